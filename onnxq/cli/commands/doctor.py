"""``onnxq doctor``: what this machine has, and what is wrong with it."""

from __future__ import annotations

import click

from onnxq.cli.options import common


@click.command("doctor", short_help="Check this machine: packages, kernels, CPU.")
@common
def command() -> int:
    """Check this machine: packages, kernels, CPU. Leaves exit code 6 when something is wrong."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.errors import UnsupportedError
    from onnxq.runtime import doctor

    report = doctor()
    if current().json:
        console.emit({**report.to_json(), "healthy": report.healthy})
    else:
        click.echo("\n".join(report.lines()))
    return 0 if report.healthy else UnsupportedError.exit_code
