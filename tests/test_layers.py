"""Imports point down only: the layers of the house, read from the tree's own import statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "onnxq": "onnxq",
    "onnxq.passes": "passes",
    "onnxq.custom_ops": "custom_ops",
    "onnxq.models": "models",
}
"""Where the modules of each package lie; links inside of onnxq/ are not followed."""

BELOW: dict[str, set[str]] = {
    "errors": set(),
    "formats": {"errors"},
    "graph": {"formats", "errors"},
    "data": {"errors"},
    "solvers": {"formats", "errors"},
    "calibration": {"data", "solvers", "graph", "formats", "errors"},
    "custom_ops": {"calibration", "solvers", "graph", "formats", "errors"},
    "runtime": {"custom_ops", "graph", "formats", "errors"},
    "models": {"graph", "formats", "errors"},
    "evaluation": {"data", "runtime", "graph", "errors"},
    "passes": {
        *("custom_ops", "runtime", "calibration", "solvers", "graph", "formats", "errors"),
    },
    "pipeline": {
        *("passes", "custom_ops", "runtime", "calibration", "solvers", "graph", "formats"),
        *("evaluation", "data", "errors"),
    },
    "cli": {
        *("pipeline", "passes", "custom_ops", "runtime", "calibration", "solvers", "graph"),
        *("evaluation", "models", "data", "formats", "errors"),
    },
    "__main__": {"cli"},
}
"""What each layer may import besides itself."""

TOP = {"__init__", "errors", "__version__"}
"""Names of the package itself that every layer may import: its version, and nothing that works."""


def modules() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every Python file of the package."""
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            inside_link = package == "onnxq" and f"onnxq.{parts[0]}" in PACKAGES
            if not inside_link:
                yield ".".join([package, *parts]).removesuffix(".__init__"), file


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer of a dotted name; None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "onnxq" and len(parts) > 1 else None


def violations(module: str, source: str) -> list[str]:
    """The imports of ``module`` that do not point down."""
    own = layer_of(module)
    if own is None:
        return []  # the package's own __init__ hands out names of every layer
    found = []
    for line, name in imports(source):
        layer = layer_of(name)
        if layer is not None and layer != own and layer not in BELOW[own] | TOP:
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_module_belongs_to_a_layer():
    layers = {layer_of(name) for name, _ in modules()} - {None}
    assert layers == set(BELOW)


def test_imports_point_down_only():
    found = [v for name, file in modules() for v in violations(name, file.read_text())]
    assert not found


def test_no_circle_between_layers():
    for layer, below in BELOW.items():
        assert not [other for other in below if layer in BELOW[other]]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onnxq.solvers.rtn", "from onnxq.graph.io import load"),
        ("onnxq.graph.edit", "import onnxq.passes.plan"),
        ("onnxq.passes.lower.qdq", "def f():\n    from onnxq.pipeline import run\n"),
        ("onnxq.formats.base", "if TYPE_CHECKING:\n    from onnxq.graph import io\n"),
        ("onnxq.pipeline.run", "from onnxq import cli"),
    ],
)
def test_an_import_that_points_up_is_found(module, source):
    assert len(violations(module, source)) == 1
