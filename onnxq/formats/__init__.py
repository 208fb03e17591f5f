"""Number formats: how reals become codes, and codes bytes. No graphs here.

>>> from onnxq.formats import parse_format
>>> fmt = parse_format("int4g32")
"""

from __future__ import annotations

from onnxq.formats.base import Format, Params
from onnxq.formats.granularity import Granularity, Groups
from onnxq.formats.integer import IntFormat, affine_params, dequantize, quantize

__all__ = [
    "Format",
    "Granularity",
    "Groups",
    "IntFormat",
    "Params",
    "affine_params",
    "dequantize",
    "quantize",
]
