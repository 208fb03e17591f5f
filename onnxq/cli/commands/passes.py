"""``onnxq passes``: which passes and recipes there are, and what one of them does."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.options import common

if TYPE_CHECKING:
    from onnxq.passes.contract import Pass
    from onnxq.pipeline.recipes import Recipe


def complete_name(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of passes and recipes, for the shell; after a comma, of the next pass."""
    from onnxq.pipeline import recipes, registry

    head, comma, last = incomplete.rpartition(",")
    names = [*recipes.names(), *registry.default_registry().names()]
    return [f"{head}{comma}{name}" for name in names if name.startswith(last)]


@click.command("passes", short_help="List passes and recipes, or explain one.")
@click.argument("name", required=False, shell_complete=complete_name)
@common
def command(name: str | None) -> None:
    """List passes and recipes, or explain the one called NAME."""
    if name is None:
        _list()
    else:
        _explain(name)


def describe_pass(cls: type[Pass], group: str) -> dict[str, Any]:
    """What a pass declares about itself, as JSON-serialisable data."""
    from onnxq.passes.contract import default_of, format_option

    options = []
    for spec in dataclasses.fields(cls):
        default = default_of(spec)
        required = default is dataclasses.MISSING
        options.append(
            {
                "name": spec.name.replace("_", "-"),
                "type": _type(spec.type),
                "default": None if required else format_option(default),
                "required": required,
                "doc": _documented(cls, spec.name),
            }
        )
    return {
        "kind": "pass",
        "name": cls.name,
        "group": group,
        "summary": cls.summary,
        "options": options,
        "requires": [k.name for k in cls.requires],
        "uses": [k.name for k in cls.uses],
        "provides": [k.name for k in cls.provides],
        "invalidates": [k.name for k in cls.invalidates],
        "forbids": [k.name for k in cls.forbids],
        "tolerance": cls.tolerance,
        "needs_data": cls.needs_data,
        "doc": _prose(cls),
    }


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return (text or str(annotation)).replace("Literal", "").replace("'", "").replace('"', "")


def _sections(cls: type[Any]) -> tuple[list[str], list[str]]:
    """The docstring before ``Args:`` and the lines of it."""
    lines = (inspect.getdoc(cls) or "").splitlines()
    for index, line in enumerate(lines):
        if line.strip() in {"Args:", "Attributes:", "Options:"}:
            return lines[:index], lines[index + 1 :]
    return lines, []


def _documented(cls: type[Pass], field: str) -> str:
    """The line(s) of one field in the docstring of the class, or of the base that has it."""
    return next(filter(None, (_documented_in(base, field) for base in cls.__mro__)), "")


def _documented_in(cls: type[Any], field: str) -> str:
    _, lines = _sections(cls)
    found: list[str] = []
    depth = 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        key, colon, rest = line.strip().partition(":")
        if found and line.strip() and indent > depth:
            found.append(line.strip())
        elif found:
            break
        elif colon and field in [k.strip("` ") for k in key.split(",")]:
            found, depth = [rest.strip()], indent
    return " ".join(found)


def _prose(cls: type[Pass]) -> str:
    import sys

    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return module or "\n".join(_sections(cls)[0]).strip()


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON-serialisable data."""
    return {
        "kind": "recipe",
        "name": recipe.name,
        "summary": recipe.summary,
        "passes": " ".join(recipe.passes.split()),
        "target": recipe.target,
        "doc": recipe.doc.strip(),
        "result": dict(recipe.result),
    }


def _list() -> None:
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.pipeline import recipes, registry

    known = registry.default_registry()
    passes = [describe_pass(known.get(entry.name), entry.group) for entry in known]
    named = [describe_recipe(recipe) for recipe in recipes.recipes()]
    if current().json:
        for record in (*named, *passes):
            console.emit(record)
        return
    console.print_table(
        "Recipes",
        [("name", "left"), ("what", "left")],
        [(r["name"], r["summary"]) for r in named],
    )
    console.print_table(
        "Passes",
        [("name", "left"), ("group", "left"), ("keeps", "right"), ("what", "left")],
        [(p["name"], p["group"], _tolerance(p["tolerance"]), p["summary"]) for p in passes],
    )
    click.echo("keeps: relative error to which a pass preserves the function; - where it quantizes")
    click.echo("`onnxq passes NAME` explains one")


def _tolerance(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _explain(name: str) -> None:
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.pipeline import recipes, registry

    spelled = name.replace("_", "-")
    known = registry.default_registry()
    if spelled in recipes.names():
        record = describe_recipe(recipes.find(spelled))
    else:
        known.entry(spelled)  # an unknown name gets the registry's error with its suggestion
        record = describe_pass(known.get(spelled), known.entry(spelled).group)
    if current().json:
        console.emit(record)
    elif record["kind"] == "recipe":
        _print_recipe(record)
    else:
        _print_pass(record)


def _print_recipe(record: dict[str, Any]) -> None:
    click.echo(f"{record['name']}: {record['summary']}\n")
    click.echo(f'  --passes "{record["passes"]}"')
    if record["target"]:
        click.echo(f"  --target {record['target']}")
    if record["doc"]:
        click.echo(f"\n{record['doc']}")
    for key, value in record["result"].items():
        click.echo(f"  {key}: {value}")


def _print_pass(record: dict[str, Any]) -> None:
    from onnxq.cli import console

    click.echo(f"{record['name']} ({record['group']}): {record['summary']}\n")
    if record["doc"]:
        click.echo(record["doc"] + "\n")
    if record["options"]:
        rows = [
            (o["name"], o["type"], "required" if o["required"] else o["default"], o["doc"])
            for o in record["options"]
        ]
        console.print_table(
            "Options",
            [("option", "left"), ("type", "left"), ("default", "left"), ("what", "left")],
            rows,
        )
    for what in ("requires", "uses", "provides", "invalidates", "forbids"):
        if record[what]:
            click.echo(f"{what + ':':13}{', '.join(record[what])}")
    data = "calibration data" if record["needs_data"] else "no data"
    click.echo(f"{'needs:':13}{data}")
    kept = record["tolerance"]
    meaning = "changes numerics" if kept is None else f"{kept:g} (checked on samples)"
    click.echo(f"{'tolerance:':13}{meaning}")
