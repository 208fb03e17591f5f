"""``onnxq completion``: the script that teaches a shell to complete our commands."""

from __future__ import annotations

from typing import Final

import click

from onnxq.cli.options import common
from onnxq.errors import InternalError

HELP: Final = """\
Print the shell completion script.

\b
bash:  eval "$(onnxq completion bash)"        in ~/.bashrc
zsh:   eval "$(onnxq completion zsh)"         in ~/.zshrc
fish:  onnxq completion fish | source         in ~/.config/fish/config.fish"""


@click.command("completion", help=HELP, short_help="Print the shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def command(shell: str) -> None:
    """Print the script; see ``HELP``."""
    from click.shell_completion import get_completion_class

    from onnxq.cli import console
    from onnxq.cli.app import COMPLETE_VARIABLE, app
    from onnxq.cli.state import current

    kind = get_completion_class(shell)
    if kind is None:
        raise InternalError("COMPLETION", f"click has no completion for {shell}")
    script = kind(app, {}, "onnxq", COMPLETE_VARIABLE).source()
    if current().json:
        console.emit({"shell": shell, "script": script})
    else:
        click.echo(script)
