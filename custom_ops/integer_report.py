"""What the proof of an integer-only model finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One integer operator.

    Args:
        node: its name.
        op: its type.
        dtype: of its first output.
        scale: worth of a step of the output; None where nobody wrote it down.
        lo, hi: what the output can hold.
        accumulator: the largest magnitude of its sum of products, or of its sum with a bias.
    """

    node: str
    op: str
    dtype: str
    scale: float | None
    lo: int
    hi: int
    accumulator: int | None


@dataclass
class IntegerReport:
    """What the proof found."""

    rows: list[Row] = field(default_factory=list)
    quantize: int = 0
    dequantize: int = 0

    @property
    def worst(self) -> Row | None:
        """The operator whose sum can come closest to overflowing."""
        sums = [row for row in self.rows if row.accumulator is not None]
        return max(sums, key=lambda row: row.accumulator or 0, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        worst = self.worst
        return {
            "integer_only": True,
            "quantize": self.quantize,
            "dequantize": self.dequantize,
            "operators": [vars(row) for row in self.rows],
            "worst_accumulator": None if worst is None else vars(worst),
        }
