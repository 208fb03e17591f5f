"""The goals of docs/cuda.md, and what a run of ``cuda.py`` says of each. Plain arithmetic on rows.

A row is one object of ``cuda.py --json``: case, M, K, N, ``ours`` and ``peer`` in microseconds,
``peer_name``, ``ratio`` (peer / ours), ``gbps`` and ``stored`` (bytes of the weight).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

BEGIN, END = "<!-- cuda: begin -->\n", "<!-- cuda: end -->\n"
BANDWIDTH = 4800.0
"""GB/s of an H200."""
LARGE = 16e6
"""Bytes of a weight from which the goal for GEMVs holds."""
W4 = ("int4_g128", "int4_g32")
CUBLAS = "cuBLAS fp16"
FP8_ALONE = "cuBLASLt FP8, scales of 1"
BF16 = "cuBLAS bf16"
ORT_FP8 = "ort MatMulBlockQuantizedFp8Weight"
ORT_NBITS = "ort MatMulNBits"
COPY = "copy of the same bytes"


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Args:
        text: what is compared.
        bound: the least figure that meets it.
        figure: a row's figure, or None where the goal is not about the row.
    """

    text: str
    bound: float
    figure: Callable[[Row], float | None]

    def worst(self, rows: Iterable[Row]) -> tuple[float, Row] | None:
        """The least figure and its row; None when nothing was measured."""
        found = [(value, row) for row in rows if (value := self.figure(row)) is not None]
        return min(found, key=lambda pair: pair[0]) if found else None


def _ratio(
    cases: Sequence[str], peer: str, low: int = 1, high: int = 1 << 30, *, large: bool = False
) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        fits = row["case"] in cases and row["peer_name"] == peer and low <= row["M"] <= high
        if not fits or (large and row.get("stored", 0) < LARGE):
            return None
        return float(row["ratio"])

    return figure


def _bandwidth(row: Row) -> float | None:
    cases = ("fp8", *W4)
    fits = row["case"] in cases and row["M"] <= 8 and row["peer_name"] == CUBLAS
    return row["gbps"] / BANDWIDTH if fits and row.get("stored", 0) >= LARGE else None


GOALS = (
    Goal("FP8 and W4A16 GEMV, M <= 8, weights >= 16 MB: share of 4.8 TB/s", 0.65, _bandwidth),
    Goal("FP8 GEMV, M <= 8, against ORT's FP8 operator", 0.95,
         _ratio(("fp8",), ORT_FP8, high=8, large=True)),
    Goal("W4A16, M = 1..16, against cuBLAS fp16", 2.5, _ratio(W4, CUBLAS, 1, 16)),
    Goal("W4A16, M = 32..64, against cuBLAS fp16", 1.5, _ratio(W4, CUBLAS, 32, 64)),
    Goal("W4A16, M = 16..128, against ORT's MatMulNBits", 1.2, _ratio(W4, ORT_NBITS, 16, 128)),
    Goal("FP8 per token x per channel, M >= 256, against cuBLASLt alone", 0.95,
         _ratio(("fp8 x fp8",), FP8_ALONE, 256)),
    Goal("the same, rows quantized on the way", 0.95,
         _ratio(("fp8 rows x fp8",), FP8_ALONE, 256)),
    Goal("the same against ORT's default FP8 path", 1.4,
         _ratio(("fp8 rows x fp8",), ORT_FP8, 256)),
    Goal("FP8 128-block scales, M >= 1024, against per-tensor cuBLASLt", 0.8,
         _ratio(("fp8 128-block",), FP8_ALONE, 1024)),
    Goal("the same against bf16", 1.0, _ratio(("fp8 128-block",), BF16, 1024)),
    Goal("the same against bf16, rows quantized on the way", 1.0,
         _ratio(("fp8 rows x fp8 128-block",), BF16, 1024)),
    Goal("MXFP4 weight-only, M <= 64, against our INT4", 0.9,
         _ratio(("mxfp4_g32",), "our int4_g32", 1, 64)),
    Goal("Hadamard (<= 8192) + INT8, against a copy of the same bytes", 1 / 1.3,
         _ratio(("hadamard+int8",), COPY)),
)  # fmt: skip


def table(rows: Sequence[Row], device: str) -> str:
    """The goals in Markdown, each with the worst figure and where it was; "not yet" without one."""
    lines = [
        f"Measured on: {device}.",
        "",
        "| | goal | worst measured | at |",
        "|---|---|---|---|",
    ]
    for goal in GOALS:
        worst = goal.worst(rows)
        shown, where = "not yet", ""
        if worst is not None:
            value, row = worst
            shown = f"{value:.2f} ({'met' if value >= goal.bound else 'missed'})"
            where = f"{row['case']}, M {row['M']}, K {row['K']}, N {row['N']}"
        lines.append(f"| {goal.text} | >= {goal.bound:.2f} | {shown} | {where} |")
    return "\n".join(lines) + "\n"


def write_table(page: Path, text: str) -> None:
    """Put the table between its markers in a page."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    found, count = pattern.subn(lambda _: BEGIN + text + END, page.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{page} has no place for the table: {BEGIN.strip()}")
    page.write_text(found, encoding="utf-8")
