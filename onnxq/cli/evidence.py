"""What a report shows beyond the run's own results: layer by layer errors, histograms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from onnxq.graph.io import copy_model, load
from onnxq.pipeline.hooks import Hook

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.calibration.statistics import Statistics
    from onnxq.passes.contract import Progress
    from onnxq.passes.plan import QuantPlan
    from onnxq.pipeline.hooks import Step
    from onnxq.pipeline.summary import RunSummary
    from onnxq.runtime.difference import LayerDiff

_LAYER_SAMPLES: Final = 2
MOVES: Final = frozenset(
    (
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that only move data: their errors are those of their inputs."""


class KeepBaseline(Hook):
    """Keeps the model as it is before the first pass that changes numerics.

    Passes before it preserve the function but not every inner value (a bias that is folded into the
    next layer, a scale into a norm): compared with the input, such values would look like errors.
    Weights are shared with the model, not copied.

    Attributes:
        model: None until such a pass comes, and in a run that was resumed behind it.
        plan: what is about to be performed; None where no pass has made one.
    """

    def __init__(self) -> None:
        self.model: ir.Model | None = None
        self.plan: QuantPlan | None = None

    def before_pass(self, step: Step) -> None:
        """Keep model and plan once."""
        from onnxq.passes.keys import PLAN

        if self.model is None and step.owner.tolerance is None:
            self.model = copy_model(step.model)
            self.plan = copy.deepcopy(step.artifacts.get(PLAN)) if PLAN in step.artifacts else None


@dataclass
class Evidence:
    """Measured after the run, on the baseline.

    Args:
        layers: inner values of the output, in graph order; values that are only moved are left out.
        histograms: of the activations that the plan quantizes.
        plan: of the run, if a pass made one.
    """

    layers: list[LayerDiff] = field(default_factory=list)
    histograms: Statistics | None = None
    plan: QuantPlan | None = None


def gather(
    summary: RunSummary,
    baseline: KeepBaseline,
    options: Mapping[str, Any],
    progress: Progress,
    *,
    histograms: bool,
) -> Evidence:
    """Compare the output with the baseline, value by value, on samples that were held back.

    Args:
        summary: of the run.
        baseline: what is compared with; the input itself where it kept no model.
        options: ``calib`` and what says how to read it.
        progress: called as the work proceeds.
        histograms: also sweep the calibration samples once more, for the drawings.
    """
    from onnxq.calibration.data import open_data
    from onnxq.pipeline.compare import per_layer
    from onnxq.pipeline.run import HOLDOUT
    from onnxq.pipeline.samples import split_holdout

    names = ("tokenizer", "images", "samples", "max_length")
    given = {n: options[n] for n in names if options[n] is not None}
    model = load(summary.source)
    data = None
    if options["calib"] is not None:
        data = open_data(options["calib"], model, seed=summary.seed, **given)
    split = split_holdout(data, HOLDOUT, model, summary.seed, [])
    plan = baseline.plan
    found = Evidence(plan=plan)
    if split.compare is None:
        return found
    reference = model if baseline.model is None else baseline.model
    layers = per_layer(
        reference,
        summary.out,
        split.compare,
        threads=summary.threads,
        limit=_LAYER_SAMPLES,
        progress=progress,
    )
    found.layers = [layer for layer in layers if layer.op not in MOVES]
    if histograms and plan is not None and split.calibration is not None:
        found.histograms = _sweep(reference, plan, split.calibration, summary.threads, progress)
    return found


def _sweep(
    model: ir.Model, plan: QuantPlan, data: Any, threads: int, progress: Progress
) -> Statistics:
    """Histograms of the values that the plan quantizes with fixed ranges."""
    from onnxq.calibration.collect import collect
    from onnxq.calibration.requests import StatRequest

    present = {v.name for node in model.graph for v in node.outputs}
    present |= {v.name for v in model.graph.inputs}
    wanted = [v for v in plan.values if v in plan.used_values() and v in present]
    requests = [StatRequest(value, "histogram") for value in wanted]
    return collect(model, requests, data, threads=threads, progress=progress)
