"""How far a plan moves the model's outputs: lower it on a copy, run it, compare with float.

The copy is lowered by ``qdq`` and run as it is written, so the numbers are those of the plan and
not of a model of it. Weights that no site of the plan touches are shared with the float model.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError
from onnxq.graph.match import Linear, static_shape
from onnxq.graph.tensors import copy_model
from onnxq.passes.contract import Artifacts, Context, DeclaredArtifacts
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.plan import QuantPlan
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.runtime.workspace import Workspace, run_samples

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

Feeds = dict[str, np.ndarray]
Array = npt.NDArray[np.floating]
Metric = Literal["sqnr", "kl", "perplexity"]

_CHUNK = 1 << 20
_ROWS = 128
"""Rows of logits that are turned into probabilities at once; bounds memory."""


@dataclass(frozen=True)
class Score:
    """How far the outputs are from the float model's.

    Attributes:
        sqnr_db: of the worst output, all samples together.
        kl: mean over rows of ``KL(softmax(float) || softmax(quantized))`` of the first output of
            rank 2 or more, in nats; None if it was not asked for.
        drop: increase of the perplexity of next tokens in percent; None likewise.
    """

    sqnr_db: float
    kl: float | None = None
    drop: float | None = None

    def badness(self, metric: Metric) -> float:
        """A number that grows with the damage: noise over signal, nats, or percent."""
        if metric == "sqnr":
            return float(10.0 ** (-self.sqnr_db / 10))
        value = self.kl if metric == "kl" else self.drop
        assert value is not None
        return value

    def describe(self, metric: Metric) -> str:
        """The value of ``metric`` with its unit."""
        if metric == "sqnr":
            return f"{self.sqnr_db:.2f} dB"
        if metric == "kl":
            return f"{self.kl:.3g} nats"
        return f"{self.drop:+.2f} % perplexity"


class PlanMeter:
    """Measures plans on one model and a few samples; a context manager.

    Args:
        model: in float; it is not changed.
        ctx: of the pass that asks; gives target, threads and seed.
        samples: to run; at least one.
        metric: what is needed besides the SQNR.
        rounded: weights that a solver rounded, used where a plan quantizes their site.

    Raises:
        DataError: ``DATA-NEEDED`` without samples; ``DATA-METRIC``: the metric needs logits, or
            token ids, that the model does not have.
    """

    def __init__(
        self,
        model: ir.Model,
        ctx: Context,
        samples: Sequence[Feeds],
        metric: Metric,
        rounded: RoundedWeights | None,
    ) -> None:
        if not samples:
            raise DataError("DATA-NEEDED", "there is no sample to measure on", "give data")
        self._model, self._ctx, self._samples = model, ctx, list(samples)
        self._metric, self._rounded = metric, rounded
        self._workspace = Workspace()
        self._lock = threading.Lock()
        session = self.open(model)
        self._exact = [_floats(out) for out in run_samples(session, self._samples)]
        self._logits = self._find_logits() if metric != "sqnr" else ""
        self._signal = {
            name: sum(_energy(out[name]) for out in self._exact) for name in self._exact[0]
        }
        self._reference = (
            [_log_softmax(_rows(out[self._logits])) for out in self._exact]
            if metric == "kl"
            else []
        )

    def __enter__(self) -> PlanMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self._workspace.close()

    @property
    def samples(self) -> Sequence[Feeds]:
        """What is run."""
        return self._samples

    def open(self, model: ir.Model, workspace: Workspace | None = None) -> ort.InferenceSession:
        """A session that runs ``model`` as it is; may be called from several threads.

        Args:
            model: the meter's, a lowered copy, or a part of one.
            workspace: that takes the weights; by default the meter's, which has the float ones.
        """
        with self._lock:
            return (workspace or self._workspace).session(model, threads=self._ctx.threads)

    def measure(self, plan: QuantPlan) -> Score:
        """Lower ``plan`` on a copy and compare; may be called from several threads."""
        model = copy_model(self._model)
        self.lower(model, plan)
        return self.score(list(run_samples(self.open(model), self._samples)))

    def score(self, outputs: Sequence[dict[str, Any]]) -> Score:
        """How far ``outputs``, by name for each sample, are from the float model's."""
        found = [_floats(out) for out in outputs]
        sqnr = min(self._sqnr(name, found) for name in self._exact[0])
        if self._metric == "kl":
            return Score(sqnr, kl=self._kl(found))
        if self._metric == "perplexity":
            return Score(sqnr, drop=self._drop(found))
        return Score(sqnr)

    def lower(self, model: ir.Model, plan: QuantPlan) -> None:
        """Perform ``plan`` on ``model``, a copy of the meter's."""
        qdq = Qdq()
        artifacts = Artifacts()
        artifacts.put(PLAN, plan)
        if self._rounded is not None:
            artifacts.put(ROUNDED, self._rounded)
        declared = DeclaredArtifacts(artifacts, qdq)
        qdq.run(model, dataclasses.replace(self._ctx, artifacts=declared, upcoming=()))

    def _sqnr(self, name: str, found: Sequence[dict[str, Array]]) -> float:
        signal, noise = self._signal[name], 0.0
        for exact, other in zip(self._exact, found, strict=True):
            noise += _energy(exact[name] - other[name])
        if noise == 0.0:
            return float("inf")
        return float(10 * np.log10(signal / noise)) if signal > 0 else -float("inf")

    def _find_logits(self) -> str:
        """The output that holds rows of logits, with next tokens where these are asked for."""
        for name, array in self._exact[0].items():
            if array.ndim < 2:
                continue
            if self._metric == "kl" or _tokens(self._samples[0], array) is not None:
                return name
        raise DataError(
            "DATA-METRIC",
            f"metric={self._metric} needs an output of logits"
            + (" and its token ids as an input" if self._metric == "perplexity" else ""),
            "use metric=sqnr",
        )

    def _kl(self, found: Sequence[dict[str, Array]]) -> float:
        total, rows = 0.0, 0
        for exact, other in zip(self._reference, found, strict=True):
            logits = _rows(other[self._logits])
            for start in range(0, len(exact), _ROWS):
                p, q = exact[start : start + _ROWS], _log_softmax(logits[start : start + _ROWS])
                total += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
            rows += len(exact)
        return total / rows

    def _drop(self, found: Sequence[dict[str, Array]]) -> float:
        return float(100 * np.expm1(self._nll(found) - self._nll(self._exact)))

    def _nll(self, outputs: Sequence[dict[str, Array]]) -> float:
        """Mean negative log-likelihood of each token but the first of each row."""
        total, count = 0.0, 0
        for feeds, out in zip(self._samples, outputs, strict=True):
            tokens = _tokens(feeds, out[self._logits])
            assert tokens is not None
            for logits, ids in zip(out[self._logits], tokens, strict=True):
                for start in range(0, len(ids) - 1, _ROWS):
                    wanted = ids[start + 1 : start + 1 + _ROWS]
                    p = _log_softmax(logits[start : start + len(wanted)])
                    total -= float(p[np.arange(len(wanted)), wanted].sum())
                    count += len(wanted)
        if count == 0:
            raise DataError("DATA-METRIC", "samples of one token predict none", "use longer texts")
        return total / count


def _tokens(feeds: Feeds, logits: Array) -> np.ndarray | None:
    """The input of token ids ``[B, S]`` that belongs to ``logits [B, S, V]``."""
    ids = feeds.get("input_ids")
    fits = ids is not None and logits.ndim == 3 and ids.shape == logits.shape[:2]
    return ids if fits else None


def _rows(logits: Array) -> Array:
    return logits.reshape(-1, logits.shape[-1])


def _energy(array: Array) -> float:
    """Sum of squares, in float64 by rows so that no copy of a large output is made."""
    flat = array.reshape(-1)
    parts = (flat[i : i + _CHUNK].astype(np.float64) for i in range(0, flat.size, _CHUNK))
    return float(sum(float(np.vdot(part, part)) for part in parts))


def _log_softmax(x: Array) -> Array:
    """In the precision of ``x``; the sum in float64."""
    shifted = x - x.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total).astype(x.dtype))


def _floats(outputs: dict[str, Any]) -> dict[str, Array]:
    found = {
        name: array
        for name, array in outputs.items()
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size
    }
    if not found:
        raise DataError("DATA-METRIC", "the model has no float output to compare", "use another")
    return found


def with_only(plan: QuantPlan, site: str) -> QuantPlan:
    """``plan`` with all sites but one in float."""
    return QuantPlan(values=dict(plan.values), sites={site: plan.sites[site]})


def without(plan: QuantPlan, floats: Sequence[str], why: str) -> QuantPlan:
    """``plan`` with ``floats`` left in float, and operators that lost their quantized input."""
    rest = QuantPlan(dict(plan.values), dict(plan.sites), dict(plan.floats))
    for site in floats:
        rest.leave_float(site, why)
    while True:
        coded = {s.output for s in rest.sites.values() if s.output}
        starved = [
            s.site for s in rest.sites.values() if s.kind == "op" and not coded.issuperset(s.inputs)
        ]
        if not starved:
            return rest
        for site in starved:
            rest.leave_float(site, "a neighbour stays float")


def multiplications(linear: Linear) -> int:
    """Multiplications a token, or of one image where the shape tells."""
    shape = static_shape(linear.output) if linear.kind == "conv" else None
    positions = 1
    if shape is not None:
        for size in shape[2:]:
            positions *= size or 1
    return int(np.prod(linear.shape)) * positions
