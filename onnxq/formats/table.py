"""How well each format keeps random data: the signal-to-quantization-noise table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxq.formats.base import Float32
from onnxq.formats.parse import parse_format

SAMPLES = 1 << 20
SEED = 0
STUDENT_FREEDOM = 5

TABLE_FORMATS: tuple[str, ...] = (
    "int8",
    "fp8e2m5",
    "fp8e3m4",
    "fp8e4m3",
    "fp8e5m2",
    "mxint8",
    "mxfp8e4m3",
    "mxfp8e5m2",
    "mxfp6e2m3",
    "mxfp6e3m2",
    "mxfp4",
    "mxfp4-ceil",
    "mxfp4-even",
    "mxfp4-43",
    "mxfp4-auto",
    "mx9",
    "mx6",
    "mx4",
    "nvfp4",
    "nvfp4-46",
    "int4g128",
    "int4g32",
    "int4g32full",
    "int4g128asym",
    "int4g32asym",
    "int3g128asym",
    "int2g64asym",
    "nf4",
    "kmeans4",
    "log2",
    "logsqrt2",
    "seq2g64",
    "ternary",
    "binary",
)


@dataclass(frozen=True)
class SqnrRow:
    """One line of the table; decibels on normal, Laplace and Student-t (5 degrees) samples."""

    format: str
    bits_per_element: float
    normal: float
    laplace: float
    student_t5: float

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def sqnr_samples(samples: int = SAMPLES, seed: int = SEED) -> dict[str, Float32]:
    """The three sample sets, of unit variance, drawn in this order from one generator; float32."""
    rng = np.random.default_rng(seed)
    deviation = np.sqrt(STUDENT_FREEDOM / (STUDENT_FREEDOM - 2))
    return {
        "normal": rng.standard_normal(samples).astype(np.float32),
        "laplace": (rng.laplace(size=samples) / np.sqrt(2)).astype(np.float32),
        "student_t5": (rng.standard_t(STUDENT_FREEDOM, samples) / deviation).astype(np.float32),
    }


def sqnr_table(
    formats: tuple[str, ...] = TABLE_FORMATS, *, samples: int = SAMPLES, seed: int = SEED
) -> list[SqnrRow]:
    """SQNR of each named format, with its default granularity, on the three distributions.

    Bits per element count scales as the codecs keep them (float32 for integers).

    Raises:
        SpecError: an unknown name.
    """
    data = sqnr_samples(samples, seed)
    rows = []
    for name in formats:
        fmt = parse_format(name)
        decibels = {key: fmt.sqnr_db(x) for key, x in data.items()}
        rows.append(SqnrRow(str(fmt), fmt.bits_per_element((samples,)), **decibels))
    return rows
