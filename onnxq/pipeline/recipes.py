"""Recipes: named pipelines, kept as TOML files in ``onnxq/recipes``.

::

    summary = "one line"
    doc = "when to use it, and what to expect"
    passes = "canonicalize,calibrate,assign,qdq"    # or [[pass]] tables: name = ..., options
    target = "cpu"                                  # optional
    [result]                                        # optional: what was measured
    cosine = 0.997

A recipe's name is its file's stem. The file that a run writes beside its output has the same
form (and may carry an ``[input]`` table), so that ``--passes @q.onnx.recipe.toml`` repeats it.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from onnxq.errors import DataError, SpecError
from onnxq.pipeline.suggest import did_you_mean

FOLDER: Final = Path(__file__).resolve().parents[1] / "recipes"
_KEYS: Final = ("summary", "doc", "passes", "pass", "target", "seed", "version", "input", "result")


@dataclass(frozen=True)
class Recipe:
    """A named pipeline.

    Args:
        name: as ``--passes`` takes it.
        passes: pipeline text.
        source: path of the file, for messages.
        target: target that the recipe is meant for, or None for any.
        result: what was measured with it, by name.
    """

    name: str
    passes: str
    source: str
    summary: str = ""
    doc: str = ""
    target: str | None = None
    seed: int | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Recipe:
    """The recipe in the TOML file ``path``.

    Raises:
        DataError: the file is missing or no TOML.
        SpecError: it is TOML, but no recipe.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise DataError(
            "DATA-RECIPE-FILE",
            f"recipe {path} cannot be read: {error.strerror}",
            "check the path after `@`",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            "DATA-RECIPE-TOML", f"recipe {path} is not valid TOML: {error}", "correct the file"
        ) from error
    return _from_table(table, path)


def _from_table(table: dict[str, Any], path: Path) -> Recipe:
    """Check the keys and types of a recipe file."""
    for key in table:
        if key not in _KEYS:
            raise SpecError(
                "SPEC-RECIPE-KEY",
                f"recipe {path} has a key `{key}` that recipes do not have",
                did_you_mean(key, _KEYS) or f"keys: {', '.join(_KEYS)}",
            )
    expected: dict[str, type] = {
        "summary": str,
        "doc": str,
        "passes": str,
        "pass": list,
        "target": str,
        "seed": int,
        "result": dict,
    }
    for key, kind in expected.items():
        if key in table and not isinstance(table[key], kind):
            raise SpecError(
                "SPEC-RECIPE-TYPE",
                f"`{key}` of recipe {path} must be a {kind.__name__}",
                "see an example in docs/pipeline.md",
            )
    if ("passes" in table) == ("pass" in table):
        raise SpecError(
            "SPEC-RECIPE-PASSES",
            f"recipe {path} must have either `passes` or [[pass]] tables",
            'write passes = "..."',
        )
    return Recipe(
        name=path.name.removesuffix(".toml"),
        passes=table["passes"] if "passes" in table else _spell_tables(table["pass"], path),
        source=str(path.resolve()),
        summary=table.get("summary", ""),
        doc=table.get("doc", ""),
        target=table.get("target"),
        seed=table.get("seed"),
        result=table.get("result", {}),
    )


def _spell_tables(tables: list[dict[str, Any]], path: Path) -> str:
    """``[[pass]]`` tables as pipeline text, so that there is one parser for options."""
    from onnxq.passes.contract import format_option

    items: list[str] = []
    for table in tables:
        options = dict(table)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise SpecError(
                "SPEC-RECIPE-PASSES",
                f"a [[pass]] table of recipe {path} has no name",
                'write name = "..."',
            )
        for key, value in options.items():
            if not isinstance(value, str | int | float | list):
                raise SpecError(
                    "SPEC-RECIPE-TYPE",
                    f"`{key}` of pass `{name}` in recipe {path} is a {type(value).__name__}",
                    "options are texts, numbers, booleans or lists of them",
                )
        text = " ".join(f"{k}={format_option(_tuples(v))}" for k, v in options.items())
        items.append(f"{name}{{{text}}}" if text else name)
    return ",".join(items)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@functools.cache
def recipes() -> tuple[Recipe, ...]:
    """All recipes that onnxq ships, by name."""
    return tuple(read(path) for path in sorted(FOLDER.glob("*.toml")))


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all recipes, without reading them."""
    return tuple(path.stem for path in sorted(FOLDER.glob("*.toml")))


def find(name: str) -> Recipe:
    """The shipped recipe called ``name``.

    Raises:
        SpecError: there is none.
    """
    if name not in names():
        raise SpecError(
            "SPEC-RECIPE-UNKNOWN",
            f"there is no recipe `{name}`",
            did_you_mean(name, names()) or f"recipes: {', '.join(names())}",
        )
    return read(FOLDER / f"{name}.toml")


def named(text: str) -> Recipe | None:
    """The recipe that ``text`` is the name or ``@file`` of, or None for other pipeline text."""
    word = text.strip()
    if word.replace("_", "-") in names():
        return find(word.replace("_", "-"))
    if word.startswith("@") and "," not in word:
        return read(Path(word[1:].strip("\"'")))
    return None


def to_toml(table: Mapping[str, Any]) -> str:
    """``table`` as TOML: scalars and lists first, then one level of tables."""
    scalars = [f"{k} = {_toml(v)}\n" for k, v in table.items() if not isinstance(v, Mapping)]
    tables = [
        f"\n[{name}]\n" + "".join(f"{_toml_key(k)} = {_toml(v)}\n" for k, v in value.items())
        for name, value in table.items()
        if isinstance(value, Mapping)
    ]
    return "".join((*scalars, *tables))


def _toml_key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, float):
        return repr(value)  # nan and inf are the same words in TOML
    # JSON's escapes are TOML's, but for pairs of surrogates and DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
