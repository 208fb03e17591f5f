"""From the results of the layers below to the plain data that is shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from onnxq.cli.view import (
    CellView,
    ErrorView,
    HistogramView,
    PassView,
    RunView,
    SpeedView,
)

if TYPE_CHECKING:
    from onnxq.calibration.statistics import Statistics
    from onnxq.cli.evidence import Evidence
    from onnxq.passes.plan import QuantPlan
    from onnxq.pipeline.compare import Comparison
    from onnxq.pipeline.runner import StepResult
    from onnxq.pipeline.summary import RunSummary
    from onnxq.runtime.difference import LayerDiff


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
    return SpeedView(
        seconds["reference"],
        seconds["candidate"],
        latency.threads,
        feeds or latency.shapes,
        latency.is_noisy,
    )


def pass_view(step: StepResult) -> PassView:
    """What one pass did."""
    return PassView(
        step.spec,
        step.seconds,
        [(c.site, c.what, c.detail) for c in step.report.changed],
        [(s.site, s.reason) for s in step.report.skipped],
        step.report.notes,
        step.report.curves,
    )


def run_view(
    summary: RunSummary, evidence: Evidence, command: str, *, with_drawings: bool
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

        plan = evidence.plan
        written = load(summary.out)
        why = dict(plan.floats) if plan is not None else {}
        if plan is not None:
            why |= {name: site.why for name, site in plan.sites.items()}
        cells = precision.cells(written, why)
        before = precision.bytes_by_format(load(summary.source))
        after = precision.bytes_by_format(written)
        bits = precision.bits_per_weight(before, after)
        histograms = _histograms(evidence.histograms, plan)
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
        layers=[layer_view(layer) for layer in evidence.layers],
        histograms=histograms,
        cells=cells,
        weights_before=before,
        weights_after=after,
        weight_bits=bits,
        provenance=provenance,
        samples=summary.samples,
        is_poor=summary.is_poor,
        task="" if summary.task is None else summary.task.words(),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _histograms(found: Statistics | None, plan: QuantPlan | None) -> list[HistogramView]:
    """What was seen of each activation beside the range that the plan gives it."""
    from onnxq.calibration.statistics import Histogram

    if found is None or plan is None:
        return []
    views: list[HistogramView] = []
    for request in found:
        stat = found.get(request)
        chosen = plan.values[request.value]
        if isinstance(stat, Histogram):
            views.append(
                HistogramView(
                    request.value,
                    stat.edges().tolist(),
                    stat.counts.tolist(),
                    chosen.lo,
                    chosen.hi,
                    f"{chosen.format} {chosen.method}",
                )
            )
    return views
