"""The plan: which value gets which number format, decided before anything is performed.

Deciding passes write :class:`QuantPlan`; only the passes in ``lower/`` read it and edit the graph.
The plan has two sides. A :class:`ValuePlan` says how one activation is quantized; a
:class:`SitePlan` says which node computes on quantized inputs, how its weight is stored and
whether its output is quantized at once. A value can be quantized for one reader and stay float
for another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

Mode = Literal["static", "dynamic", "per-token", "weight-only"]
WeightMethod = Literal["minmax", "mse"]
ANY_WEIGHT: Final = ("weight-only", "per-token")
"""Modes whose weights may have any format, in blocks: the product itself is in float."""
CACHE: Final = " keys and values"
"""Behind the name of an attention, the site of kind ``cache``: what it reads of other tokens."""
SiteKind = Literal["matmul", "gemm", "conv", "embedding", "op", "cache"]


@dataclass(frozen=True)
class ValuePlan:
    """How one activation is quantized, per tensor.

    Args:
        format: integer format, for example ``uint8``.
        symmetric: the zero point lies in the middle of the code range.
        lo, hi: float range that the codes cover.
        method: how the range was chosen, for the report.
        same_as: name of a value whose scale and zero point this one shares, because only
            order-preserving operators lie between them.
    """

    format: str
    lo: float
    hi: float
    symmetric: bool = False
    method: str = "minmax"
    same_as: str | None = None


@dataclass(frozen=True)
class ActivationPlan:
    """How one product's input is rounded at run time, by itself for each token or block.

    Args:
        format: with its block, for example ``int8``, ``int4g32``, ``mxfp4``.
        clip: share of the largest magnitude that the codes reach.
    """

    format: str
    clip: float = 1.0


@dataclass(frozen=True)
class WeightPlan:
    """How one constant weight is stored.

    Args:
        format: for example ``int8`` or ``int4``; any format where activations stay float.
        symmetric: the zero point lies in the middle of the code range.
        per_channel: one scale an output channel (or table row) instead of one in all.
        block: elements along the reduction axis that share a scale; 0 for none.
        method: how scales are chosen, ``minmax`` or ``mse``.
        same_as: site of the layer whose codes an embedding table reads; empty for its own.
    """

    format: str
    symmetric: bool = True
    per_channel: bool = True
    block: int = 0
    method: WeightMethod = "minmax"
    same_as: str = ""


@dataclass(frozen=True)
class InputPart:
    """Columns of a product's input that are treated alike, apart from the others.

    Args:
        columns: indices along K, each in one part of the site.
        format: integer format, or ``float`` for columns that are multiplied in float.
        lo, hi: float range that the codes cover in static mode; 0 otherwise.
        symmetric: the zero point lies in the middle of the code range.
    """

    columns: tuple[int, ...]
    format: str
    lo: float = 0.0
    hi: float = 0.0
    symmetric: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the columns are multiplied in float."""
        return self.format == "float"


@dataclass(frozen=True)
class SitePlan:
    """One node that will compute on quantized inputs.

    Args:
        site: the node's name, as globs see it.
        kind: what it is.
        mode: how its activations are quantized, if they are.
        inputs: names of the values that it reads quantized (static mode).
        output: name of the value that is quantized right after it; empty if it stays float.
        weight: how its constant is stored; None for operators without one.
        activation: how its input is rounded at run time (mode ``per-token``).
        parts: how its input is split by columns; empty where it is not.
        by: the pass that decided.
        why: its reason, in a few words.
    """

    site: str
    kind: SiteKind
    mode: Mode
    inputs: tuple[str, ...] = ()
    output: str = ""
    weight: WeightPlan | None = None
    activation: ActivationPlan | None = None
    parts: tuple[InputPart, ...] = ()
    by: str = ""
    why: str = ""


@dataclass
class QuantPlan:
    """All decisions: by value, by site, and the sites left in float with the reason."""

    values: dict[str, ValuePlan] = field(default_factory=dict)
    sites: dict[str, SitePlan] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def add(self, site: SitePlan) -> None:
        """Decide for ``site``; a later decision replaces an earlier one."""
        self.floats.pop(site.site, None)
        self.sites[site.site] = site

    def leave_float(self, site: str, reason: str) -> None:
        """Decide that ``site`` stays in float."""
        self.sites.pop(site, None)
        self.floats[site] = reason

    def used_values(self) -> set[str]:
        """Names of the values that some site of the plan reads or writes quantized."""
        used: set[str] = set()
        for site in self.sites.values():
            used.update(site.inputs)
            if site.output:
                used.add(site.output)
        return used

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The plan as JSON; it holds no arrays."""
        header = {
            "values": {name: dataclasses.asdict(v) for name, v in self.values.items()},
            "sites": [dataclasses.asdict(s) for s in self.sites.values()],
            "floats": self.floats,
        }
        return header, {}

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> QuantPlan:
        """The inverse of :meth:`to_storage`."""
        plan = cls(
            values={name: ValuePlan(**raw) for name, raw in header["values"].items()},
            floats=dict(header["floats"]),
        )
        for raw in header["sites"]:
            weight, activation = raw["weight"], raw["activation"]
            plan.sites[raw["site"]] = SitePlan(
                **{
                    **raw,
                    "inputs": tuple(raw["inputs"]),
                    "parts": tuple(
                        InputPart(**{**part, "columns": tuple(part["columns"])})
                        for part in raw["parts"]
                    ),
                    "weight": None if weight is None else WeightPlan(**weight),
                    "activation": None if activation is None else ActivationPlan(**activation),
                }
            )
        return plan
