"""``onnxq formats``: the number formats, and how well each keeps random data."""

from __future__ import annotations

import click

from onnxq.cli.options import common


@click.command("formats", short_help="List the number formats.")
@click.option("--table", "measured", is_flag=True, help="Measure what each format keeps.")
@click.option(
    "--samples",
    type=click.IntRange(min=1024),
    default=1 << 20,
    show_default=True,
    help="Random numbers drawn for --table.",
)
@common
def command(measured: bool, samples: int) -> None:
    """List the number formats and their bits per element, scales included.

    With --table, also the signal-to-quantization-noise ratio in dB on normal, Laplace and Student-t
    samples, each format with its default granularity.
    """
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.formats.parse import parse_format
    from onnxq.formats.table import TABLE_FORMATS, sqnr_table

    columns: list[tuple[str, console.Justify]] = [("format", "left"), ("bits", "right")]
    if measured:
        found = sqnr_table(samples=samples)
        records = [row.to_json() for row in found]
        columns += [("normal", "right"), ("Laplace", "right"), ("Student t5", "right")]
        rows = [
            (
                row.format,
                f"{row.bits_per_element:.3g}",
                *(f"{value:.2f}" for value in (row.normal, row.laplace, row.student_t5)),
            )
            for row in found
        ]
    else:
        formats = [parse_format(name) for name in TABLE_FORMATS]
        bits = [fmt.bits_per_element((samples,)) for fmt in formats]
        records = [
            {"format": str(f), "bits_per_element": b} for f, b in zip(formats, bits, strict=True)
        ]
        rows = [(str(f), f"{b:.3g}") for f, b in zip(formats, bits, strict=True)]
    if current().json:
        for record in records:
            console.emit(record)
        return
    console.print_table("SQNR in dB" if measured else "", columns, rows)
