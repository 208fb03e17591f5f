"""The report page: no script, no outside asset, readable on a phone, light and dark."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from onnxq.cli.console import alike, counted, milliseconds, size
from onnxq.cli.report import drawings
from onnxq.cli.view import ErrorView, PassView, RunView
from onnxq.errors import DataError

_WORST: Final = 12
_HISTOGRAMS: Final = 12


def write(view: RunView, path: Path) -> None:
    """Write the page to ``path`` in one atomic step.

    Raises:
        DataError: the folder is missing or cannot be written.
    """
    check_writable(path)
    text = page(view)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a path that a report cannot be written to, before the work begins.

    Raises:
        DataError: the folder is missing or cannot be written, or ``path`` is a folder.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(
            "DATA-REPORT-UNWRITABLE",
            f"the report {path} cannot be written",
            "name a file in a folder that exists and that you may write",
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def page(view: RunView) -> str:
    """The whole page."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _head(view),
            _tiles(view),
            _passes(view.passes),
            _precision(view),
            _layers(view.layers),
            _histograms(view),
            _weights(view),
            _provenance(view),
        )
    )
    title = escape(f"{Path(view.output).name}: onnxq report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _head(view: RunView) -> str:
    warnings = "".join(f'<p class="warning">{escape(w)}</p>' for w in view.warnings)
    return (
        f'<header><p class="eyebrow">onnxq report</p><h1>{escape(Path(view.output).name)}</h1>'
        f'<p class="lead"><strong>Passed.</strong> {escape(Path(view.source).name)} through '
        f"<code>{escape(view.pipeline)}</code> for {escape(view.target)}, in "
        f"{view.seconds:.1f} s.</p>{warnings}</header>\n"
    )


def _tile(name: str, big: str, unit: str, note: str) -> str:
    return (
        f'<div class="tile"><dt>{escape(name)}</dt><dd><span class="big">{escape(big)}</span> '
        f'<span class="unit">{escape(unit)}</span></dd><dd class="note">{escape(note)}</dd></div>'
    )


def _decibel(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"


def _tiles(view: RunView) -> str:
    ratio = view.bytes_before / view.bytes_after
    after, unit = size(view.bytes_after).split()
    tiles = [_tile("Size", after, unit, f"{ratio:.2f}x smaller than {size(view.bytes_before)}")]
    if view.speed is not None:
        fast = view.speed
        note = (
            f"{milliseconds(fast.after)} against {milliseconds(fast.before)}, "
            f"{counted(fast.threads, 'thread')}"
        )
        tiles.append(_tile("Speed", f"{fast.ratio:.2f}", "x fp32", note))
    if view.worst is not None:
        tiles.append(
            _tile(
                "Cosine",
                f"{view.worst.cosine:.5f}",
                "",
                f"to fp32, mean of {counted(view.worst.samples, 'sample')}",
            )
        )
        tiles.append(_tile("SQNR", _decibel(view.worst.sqnr_db), "dB", f"output {view.worst.name}"))
    if view.weight_bits is not None:
        tiles.append(_tile("Weights", f"{view.weight_bits:.2f}", "bits", "mean of a weight"))
    quantized = sum(c.mode != "float" for c in view.cells)
    if view.cells:
        note = f"{len(view.cells) - quantized} stay in float"
        tiles.append(_tile("Operators", str(quantized), "quantized", note))
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n'


def _passes(passes: Sequence[PassView]) -> str:
    rows = "".join(_pass_row(p) for p in passes)
    return (
        "<h2>Passes</h2><p>What each pass changed, and what it left alone and why.</p>"
        '<div class="scroll"><table><thead><tr><th>pass</th><th class="n">changed</th>'
        '<th>what</th><th class="n wide-only">skipped</th><th class="n wide-only">s</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>\n"
        + "".join(
            f"<h3>{escape(curve.title)}</h3><p>Trials of <span class=mono>{escape(p.spec)}</span>; "
            f"the ring is what was chosen.</p>{drawings.curve(curve)}\n"
            for p in passes
            for curve in p.curves
        )
    )


def _pass_row(view: PassView) -> str:
    what = "".join(f"<div>{n} x {escape(text)}</div>" for n, text in view.changes())
    what += "".join(f"<div>{escape(note)}</div>" for note in view.notes)
    what = what or ("" if view.skipped else "<div>nothing to do</div>")
    sites: dict[str, list[str]] = {}
    for site, reason in view.skipped:
        sites.setdefault(alike(reason), []).append(site)
    for count, reason in view.reasons():
        names = "".join(f"<li class=mono>{escape(s)}</li>" for s in sites[alike(reason)])
        what += (
            f'<details><summary>left alone: {escape(reason)} <span class="count">{count}</span>'
            f"</summary><ul>{names}</ul></details>"
        )
    return (
        f'<tr><td><span class="mono">{escape(view.spec)}</span></td>'
        f'<td class="n">{len(view.changed)}</td><td class="name">{what}</td>'
        f'<td class="n wide-only">{len(view.skipped)}</td>'
        f'<td class="n wide-only">{view.seconds:.2f}</td></tr>'
    )


def _precision(view: RunView) -> str:
    if not view.cells:
        return ""
    count = drawings.changes(view.cells)
    return (
        "<h2>Where precision changes</h2>"
        f"<p>Operators in graph order. Activations change precision "
        f"{counted(count, 'time')}.</p>"
        f"{drawings.legend(view.cells)}{drawings.strip(view.cells)}\n"
    )


def _layers(layers: Sequence[ErrorView]) -> str:
    ordered = sorted(layers, key=lambda e: e.sqnr_db)[:_WORST]
    if not ordered:
        return ""
    finite = [e.sqnr_db for e in layers if math.isfinite(e.sqnr_db)]
    top = max([*finite, 1.0])
    rows = "".join(
        f'<tr><td class="name mono">{escape(e.name)}</td><td class="wide-only">{escape(e.op)}</td>'
        f'<td class="n">{_decibel(e.sqnr_db)}</td><td class="n">{e.cosine:.5f}</td>'
        f'<td class="bar"><i{" class=low" if e.sqnr_db < 10 else ""} '
        f'style="width:{max(1.0, 100 * min(e.sqnr_db, top) / top):.1f}%"></i></td></tr>'
        for e in ordered
    )
    plot = drawings.layer_plot(layers, {e.name for e in ordered})
    return (
        "<h2>Layers</h2><p>Signal to quantization noise of each value, in dB, against the float "
        "model that was quantized: more is better, 20 dB is one part in ten. The error of a layer "
        "holds what the layers before it lost.</p>"
        f"<figure>{plot}<figcaption>All {len(layers)} layers in graph order, the worst "
        f"{len(ordered)} marked</figcaption></figure>"
        '<div class="scroll"><table><thead><tr><th>worst layers</th><th class="wide-only">op</th>'
        '<th class="n">SQNR dB</th><th class="n">cosine</th><th></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _histograms(view: RunView) -> str:
    if not view.histograms:
        return ""
    figures = [
        f"<figure>{drawings.histogram(h)}<figcaption><span class=mono>{escape(h.name)}</span><br>"
        f"{escape(h.label)}, {h.lo:.4g} to {h.hi:.4g}, {100 * h.clipped:.3g} % clipped"
        "</figcaption></figure>"
        for h in sorted(view.histograms, key=lambda h: -h.clipped)
    ]
    first, rest = figures[:_HISTOGRAMS], figures[_HISTOGRAMS:]
    more = (
        f"<details><summary>{len(rest)} more</summary>"
        f'<div class="multiples">{"".join(rest)}</div></details>'
        if rest
        else ""
    )
    return (
        "<h2>Ranges</h2><p>What calibration saw of each activation, on a square-root scale, and "
        "the range that was chosen (between the lines). Most clipped first.</p>"
        f'<div class="multiples">{"".join(first)}</div>{more}\n'
    )


def _weights(view: RunView) -> str:
    if not view.weights_after:
        return ""
    total = sum(view.weights_before.values())
    return (
        "<h2>Weights</h2><p>Bytes by type, before and after, at one scale.</p>"
        f"<figure>{drawings.stacked(view.weights_before, total)}<figcaption>before, {size(total)}"
        f"</figcaption></figure><figure>{drawings.stacked(view.weights_after, total)}<figcaption>"
        f"after, {size(sum(view.weights_after.values()))}</figcaption></figure>\n"
    )


def _provenance(view: RunView) -> str:
    facts = {"model": view.source, "output": view.output, "pipeline": view.pipeline}
    rows = "".join(
        f"<dt>{escape(k)}</dt><dd class=mono>{escape(v)}</dd>"
        for k, v in {**facts, **view.provenance}.items()
    )
    return (
        "<h2>Provenance</h2><p>The same is stored in the model's metadata.</p>"
        f'<dl class="facts">{rows}</dl><pre>{escape(view.command)}</pre>\n'
    )
