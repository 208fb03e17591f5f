"""docs/cli.md says what --help says."""

from __future__ import annotations

from pathlib import Path

from onnxq.cli.manual import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m onnxq.cli.manual > docs/cli.md"
