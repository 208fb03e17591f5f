"""The end of a run on the terminal: passes, layers, size, speed, error, and the line to paste."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import click

from onnxq.cli import console
from onnxq.cli.view import ErrorView, PassView, RunView, SpeedView

_WORST = 5
_REASONS = 6


def print_run(view: RunView, *, verbose: bool) -> None:
    """Print everything that a finished run has to say on stdout."""
    print_passes(view.passes, verbose=verbose)
    if view.layers:
        worst = sorted(view.layers, key=lambda e: e.sqnr_db)[: None if verbose else _WORST]
        print_errors("Layers farthest from the float model that was quantized", worst)
    print_outputs(view.errors)
    print_outcome(view.bytes_before, view.bytes_after, view.speed)
    click.echo(view.verdict())


def print_outputs(errors: Sequence[ErrorView]) -> None:
    """Outputs against their reference, worst first; a broken one says how."""
    if not errors:
        return
    broken = any(e.flags for e in errors)
    columns: list[tuple[str, console.Justify]] = [
        ("output", "left"),
        ("cosine", "right"),
        ("least", "right"),
        ("SQNR", "right"),
        ("samples", "right"),
    ]
    if broken:
        columns.append(("broken", "left"))
    rows = [
        (
            e.name,
            f"{e.cosine:.5f}",
            "" if e.cosine_min is None else f"{e.cosine_min:.5f}",
            decibel(e.sqnr_db),
            str(e.samples),
            *((", ".join(e.flags),) if broken else ()),
        )
        for e in errors
    ]
    console.print_table("", columns, rows)


def print_outcome(
    before: int, after: int, speed: SpeedView | None, names: tuple[str, str] = ("fp32", "output")
) -> None:
    """Size and latency of two models."""
    rows = [("size", console.size(before), console.size(after), f"{before / after:.2f}x smaller")]
    if speed is not None:
        rows.append(
            (
                "latency",
                console.milliseconds(speed.before),
                console.milliseconds(speed.after),
                f"{speed.ratio:.2f}x as fast, {console.counted(speed.threads, 'thread')}"
                + (f", {speed.feeds}" if speed.feeds else "")
                + (", NOISY: the machine is busy, measure again" if speed.is_noisy else ""),
            )
        )
    columns: list[tuple[str, console.Justify]] = [
        ("", "left"),
        (names[0], "right"),
        (names[1], "right"),
        ("", "left"),
    ]
    console.print_table("", columns, rows)


def print_passes(passes: Sequence[PassView], *, verbose: bool) -> None:
    """One row a pass, with the skipped candidates grouped by reason."""
    rows: list[tuple[str, str, str, str]] = []
    for view in passes:
        lines = list(_lines(view, verbose=verbose)) or ["nothing to do"]
        rows.append((view.name, str(len(view.changed)), lines[0], f"{view.seconds:.2f}"))
        rows += [("", "", line, "") for line in lines[1:]]
    console.print_table(
        "",
        [("pass", "left"), ("changed", "right"), ("what", "left"), ("s", "right")],
        rows,
    )


def _lines(view: PassView, *, verbose: bool) -> Iterator[str]:
    """What a pass did, one line each."""
    if verbose:
        for site, what, detail in view.changed:
            yield f"{site}: {what}" + (f" ({detail})" if detail else "")
        for site, reason in view.skipped:
            yield f"left alone: {site}: {reason}"
    else:
        for count, what in view.changes():
            yield f"{count} x {what}"
        reasons = view.reasons()
        for count, reason in reasons[:_REASONS]:
            yield f"left alone: {count} x {reason}"
        if len(reasons) > _REASONS:
            rest = sum(count for count, _ in reasons[_REASONS:])
            yield f"left alone: {rest} x for other reasons (-v lists them)"
    yield from view.notes


def print_errors(title: str, errors: Sequence[ErrorView]) -> None:
    """Cosine and SQNR of values, in the order given."""
    console.print_table(
        title,
        [("value", "left"), ("op", "left"), ("cosine", "right"), ("SQNR", "right")],
        [(e.name, e.op, f"{e.cosine:.5f}", decibel(e.sqnr_db)) for e in errors],
    )


def decibel(value: float) -> str:
    """An SQNR; equal arrays have none."""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"
