"""``python -m onnxq.cli.manual``: docs/cli.md, written from the commands' own help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from onnxq.cli.app import COMMANDS, app

_HEAD: Final = """\
# The command line

This page is written by `python -m onnxq.cli.manual`; a test compares it with `--help`.

Results go to stdout, everything else (progress, warnings, errors) to stderr. With `--json` stdout
holds one JSON object a line and nothing else; an error is such an object too, with the keys
`error`, `cause`, `hint` and `exit_code`. Progress shows on a terminal only. `NO_COLOR` is honoured.

An error is one block: a stable code, the cause, the place in the text where there is one, and what
to do. `--debug` adds the traceback.

    error[SPEC-PASS-UNKNOWN]: there is no pass `calibrat`
      | canonicalize,calibrat{method=mse}
      |              ^^^^^^^^
      hint: did you mean `calibrate`?

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the command line, the pipeline text or the order of the passes is wrong |
| 3 | the result is worse than the threshold that was asked for |
| 4 | a pass that was asked for matched nothing (`--allow-noop` accepts it) |
| 5 | a file, a model or calibration data is missing, broken or does not fit |
| 6 | the model, the target or this machine lacks what is needed |
| 7 | a pass that must keep the model's function changed it |
| 70 | a bug in onnxq |
| 130, 143 | interrupted by Ctrl-C or SIGTERM |

Where an error leaves one of these codes, nothing was written. Outputs are replaced in one step, so
that the file of an earlier run stays intact until the new one is complete.

Completion: `eval "$(onnxq completion bash)"`, or `zsh`, or `onnxq completion fish | source`.
"""


def markdown() -> str:
    """The page."""
    root = app.make_context("onnxq", [], resilient_parsing=True)
    parts = [_HEAD]
    for name in COMMANDS:
        command = app.get_command(root, name)
        if command is not None:
            parts += _sections(command, root, 2)
    return "\n".join(parts)


def _sections(command: click.Command, parent: click.Context, depth: int) -> Iterator[str]:
    """The command's help and that of its subcommands."""
    context = click.Context(command, info_name=command.name, parent=parent)
    context.terminal_width = 96
    yield f"{'#' * depth} {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _sections(inner, context, depth + 1)


if __name__ == "__main__":
    click.echo(markdown(), nl=False)
