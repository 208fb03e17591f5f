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
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxq.calibration.sessions import Session
from onnxq.errors import DataError, InternalError, SpecError
from onnxq.formats import Format
from onnxq.graph import io
from onnxq.graph.atomic import reported, temporary_for
from onnxq.graph.match import Linear, analyze
from onnxq.graph.match.values import value_name
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.lower.weights import weight_as_read
from onnxq.passes.naming import about
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.passes.weights.rounding import (
    Array,
    format_of,
    quality,
    rows_of,
    searched_scales,
)
from onnxq.passes.weights.segments import Stage, cut, stage_model
from onnxq.passes.weights.stream import Stream
from onnxq.solvers.gpfq import gpfq
from onnxq.solvers.gptaq import gptaq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.grid import Solution
from onnxq.solvers.qronos import qronos
from onnxq.solvers.scale_search import opt_rtn

Solver = Literal["gptq", "gptaq", "qronos", "gpfq", "opt-rtn"]

_TWO_STREAMS = ("gptaq", "qronos", "gpfq")


@dataclass(frozen=True)
class Moments:
    """Of the input of one or more layers, over all samples.

    Attributes:
        gram: ``[K, K]`` sum of ``y y^T``, y as it comes through the rounded layers.
        cross: ``[K, K]`` sum of ``x y^T``, x that of the float model; None without it.
    """

    gram: Array
    cross: Array | None


@dataclass(frozen=True)
class Sequential(Pass):
    """Round the planned weights in the order in which they run.

    Args:
        solver: how each layer is rounded.
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
        act_order: round the columns with the largest activations first.
        alpha: share of the inputs' error that ``gptaq`` undoes.
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
    cache: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise SpecError("SPEC-RANGE", f"damping={self.damping} is not above 0 and at most 1")
        if not 0.0 <= self.alpha <= 1.0:
            raise SpecError("SPEC-RANGE", f"alpha={self.alpha} is not between 0 and 1")

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
            "options": [self.solver, self.damping, self.act_order, self.alpha],
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        folder = Path(self.cache) / key
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return nullcontext(str(folder))

    def solve(self, rows: Array, moments: Moments, fmt: Format, group: int) -> Solution:
        """Codes and scales for layers with equal inputs, one below the other.

        Args:
            rows: ``[N, K]``.
            moments: of their input.
            fmt: the format, its scheme included.
            group: columns that share a scale; 0 for the whole row.
        """
        gram, cross = moments.gram, moments.cross
        if self.solver == "opt-rtn":
            return opt_rtn(rows, fmt, group=group, importance=np.diag(gram).astype(np.float32))
        params = searched_scales(rows, gram, fmt, group)
        if self.solver == "gpfq":
            return gpfq(rows, gram, fmt, G=cross, group=group, params=params)
        if self.solver == "qronos":
            return qronos(
                rows, gram, fmt, G=cross, group=group, act_order=self.act_order,
                params=params, damp=self.damping,
            )  # fmt: skip
        if self.solver == "gptaq":
            assert cross is not None
            return gptaq(
                rows, gram, cross - gram, fmt, group=group, alpha=self.alpha,
                act_order=self.act_order, params=params, damp=self.damping,
            )  # fmt: skip
        return gptq(
            rows, gram, fmt, group=group, act_order=self.act_order, params=params,
            damp=self.damping,
        )  # fmt: skip


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

    def _feed(self) -> None:
        """Put the model's inputs into the streams."""
        wanted = {value_name(v) for stage in self._stages for v in stage.inputs}
        wanted |= {value_name(layer.x) for layer in self._layers.values()}
        for sample, feeds in enumerate(self._data):
            for stream in self._streams.values():
                stream.put(sample, {n: a for n, a in feeds.items() if n in wanted})

    def _advance(self, stage: Stage, name: str) -> None:
        """Compute the outputs of ``stage`` for all samples."""
        if not stage.nodes:
            return
        stream = self._streams[name]
        inputs = [value_name(v) for v in stage.inputs]
        outputs = [value_name(v) for v in stage.outputs]
        types = {n: stream.get(0, n).dtype for n in inputs}
        weights = {} if name == "float" else self._weights(stage)
        path = self._folder / "stage.onnx"
        path.write_bytes(stage_model(self._model, stage, types, weights).SerializeToString())
        session = Session(path, self._ctx.threads)
        for sample in range(self._samples):
            found = session.run(outputs, {n: stream.get(sample, n) for n in inputs}, sample)
            stream.put(sample, {n: v.numpy() for n, v in zip(outputs, found, strict=True)})
        path.unlink()

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
        """Round the layers of ``stage``; those with equal inputs and formats in one go."""
        alike: dict[tuple[str, str, int], list[Linear]] = {}
        for layer in stage.layers:
            if layer.name in self._given:
                continue
            site = self._plan.sites[layer.name]
            assert site.weight is not None
            fmt = format_of(site, site.weight, self._ctx)
            alike.setdefault((value_name(layer.x), str(fmt), site.weight.block), []).append(layer)
        new = RoundedWeights()
        moments: dict[str, Moments] = {}
        for (x, _, block), layers in alike.items():
            if x not in moments:
                moments[x] = self._moments(x)
            site = self._plan.sites[layers[0].name]
            assert site.weight is not None
            parts = [rows_of(layer) for layer in layers]
            fmt = format_of(site, site.weight, self._ctx)
            with about(", ".join(layer.name for layer in layers)):
                solved = RoundedWeight.of(
                    self._owner.solve(np.concatenate(parts), moments[x], fmt, block)
                )
            start = 0
            for layer, rows in zip(layers, parts, strict=True):
                weight = solved.part(start, start + len(rows))
                start += len(rows)
                new.add(layer.name, weight)
                detail = quality(rows, weight.values(), moments[x].gram)
                self._report.change(layer.name, "rounded", detail)
        return new

    def _moments(self, x: str) -> Moments:
        rounded, exact = self._streams["rounded"], self._streams.get("float")
        gram: Array | None = None
        cross: Array | None = None
        for sample in range(self._samples):
            array = rounded.get(sample, x)
            rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
            product = (rows.T @ rows).astype(np.float64)
            gram = product if gram is None else gram + product
            if exact is not None:
                other = exact.get(sample, x).reshape(rows.shape).astype(np.float32, copy=False)
                mixed = (other.T @ rows).astype(np.float64)
                cross = mixed if cross is None else cross + mixed
        if gram is None or not np.isfinite(gram).all():
            raise DataError(
                "DATA-NOT-FINITE",
                f"NaN, Inf or overflow in `{x}`, the input of a layer to be rounded",
                "check the calibration data; masked positions must not reach a layer's input",
            )
        return Moments(gram, cross)

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
        for stream in self._streams.values():
            stream.drop(stage.finished, self._samples)

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
