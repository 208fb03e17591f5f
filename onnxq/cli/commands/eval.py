"""``onnxq eval``: measure a model on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.options import FILE, common, threads
from onnxq.errors import SpecError


@click.command("eval", short_help="Evaluate a model on a task.")
@click.argument("model", type=FILE)
@click.option("--task", required=True, metavar="TASK", help="sts, perplexity, imagenet or sst2.")
@click.option("--data", type=FILE, required=True, metavar="PATH", help="The task's file or folder.")
@click.option("--tokenizer", type=FILE, metavar="FILE", help="By default the one beside MODEL.")
@click.option("--batch", type=click.IntRange(min=1), help="Examples a run.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many examples.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the task."
)
@threads(1)
@common
def command(
    model: Path,
    task: str,
    data: Path,
    tokenizer: Path | None,
    batch: int | None,
    limit: int | None,
    settings: tuple[str, ...],
    threads: int,
) -> None:
    """Measure MODEL on a task; the number goes to stdout."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.evaluation import evaluate
    from onnxq.runtime import session

    options: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SpecError(
                "SPEC-EVAL-OPTION", f"`--set {setting}` has no `=`", "write --set KEY=VALUE"
            )
        options[key] = value
    with console.progress() as live:
        result = evaluate(
            model,
            task,
            data,
            tokenizer=tokenizer,
            batch=batch,
            limit=limit,
            session_factory=lambda path: session(path, threads=threads),
            progress=lambda done, total: live(f"evaluate {model.name}", done, total),
            **options,
        )
    if current().json:
        console.emit({"model": model, **result.to_json()})
        return
    click.echo(f"{result.metric}  {result.value:.4f}  ({result.n} examples, {model})")
    for key, value in result.details.items():
        click.echo(f"  {key}: {value}")
