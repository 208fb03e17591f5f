"""The page's drawings, as inline SVG that takes its colours from the page's style."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from onnxq.cli.console import size
from onnxq.cli.view import CellView, ErrorView, HistogramView

if TYPE_CHECKING:
    from onnxq.passes.contract import Curve

_GLYPHS: Final = {
    "MatMul": "M",
    "Gemm": "M",
    "MatMulInteger": "M",
    "MatMulNBits": "M",
    "Conv": "C",
    "ConvInteger": "C",
    "ConvTranspose": "C",
    "Clip": "R",
    "Relu": "R",
    "Gather": "E",
    "Softmax": "S",
    "Add": "+",
    "Mul": "x",
    "layernorm": "N",
    "rmsnorm": "N",
    "LayerNormalization": "N",
    "Attention": "A",
}
"""One letter for each frequent operator; others show their own first letter."""

_CELL: Final = 22
_BINS: Final = 72


def glyph(op: str) -> str:
    """The letter that stands for ``op`` in the strip."""
    return _GLYPHS.get(op, op[:1].upper())


def tone(cell: CellView) -> str:
    """CSS class of a cell: how it computes."""
    if cell.mode == "static" and "16" in cell.activation:
        return "wide"
    return cell.mode


def strip(cells: Sequence[CellView]) -> str:
    """Operators in graph order, one row a block of the model, with Q/DQ borders between them."""
    rows: list[str] = []
    previous = "float"
    for name, members in blocks(cells):
        rows.append(f'<div class="row mono">{escape(name)}</div><div class="cells">')
        for cell in members:
            rows.append(_cell(cell, previous))
            previous = cell.activation
        rows.append("</div>")
    return f'<div class="strip">{"".join(rows)}</div>'


def _cell(cell: CellView, previous: str) -> str:
    """A square with the operator's letter; a bar at its left where the precision changes."""
    weights = f", weights {cell.weight}" if cell.weight else ""
    why = f" ({cell.why})" if cell.why else ""
    hint = f"{cell.name}: {cell.op}, activations {cell.activation}{weights}{why}"
    border = ""
    if cell.activation != previous:
        border = f'<rect class="edge" x="1" y="-1" width="2" height="{_CELL + 2}"/>'
    ink = "off" if cell.mode == "float" else "on"
    stripe = ""
    if cell.weight and cell.weight != "float":
        stripe = f'<rect class="w" x="8" y="{_CELL - 4}" width="{_CELL - 7}" height="1.5"/>'
    return (
        f'<svg width="{_CELL + 6}" height="{_CELL}" viewBox="0 0 {_CELL + 6} {_CELL}" role="img">'
        f"<title>{escape(hint)}</title>{border}"
        f'<rect class="{tone(cell)}" x="5" y="0" width="{_CELL - 1}" height="{_CELL}" rx="1.5"/>'
        f'<text class="{ink}" x="{_CELL / 2 + 4.5:g}" y="14.5" text-anchor="middle">'
        f"{escape(glyph(cell.op))}</text>{stripe}</svg>"
    )


def blocks(cells: Sequence[CellView]) -> list[tuple[str, list[CellView]]]:
    """Consecutive cells of one block of the model, by the first number in their names.

    A cell without a number (a residual add that an exporter named by count, say) stays with the
    cells before it. Models whose names say nothing get rows of two dozen cells.
    """
    found: list[tuple[str, list[CellView]]] = []
    for cell in cells:
        key = _block(cell.name)
        if found and (key == found[-1][0] or not key):
            found[-1][1].append(cell)
        else:
            found.append((key, [cell]))
    if len(found) > len(cells) / 3 or any(len(members) > 60 for _, members in found):
        step = 24
        return [
            (f"{i + 1} to {min(i + step, len(cells))}", list(cells[i : i + step]))
            for i in range(0, len(cells), step)
        ]
    return [(key or "input", members) for key, members in found]


def _block(name: str) -> str:
    """``encoder.layer.3`` of ``/encoder/layer.3/attention/MatMul``; empty without a number."""
    match = re.match(r"^/?(.*?[./_](?:layers?|blocks?|h|stages?)[./_]?\d+)(?=[./_]|$)", name)
    if match is None:
        match = re.match(r"^/?((?:layers?|blocks?|h|stages?)[./_]?\d+)(?=[./_]|$)", name)
    if match is not None:
        return match.group(1).strip("/").replace("/", ".")
    head = re.split(r"[./]", name.strip("/"))[0]
    return "" if re.search(r"\d", head) or not re.search(r"[./]", name) else head


def legend(cells: Iterable[CellView]) -> str:
    """What the colours and letters of the strip mean; only those that occur."""
    names = {
        "static": "integer, fixed ranges",
        "wide": "16-bit integer",
        "dynamic": "integer, ranges at run time",
        "weights": "integer weights, float arithmetic",
        "float": "float",
    }
    cells = list(cells)
    present = {tone(c) for c in cells}
    items = [
        f'<li><svg width="11" height="11"><rect class="{key}" width="11" height="11" rx="1.5"/>'
        f"</svg>{text}</li>"
        for key, text in names.items()
        if key in present
    ]
    letters: dict[str, list[str]] = {}
    for op in dict.fromkeys(c.op for c in cells):
        letters.setdefault(glyph(op), []).append(op)
    keys = "; ".join(f"{letter} {', '.join(ops)}" for letter, ops in letters.items())
    items.append("<li>a bar before a cell: Q or DQ border</li>")
    return f'<ul class="legend">{"".join(items)}</ul><p class="legend">{escape(keys)}</p>'


def layer_plot(layers: Sequence[ErrorView], worst: set[str]) -> str:
    """SQNR of every layer in graph order, in dB; the worst ones stand out."""
    finite = [e.sqnr_db for e in layers if math.isfinite(e.sqnr_db)]
    if not finite:
        return ""
    top = max(10.0, math.ceil(max(finite) / 10) * 10)
    bottom = min(0.0, math.floor(min(finite) / 10) * 10)
    width, height, left = 960, 190, 34
    step = (width - left) / len(layers)

    def y(value: float) -> float:
        return 10 + (height - 20) * (top - min(max(value, bottom), top)) / (top - bottom)

    parts = []
    tick = bottom
    while tick <= top:
        parts.append(
            f'<line class="axis" x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:.0f}</text>'
        )
        tick += 10 if top - bottom <= 60 else 20
    for i, layer in enumerate(layers):
        value = layer.sqnr_db if math.isfinite(layer.sqnr_db) else top
        start, stop = sorted((y(value), y(0.0)))
        tone_ = "low" if layer.name in worst else "static"
        parts.append(
            f'<rect class="{tone_}" x="{left + i * step + 0.1 * step:.2f}" y="{start:.1f}" '
            f'width="{max(0.5, 0.8 * step):.2f}" height="{max(0.5, stop - start):.1f}">'
            f"<title>{escape(layer.name)}: {layer.sqnr_db:.1f} dB</title></rect>"
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="SQNR of each layer in dB">{"".join(parts)}</svg>'
    )


def curve(view: Curve) -> str:
    """The points of a trade-off, joined, with the chosen one ringed and the limit dashed."""
    width, height, left, base = 960, 260, 62, 206
    xs = [x for x, _, _ in view.points]
    ys = [y for _, y, _ in view.points if math.isfinite(y)]
    ys += [view.limit] if view.limit is not None else []
    (x_lo, x_hi), (y_lo, y_hi) = _padded(xs), _padded(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, y_lo), y_hi)
        return (
            left + (width - left - 12) * (x - x_lo) / (x_hi - x_lo),
            10 + (base - 10) * (y_hi - y) / (y_hi - y_lo),
        )

    parts = []
    for step in range(5):
        x, y = x_lo + step * (x_hi - x_lo) / 4, y_lo + step * (y_hi - y_lo) / 4
        at, level = place(x, y)
        parts.append(
            f'<line class="axis" x1="{left}" x2="{width}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<text x="{left - 6}" y="{level + 3.5:.1f}" text-anchor="end">{y:.4g}</text>'
            f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{x:.4g}</text>'
        )
    spots = [place(x, y) for x, y, _ in view.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    for (x, y), (_, value, what) in zip(spots, view.points, strict=True):
        hint = escape(f"{what}: {value:.4g}")
        parts.append(
            f'<circle class="static" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{hint}</title></circle>'
        )
    x, y = place(*view.chosen)
    parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    if view.limit is not None:
        _, level = place(x_lo, view.limit)
        parts.append(
            f'<line class="limit" x1="{left}" x2="{width}" y1="{level:.1f}" y2="{level:.1f}"/>'
        )
    parts.append(f'<text x="{left}" y="{height - 18}">{escape(view.x_label)}</text>')
    parts.append(f'<text x="{left}" y="{height - 3}">vertical: {escape(view.y_label)}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(view.title, quote=True)}">{"".join(parts)}</svg>'
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Least and most, with some room on both sides."""
    lo, hi = min(values, default=0.0), max(values, default=1.0)
    room = 0.04 * (hi - lo) or 0.5
    return lo - room, hi + room


def histogram(view: HistogramView) -> str:
    """Counts on a square-root scale over the seen range; the chosen range is what is blue."""
    bars, lo, hi = rebin(view, _BINS)
    width, height, base = 260, 84, 66
    top = max(bars) or 1.0
    span = hi - lo or 1.0
    step = width / len(bars)

    def x(value: float) -> float:
        return width * (value - lo) / span

    parts = []
    for i, count in enumerate(bars):
        tall = base * math.sqrt(count / top)
        middle = lo + (i + 0.5) * span / len(bars)
        inside = view.lo <= middle <= view.hi
        if count:
            parts.append(
                f'<rect class="{"static" if inside else "low"}" x="{i * step:.1f}" '
                f'y="{base - max(tall, 0.7):.1f}" width="{step * 0.9:.2f}" '
                f'height="{max(tall, 0.7):.1f}"/>'
            )
    for edge in (view.lo, view.hi):
        if lo <= edge <= hi:
            parts.append(
                f'<line class="mark" x1="{x(edge):.1f}" x2="{x(edge):.1f}" y1="0" y2="{base + 4}" '
                f'stroke-width="1"/>'
            )
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text x="0" y="{height - 3}">{lo:.3g}</text>')
    parts.append(f'<text x="{width}" y="{height - 3}" text-anchor="end">{hi:.3g}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="histogram of {escape(view.name, quote=True)}">{"".join(parts)}</svg>'
    )


def rebin(view: HistogramView, bins: int) -> tuple[list[float], float, float]:
    """``bins`` equal bins over the part of the histogram that holds elements."""
    used = [i for i, count in enumerate(view.counts) if count]
    if not used:
        return [0.0] * bins, view.lo, view.hi
    lo = min(view.edges[used[0]], view.lo)
    hi = max(view.edges[used[-1] + 1], view.hi)
    span = hi - lo or 1.0
    bars = [0.0] * bins
    for i in used:
        left = (view.edges[i] - lo) / span * bins
        right = (view.edges[i + 1] - lo) / span * bins
        first, last = int(left), min(bins - 1, int(math.nextafter(right, left)))
        for j in range(first, last + 1):
            share = min(right, j + 1) - max(left, j)
            bars[j] += view.counts[i] * (share / (right - left) if right > left else 1.0)
    return bars, lo, hi


def stacked(weights: Mapping[str, int], total: int) -> str:
    """Bytes by dtype as one bar, its full length being ``total`` bytes."""
    width, x = 960.0, 0.0
    parts = []
    for name, count in sorted(weights.items(), key=lambda item: -item[1]):
        wide = width * count / total if total else 0.0
        parts.append(
            f'<rect class="{_weight_tone(name)}" x="{x:.1f}" y="0" '
            f'width="{max(0.0, wide - 1):.1f}" height="26">'
            f"<title>{escape(name)} {size(count)}</title></rect>"
        )
        if wide > 110:
            ink = "off" if _weight_tone(name) == "float" else "on"
            parts.append(
                f'<text class="{ink}" x="{x + 8:.1f}" y="17">{escape(name)} {size(count)}</text>'
            )
        x += wide
    return f'<svg viewBox="0 0 960 26" width="960" height="26" role="img">{"".join(parts)}</svg>'


def _weight_tone(dtype: str) -> str:
    if dtype.startswith(("float", "bfloat", "double")) and not dtype.startswith("float8"):
        return "float"
    if "4" in dtype and "64" not in dtype:
        return "weights"
    return "static" if "8" in dtype else "wide"


def changes(cells: Sequence[CellView]) -> int:
    """How often the precision of activations changes along the graph, from a float input on."""
    formats = ["float", *(cell.activation for cell in cells)]
    return sum(a != b for a, b in pairwise(formats))
