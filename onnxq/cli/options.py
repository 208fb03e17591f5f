"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
"""A path that the layers below check, so that a missing file has a code of ours."""


def common(function: F) -> F:
    """Add ``--json`` and ``--debug``; both are read from the raw arguments by ``State.of``."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )
    machine = click.option(
        "--json", "json_", is_flag=True, expose_value=False, help="Print JSON on stdout."
    )
    return machine(debug(function))


def threads(default: int | None) -> Callable[[F], F]:
    """Add ``--threads``; without a default, the layers below choose."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=default,
        show_default=default is not None,
        help="Threads that onnxruntime may use." + ("" if default else "  [default: all CPUs]"),
    )


def calibration(*, required: bool) -> Callable[[F], F]:
    """Add ``--calib`` and the options that say how to read it."""

    def add(function: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--calib",
                    metavar="DATA",
                    required=required,
                    help="Samples: a .npz, a folder of .npz or .npy, .jsonl, a text file (with "
                    "--tokenizer), an image folder (with --images), module:function, or `random`.",
                ),
                click.option(
                    "--tokenizer", type=FILE, metavar="FILE", help="tokenizer.json for text."
                ),
                click.option(
                    "--images",
                    metavar="SPEC",
                    help="How to prepare images, for example "
                    "`resize=256,crop=224,mean=127,std=128,layout=nchw`.",
                ),
                click.option(
                    "--samples",
                    type=click.IntRange(min=1),
                    help="Samples to use, spread evenly over the data.  [default: all]",
                ),
                click.option(
                    "--max-length",
                    type=click.IntRange(min=1),
                    help="Tokens that a text is cut to.  [default: 128]",
                ),
            )
        ):
            function = option(function)
        return function

    return add
