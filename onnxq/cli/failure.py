"""How an error looks, and which exit code it leaves.

``error[CODE]: cause``, the place in the text when there is one, and what to do. With ``--json`` the
same facts are one object on stdout. The codes 0 to 70 are those of :mod:`onnxq.errors`; an
interrupted command leaves 128 plus the signal's number, as a shell expects.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from onnxq.cli.state import State, colour_wanted
from onnxq.errors import DataError, InternalError, OnnxqError, SpecError, UnsupportedError


class Terminated(KeyboardInterrupt):
    """Raised where SIGTERM arrives, so that it unwinds like Ctrl-C and temporary files go."""


def install_sigterm() -> None:
    """Let SIGTERM unwind the stack instead of killing the process on the spot."""

    def handler(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return  # only the main thread may set handlers; an embedding program keeps its own


def classify(error: Exception) -> OnnxqError:
    """``error`` as an error with a code; what nobody foresaw is INTERNAL."""
    match error:
        case OnnxqError():
            return error
        case click.UsageError():
            return _usage(error)
        case click.ClickException():
            return SpecError("USAGE", _sentence(error.format_message()))
        case MemoryError():
            return UnsupportedError(
                "UNSUPPORTED-MEMORY",
                "there is not enough memory",
                "use fewer or shorter samples, or a machine with more memory",
            )
        case ModuleNotFoundError(name=str(name)) if name.split(".")[0] != "onnxq":
            return UnsupportedError(
                "UNSUPPORTED-PACKAGE",
                f"the package `{name.split('.')[0]}` is not installed",
                "install it, or see `onnxq doctor` for the extras of onnxq",
            )
        case OSError() if error.errno is not None and error.filename is not None:
            return DataError(
                "DATA-IO", f"{error.filename}: {os.strerror(error.errno)}", "check the path"
            )
        case OSError() if error.errno is not None:
            return DataError("DATA-IO", os.strerror(error.errno), "check the disk and the paths")
        case _:
            return _internal(error)


def _usage(error: click.UsageError) -> SpecError:
    where = "onnxq" if error.ctx is None else error.ctx.command_path
    message = error.format_message()
    hint = f"see `{where} --help`"
    if "unexpected extra argument" in message and "," in message:
        hint = f"quote the text of --passes: the shell expands {{a,b}}; {hint}"
    return SpecError("USAGE", _sentence(message), hint)


def _internal(error: Exception) -> InternalError:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "onnxq" in Path(f.filename).parts or "passes" in f.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    text = " ".join(str(error).split()) or "no message"
    return InternalError(
        "INTERNAL",
        f"{type(error).__name__}: {text[:400]}{place}",
        "this is a bug in onnxq: run again with --debug and report what it prints",
    )


def _sentence(text: str) -> str:
    """A message in the style of our own causes: one line, small first letter, no full stop."""
    line = " ".join(text.split()).rstrip(".")
    return line[:1].lower() + line[1:]


def render(error: OnnxqError, *, colour: bool) -> str:
    """The block that a user sees."""

    def paint(text: str, **style: object) -> str:
        return click.style(text, **style) if colour else text  # type: ignore[arg-type]

    lines = [
        paint(f"error[{error.code}]", fg="red", bold=True) + paint(f": {error.cause}", bold=True)
    ]
    span = error.span if isinstance(error, SpecError) else None
    if span is not None:
        text, carets = _window(span.text, span.start, span.stop)
        lines += [f"  | {text}", "  | " + paint(carets, fg="red", bold=True)]
    if error.hint:
        lines.append(paint("  hint", fg="cyan", bold=True) + f": {error.hint}")
    return "\n".join(lines)


def _window(text: str, start: int, stop: int, width: int = 72) -> tuple[str, str]:
    """The part of a long text around the span, and the carets below it."""
    first = text.rfind("\n", 0, start) + 1
    end = text.find("\n", start)
    line = text[first : len(text) if end < 0 else end]
    start, stop = start - first, min(stop - first, len(line))
    cut = max(0, min(start - width // 3, len(line) - width))
    shown = line[cut : cut + width]
    head = "..." if cut else ""
    tail = "..." if cut + width < len(line) else ""
    carets = " " * (len(head) + start - cut) + "^" * max(1, min(stop, cut + width) - start)
    return head + shown + tail, carets


def leave_with(error: Exception, state: State) -> int:
    """Print ``error`` and say which exit code it has."""
    if state.debug:
        traceback.print_exception(error, file=sys.stderr)
    known = classify(error)
    if state.json:
        click.echo(json.dumps(known.to_json(), default=str))
    click.echo(render(known, colour=colour_wanted(sys.stderr.isatty())), err=True)
    return known.exit_code


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that ``error`` was made of.

    A signal that arrives while a compiled module is imported becomes an ``ImportError``.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def leave_interrupted(error: BaseException, state: State) -> int:
    """Say what an interrupted command left behind."""
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    done = ", ".join(str(path) for path in state.written)
    click.echo(
        f"interrupted: {done} is complete" if done else "interrupted: nothing was written", err=True
    )
    return 128 + number


def leave_broken_pipe() -> int:
    """The reader went away (``onnxq passes | head``): be quiet, as every filter is."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    return 128 + signal.SIGPIPE
