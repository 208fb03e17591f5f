"""The table of passes agrees with the files, and nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import onnxq
from onnxq.errors import InternalError, SpecError
from onnxq.passes.contract import Pass, Storable
from onnxq.pipeline import recipes, registry
from onnxq.pipeline.registry import BUILTIN, Entry, Registry, default_registry
from tests.pipeline.tiny import Observe

FOLDER = Path(onnxq.__file__).parent / "passes"


def passes_in_files() -> dict[str, str]:
    """Name -> module:Class of every pass that a file under passes/ defines."""
    found = {}
    for path in sorted(FOLDER.glob("*/*.py")):
        if path.stem == "__init__":
            continue
        module = importlib.import_module(f"onnxq.passes.{path.parent.name}.{path.stem}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            is_own = cls.__module__ == module.__name__ and not inspect.isabstract(cls)
            if is_own and issubclass(cls, Pass):
                found[cls.name] = f"{module.__name__}:{name}"
    return found


def test_the_table_has_every_pass_and_no_other():
    assert {e.name: e.where for e in BUILTIN.values()} == passes_in_files()


def test_one_pass_a_file_named_after_it():
    for entry in BUILTIN.values():
        module = entry.where.partition(":")[0]
        assert module == f"onnxq.passes.{entry.group}.{entry.name.replace('-', '_')}"


@pytest.mark.parametrize("name", BUILTIN)
def test_contracts_are_complete(name):
    cls = default_registry().get(name)
    assert cls.summary
    assert cls.__doc__
    for key in cls.provides:
        assert issubclass(key.type, Storable), f"`{key}` could not be saved for a resumed run"


def test_passes_and_recipes_share_no_name():
    assert not set(default_registry().names()) & set(recipes.names())


def test_names_are_kebab_case():
    for name in (*BUILTIN, *recipes.names()):
        assert name == name.lower().replace("_", "-")


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(SpecError, match="did you mean `smooth-quant`") as caught:
        default_registry().get("smoth-quant")
    assert caught.value.code == "SPEC-PASS-UNKNOWN"


def test_an_entry_must_point_to_a_pass_of_its_name():
    table = Registry({"other": Entry("other", "tests.pipeline.tiny:Observe", "tests")})
    with pytest.raises(InternalError, match="not a Pass with the name `other`"):
        table.get("other")


def test_a_broken_third_party_pass_is_one_clear_error():
    table = Registry({"gone": Entry("gone", "no_such_module:Gone", "some-package")})
    with pytest.raises(SpecError, match="remove some-package") as caught:
        table.get("gone")
    assert caught.value.code == "SPEC-PASS-IMPORT"


def entry_point(name: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, "tests.pipeline.tiny:Observe", "onnxq.passes")


def test_passes_of_other_packages_are_found(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point("observe")])
    table = Registry({**BUILTIN, **registry._third_party()})
    assert table.get("observe") is Observe


def test_a_package_cannot_take_a_name_that_is_in_use(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point("qdq")])
    with pytest.raises(SpecError, match="brings a pass `qdq`, a name that") as caught:
        registry._third_party()
    assert caught.value.code == "SPEC-PASS-CLASH"


def loaded_by(code: str) -> set[str]:
    """Modules that ``code`` leaves imported in a fresh interpreter."""
    script = f"{code}\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=FOLDER.parents[1],
    )
    return set(done.stdout.split())


def test_import_onnxq_is_light():
    loaded = loaded_by("import onnxq")
    assert not loaded & {"numpy", "onnx", "onnx_ir", "onnxruntime", "onnxq.pipeline", "rich"}


def test_listing_names_imports_no_pass():
    loaded = loaded_by("from onnxq.pipeline.registry import default_registry as d; d().names()")
    assert "onnxq.pipeline.registry" in loaded
    assert not {m for m in loaded if m.startswith("onnxq.passes")}
    assert not loaded & {"numpy", "onnx", "onnx_ir", "onnxruntime"}


def test_the_public_names_are_there():
    for name in onnxq.__all__:
        assert getattr(onnxq, name)
        assert name in dir(onnxq)
    assert onnxq.errors.SpecError is SpecError
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        onnxq.quantise  # noqa: B018
