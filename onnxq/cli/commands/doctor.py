"""``onnxq doctor``: what this machine has, what is wrong with it, and what it makes of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxq.cli.options import FILE, common

if TYPE_CHECKING:
    from onnxq.runtime import ModelKernels


@click.command("doctor", short_help="Check this machine: packages, kernels, CPU.")
@click.argument("model", type=FILE, required=False)
@common
def command(model: Path | None) -> int:
    """Check this machine: packages, kernels, CPU. Leaves exit code 6 when something is wrong.

    With MODEL, also show which kernel runs each of its nodes on the CPU: one of onnxq's, one of
    onnxruntime's, or the standard operators that an operator of onnxq falls back to.
    """
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.errors import UnsupportedError
    from onnxq.runtime import doctor, model_kernels

    report = doctor()
    kernels = None if model is None else model_kernels(model)
    if current().json:
        record = {**report.to_json(), "healthy": report.healthy}
        if kernels is not None:
            record["nodes"] = [dataclasses.asdict(node) for node in kernels.nodes]
            record["why_bodies"] = kernels.why_bodies
        console.emit(record)
    else:
        click.echo("\n".join(report.lines()))
        if kernels is not None:
            _print_kernels(kernels)
    return 0 if report.healthy else UnsupportedError.exit_code


def _print_kernels(kernels: ModelKernels) -> None:
    from onnxq.cli import console

    rows = [(str(n), *key) for key, n in kernels.counts().items()]
    columns: list[tuple[str, console.Justify]] = [("nodes", "right")]
    columns += [(name, "left") for name in ("operator", "kernel", "detail")]
    click.echo()
    console.stdout().print(console.table(columns, rows))
    if kernels.why_bodies is not None and any(node.by == "body" for node in kernels.nodes):
        click.echo(f"bodies run because {kernels.why_bodies}")
