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
        written: files that this invocation has finished, for the message when it is interrupted.
    """

    argv: Sequence[str] = ()
    json: bool = False
    debug: bool = False
    written: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, argv: Sequence[str]) -> State:
        """Read from raw arguments, so that errors in the arguments are shown the same way."""
        return cls(tuple(argv), json="--json" in argv, debug="--debug" in argv)

    @property
    def command(self) -> str:
        """The command line, quoted so that it can be pasted back into a shell."""
        return shlex.join(["onnxq", *self.argv])


def current() -> State:
    """The state of the command that is running."""
    found = click.get_current_context().find_object(State)
    return State() if found is None else found


def colour_wanted(tty: bool) -> bool:
    """Whether to colour text: on a terminal, unless ``NO_COLOR`` is set or it cannot."""
    return tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
