"""Scores of single sites: measured here, or by other processes, with the same numbers.

Each task is a range of neighbouring sites. The model and all that does not differ between tasks lie
in a folder, which a worker reads once.
"""

from __future__ import annotations

import functools
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxq.graph import io
from onnxq.graph.atomic import reported
from onnxq.passes.contract import Artifacts, Context, DeclaredArtifacts
from onnxq.passes.decide.chain import SITES_A_SEGMENT, in_order, measure_each
from onnxq.passes.decide.measure import Feeds, Metric, PlanMeter, Score
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.plan import QuantPlan
from onnxq.passes.targets import Target
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.passes.work import run_tasks

_SITES_A_TASK = 2 * SITES_A_SEGMENT


@dataclass(frozen=True)
class Work:
    """What a site's score depends on.

    Args:
        model: in float; it is not changed.
        plan: what the sites are quantized by.
        samples, metric: see :class:`PlanMeter`.
        rounded: weights that a solver rounded, if there are any.
        target: that the plan is lowered for.
        threads: of onnxruntime, inside one operator.
    """

    model: ir.Model
    plan: QuantPlan
    samples: Sequence[Feeds]
    metric: Metric
    rounded: RoundedWeights | None
    target: Target
    threads: int

    def meter(self) -> PlanMeter:
        """Measures on this."""
        declared = DeclaredArtifacts(Artifacts(), Qdq())
        ctx = Context(declared, self.target, None, None, self.model, threads=self.threads)
        return PlanMeter(self.model, ctx, self.samples, self.metric, self.rounded)


def measure_sites(work: Work, sites: Sequence[str], ctx: Context) -> Iterator[tuple[str, Score]]:
    """Each of ``sites`` with its score, through the executor of ``ctx`` if there is one."""
    if ctx.executor is None:
        with work.meter() as meter:
            yield from measure_each(meter, work.model, work.plan, sites)
        return
    ordered, _ = in_order(work.model, work.plan, sites)
    with tempfile.TemporaryDirectory(prefix="onnxq-tasks-") as folder:
        _store(work, Path(folder))
        tasks = [
            _Task(folder, tuple(ordered[at : at + _SITES_A_TASK]))
            for at in range(0, len(ordered), _SITES_A_TASK)
        ]
        for found in run_tasks(ctx.executor, _measure_task, tasks):
            yield from found


@dataclass(frozen=True)
class _Task:
    folder: str
    sites: tuple[str, ...]


def _store(work: Work, folder: Path) -> None:
    io.save(work.model, folder / "model.onnx")
    rounded = None if work.rounded is None else work.rounded.to_storage()
    facts: dict[str, Any] = {
        "plan": work.plan.to_storage(),
        "samples": list(work.samples),
        "metric": work.metric,
        "rounded": rounded,
        "target": work.target,
        "threads": work.threads,
    }
    with reported(folder / "facts"):
        (folder / "facts").write_bytes(pickle.dumps(facts))


@functools.lru_cache(maxsize=1)
def _restored(folder: str) -> tuple[Work, PlanMeter]:
    """What :func:`_store` wrote; a worker keeps it from task to task."""
    facts = pickle.loads(Path(folder, "facts").read_bytes())
    rounded = facts["rounded"]
    work = Work(
        io.load(Path(folder, "model.onnx")),
        QuantPlan.from_storage(*facts["plan"]),
        facts["samples"],
        facts["metric"],
        None if rounded is None else RoundedWeights.from_storage(*rounded),
        facts["target"],
        facts["threads"],
    )
    return work, work.meter()


def _measure_task(task: _Task) -> list[tuple[str, Score]]:
    work, meter = _restored(task.folder)
    return list(measure_each(meter, work.model, work.plan, task.sites))
