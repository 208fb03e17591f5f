"""What lands in the wheel and the sdist, and what an installation does with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import onnxq

REPOSITORY = Path(__file__).parents[2]
LINKED = ("passes", "custom_ops", "models")
LIBRARY = "onnxq/custom_ops/lib/libonnxq_ops_cpu.so"


def python_sources() -> set[str]:
    """Every Python file that the package must bring, as its path below site-packages."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--", "onnxq", *LINKED],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    names = {name if name.startswith("onnxq/") else f"onnxq/{name}" for name in tracked if name}
    return {name for name in names if name.endswith(".py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, as a fresh clone has them, with the working tree's contents."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        source, target = REPOSITORY / name, folder / name
        if not source.is_symlink() and not source.is_file():
            continue  # deleted, not yet committed
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return folder


def build(checkout: Path, what: str, out: Path, **env: str) -> Path:
    """Call the build backend as pip does, without the network."""
    pytest.importorskip("scikit_build_core")
    code = f"import sys; from scikit_build_core import build; build.build_{what}(sys.argv[1])"
    clean = {key: value for key, value in os.environ.items() if key != "ONNXQ_NO_KERNELS"}
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code, out],
        cwd=checkout,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_links_lead_to_the_top_level_folders() -> None:
    for name in LINKED:
        link = REPOSITORY / "onnxq" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_linked_packages_refuse_another_name() -> None:
    for name in ("passes", "custom_ops"):
        child = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 1
        assert f"this package is onnxq.{name}, not {name}" in child.stderr


def test_pure_wheel_has_every_source_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "wheel", tmp_path / "out", ONNXQ_NO_KERNELS="1")
    assert wheel.name == f"onnxq-{onnxq.__version__}-py3-none-any.whl"
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} == {"onnxq"}
    assert python_sources() <= names
    assert {
        "onnxq/py.typed",
        "onnxq/custom_ops/ops.def",
        "onnxq/models/sentences.txt",
        *(f"onnxq/recipes/{path.name}" for path in (checkout / "onnxq/recipes").glob("*.toml")),
    } <= names
    assert not {name for name in names if name.endswith((".so", ".cc", ".h", ".cu"))}


def test_entry_point_and_extras() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"onnxq": "onnxq.cli:main"}
    for extra, package in (("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        (requirement,) = project["optional-dependencies"][extra]
        assert requirement.split(">")[0] == package
    assert not [name for name in project["dependencies"] if name.startswith("onnxruntime")]


@pytest.mark.slow
def test_wheel_from_the_sdist_equals_the_wheel(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "wheel", tmp_path / "direct", CI="true")
    sdist = build(checkout, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path / "again", CI="true")
    assert again.name == wheel.name
    assert names_in(again) == names_in(wheel)
    assert LIBRARY in names_in(wheel)
    assert {name.split("/")[0] for name in names_in(wheel)} == {"onnxq"}


@pytest.mark.slow
def test_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    """The build goes on without kernels, the package says so; continuous integration refuses."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja", "make", "sh", "uname", "git"):
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    hidden = {"PATH": str(tools), "CXX": "", "CI": ""}
    wheel = build(checkout, "wheel", tmp_path / "out", **hidden)
    assert LIBRARY not in names_in(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    child = subprocess.run(
        # -S: the finder of an editable installation would come first.
        [sys.executable, "-S", "-m", "onnxq.runtime"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.startswith("onnxq: WITHOUT KERNELS: the operator library was not built")
    with pytest.raises(AssertionError, match="NO C\\+\\+ COMPILER"):
        build(checkout, "wheel", tmp_path / "ci", **{**hidden, "CI": "true"})
