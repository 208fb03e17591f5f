"""``onnxq bench``: latency of models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.options import FILE, common, threads
from onnxq.errors import SpecError


@click.command("bench", short_help="Measure the latency of models side by side.")
@click.argument("models", type=FILE, nargs=-1, required=True)
@click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=DIMS", help="For example input_ids=1x128."
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Size of an open first dimension.",
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Size of the other open dimensions.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Timed runs of each model, in turn.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the random inputs.",
)
@threads(1)
@common
def command(
    models: tuple[Path, ...],
    shapes: tuple[str, ...],
    batch: int,
    length: int,
    rounds: int,
    seed: int,
    threads: int,
) -> None:
    """Measure the latency of MODELS side by side, on random inputs.

    The models run in turn (A B A B ...), so that all of them see the same machine; medians are
    compared with the first model.
    """
    from onnxq.cli import console
    from onnxq.cli.feeds import describe, parse_shapes, random_feeds
    from onnxq.cli.state import current
    from onnxq.graph.io import size_on_disk
    from onnxq.pipeline.compare import measure
    from onnxq.runtime import session

    if len(set(models)) != len(models):
        raise SpecError("USAGE", "a model is given twice", "name each model once")
    wanted = parse_shapes(shapes)
    with console.progress() as live:
        sessions = {}
        for number, path in enumerate(models):
            live(f"load {path.name}", number, len(models))
            sessions[str(path)] = session(path, threads=threads)
        # Inputs of one name are the same array for all models.
        feeds: dict[str, Any] = {}
        for opened in sessions.values():
            made = random_feeds(opened, wanted, batch=batch, length=length, seed=seed)
            feeds = {**made, **feeds}
        live("measure latency", 0, None)
        medians = measure(sessions, feeds, threads=threads, repeats=rounds).seconds
    first = medians[str(models[0])]
    records = [
        {
            "model": path,
            "bytes": size_on_disk(path),
            "median_ms": medians[str(path)] * 1e3,
            "ratio": first / medians[str(path)],
            "threads": threads,
            "rounds": rounds,
            "feeds": describe(feeds),
        }
        for path in models
    ]
    if current().json:
        for record in records:
            console.emit(record)
        return
    rows = [
        (
            str(path),
            console.size(size_on_disk(path)),
            console.milliseconds(medians[str(path)]),
            f"{first / medians[str(path)]:.2f}x",
        )
        for path in models
    ]
    console.print_table(
        f"{console.counted(rounds, 'round')} in turn, {console.counted(threads, 'thread')}, "
        f"inputs {describe(feeds)}",
        [("model", "left"), ("size", "right"), ("median", "right"), ("speed", "right")],
        rows,
    )
