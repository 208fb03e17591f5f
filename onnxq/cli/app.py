"""The ``onnxq`` command: finds the subcommand's file, runs it, turns errors into exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from onnxq.cli import failure
from onnxq.cli.state import State

COMPLETE_VARIABLE: Final = "_ONNXQ_COMPLETE"

COMMANDS: Final[dict[str, str]] = {
    "run": "Quantize a model with a pipeline of passes.",
    "passes": "List passes and recipes, or explain one.",
    "inspect": "Show what is inside a model.",
    "compare": "Compare two models: outputs, layers, size, speed.",
    "bench": "Measure the latency of models side by side.",
    "eval": "Evaluate a model on a task.",
    "models": "List and build the reference models.",
    "formats": "List the number formats.",
    "doctor": "Check this machine: packages, kernels, CPU.",
    "completion": "Print the shell completion script.",
}
"""Name and first help line of each command, so that ``--help`` imports none of them."""

EPILOG: Final = """\b
Start here:
  onnxq models build minilm -o minilm.onnx
  onnxq run minilm.onnx --passes w8a8 --calib sentences.txt -o minilm.w8a8.onnx

\b
Exit codes: 0 done, 2 usage or pipeline, 3 worse than the threshold, 4 a pass matched nothing,
5 bad file or data, 6 cannot be done here, 7 a pass broke the model, 70 a bug, 130 interrupted."""


class App(click.Group):
    """A click group that loads commands on demand and owns the process's exit."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"onnxq.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run one command line and leave with its exit code, whatever happens."""
        argv = list(sys.argv[1:] if args is None else args)
        name = prog_name or "onnxq"
        # A terminal that cannot show a character shows a question mark, never a traceback.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._main_shell_completion(extra, name, complete_var or COMPLETE_VARIABLE)
        sys.exit(self._run(argv, name, extra))

    def _run(self, argv: list[str], name: str, extra: dict[str, Any]) -> int:
        state = State.of(argv)
        failure.install_sigterm()
        try:
            with self.make_context(name, argv, obj=state, **extra) as ctx:
                code = self.invoke(ctx)
                sys.stdout.flush()
                return code if isinstance(code, int) else 0
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return 2
        except (KeyboardInterrupt, click.Abort) as error:
            return failure.leave_interrupted(error, state)
        except BrokenPipeError:
            return failure.leave_broken_pipe()
        except Exception as error:
            interrupt = failure.interrupt_behind(error)
            if interrupt is not None:
                return failure.leave_interrupted(interrupt, state)
            return failure.leave_with(error, state)


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"onnxq {version('onnxq')}")
    except PackageNotFoundError:
        click.echo("onnxq (not installed, run from a source tree)")
    ctx.exit()


@click.group(
    "onnxq",
    cls=App,
    epilog=EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": None,
    },
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and leave.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def app() -> None:
    """Quantize ONNX models with pipelines of small passes.

    A model goes in, passes rewrite it, and a model comes out that is smaller and faster on ONNX
    Runtime, with a report of what every pass did and what it cost.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
