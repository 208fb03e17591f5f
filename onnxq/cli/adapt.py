"""From the results of the layers below to the plain data that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxq.cli.view import ErrorView, SpeedView

if TYPE_CHECKING:
    from onnxq.pipeline.compare import Comparison, LayerDiff


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
