"""``onnxq compare``: two forms of one model, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.options import FILE, calibration, common, threads

_LAYERS = 10


@click.command("compare", short_help="Compare two models: outputs, layers, size, speed.")
@click.argument("reference", type=FILE)
@click.argument("candidate", type=FILE)
@calibration(required=True)
@threads(1)
@click.option("--no-layers", is_flag=True, help="Skip the comparison of inner values.")
@click.option("-v", "--verbose", is_flag=True, help="List every layer, not only the worst.")
@common
def command(
    reference: Path,
    candidate: Path,
    threads: int,
    no_layers: bool,
    verbose: bool,
    **data: Any,
) -> None:
    """Compare CANDIDATE with REFERENCE on samples: outputs, layers, size and speed."""
    from onnxq.calibration.data import open_data
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.graph.io import load
    from onnxq.pipeline.compare import compare_models, per_layer

    with console.progress() as live:
        given = {name: value for name, value in data.items() if value is not None}
        samples = open_data(given.pop("calib"), load(reference), **given)
        whole = compare_models(reference, candidate, samples, threads=threads, progress=live)
        layers = (
            []
            if no_layers
            else per_layer(reference, candidate, samples, threads=threads, progress=live)
        )
    if current().json:
        console.emit(
            {
                "reference": reference,
                "candidate": candidate,
                **whole.to_json(),
                "layers": [layer.to_json() for layer in layers],
            }
        )
        return
    from onnxq.cli.adapt import error_views, layer_view, speed_view
    from onnxq.cli.evidence import MOVES
    from onnxq.cli.summary import print_errors, print_outcome, print_outputs

    layers = [layer for layer in layers if layer.op not in MOVES]
    if layers:
        ordered = sorted(layers, key=lambda e: e.sqnr_db)[: None if verbose else _LAYERS]
        title = f"Layers farthest from {reference.name}, of {len(layers)}"
        print_errors(title, [layer_view(layer) for layer in ordered])
        click.echo("values into which a pass folded a bias or a scale differ by that too\n")
    print_outputs(error_views(whole))
    print_outcome(
        whole.reference_bytes,
        whole.candidate_bytes,
        speed_view(whole),
        (reference.name, candidate.name),
    )
