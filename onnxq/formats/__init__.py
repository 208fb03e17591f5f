"""Number formats: how reals become codes, and codes bytes. No graphs here.

>>> from onnxq.formats import parse_format
>>> fmt = parse_format("int4g32")
>>> fmt.bits_per_element((4096, 4096))
5.0
"""

from __future__ import annotations

from onnxq.formats.base import Format, Params
from onnxq.formats.bdr import BdrFormat
from onnxq.formats.codebook import KMeansFormat, Nf4Format
from onnxq.formats.granularity import Granularity, Groups
from onnxq.formats.integer import IntFormat, affine_params, dequantize, quantize
from onnxq.formats.logarithmic import LogFormat
from onnxq.formats.lowbit import BinaryFormat, Seq2Format, TernaryFormat
from onnxq.formats.minifloat import NAMED_FLOATS, MiniFloat, search_minifloat
from onnxq.formats.mx import MxFormat
from onnxq.formats.nvfp4 import NvFp4Format
from onnxq.formats.parse import format_names, parse_format

__all__ = [
    "NAMED_FLOATS",
    "BdrFormat",
    "BinaryFormat",
    "Format",
    "Granularity",
    "Groups",
    "IntFormat",
    "KMeansFormat",
    "LogFormat",
    "MiniFloat",
    "MxFormat",
    "Nf4Format",
    "NvFp4Format",
    "Params",
    "Seq2Format",
    "TernaryFormat",
    "affine_params",
    "dequantize",
    "format_names",
    "parse_format",
    "quantize",
    "search_minifloat",
]
