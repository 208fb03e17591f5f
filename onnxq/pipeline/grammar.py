"""The text of a pipeline: ``canonicalize,smooth-quant{alpha=0.65 skip=[*/attn/*]},qdq``.

::

    pipeline := item ("," item)*
    item     := NAME [ "{" option (("," | space) option)* "}" ]  |  "@" file
    option   := NAME "=" value
    value    := bare word | "quoted" | 'quoted' | "[" [value (("," | space) value)*] "]"

A NAME is a pass or a recipe (which expands to its passes); ``-`` and ``_`` mean the same. White
space is free. Options get the type of the pass's dataclass field. ``str(pass)`` parses back to an
equal pass. Every error points at its place in the text.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Union

from onnxq.errors import InternalError, Span, SpecError
from onnxq.pipeline.suggest import did_you_mean

if TYPE_CHECKING:
    from onnxq.passes.contract import Pass
    from onnxq.pipeline.registry import Registry

_DELIMITERS: Final = frozenset(" \t\r\n,{}[]=\"'")
_SPACE: Final = frozenset(" \t\r\n")
_INT: Final = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class _Scalar:
    """One word as it was written; ``quoted`` words are texts and nothing else."""

    text: str
    quoted: bool
    span: Span


@dataclass(frozen=True)
class _List:
    """A bracketed list."""

    items: tuple[_Raw, ...]
    span: Span


_Raw = Union[_Scalar, _List]  # noqa: UP007  (evaluated at import, before _List's own annotation)


@dataclass(frozen=True)
class _Option:
    """``key=value`` as it was written."""

    key: str
    key_span: Span
    value: _Raw


@dataclass(frozen=True)
class _Item:
    """One element of the pipeline as it was written."""

    name: str
    name_span: Span
    is_file: bool
    options: tuple[_Option, ...] | None
    span: Span


class _Reader:
    """Recursive descent over the text; knows positions, not passes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def span(self, start: int, stop: int | None = None) -> Span:
        return Span(self.text, start, self.at if stop is None else stop)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self, chars: frozenset[str]) -> None:
        while self.at < len(self.text) and self.text[self.at] in chars:
            self.at += 1

    def error(self, cause: str, hint: str, start: int | None = None) -> SpecError:
        begin = self.at if start is None else start
        return SpecError("SPEC-SYNTAX", cause, hint, span=self.span(begin, max(self.at, begin + 1)))

    def pipeline(self) -> list[_Item]:
        items: list[_Item] = []
        self.skip(_SPACE)
        while self.at < len(self.text):
            items.append(self.item())
            self.skip(_SPACE)
            if self.at == len(self.text):
                break
            if self.peek() != ",":
                raise self.error(
                    f"`{self.peek()}` is not expected here", "passes are separated by commas"
                )
            self.at += 1
            self.skip(_SPACE)
            if self.at == len(self.text):
                raise self.error(
                    "a pass is missing after the comma", "name a pass, or drop the comma"
                )
        return items

    def item(self) -> _Item:
        start = self.at
        is_file = self.peek() == "@"
        if is_file:
            self.at += 1
        name = self.scalar("a file name after `@`" if is_file else "a pass name")
        if name.quoted and not is_file:
            raise self.error("a pass name is not quoted", f"write {name.text}", start)
        name_span = self.span(start)
        self.skip(_SPACE)
        options = self.options() if self.peek() == "{" else None
        return _Item(name.text, name_span, is_file, options, self.span(start))

    def options(self) -> tuple[_Option, ...]:
        opening = self.at
        self.at += 1
        found: list[_Option] = []
        while True:
            self.skip(_SPACE | {","})
            if self.peek() == "}":
                self.at += 1
                return tuple(found)
            if not self.peek():
                raise self.error("this `{` is never closed", "close the options with `}`", opening)
            found.append(self.option())

    def option(self) -> _Option:
        key = self.scalar("an option name")
        self.skip(_SPACE)
        if key.quoted or self.peek() != "=":
            raise SpecError(
                "SPEC-SYNTAX",
                f"option `{key.text}` has no value",
                f"write {key.text}=VALUE",
                span=key.span,
            )
        self.at += 1
        self.skip(_SPACE)
        return _Option(key.text, key.span, self.value(key.text))

    def value(self, key: str) -> _Raw:
        if self.peek() == "[":
            return self.list(key)
        return self.scalar(f"a value of `{key}`")

    def list(self, key: str) -> _List:
        opening = self.at
        self.at += 1
        items: list[_Raw] = []
        while True:
            self.skip(_SPACE | {","})
            if self.peek() == "]":
                self.at += 1
                return _List(tuple(items), self.span(opening))
            if not self.peek() or self.peek() == "}":
                self.at = opening + 1
                raise self.error("this `[` is never closed", "close the list with `]`", opening)
            items.append(self.value(key))

    def scalar(self, what: str) -> _Scalar:
        start = self.at
        quote = self.peek()
        if quote in ('"', "'"):
            return self.quoted(quote)
        while self.at < len(self.text) and self.text[self.at] not in _DELIMITERS:
            self.at += 1
        if self.at == start:
            found = f"`{self.peek()}`" if self.peek() else "the end"
            raise self.error(
                f"{what} is expected here, not {found}", "quote texts with odd characters"
            )
        return _Scalar(self.text[start : self.at], False, self.span(start))

    def quoted(self, quote: str) -> _Scalar:
        start = self.at
        self.at += 1
        chars: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == quote:
                return _Scalar("".join(chars), True, self.span(start))
            if char == "\\" and self.at < len(self.text):
                char = self.text[self.at]
                self.at += 1
            chars.append(char)
        self.at = start + 1
        raise self.error(f"this {quote} is never closed", f"close the text with {quote}", start)


def parse(text: str, registry: Registry | None = None) -> tuple[Pass, ...]:
    """The passes that ``text`` names, with their options.

    Args:
        text: a pipeline text; see the module's grammar.
        registry: where pass names are looked up; by default all installed passes.

    Raises:
        SpecError: the text cannot be understood; its span says where.
        DataError: an ``@file`` cannot be read.
    """
    return _parse(text, registry or _default_registry(), ())


def spell(passes: Sequence[Pass]) -> str:
    """The text of ``passes``: ``parse(spell(passes)) == tuple(passes)``."""
    return ",".join(str(p) for p in passes)


def _default_registry() -> Registry:
    from onnxq.pipeline.registry import default_registry

    return default_registry()


def _parse(text: str, registry: Registry, inside: tuple[str, ...]) -> tuple[Pass, ...]:
    """``inside``: the recipes that are being expanded, outermost first."""
    items = _Reader(text).pipeline()
    if not items:
        raise SpecError(
            "SPEC-EMPTY",
            "the pipeline is empty",
            "name a recipe or passes; `onnxq passes` lists them",
            span=Span(text, 0, len(text)),
        )
    return tuple(p for item in items for p in _resolve(item, registry, inside))


def _resolve(item: _Item, registry: Registry, inside: tuple[str, ...]) -> tuple[Pass, ...]:
    """The passes of one item: one pass, or those of a recipe."""
    from onnxq.pipeline import recipes

    if item.is_file:
        return _expand(recipes.read(Path(item.name)), item, registry, inside)
    name = item.name.replace("_", "-")
    if name in registry:
        return (_build(registry.get(name), item),)
    if name in recipes.names():
        return _expand(recipes.find(name), item, registry, inside)
    raise SpecError(
        "SPEC-PASS-UNKNOWN",
        f"there is no pass or recipe `{item.name}`",
        did_you_mean(name, [*registry.names(), *recipes.names()])
        or "`onnxq passes` lists passes and recipes",
        span=item.name_span,
    )


def _expand(
    recipe: Any, item: _Item, registry: Registry, inside: tuple[str, ...]
) -> tuple[Pass, ...]:
    """The passes of a recipe."""
    if item.options is not None:
        raise SpecError(
            "SPEC-RECIPE-OPTIONS",
            f"`{item.name}` is a recipe, and recipes take no options",
            f"write its passes out and change them: {recipe.passes}",
            span=item.span,
        )
    if recipe.source in inside:
        raise SpecError(
            "SPEC-RECIPE-CYCLE",
            f"recipe `{recipe.name}` contains itself",
            "remove it from its own passes",
            span=item.span,
        )
    try:
        return _parse(recipe.passes, registry, (*inside, recipe.source))
    except SpecError as error:
        if error.details.get("recipe") is None:
            error.cause = f"in recipe {recipe.name}: {error.cause}"
            error.details["recipe"] = recipe.name
        raise


def _build(cls: type[Pass], item: _Item) -> Pass:
    """An instance of ``cls`` with the options of ``item``."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    spans: dict[str, Span] = {}
    for option in item.options or ():
        field = option.key.replace("-", "_")
        whole = Span(option.key_span.text, option.key_span.start, option.value.span.stop)
        if field not in fields:
            raise _unknown_option(cls, option, list(fields))
        if field in values:
            raise SpecError(
                "SPEC-OPTION-TWICE",
                f"option `{option.key}` of `{cls.name}` is given twice",
                "keep one of them",
                span=whole,
            )
        values[field] = _convert(hints[field], option.value, option.key)
        spans[field] = whole
    missing = [
        f.replace("_", "-")
        for f, s in fields.items()
        if f not in values
        and s.default is dataclasses.MISSING
        and s.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SpecError(
            "SPEC-OPTION-MISSING",
            f"`{cls.name}` needs the option `{missing[0]}`",
            f"write {cls.name}{{{missing[0]}=VALUE}}",
            span=item.span,
        )
    try:
        return cls(**values)
    except SpecError as error:
        if error.span is None:
            error.span = spans.get(_blamed(error, spans), item.span)
        raise


def _blamed(error: SpecError, spans: dict[str, Span]) -> str:
    """The field that a pass's own check complains about, if it says so."""
    named = str(error.details.get("option", "")).replace("-", "_")
    if named:
        return named
    words = [w.replace("-", "_") for w in re.findall(r"[\w-]+", error.cause)]
    return next((w for w in words if w in spans), "")


def _unknown_option(cls: type[Pass], option: _Option, fields: list[str]) -> SpecError:
    names = [f.replace("_", "-") for f in fields]
    listed = f"its options: {', '.join(names)}" if names else "it has no options"
    return SpecError(
        "SPEC-OPTION-UNKNOWN",
        f"`{cls.name}` has no option `{option.key}`",
        did_you_mean(option.key, names) or listed,
        span=option.key_span,
    )


def _convert(hint: Any, raw: _Raw, key: str) -> Any:
    """``raw`` as a value of the type ``hint``.

    Raises:
        SpecError: it is not one.
    """
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), raw, key)
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), raw, key)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), raw, key)
    if hint not in _SCALARS:
        raise InternalError("OPTION-TYPE", f"option `{key}` has a type {hint!r} without a spelling")
    if isinstance(raw, _List):
        raise _type_error(hint, raw, key)
    try:
        return _SCALARS[hint](raw)
    except ValueError:
        raise _type_error(hint, raw, key) from None


def _convert_union(members: tuple[Any, ...], raw: _Raw, key: str) -> Any:
    """The first member that fits, the most particular type first."""
    bare = isinstance(raw, _Scalar) and not raw.quoted
    if types.NoneType in members and bare and typing.cast("_Scalar", raw).text == "none":
        return None
    rest = sorted((m for m in members if m is not types.NoneType), key=_particularity)
    failure: SpecError | None = None
    for member in rest:
        try:
            return _convert(member, raw, key)
        except SpecError as error:
            failure = failure or error
    if failure is None or len(rest) == 1:
        raise failure or _type_error(types.NoneType, raw, key)
    listed = " or ".join(_describe(m) for m in members)
    choices = [
        str(c) for m in members if typing.get_origin(m) is Literal for c in typing.get_args(m)
    ]
    text = raw.text if isinstance(raw, _Scalar) else "a list"
    raise SpecError(
        failure.code,
        f"option `{key}` must be {listed}, not `{text}`",
        did_you_mean(text, choices) or failure.hint,
        span=raw.span,
    )


def _particularity(hint: Any) -> int:
    order: list[Any] = [bool, int, float]
    return order.index(hint) if hint in order else 9 if hint is str else 5


def _convert_literal(choices: tuple[Any, ...], raw: _Raw, key: str) -> Any:
    for choice in choices:
        try:
            if _convert(type(choice), raw, key) == choice:
                return choice
        except SpecError:
            continue
    listed = ", ".join(str(c) for c in choices)
    text = raw.text if isinstance(raw, _Scalar) else "a list"
    raise SpecError(
        "SPEC-OPTION-VALUE",
        f"option `{key}` cannot be `{text}`; it is one of: {listed}",
        did_you_mean(text, [str(c) for c in choices]) or f"one of: {listed}",
        span=raw.span,
    )


def _convert_tuple(members: tuple[Any, ...], raw: _Raw, key: str) -> tuple[Any, ...]:
    """A list; a single value stands for a list of one."""
    items = raw.items if isinstance(raw, _List) else (raw,)
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_convert(members[0], item, key) for item in items)
    if len(items) != len(members):
        raise SpecError(
            "SPEC-OPTION-TYPE",
            f"option `{key}` must be a list of {len(members)} values, not {len(items)}",
            f"write {key}=[{','.join(_describe(m) for m in members)}]",
            span=raw.span,
        )
    return tuple(_convert(m, item, key) for m, item in zip(members, items, strict=True))


def _to_bool(raw: _Scalar) -> bool:
    if raw.quoted or raw.text not in ("true", "false"):
        raise ValueError
    return raw.text == "true"


def _to_int(raw: _Scalar) -> int:
    if raw.quoted or not _INT.fullmatch(raw.text):
        raise ValueError
    return int(raw.text)


def _to_float(raw: _Scalar) -> float:
    if raw.quoted or "_" in raw.text:
        raise ValueError
    return float(raw.text)


_SCALARS: Final[dict[Any, Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: lambda raw: raw.text,
}
_WORDS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "none",
}


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"`{c}`" for c in typing.get_args(hint))
    return _WORDS.get(hint, str(hint))


def _type_error(hint: Any, raw: _Raw, key: str) -> SpecError:
    given = "a list" if isinstance(raw, _List) else f"`{raw.text}`"
    return SpecError(
        "SPEC-OPTION-TYPE",
        f"option `{key}` must be {_describe(hint)}, not {given}",
        f"write {key}={_EXAMPLES.get(hint, 'VALUE')}",
        span=raw.span,
    )


_EXAMPLES: Final[dict[Any, str]] = {bool: "true", int: "8", float: "0.5", str: '"text"'}
