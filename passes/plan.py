"""The plan: which value gets which number format, decided before anything is performed.

Deciding passes write :class:`QuantPlan`; only the passes in ``lower/`` read it and edit the graph.
An entry names a *site* (a linear layer, an embedding) and what happens to its weight and to the
activation that it reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Mode = Literal["static", "dynamic", "weight-only"]


@dataclass(frozen=True)
class ActivationSpec:
    """How one activation is quantized, per tensor.

    Args:
        format: number format, for example ``uint8``.
        symmetric: the zero point lies in the middle of the code range.
        lo, hi: float range that the codes cover; None until ranges are chosen, and for
            activations that are quantized at run time.
        method: how the range was chosen, for the report.
    """

    format: str
    symmetric: bool = False
    lo: float | None = None
    hi: float | None = None
    method: str = ""


@dataclass(frozen=True)
class WeightSpec:
    """How one constant weight is quantized.

    Args:
        format: number format, for example ``int8`` or ``int4``.
        symmetric: zero point 0 (signed) or in the middle (unsigned).
        axis: axis of the stored tensor with one scale an index, or None for per tensor.
        block: size of the blocks along the reduction axis that share a scale, or None.
        method: how the range was chosen, for the report.
    """

    format: str
    symmetric: bool = True
    axis: int | None = None
    block: int | None = None
    method: str = "minmax"


@dataclass(frozen=True)
class Entry:
    """One site of the plan.

    Args:
        site: name of the layer, as globs see it.
        kind: ``linear``, ``conv`` or ``embedding``.
        mode: static Q/DQ, activation quantized at run time, or weights only.
        activation: name of the value that the site reads; empty for embeddings.
    """

    site: str
    kind: Literal["matmul", "gemm", "conv", "embedding"]
    mode: Mode
    weight: WeightSpec
    activation: str = ""
    activation_spec: ActivationSpec | None = None
    by: str = ""
    why: str = ""


@dataclass
class QuantPlan:
    """All decisions, by site, and the sites left in float with the reason."""

    entries: dict[str, Entry] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Decide for ``entry.site``; a later decision replaces an earlier one."""
        self.floats.pop(entry.site, None)
        self.entries[entry.site] = entry

    def leave_float(self, site: str, reason: str) -> None:
        """Decide that ``site`` stays in float."""
        self.entries.pop(site, None)
        self.floats[site] = reason

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The plan as JSON; it holds no arrays."""
        return {
            "entries": [dataclasses.asdict(e) for e in self.entries.values()],
            "floats": self.floats,
        }, {}

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> QuantPlan:
        """The inverse of :meth:`to_storage`."""
        plan = cls(floats=dict(header["floats"]))
        for raw in header["entries"]:
            spec = raw.pop("activation_spec")
            weight = WeightSpec(**raw.pop("weight"))
            activation = None if spec is None else ActivationSpec(**spec)
            plan.add(Entry(weight=weight, activation_spec=activation, **raw))
        return plan
