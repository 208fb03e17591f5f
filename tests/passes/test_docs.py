"""Every pass has a page, and its options are those of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from onnxq.passes.contract import Pass, default_of, format_option
from onnxq.pipeline.registry import default_registry

PAGES = Path(__file__).resolve().parents[2] / "docs" / "passes"
PARTS = ["Rewrites", "Math", "Applies when", "Options", "Reference"]
REGISTRY = default_registry()
LISTED = re.compile(r"^- `([a-z0-9-]+)`(?: \(`?([^`)]*)`?\))?", re.MULTILINE)


def options_of(cls: type[Pass]) -> dict[str, Any]:
    return {f.name.replace("_", "-"): default_of(f) for f in dataclasses.fields(cls)}


def part(text: str, name: str) -> str:
    return text.split(f"**{name}**", 1)[1].split("\n**", 1)[0]


@pytest.mark.parametrize("name", REGISTRY.names())
def test_the_page_has_all_parts_in_order(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf8")
    assert text.startswith(f"# {name}\n")
    places = [text.find(f"**{p}**") for p in PARTS]
    assert -1 not in places, dict(zip(PARTS, places, strict=True))
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("name", REGISTRY.names())
def test_the_options_are_those_of_the_pass(name: str) -> None:
    options = options_of(REGISTRY.get(name))
    text = part((PAGES / f"{name}.md").read_text(encoding="utf8"), "Options")
    named = set(re.findall(r"`([a-z0-9-]+)`", text))
    assert options.keys() <= named, "an option is not described"
    if not options:
        assert "none" in text
    for option, default in LISTED.findall(text):
        assert option in options, "there is no such option"
        if default:
            assert default in (
                format_option(options[option]),
                "none" if not options[option] else "",
            )


def test_no_page_is_left_over() -> None:
    assert {p.stem for p in PAGES.glob("*.md")} <= set(REGISTRY.names())
