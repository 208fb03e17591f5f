"""From the results of the layers below to the plain data that is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from onnxq.cli.view import (
    CellView,
    ErrorView,
    HistogramView,
    PassView,
    RunView,
    SpeedView,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.passes.contract import Progress
    from onnxq.passes.plan import QuantPlan
    from onnxq.pipeline.compare import Comparison, LayerDiff
    from onnxq.pipeline.run import RunSummary
    from onnxq.pipeline.runner import StepResult

_LAYER_SAMPLES: Final = 2


def error_views(comparison: Comparison) -> list[ErrorView]:
    """One view an output, the worst first."""
    views = [
        ErrorView(
            o.name,
            o.cosine_mean,
            o.sqnr_db,
            cosine_min=o.cosine_min,
            samples=o.samples,
            flags=o.flags,
        )
        for o in comparison.outputs
    ]
    return sorted(views, key=lambda e: e.badness)


def layer_view(layer: LayerDiff) -> ErrorView:
    """An inner value."""
    return ErrorView(layer.name, layer.cosine, layer.sqnr_db, layer.op)


def speed_view(comparison: Comparison, feeds: str = "") -> SpeedView | None:
    """The latencies, if they were measured."""
    latency = comparison.latency
    if latency is None:
        return None
    seconds = latency.seconds
    return SpeedView(seconds["reference"], seconds["candidate"], latency.threads, feeds)


def pass_view(step: StepResult) -> PassView:
    """What one pass did."""
    return PassView(
        step.spec,
        step.seconds,
        [(c.site, c.what, c.detail) for c in step.report.changed],
        [(s.site, s.reason) for s in step.report.skipped],
        step.report.notes,
    )


def layers_of(
    summary: RunSummary,
    baseline: ir.Model | None,
    options: Mapping[str, Any],
    progress: Progress,
) -> list[LayerDiff]:
    """Inner values of the output, on a few of the samples held back.

    Args:
        summary: of the run.
        baseline: the last model of the run that computed what the input does, see
            :class:`~onnxq.cli.baseline.KeepBaseline`; None for the input itself.
        options: of the command line.
        progress: called as the comparison proceeds.
    """
    from onnxq.calibration.data import open_data
    from onnxq.graph.io import load
    from onnxq.pipeline.compare import per_layer
    from onnxq.pipeline.run import HOLDOUT
    from onnxq.pipeline.samples import split_holdout

    names = ("tokenizer", "images", "samples", "max_length")
    given = {n: options[n] for n in names if options[n] is not None}
    model = load(summary.source)
    data = (
        None
        if options["calib"] is None
        else open_data(options["calib"], model, seed=summary.seed, **given)
    )
    samples = split_holdout(data, HOLDOUT, model, summary.seed, []).compare
    if samples is None:
        return []
    return per_layer(
        model if baseline is None else baseline,
        summary.out,
        samples,
        threads=summary.threads,
        limit=_LAYER_SAMPLES,
        progress=progress,
    )


def run_view(
    summary: RunSummary, layers: Sequence[LayerDiff], command: str, *, with_drawings: bool
) -> RunView:
    """Everything that a finished run has to show; the drawings cost a second look at the model."""
    comparison = summary.comparison
    cells: list[CellView] = []
    histograms: list[HistogramView] = []
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    bits = None
    if with_drawings:
        from onnxq.cli.report import precision
        from onnxq.graph.io import load

        plan = _plan(summary)
        written = load(summary.out)
        why = dict(plan.floats) if plan is not None else {}
        if plan is not None:
            why |= {name: site.why for name, site in plan.sites.items()}
        cells = precision.cells(written, why)
        before = precision.bytes_by_format(load(summary.source))
        after = precision.bytes_by_format(written)
        bits = precision.bits_per_weight(before, after)
        histograms = _histograms(summary, plan)
    provenance = {k: _text(v) for k, v in summary.result.provenance.items() if k != "pipeline"}
    return RunView(
        source=str(summary.source),
        output=str(summary.out),
        pipeline=summary.pipeline,
        target=summary.target,
        command=command,
        passes=[pass_view(step) for step in summary.steps],
        bytes_before=summary.bytes_before,
        bytes_after=summary.bytes_after,
        seconds=summary.seconds,
        warnings=summary.warnings,
        errors=[] if comparison is None else error_views(comparison),
        speed=None if comparison is None else speed_view(comparison),
        layers=[layer_view(layer) for layer in layers],
        histograms=histograms,
        cells=cells,
        weights_before=before,
        weights_after=after,
        weight_bits=bits,
        provenance=provenance,
        samples=summary.samples,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plan(summary: RunSummary) -> QuantPlan | None:
    from onnxq.passes.keys import PLAN

    artifacts = summary.result.artifacts
    return artifacts.get(PLAN) if PLAN in artifacts else None


def _histograms(summary: RunSummary, plan: QuantPlan | None) -> list[HistogramView]:
    """The activations that the plan quantizes and of which calibration kept a histogram."""
    from onnxq.calibration.statistics import Histogram
    from onnxq.passes.keys import STATISTICS

    artifacts = summary.result.artifacts
    if plan is None or STATISTICS not in artifacts:
        return []
    statistics = artifacts.get(STATISTICS)
    found: list[HistogramView] = []
    used = plan.used_values()
    for request in statistics:
        stat = statistics.get(request)
        chosen = plan.values.get(request.value)
        if chosen is None or request.value not in used or not isinstance(stat, Histogram):
            continue
        found.append(
            HistogramView(
                request.value,
                stat.edges().tolist(),
                stat.counts.tolist(),
                chosen.lo,
                chosen.hi,
                f"{chosen.format} {chosen.method}",
            )
        )
    return found
