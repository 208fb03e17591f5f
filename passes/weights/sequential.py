"""``sequential``: round layer after layer, each on what the rounded layers before it hand on.

The model is cut into stages (:mod:`onnxq.passes.weights.segments`); the calibration samples go
through it once, a stage at a time, with the weights rounded so far. So a layer's second moments
are those of the inputs that it will meet, and only one stage's weights and one sample's activations
are in memory. ``gptaq``, ``qronos`` and ``gpfq`` also run the float model beside it and undo the
error of the inputs (arXiv 2504.02692, 2505.11695, 2201.11113).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxq.errors import DataError, InternalError, SpecError
from onnxq.formats import Format, Params
from onnxq.graph import io
from onnxq.graph.atomic import reported, temporary_for
from onnxq.graph.match import Linear, analyze
from onnxq.graph.match.values import value_name
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.lower.weights import rows_of, weight_as_read
from onnxq.passes.plan import ActivationPlan
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.passes.weights.rounding import Array, format_of, searched_scales
from onnxq.passes.weights.segments import Stage, cut, stage_model
from onnxq.passes.weights.stream import (
    MomentTask,
    StageTask,
    Stream,
    rounded_name,
    run_stage,
    sum_moments,
)
from onnxq.passes.weights.tasks import LayerTask, Moments, round_layer, round_task
from onnxq.passes.work import WeightRef, run_tasks
from onnxq.solvers.gpfq import gpfq
from onnxq.solvers.gptaq import gptaq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.grid import Solution
from onnxq.solvers.qronos import qronos
from onnxq.solvers.refine import refine
from onnxq.solvers.scale_search import opt_rtn

Solver = Literal["gptq", "gptaq", "qronos", "gpfq", "opt-rtn"]

SAMPLES_PER_TASK = 4

_TWO_STREAMS = ("gptaq", "qronos", "gpfq")


@dataclass(frozen=True)
class Sequential(Pass):
    """Round the planned weights in the order in which they run.

    Args:
        solver: how each layer is rounded.
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
        act_order: round the columns with the largest activations first.
        alpha: share of the inputs' error that ``gptaq`` undoes.
        sweeps: times that each layer is gone over again afterwards (:mod:`onnxq.solvers.refine`);
            not for ``opt-rtn``.
        round_inputs: where layers round their input at run time (mode ``per-token``), round on such
            inputs, and make up for their error too.
        token_cap: tokens whose input has more than this many times the median energy of their
            sample are scaled down to it; 0 for none.
        cache: folder in which finished stages are kept; a run with the same model, data and plan
            goes on behind the last of them.
    """

    name: ClassVar[str] = "sequential"
    summary: ClassVar[str] = "round layer by layer on activations of the layers rounded before"
    requires: ClassVar = (PLAN,)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True

    solver: Solver = "gptq"
    damping: float = 0.01
    act_order: bool = True
    alpha: float = 0.25
    sweeps: int = 0
    round_inputs: bool = True
    token_cap: float = 0.0
    cache: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise SpecError("SPEC-RANGE", f"damping={self.damping} is not above 0 and at most 1")
        if not 0.0 <= self.alpha <= 1.0:
            raise SpecError("SPEC-RANGE", f"alpha={self.alpha} is not between 0 and 1")
        if self.sweeps < 0 or self.token_cap < 0:
            raise SpecError(
                "SPEC-RANGE", f"sweeps={self.sweeps} token-cap={self.token_cap}: below 0"
            )

    def candidates(self, model: ir.Model) -> list[str]:
        """MatMul and Gemm layers."""
        return [layer.name for layer in analyze(model).linears if layer.kind != "conv"]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Cut, and go through the stages."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        layers = []
        for layer in analyze(model).linears:
            site = plan.sites.get(layer.name)
            if site is None:
                continue
            if layer.kind == "conv" or site.weight is None:
                report.skip(layer.name, "Conv is rounded to nearest")
                continue
            layers.append(layer)
            if rounded.get(layer.name) is not None:
                report.skip(layer.name, "rounded by an earlier pass; its codes are kept")
        if ctx.data is None:
            raise InternalError("PASS-DATA", "`sequential` was run without samples")
        with self._folder(model, ctx) as folder:
            walk = _Walk(self, model, ctx, layers, rounded, Path(folder), report)
            walk.run()
        ctx.artifacts.put(ROUNDED, rounded)
        return report

    def _folder(self, model: ir.Model, ctx: Context) -> AbstractContextManager[str]:
        if not self.cache:
            return tempfile.TemporaryDirectory(prefix="onnxq-sequential-")
        assert ctx.data is not None
        facts = {
            "model": io.fingerprint(model),
            "data": ctx.data.digest(),
            "plan": ctx.artifacts.get(PLAN).to_storage()[0],
            "options": {k: v for k, v in vars(self).items() if k != "cache"},
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        folder = Path(self.cache) / key
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return nullcontext(str(folder))

    def round_rows(self, rows: Array, moments: Moments | None, fmt: Format, group: int) -> Solution:
        """Codes and scales for one layer, ``rows [N, K]``."""
        assert moments is not None
        gram, cross = moments.gram, moments.cross
        if self.solver == "opt-rtn":
            return opt_rtn(rows, fmt, group=group, importance=np.diag(gram).astype(np.float32))
        params = searched_scales(rows, gram, fmt, group)
        mismatch = None if cross is None else cross - gram
        found, alpha = self._first(rows, gram, mismatch, fmt, group, params)
        return refine(
            rows, gram, found, D=mismatch, alpha=alpha, damp=self.damping, sweeps=self.sweeps
        )

    def _first(
        self,
        rows: Array,
        gram: Array,
        mismatch: Array | None,
        fmt: Format,
        group: int,
        params: Params,
    ) -> tuple[Solution, float]:
        """The solver's result, and the share of the inputs' error that it undoes."""
        order, damp = self.act_order, self.damping
        cross = None if mismatch is None else gram + mismatch
        if self.solver == "gpfq":
            return gpfq(rows, gram, fmt, G=cross, group=group, params=params), 1.0
        if self.solver == "qronos":
            return qronos(
                rows, gram, fmt, G=cross, group=group, act_order=order, params=params, damp=damp
            ), 1.0
        if self.solver == "gptaq":
            assert mismatch is not None
            return gptaq(
                rows, gram, mismatch, fmt, group=group, alpha=self.alpha, act_order=order,
                params=params, damp=damp,
            ), self.alpha  # fmt: skip
        return gptq(rows, gram, fmt, group=group, act_order=order, params=params, damp=damp), 0.0


class _Walk:
    """One run through all stages."""

    def __init__(
        self,
        owner: Sequential,
        model: ir.Model,
        ctx: Context,
        layers: Sequence[Linear],
        rounded: RoundedWeights,
        folder: Path,
        report: PassReport,
    ) -> None:
        assert ctx.data is not None
        self._owner, self._model, self._ctx = owner, model, ctx
        self._layers = {layer.node: layer for layer in layers}
        self._stages = cut(model.graph, layers)
        self._rounded, self._report, self._folder = rounded, report, folder
        self._plan = ctx.artifacts.get(PLAN)
        self._data = ctx.data
        self._samples = len(ctx.data)
        self._given = set(rounded)
        self._rounding = self._planned_rounding() if owner.round_inputs else {}
        streams = ["rounded", *(["float"] if owner.solver in _TWO_STREAMS else [])]
        self._streams = {name: Stream(folder / name) for name in streams}

    def run(self) -> None:
        first = self._resume()
        if first == 0:
            self._feed()
        done = sum(len(stage.layers) for stage in self._stages[:first])
        for number, stage in enumerate(self._stages[first:], start=first):
            self._ctx.progress(self._owner.name, done, len(self._layers))
            for name in self._streams:
                self._advance(stage, name)
            new = self._round(stage)
            self._finish(number, stage, new)
            done += len(stage.layers)
        self._ctx.progress(self._owner.name, done, len(self._layers))

    def _planned_rounding(self) -> dict[ir.Node, tuple[str, ActivationPlan]]:
        """For layers that round their input at run time, its name and how."""
        found = {}
        for node, layer in self._layers.items():
            activation = self._plan.sites[layer.name].activation
            if activation is not None:
                found[node] = (value_name(layer.x), activation)
        return found

    def _met(self, layer: Linear) -> str:
        """Name in the rounded stream of what ``layer`` multiplies."""
        rounding = self._rounding.get(layer.node)
        return value_name(layer.x) if rounding is None else rounded_name(*rounding)

    def _feed(self) -> None:
        """Put the model's inputs into the streams."""
        wanted = {value_name(v) for stage in self._stages for v in stage.inputs}
        wanted |= {value_name(layer.x) for layer in self._layers.values()}
        for sample, feeds in enumerate(self._data):
            for stream in self._streams.values():
                stream.put(sample, {n: a for n, a in feeds.items() if n in wanted})
            self._streams["rounded"].put_rounded(sample, feeds, self._kinds(self._layers.values()))

    def _kinds(self, layers: Iterable[Linear]) -> list[tuple[str, ActivationPlan]]:
        """The ways in which ``layers`` round their inputs, each once."""
        found = (self._rounding[layer.node] for layer in layers if layer.node in self._rounding)
        return list(dict.fromkeys(found))

    def _advance(self, stage: Stage, name: str) -> None:
        """Compute the outputs of ``stage`` for all samples."""
        if not stage.nodes:
            return
        stream = self._streams[name]
        is_float = name == "float"
        renamed = {} if is_float else self._renamed(stage)
        names = [value_name(v) for v in stage.inputs]
        names += [new for each in renamed.values() for new in each.values()]
        types = {n: stream.get(0, n).dtype for n in dict.fromkeys(names)}
        weights = {} if is_float else self._weights(stage)
        proto = stage_model(self._model, stage, types, weights, renamed)
        path = self._folder / "stage.onnx"
        path.write_bytes(proto.SerializeToString())
        inputs = tuple(i.name for i in proto.graph.input)
        outputs = tuple(o.name for o in proto.graph.output)
        rounding = () if is_float else tuple(self._kinds(stage.layers))
        tasks = [
            StageTask(str(path), str(stream.folder), inputs, outputs, part, threads, rounding)
            for part, threads in self._parts()
        ]
        for _ in run_tasks(self._ctx.executor, run_stage, tasks):
            pass
        path.unlink()

    def _renamed(self, stage: Stage) -> dict[ir.Node, dict[str, str]]:
        """What the layers of ``stage`` read in place of inputs that they round."""
        found = {}
        for node in stage.nodes:
            rounding = self._rounding.get(node)
            if rounding is not None:
                found[node] = {rounding[0]: rounded_name(*rounding)}
        return found

    def _parts(self) -> list[tuple[range, int]]:
        """Samples for one task each, and the threads that it may use."""
        if self._ctx.executor is None:
            return [(range(self._samples), self._ctx.threads)]
        starts = range(0, self._samples, SAMPLES_PER_TASK)
        return [(range(i, min(i + SAMPLES_PER_TASK, self._samples)), 1) for i in starts]

    def _weights(self, stage: Stage) -> dict[ir.Node, tuple[int, Array]]:
        """What the rounded layers of ``stage`` multiply by."""
        found = {}
        for node in stage.nodes:
            layer = self._layers.get(node)
            weight = None if layer is None else self._rounded.get(layer.name)
            if layer is not None and weight is not None:
                _, in_axis, _ = weight_as_read(layer)
                values = weight.values()
                found[node] = (
                    layer.weight_index,
                    values if in_axis == 1 else np.ascontiguousarray(values.T),
                )
        return found

    def _round(self, stage: Stage) -> RoundedWeights:
        """Round the layers of ``stage``, each by itself."""
        layers = [layer for layer in stage.layers if layer.name not in self._given]
        moments: dict[str, Moments] = {}
        for layer in layers:
            met = self._met(layer)
            if met not in moments:
                moments[met] = self._moments(value_name(layer.x), met)
        new = RoundedWeights()
        for layer, (weight, detail) in zip(layers, self._solved(layers, moments), strict=True):
            new.add(layer.name, weight)
            self._report.change(layer.name, "rounded", detail)
        return new

    def _solved(
        self, layers: Sequence[Linear], moments: Mapping[str, Moments]
    ) -> Iterator[tuple[RoundedWeight, str]]:
        executor = self._ctx.executor
        settings = []
        for layer in layers:
            site = self._plan.sites[layer.name]
            assert site.weight is not None
            settings.append((format_of(site, site.weight, self._ctx), site.weight.block))
        if executor is None:
            for layer, (fmt, group) in zip(layers, settings, strict=True):
                found = moments[self._met(layer)]
                yield round_layer(self._owner, layer.name, rows_of(layer), found, fmt, group)
            return
        paths = {
            x: found.save(self._folder / f"moments-{number}")
            for number, (x, found) in enumerate(moments.items())
        }
        tasks = [
            LayerTask(
                self._owner,
                layer.name,
                WeightRef.of(layer, self._folder, number),
                paths[self._met(layer)],
                fmt,
                group,
            )
            for number, (layer, (fmt, group)) in enumerate(zip(layers, settings, strict=True))
        ]
        yield from run_tasks(executor, round_task, tasks)

    def _moments(self, x: str, met: str) -> Moments:
        """Of the input ``x``, which layers meet as ``met``."""
        exact = self._streams.get("float")
        folders = (str(self._streams["rounded"].folder), "" if exact is None else str(exact.folder))
        # The same sums, in the same order, however many workers there are.
        starts = range(0, self._samples, SAMPLES_PER_TASK)
        tasks = [
            MomentTask(*folders, x, met, range(i, min(i + SAMPLES_PER_TASK, self._samples)), cap)
            for i in starts
            for cap in (self._owner.token_cap,)
        ]
        total: Moments | None = None
        for part in run_tasks(self._ctx.executor, sum_moments, tasks):
            total = part if total is None else total.plus(part)
        if total is None or not np.isfinite(total.gram).all():
            raise DataError(
                "DATA-NOT-FINITE",
                f"NaN, Inf or overflow in `{x}`, the input of a layer to be rounded",
                "check the calibration data; masked positions must not reach a layer's input",
            )
        return total

    def _finish(self, number: int, stage: Stage, new: RoundedWeights) -> None:
        """Take over what was rounded; with a cache, note that the stage is complete."""
        for site in new:
            weight = new.get(site)
            assert weight is not None
            self._rounded.add(site, weight)
        if self._owner.cache:
            header, arrays = new.to_storage()
            header["changes"] = [vars(c) for c in self._report.changed[-len(new) :]] if new else []
            target = self._folder / f"stage-{number:04}.npz"
            arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
            with reported(target), temporary_for(target) as temporary:
                np.savez(temporary.file, **arrays)  # type: ignore[arg-type]
                temporary.put_in_place()
        finished = set(stage.finished)
        rounded = {rounded_name(*each) for each in self._rounding.values() if each[0] in finished}
        for stream in self._streams.values():
            stream.drop(finished | rounded, self._samples)

    def _resume(self) -> int:
        """Take over complete stages; the number of the first one that is left."""
        if not self._owner.cache:
            return 0
        for number in range(len(self._stages)):
            path = self._folder / f"stage-{number:04}.npz"
            if not path.is_file():
                return number
            with reported(path), np.load(path, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
            header: dict[str, Any] = json.loads(arrays.pop("header").tobytes())
            for change in header.pop("changes"):
                self._report.change(**change)
            found = RoundedWeights.from_storage(header, arrays)
            for site in found:
                weight = found.get(site)
                assert weight is not None
                self._rounded.add(site, weight)
        return len(self._stages)
