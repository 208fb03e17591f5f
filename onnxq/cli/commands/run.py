"""``onnxq run``: quantize a model with a pipeline of passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.commands.passes import complete_name
from onnxq.cli.options import FILE, calibration, common, threads


@click.command("run", short_help="Quantize a model with a pipeline of passes.")
@click.argument("model", type=FILE)
@click.option(
    "--passes",
    required=True,
    metavar="PIPELINE",
    shell_complete=complete_name,
    help="Pipeline text, a recipe's name, or @recipe.toml. Quote it: the shell expands {a,b}.",
)
@click.option(
    "-o",
    "--out",
    type=FILE,
    metavar="FILE",
    help="The .onnx to write; by default MODEL.q.onnx beside MODEL.",
)
@calibration(required=False)
@click.option("--target", metavar="NAME", help="Runtime of the output.  [default: cpu]")
@threads(None)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that round layers side by side.",
)
@click.option(
    "--cluster",
    metavar="URL",
    help="A dask scheduler that rounds layers instead, for example tcp://host:8786.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="The only source of randomness.  [default: 0]"
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1.0, 1.0),
    help="Exit with 3, writing nothing, when an output is farther from fp32.",
)
@click.option("--task", metavar="TASK", help="Measure before and after on TASK, see `onnxq eval`.")
@click.option("--data", type=FILE, metavar="PATH", help="The task's file or folder.")
@click.option(
    "--task-limit", type=click.IntRange(min=1), help="Use only its first so many examples."
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0.0),
    help="Exit with 3, writing nothing, when the task loses more points (percent for perplexity).",
)
@click.option("--allow-noop", is_flag=True, help="Accept passes that match nothing.")
@click.option("--dry-run", is_flag=True, help="Show what each pass would match; write nothing.")
@click.option("--dump-dir", type=FILE, metavar="DIR", help="Keep the model after each pass there.")
@click.option("--resume", is_flag=True, help="Go on behind the last complete pass in --dump-dir.")
@click.option("--bisect", is_flag=True, help="Find the first rewrite that breaks the model.")
@click.option(
    "--no-verify", is_flag=True, help="Skip the checks of passes that promise to keep the function."
)
@click.option("--report", type=FILE, metavar="FILE", help="Write one HTML page about the run.")
@click.option(
    "--force", is_flag=True, help="Write the output even if it is bad; the exit code stays 3."
)
@click.option("-v", "--verbose", is_flag=True, help="List each site.")
@common
def command(model: Path, passes: str, out: Path | None, **options: Any) -> int:
    """Quantize MODEL with a pipeline of passes, compare it with fp32, and say what happened."""
    from onnxq.cli.running import execute

    return execute(model, passes, out, options)
