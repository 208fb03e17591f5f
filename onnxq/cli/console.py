"""Writing results: tables on stdout, JSON lines on stdout, notices and progress on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from onnxq.cli.state import colour_wanted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxq.passes.contract import Progress

PIPE_WIDTH: Final = 160
"""Columns when stdout is no terminal: wide enough that no cell is cut."""

Justify = Literal["left", "right"]


def stdout() -> Console:
    """A console for results; it never guesses colours into names and numbers."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_WIDTH if piped else None, highlight=False, markup=False, emoji=False)


def emit(record: Mapping[str, Any]) -> None:
    """Print one JSON object as one line on stdout."""
    click.echo(json.dumps(record, default=_plain, allow_nan=False))


def _plain(value: Any) -> Any:
    """Numpy scalars, paths, tuples and sets as JSON has them."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no number for it."""
    return value if value is not None and abs(value) < float("inf") else None


def notice(text: str, *, loud: bool = False) -> None:
    """One line for the user on stderr; a loud one is a warning."""
    head = "warning: " if loud else ""
    if loud and colour_wanted(sys.stderr.isatty()):
        head = click.style(head, fg="yellow", bold=True)
    click.echo(head + text, err=True)


def print_table(
    title: str,
    columns: Sequence[tuple[str, Justify]],
    rows: Iterable[Sequence[str]],
) -> None:
    """Print a table under its title on stdout, and an empty line."""
    out = stdout()
    if title:
        out.print(title, style="bold", soft_wrap=True)
    out.print(table(columns, rows))
    out.print()


def table(columns: Sequence[tuple[str, Justify]], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a quiet frame; numbers are right-aligned by the caller's ``columns``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        show_edge=False,
    )
    for index, (name, justify) in enumerate(columns):
        made.add_column(
            name,
            justify=justify,
            no_wrap=justify == "right",
            overflow="fold",
            ratio=None,
            min_width=(4 if index else 6) if name else None,
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks and the tables in the README have them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def milliseconds(seconds: float) -> str:
    """A duration with three significant digits."""
    value = seconds * 1000
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} ms"


def counted(count: int, what: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


_PARTICULAR: Final = re.compile(r"(?<!\S)(?:\S*/\S+|[-+]?\d[\d.,]*(?:e[-+]?\d+)?)(?=[\s,;:]|$)")
"""Words that differ between like sites: paths of nodes, and numbers."""


def alike(text: str) -> str:
    """``text`` without the names and numbers that belong to one site only."""
    return _PARTICULAR.sub("...", text)


def grouped(texts: Iterable[str]) -> list[tuple[int, str]]:
    """Like texts counted, the most frequent first; what differs between them is left out."""
    members: dict[str, list[str]] = {}
    for text in texts:
        members.setdefault(alike(text), []).append(text)
    found = [(len(same), same[0] if len(set(same)) == 1 else key) for key, same in members.items()]
    return sorted(found, key=lambda item: (-item[0], item[1]))


@contextmanager
def progress() -> Iterator[Progress]:
    """One live line on stderr while work goes on; silence when stderr is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        from onnxq.passes.contract import no_progress

        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    name = TextColumn(
        "{task.description}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
    )
    live = Progress(
        SpinnerColumn(),
        name,
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        expand=True,
    )
    with live:
        task = live.add_task("", total=None, count="")

        def update(what: str, done: int, total: int | None) -> None:
            count = "" if total is None else f"{done}/{total}"
            live.update(task, description=what, completed=done, total=total, count=count)

        yield update
