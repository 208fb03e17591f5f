"""``onnxq formats``: the number formats and how well each keeps a reference tensor."""

from __future__ import annotations

import click

from onnxq.cli.options import common


@click.command("formats", short_help="List the number formats.")
@click.option(
    "--table", "measured", is_flag=True, help="Measure each format on Gaussian and heavy tails."
)
@common
def command(measured: bool) -> None:
    """List the number formats; with --table, the signal-to-noise ratio that each keeps."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.formats.table import sqnr_table

    rows = sqnr_table() if measured else []
    if current().json:
        for row in rows:
            console.emit(row)
