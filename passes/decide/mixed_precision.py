"""``mixed-precision``: 8 bits, 16 bits or float for each activation tensor, within a budget.

The layers that read one value are a unit. What a unit does to the outputs at each precision is
measured by itself, with all other layers in float; what it costs is measured on this machine, or
counted in bytes. One precision a unit is chosen so that the damages sum up to the least within the
budget (a multiple-choice knapsack). The cure by 16 bits is Bondarenko et al.'s, arXiv 2109.12948.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import PreconditionError, QualityError, SpecError
from onnxq.formats import IntFormat, parse_format
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Curve, Pass, PassReport
from onnxq.passes.decide.calibrate import RANGE_RULE, RangeRule
from onnxq.passes.decide.kernel_cost import KernelCosts, Level
from onnxq.passes.decide.measure import Metric, PlanMeter
from onnxq.passes.decide.sensitivity import take_samples
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.plan import QuantPlan, ValuePlan
from onnxq.solvers.knapsack import choose

_WHY: Final = "mixed-precision: float"
_OPSET: Final = 21
_CURVE: Final = 12
"""Budgets for which the curve of the report is drawn."""


@dataclass(frozen=True)
class Unit:
    """Layers that read one value.

    Args:
        value: its name.
        layers: their matches.
        damage, cost: by level; damage is that of the outputs with this unit alone quantized.
    """

    value: str
    layers: tuple[Linear, ...]
    damage: Mapping[Level, float]
    cost: Mapping[Level, float]


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Choose a precision for the input of each matrix product.

    Args:
        levels: precisions to choose from; ``int8`` is the plan as it is.
        max_latency: budget: most time of the products together, in times of that with ``int8``.
        max_size: budget: most bytes of their weights, in times of those with ``int8``.
        metric: what the damage is in: ``sqnr`` (noise over signal), ``kl`` or ``perplexity``.
        rows: tokens of the products that are timed.
        samples: to run; a unit costs one run of each for each integer level.
        costs: file that keeps measured times, for later runs to decide the same; empty for none.
    """

    name: ClassVar[str] = "mixed-precision"
    summary: ClassVar[str] = "int8, int16 or float for each activation tensor within a budget"
    requires: ClassVar = (PLAN, STATISTICS, RANGE_RULE)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True

    levels: tuple[Level, ...] = ("int8", "int16", "float")
    max_latency: float | None = None
    max_size: float | None = None
    metric: Metric = "sqnr"
    rows: int = 128
    samples: int = 4
    costs: str = ""

    def __post_init__(self) -> None:
        if (self.max_latency is None) == (self.max_size is None):
            raise SpecError(
                "SPEC-EMPTY",
                "`mixed-precision` needs exactly one of max-latency, max-size",
                "for example mixed-precision{max-latency=1.2}",
            )
        if "int8" not in self.levels or len(set(self.levels)) < 2:
            raise SpecError("SPEC-COMBINATION", "levels has int8 and at least one more", "")
        if self.samples < 1 or self.rows < 1:
            raise SpecError("SPEC-RANGE", "samples and rows are at least 1")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Ranges for 16 bits."""
        return [StatRequest(str(x.x.name), "range") for x in analyze(model).linears]

    def candidates(self, model: ir.Model) -> list[str]:
        """Values that matrix products read."""
        linears = analyze(model).linears
        return list(dict.fromkeys(str(x.x.name) for x in linears if x.kind != "conv"))

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Measure all units, choose, and change the plan.

        Raises:
            PreconditionError: ``PASS-OPSET``: 16 bits need opset 21.
            QualityError: ``QUALITY-BUDGET``: even the cheapest choice costs more.
        """
        opset = model.opset_imports.get("", 0)
        if "int16" in self.levels and opset < _OPSET:
            raise PreconditionError(
                "PASS-OPSET",
                f"`mixed-precision`: 16-bit activations need opset {_OPSET}; the model has {opset}",
                f"put `canonicalize{{opset={_OPSET}}}` first, or leave int16 out of levels",
            )
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        groups = self._groups(model, plan, report)
        wide = self._wide_values(list(groups), plan, ctx)
        units = self._measure(model, plan, groups, wide, ctx)
        if not units:
            report.skip("the plan", "has no product with a static range")
            return report
        chosen = self._choose(units)
        for unit, level in zip(units, chosen, strict=True):
            self._apply(plan, unit, level, wide)
            detail = f"damage {unit.damage['int8']:.3g} as int8, {unit.damage[level]:.3g} now"
            if level != "int8":
                report.change(unit.value, level, detail)
        if not report.changed:
            report.change("all values", "stay int8", "nothing better is within the budget")
        report.note(self._outcome(units, chosen))
        report.curves.append(self._curve(units, chosen))
        ctx.artifacts.put(PLAN, plan)
        return report

    def _groups(
        self, model: ir.Model, plan: QuantPlan, report: PassReport
    ) -> dict[str, list[Linear]]:
        """Planned products by the value that they read."""
        found: dict[str, list[Linear]] = {}
        for linear in analyze(model).linears:
            site = plan.sites.get(linear.name)
            if site is None:
                report.skip(linear.name, "it is not in the plan")
            elif linear.kind == "conv" or site.output:
                report.skip(linear.name, "a Conv's input and output share integer kernels")
            elif site.mode != "static" or site.parts:
                report.skip(linear.name, "it has no static range of its own")
            else:
                found.setdefault(site.inputs[0], []).append(linear)
        return found

    def _wide_values(
        self, values: Sequence[str], plan: QuantPlan, ctx: Context
    ) -> dict[str, ValuePlan]:
        """The plan of each value in 16 bits, at the range that suits so many codes."""
        rule: RangeRule = ctx.artifacts.get(RANGE_RULE)
        statistics: Statistics = ctx.artifacts.get(STATISTICS)
        found = {}
        for name in values:
            old = plan.values[name]
            fmt = parse_format("int16" if old.symmetric else "uint16")
            assert isinstance(fmt, IntFormat)
            lo, hi = rule.range_of(statistics, name, fmt, symmetric=old.symmetric)
            found[name] = dataclasses.replace(old, format=str(fmt), lo=lo, hi=hi)
        return found

    def _measure(
        self,
        model: ir.Model,
        plan: QuantPlan,
        groups: Mapping[str, list[Linear]],
        wide: Mapping[str, ValuePlan],
        ctx: Context,
    ) -> list[Unit]:
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else None
        samples = take_samples(ctx, self.samples)
        costs = KernelCosts(self.rows, self.costs)
        units = []
        with PlanMeter(model, ctx, samples, self.metric, rounded) as meter:
            for number, (value, layers) in enumerate(groups.items()):
                ctx.progress(self.name, number, len(groups))
                sites = {layer.name: plan.sites[layer.name] for layer in layers}
                damage: dict[Level, float] = {"float": 0.0}
                for level in self.levels:
                    if level != "float":
                        planned = plan.values[value] if level == "int8" else wide[value]
                        alone = QuantPlan({value: planned}, dict(sites))
                        damage[level] = max(0.0, meter.measure(alone).badness(self.metric))
                units.append(Unit(value, tuple(layers), damage, self._costs(layers, costs)))
        return units

    def _costs(self, layers: Sequence[Linear], costs: KernelCosts) -> dict[Level, float]:
        """Seconds or bytes of some layers by level."""
        found: dict[Level, float] = dict.fromkeys(self.levels, 0.0)
        for layer in layers:
            k, n = layer.in_features, layer.out_features
            seconds = costs.of(k, n, self.levels) if self.max_latency is not None else {}
            for level in self.levels:
                count = 4 * k * n if level == "float" else k * n + 4 * n
                found[level] += seconds.get(level, 0.0) if seconds else count
        return found

    @property
    def _limit(self) -> float:
        limit = self.max_latency if self.max_latency is not None else self.max_size
        assert limit is not None
        return limit

    @property
    def _what(self) -> str:
        return "time" if self.max_latency is not None else "size"

    def _solve(self, units: Sequence[Unit], limit: float) -> list[Level] | None:
        options = [[(u.cost[level], u.damage[level]) for level in self.levels] for u in units]
        chosen = choose(options, limit * _total(units, ["int8"] * len(units)))
        return None if chosen is None else [self.levels[i] for i in chosen]

    def _choose(self, units: Sequence[Unit]) -> list[Level]:
        chosen = self._solve(units, self._limit)
        if chosen is not None:
            return chosen
        least = [min(self.levels, key=lambda level, u=u: u.cost[level]) for u in units]  # type: ignore[misc]
        best = _total(units, least) / _total(units, ["int8"] * len(units))
        raise QualityError(
            "QUALITY-BUDGET",
            f"mixed-precision: the cheapest choice takes {best:.3g} times the {self._what} of "
            f"int8, {best - self._limit:.3g} above {self._limit:g}",
            "relax the budget; 1 is int8 everywhere",
            best=best,
            distance=best - self._limit,
        )

    def _apply(
        self, plan: QuantPlan, unit: Unit, level: Level, wide: Mapping[str, ValuePlan]
    ) -> None:
        for layer in unit.layers:
            if level == "float":
                plan.leave_float(layer.name, _WHY)
            elif level == "int16":
                plan.add(dataclasses.replace(plan.sites[layer.name], by=self.name))
        if level == "int16":
            plan.values[unit.value] = wide[unit.value]

    def _outcome(self, units: Sequence[Unit], chosen: Sequence[Level]) -> str:
        plain: list[Level] = ["int8"] * len(units)
        ratio = _total(units, chosen) / _total(units, plain)
        counts = ", ".join(f"{chosen.count(x)} {x}" for x in self.levels if x in chosen)
        return (
            f"{counts}; {ratio:.3f} times the {self._what} of int8; sum of damages "
            f"{_damage(units, plain):.3g} as int8, {_damage(units, chosen):.3g} now"
        )

    def _curve(self, units: Sequence[Unit], chosen: Sequence[Level]) -> Curve:
        """What other budgets would give."""
        whole = _total(units, ["int8"] * len(units))
        most = max(self._limit, max(sum(u.cost[x] for u in units) / whole for x in self.levels))
        least = min(1.0, self._limit)
        points: dict[tuple[float, float], str] = {}
        for step in range(_CURVE + 1):
            found = self._solve(units, least + (most - least) * step / _CURVE)
            if found is not None:
                at = (_total(units, found) / whole, _damage(units, found))
                points[at] = f"{len(units) - found.count('int8')} values above int8"
        here = (_total(units, chosen) / whole, _damage(units, chosen))
        points.setdefault(here, "chosen")
        return Curve(
            f"Damage against {self._what}",
            f"{self._what} of the matrix products, times int8",
            f"sum of damages ({self.metric})",
            tuple((x, y, what) for (x, y), what in sorted(points.items())),
            here,
        )


def _total(units: Sequence[Unit], levels: Sequence[Level]) -> float:
    return math.fsum(unit.cost[level] for unit, level in zip(units, levels, strict=True))


def _damage(units: Sequence[Unit], levels: Sequence[Level]) -> float:
    return math.fsum(unit.damage[level] for unit, level in zip(units, levels, strict=True))
