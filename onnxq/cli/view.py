"""What a finished run has to show, in plain data: the terminal, JSON and the page draw from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxq.cli.console import finite, grouped

if TYPE_CHECKING:
    from onnxq.passes.contract import Curve


@dataclass(frozen=True)
class PassView:
    """One pass of the pipeline.

    Args:
        spec: the pass as a pipeline text spells it.
        seconds: wall time.
        changed: (site, what, detail).
        skipped: (site, reason).
        notes: facts that belong to no single site.
        curves: what the pass weighed against each other.
    """

    spec: str
    seconds: float
    changed: Sequence[tuple[str, str, str]] = ()
    skipped: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    curves: Sequence[Curve] = ()

    @property
    def name(self) -> str:
        """The pass without its options."""
        return self.spec.partition("{")[0]

    def changes(self) -> list[tuple[int, str]]:
        """Equal changes counted."""
        return grouped(what for _, what, _ in self.changed)

    def reasons(self) -> list[tuple[int, str]]:
        """Equal reasons for skipping counted."""
        return grouped(reason for _, reason in self.skipped)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable data."""
        return {
            "pass": self.spec,
            "seconds": round(self.seconds, 4),
            "changed": [{"site": s, "what": w, "detail": d} for s, w, d in self.changed],
            "skipped": [{"site": s, "reason": r} for s, r in self.skipped],
            "notes": list(self.notes),
            "curves": [dataclasses.asdict(curve) for curve in self.curves],
        }


@dataclass(frozen=True)
class ErrorView:
    """How far a value is from its float self.

    Args:
        name: of the value.
        cosine: mean over samples, in [-1, 1].
        sqnr_db: signal to quantization noise in dB.
        op: operator that makes it, for inner values.
        cosine_min: least over samples, for outputs.
        samples: how many were compared, for outputs.
        flags: what is plainly broken, ``all-zero`` for example.
    """

    name: str
    cosine: float
    sqnr_db: float
    op: str = ""
    cosine_min: float | None = None
    samples: int = 0
    flags: tuple[str, ...] = ()

    @property
    def badness(self) -> tuple[bool, float]:
        """Sort key, the worst first: broken ones, then those with the least cosine."""
        broken = bool(self.flags) or math.isnan(self.cosine)
        return not broken, self.cosine if not broken else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable data."""
        return {
            "name": self.name,
            "op": self.op,
            **({"flags": list(self.flags)} if self.flags else {}),
            "cosine": finite(self.cosine),
            "sqnr_db": finite(self.sqnr_db),
        }


@dataclass(frozen=True)
class SpeedView:
    """Medians of interleaved runs, in seconds."""

    before: float
    after: float
    threads: int
    feeds: str
    is_noisy: bool = False

    @property
    def ratio(self) -> float:
        """How many times as fast the output is."""
        return self.before / self.after

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable data."""
        return {
            "before_ms": self.before * 1e3,
            "after_ms": self.after * 1e3,
            "ratio": self.ratio,
            "threads": self.threads,
            "feeds": self.feeds,
        }


@dataclass(frozen=True)
class HistogramView:
    """What calibration saw of one activation, and the range that was chosen.

    Args:
        name: of the value.
        edges: ``len(counts) + 1`` bin edges, ascending.
        counts: elements in each bin.
        lo, hi: the chosen range.
        label: format and method, for example ``uint8 mse``.
    """

    name: str
    edges: Sequence[float]
    counts: Sequence[float]
    lo: float
    hi: float
    label: str

    @property
    def clipped(self) -> float:
        """Share of the elements in bins that lie wholly outside of the range."""
        bins = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        outside = sum(c for left, right, c in bins if right <= self.lo or left >= self.hi)
        total = sum(self.counts)
        return outside / total if total else 0.0


@dataclass(frozen=True)
class CellView:
    """One operator in the drawing of precisions.

    Args:
        name: of the node.
        op: operator type, or the name of the region that it begins.
        activation: format in which it reads activations; ``float`` if it does.
        weight: format in which its constant is stored; empty without one.
        mode: ``float``, ``static``, ``dynamic`` or ``weights``.
        why: reason from the plan, if there is one.
    """

    name: str
    op: str
    activation: str
    weight: str
    mode: str
    why: str = ""


@dataclass(frozen=True)
class RunView:
    """A finished run."""

    source: str
    output: str
    pipeline: str
    target: str
    command: str
    passes: Sequence[PassView]
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: Sequence[str] = ()
    errors: Sequence[ErrorView] = ()
    speed: SpeedView | None = None
    layers: Sequence[ErrorView] = ()
    histograms: Sequence[HistogramView] = ()
    cells: Sequence[CellView] = ()
    weights_before: Mapping[str, int] = field(default_factory=dict)
    weights_after: Mapping[str, int] = field(default_factory=dict)
    weight_bits: float | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    samples: str = ""
    is_poor: bool = False
    task: str = ""

    @property
    def worst(self) -> ErrorView | None:
        """The output that is farthest from fp32."""
        return min(self.errors, key=lambda e: e.badness, default=None)

    def verdict(self) -> str:
        """One line that says it all and can be pasted into a report."""
        parts = ["POOR RESULT" if self.is_poor else "PASSED"]
        if self.worst is not None:
            parts.append(f"cosine {self.worst.cosine:.5f}, SQNR {self.worst.sqnr_db:.1f} dB")
        parts.append(f"{self.bytes_before / self.bytes_after:.2f}x smaller")
        if self.task:
            parts.append(self.task)
        if self.speed is not None:
            parts.append(f"{self.speed.ratio:.2f}x fp32 speed")
        return " | ".join((*parts, f"Command: {self.command}"))

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable data."""
        return {
            "status": "poor" if self.is_poor else "passed",
            "model": self.source,
            "output": self.output,
            "pipeline": self.pipeline,
            "target": self.target,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
            "passes": [p.to_json() for p in self.passes],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "size_ratio": self.bytes_before / self.bytes_after,
            "outputs": [e.to_json() for e in self.errors],
            "speed": None if self.speed is None else self.speed.to_json(),
            "layers": [e.to_json() for e in self.layers],
            "weight_bits": self.weight_bits,
            "task": self.task or None,
            "provenance": dict(self.provenance),
            "command": self.command,
        }
