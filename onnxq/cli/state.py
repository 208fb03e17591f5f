"""What one invocation of the command line knows about itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click


@dataclass
class State:
    """Settings that every command shares, read once from the arguments.

    Args:
        argv: the arguments as they were typed, without the program's name.
        json: machine-readable results on stdout.
        debug: show the traceback of an error.
        watched: outputs, and what lay in their places at the start.
    """

    argv: Sequence[str] = ()
    json: bool = False
    debug: bool = False
    watched: dict[Path, tuple[int, int] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, argv: Sequence[str]) -> State:
        """Read from raw arguments, so that errors in the arguments are shown the same way."""
        return cls(tuple(argv), json="--json" in argv, debug="--debug" in argv)

    def watch(self, *paths: Path) -> None:
        """Remember what is at ``paths`` now; outputs are replaced in one step, at the end."""
        self.watched.update({path: _identity(path) for path in paths})

    @property
    def written(self) -> list[Path]:
        """The outputs that this invocation has replaced, for the message of an interruption."""
        return [p for p, old in self.watched.items() if _identity(p) not in (None, old)]

    @property
    def command(self) -> str:
        """The command line, quoted so that it can be pasted back into a shell."""
        return shlex.join(["onnxq", *self.argv])


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes when a file is replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def current() -> State:
    """The state of the command that is running."""
    found = click.get_current_context().find_object(State)
    return State() if found is None else found


def colour_wanted(tty: bool) -> bool:
    """Whether to colour text: on a terminal, unless ``NO_COLOR`` is set or it cannot."""
    return tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
