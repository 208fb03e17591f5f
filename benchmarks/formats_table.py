"""Claim: every codec keeps the signal-to-noise ratio that other code measured for its format.

    python benchmarks/formats_table.py                 the table
    python benchmarks/formats_table.py --json          one object a line
    python benchmarks/formats_table.py --docs docs     also rewrite docs/formats.md's table and plot

2**20 samples of unit variance, seed 0. The peer figures were measured with other implementations
(microxcaling, fouroversix, bitsandbytes' table, plain numpy) before these codecs were written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from onnxq.formats import parse_format
from onnxq.formats.table import SqnrRow, sqnr_table

PEER = {
    "mxint8": 41.66, "mxfp8e4m3": 30.64, "mxfp8e5m2": 25.35, "mxfp6e2m3": 30.94,
    "mxfp6e3m2": 25.35, "mxfp4": 18.79, "mxfp4-ceil": 18.76, "mxfp4-43": 18.58,
    "mxfp4-auto": 19.05, "nvfp4": 20.44, "nvfp4-46": 21.22, "int4g128": 18.60,
    "int4g32": 20.27, "int4g32full": 21.31, "int4g128asym": 19.95, "int4g32asym": 21.86,
    "nf4": 20.73, "int3g128asym": 13.33, "int2g64asym": 6.80, "mx9": 46.53, "mx6": 28.31,
    "mx4": 15.72,
}  # fmt: skip
PLOTTED = (
    "binary", "ternary", "seq2", "int2", "int3", "int4", "fp4ieee", "fp4", "nf4", "log2",
    "logsqrt2", "mx4", "int6", "fp6e2m3", "fp6e3m2", "mx6", "int8", "fp8e2m5", "fp8e3m4",
    "fp8e4m3", "fp8e5m2",
)  # fmt: skip
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
LEFT, WIDTH, ROW, TICK = 80, 640, 16, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--docs", type=Path, help="folder of formats.md and images/")
    arguments = parser.parse_args()
    rows = sqnr_table()
    for row in rows:
        print(json.dumps(record(row)) if arguments.json else line(row))
    if arguments.docs:
        page = arguments.docs / "formats.md"
        head, rest = page.read_text().split(BEGIN)
        page.write_text(head + BEGIN + markdown(rows) + END + rest.split(END)[1])
        (arguments.docs / "images" / "formats.svg").write_text(plot())


def record(row: SqnrRow) -> dict[str, object]:
    peer = PEER.get(row.format)
    return {
        "case": f"sqnr {row.format} normal",
        "ours": round(row.normal, 3),
        "peer": peer,
        "peer_name": "reference implementation" if peer else None,
        "ratio": round(row.normal / peer, 4) if peer else None,
        "unit": "dB",
        **row.to_json(),
    }


def line(row: SqnrRow) -> str:
    figures = f"{row.normal:7.2f} {row.laplace:7.2f} {row.student_t5:7.2f}"
    peer = PEER.get(row.format)
    return f"{row.format:14} {row.bits_per_element:6.3f} {figures}" + (
        f"   reference {peer:5.2f}" if peer else ""
    )


def markdown(rows: list[SqnrRow]) -> str:
    lines = [
        "| format | bits per element | normal | Laplace | Student t5 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.format}` | {r.bits_per_element:.3f} | {r.normal:.2f} | {r.laplace:.2f} "
        f"| {r.student_t5:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def plot() -> str:
    """Levels of each format, divided by the largest, as ticks on a line from -1 to 1."""
    height = ROW * (len(PLOTTED) + 1)
    body = []
    for i, name in enumerate(PLOTTED):
        levels = parse_format(name).levels()
        places = LEFT + (levels / np.abs(levels).max() + 1) * WIDTH / 2
        top = i * ROW + 3
        ticks = "".join(f"M{x:.1f} {top}v{TICK}" for x in np.unique(np.round(places, 1)))
        body.append(f'<text x="{LEFT - 10}" y="{top + TICK - 1}">{name}</text><path d="{ticks}"/>')
    axis = "".join(
        f'<text x="{LEFT + (v + 1) * WIDTH / 2 + 8:g}" y="{height - 2}">{v:g}</text>'
        for v in (-1, -0.5, 0, 0.5, 1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        'font-family="monospace" font-size="11" text-anchor="end">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        '<g stroke="#1f6feb" stroke-width="0.8" fill="none">'
        f"<style>text{{stroke:none;fill:#333}}</style>\n{chr(10).join(body)}\n{axis}</g></svg>\n"
    )


if __name__ == "__main__":
    main()
