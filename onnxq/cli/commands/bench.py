"""``onnxq bench``: latency of models side by side."""

from __future__ import annotations

import statistics
from pathlib import Path

import click

from onnxq.cli.options import FILE, common, threads
from onnxq.errors import SpecError


@click.command("bench", short_help="Measure the latency of models side by side.")
@click.argument("models", type=FILE, nargs=-1, required=True)
@click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=DIMS", help="For example input_ids=1x128."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True,
              help="Size of an open first dimension.")
@click.option("--length", type=click.IntRange(min=1), default=128, show_default=True,
              help="Size of the other open dimensions.")
@click.option("--rounds", type=click.IntRange(min=1), default=50, show_default=True,
              help="Timed runs of each model, in turn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@threads
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
    from onnxq.cli import console, latency
    from onnxq.cli.state import current
    from onnxq.graph.io import size_on_disk
    from onnxq.runtime import session

    if len(set(models)) != len(models):
        raise SpecError("USAGE", "a model is given twice", "name each model once")
    wanted = latency.parse_shapes(shapes)
    with console.progress() as live:
        sessions = {}
        for number, path in enumerate(models):
            live(f"load {path.name}", number, len(models))
            sessions[path] = session(path, threads=threads)
        feeds = {
            path: latency.random_feeds(opened, wanted, batch=batch, length=length, seed=seed)
            for path, opened in sessions.items()
        }
        times = latency.interleaved(sessions, feeds, rounds=rounds, progress=live)
    middle = latency.medians(times)
    first = middle[models[0]]
    if current().json:
        for path in models:
            console.emit(
                {
                    "model": path,
                    "bytes": size_on_disk(path),
                    "median_ms": middle[path] * 1e3,
                    "min_ms": min(times[path]) * 1e3,
                    "ratio": first / middle[path],
                    "threads": threads,
                    "rounds": rounds,
                    "feeds": latency.describe(feeds[path]),
                }
            )
        return
    rows = [
        (
            str(path),
            console.size(size_on_disk(path)),
            console.milliseconds(middle[path]),
            console.milliseconds(_spread(times[path])),
            f"{first / middle[path]:.2f}x",
        )
        for path in models
    ]
    console.print_table(
        f"{rounds} rounds in turn, {threads} thread{'s' if threads > 1 else ''}, "
        f"inputs {latency.describe(feeds[models[0]])}",
        [
            ("model", "left"),
            ("size", "right"),
            ("median", "right"),
            ("+-", "right"),
            ("speed", "right"),
        ],
        rows,
    )


def _spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
