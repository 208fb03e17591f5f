"""save: equal bytes, nothing overwritten by mistake, and the old output safe from every fault."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph import atomic, check, io
from tests.graph.io_helpers import external_model, small_model, weight, wide_model, write

ROOT = Path(__file__).parents[2]


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _wiring(model: onnx.ModelProto) -> list[tuple[str, str, list[str], list[str]]]:
    nodes = list(check.walk_nodes(model.graph.node))
    nodes += [node for function in model.functions for node in function.node]
    return [(n.domain, n.op_type, list(n.input), list(n.output)) for n in nodes]


@pytest.fixture
def wide(tmp_path: Path) -> ir.Model:
    (tmp_path / "in").mkdir()
    return io.load(write(wide_model(), tmp_path / "in" / "m.onnx"))


@pytest.mark.parametrize("external", [False, True])
def test_round_trip_keeps_the_model(tmp_path: Path, external: bool) -> None:
    for name, proto in (("small", small_model()), ("wide", wide_model())):
        model = io.load(write(proto, tmp_path / f"{name}.onnx"))
        saved = io.save(model, tmp_path / f"{name}-out.onnx", external=external)
        back = onnx.load(saved.path)  # onnx's own reader, data file included
        onnx.checker.check_model(back)
        assert _wiring(back) == _wiring(proto)
        for ours, theirs in zip(back.graph.initializer, proto.graph.initializer, strict=True):
            assert ours.name == theirs.name
            assert ours.raw_data == theirs.raw_data
        assert io.fingerprint(io.load(saved.path)) == io.fingerprint(model)
        assert saved.bytes == io.size_on_disk(saved.path)


@pytest.mark.parametrize("external", [False, True])
def test_fields_lie_in_the_order_of_protobufs_own_serializer(
    tmp_path: Path, wide: ir.Model, external: bool
) -> None:
    io.set_provenance(wide, {"pipeline": "none", "seed": 0})
    wide.opset_imports["com.microsoft"] = 1
    written = io.save(wide, tmp_path / "o.onnx", external=external).path.read_bytes()
    assert written == onnx.ModelProto.FromString(written).SerializeToString(deterministic=True)


def test_external_data_file_is_named_by_its_content(tmp_path: Path, wide: ir.Model) -> None:
    saved = io.save(wide, tmp_path / "o.onnx", external=True)
    assert saved.data_path is not None
    digest = io.file_hash(saved.data_path)
    assert saved.data_path.name == f"o.{digest[:12]}.data"
    proto = onnx.load(saved.path, load_external_data=False)
    offsets = [
        int({e.key: e.value for e in tensor.external_data}["offset"])
        for tensor in proto.graph.initializer
    ]
    assert offsets == [i * 4 * 256 * 256 for i in range(4)]
    assert saved.path.stat().st_size < 4096


def test_threshold_and_alignment(tmp_path: Path) -> None:
    proto = small_model()
    model = io.load(write(proto, tmp_path / "m.onnx"))
    assert io.save(model, tmp_path / "a.onnx", external=True).data_path is None
    saved = io.save(model, tmp_path / "b.onnx", external=True, threshold=1)
    assert saved.data_path is not None
    # w has 48 bytes; the initializer of the branch, 12 bytes, starts at the next line of 64
    assert saved.data_path.stat().st_size == 64 + 12
    assert io.fingerprint(io.load(saved.path)) == io.fingerprint(model)


def test_input_with_external_data_is_saved_with_external_data(tmp_path: Path) -> None:
    path = external_model(tmp_path, data=weight().tobytes())
    saved = io.save(io.load(path), tmp_path / "o.onnx", threshold=1)
    assert saved.data_path is not None
    copy = io.copy_model(io.load(path))
    assert io.save(copy, tmp_path / "c.onnx", threshold=1).data_path is not None
    assert io.save(copy, tmp_path / "i.onnx", external=False).data_path is None


def test_shared_tensor_is_stored_once(tmp_path: Path, wide: ir.Model) -> None:
    first = wide.graph.initializers["w0"].const_value
    wide.graph.initializers["w1"].const_value = first
    saved = io.save(wide, tmp_path / "o.onnx", external=True)
    assert saved.data_path is not None
    assert saved.data_path.stat().st_size == 3 * 4 * 256 * 256
    back = onnx.load(saved.path)
    assert back.graph.initializer[0].raw_data == back.graph.initializer[1].raw_data
    assert [t.name for t in back.graph.initializer] == ["w0", "w1", "w2", "w3"]
    internal = onnx.load(io.save(wide, tmp_path / "i.onnx").path)
    assert [t.name for t in internal.graph.initializer] == ["w0", "w1", "w2", "w3"]


def test_a_model_above_two_gib_needs_external_data(
    tmp_path: Path, wide: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxq.graph.write.MAX_MESSAGE_BYTES", 1 << 19)
    assert io.save(wide, tmp_path / "o.onnx").data_path is not None
    with pytest.raises(UnsupportedError, match="UNSUPPORTED-TOO-LARGE"):
        io.save(wide, tmp_path / "i.onnx", external=False)
    with pytest.raises(UnsupportedError, match="UNSUPPORTED-TOO-LARGE"):
        io.serialized(wide)
    assert _names(tmp_path) == {"in", "o.onnx", *_data_names(tmp_path)}


def _data_names(folder: Path) -> set[str]:
    return {name for name in _names(folder) if name.endswith(".data")}


@pytest.mark.parametrize("external", [False, True])
def test_equal_models_give_equal_bytes(tmp_path: Path, external: bool) -> None:
    """In two folders, two processes with other hash seeds and threads, and once more over."""
    source = write(wide_model(), tmp_path / "m.onnx")
    program = (
        "import sys; from onnxq.graph import io\n"
        "model = io.load(sys.argv[1]); io.set_provenance(model, {'b': {'y': 1, 'x': 2}, 'a': 1})\n"
        "io.save(model, sys.argv[2], external=sys.argv[3] == 'True')"
    )
    seen = []
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "1")):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, source, folder / "o.onnx", str(external)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        seen.append({entry.name: entry.read_bytes() for entry in folder.iterdir()})
    assert seen[0] == seen[1] == seen[2]
    again = io.load(tmp_path / "0" / "o.onnx")
    io.save(again, tmp_path / "1" / "o.onnx", external=external)
    assert {e.name: e.read_bytes() for e in (tmp_path / "1").iterdir()} == seen[0]


def test_serialized_is_what_save_writes(tmp_path: Path, wide: ir.Model) -> None:
    assert io.serialized(wide) == io.save(wide, tmp_path / "o.onnx").path.read_bytes()


def test_session_source_by_size(tmp_path: Path, wide: ir.Model) -> None:
    with io.session_source(wide) as source:
        assert source == io.serialized(wide)
    with io.session_source(wide, limit=1000) as source:
        assert isinstance(source, str)
        assert io.fingerprint(io.load(source)) == io.fingerprint(wide)
    assert not Path(source).exists()


# ------------------------------------------------------------------------------ output = input


@pytest.mark.parametrize("how", ["same", "spelled", "symlink", "hard link", "link to folder"])
def test_output_is_input(tmp_path: Path, how: str) -> None:
    path = write(wide_model(), tmp_path / "m.onnx")
    before = path.read_bytes()
    target = {
        "same": path,
        "spelled": tmp_path / ".." / tmp_path.name / "m.onnx",
        "symlink": tmp_path / "s.onnx",
        "hard link": tmp_path / "h.onnx",
        "link to folder": tmp_path / "f" / "m.onnx",
    }[how]
    if how == "symlink":
        target.symlink_to(path)
    elif how == "hard link":
        target.hardlink_to(path)
    elif how == "link to folder":
        target.parent.symlink_to(tmp_path)
    for model, source in ((io.load(path), None), (ir.load(path), path)):
        with pytest.raises(DataError) as caught:
            io.save(model, target, source=source)
        assert caught.value.code == "DATA-OUTPUT-IS-INPUT"
    assert path.read_bytes() == before


def test_output_is_the_data_of_the_input(tmp_path: Path) -> None:
    path = external_model(tmp_path, data=weight().tobytes())
    with pytest.raises(DataError, match="DATA-OUTPUT-IS-INPUT"):
        io.save(io.load(path), tmp_path / "w.data")


def test_data_of_an_input_with_the_same_stem_is_kept(tmp_path: Path, wide: ir.Model) -> None:
    """``in.onnx`` is a copy of an earlier ``o.onnx`` and still reads the data file of that."""
    first = io.save(wide, tmp_path / "o.onnx", external=True)
    (tmp_path / "in.onnx").write_bytes(first.path.read_bytes())
    model = io.load(tmp_path / "in.onnx")
    same = io.save(model, tmp_path / "o.onnx")
    assert same.data_path == first.data_path
    np.testing.assert_array_equal(
        model.graph.initializers["w3"].const_value.numpy(), weight(256, 256, 3)
    )
    model.graph.initializers["w0"].const_value = ir.tensor(weight(256, 256, 9), name="w0")
    second = io.save(model, tmp_path / "o.onnx")
    assert second.data_path is not None
    assert first.data_path is not None
    assert _data_names(tmp_path) == {first.data_path.name, second.data_path.name}
    io.load(tmp_path / "in.onnx")


def test_data_that_another_model_names_is_kept(tmp_path: Path, wide: ir.Model) -> None:
    first = io.save(wide, tmp_path / "o.onnx", external=True)
    (tmp_path / "other.onnx").write_bytes(first.path.read_bytes())
    io.save(wide, tmp_path / "o.onnx", external=False)
    io.load(tmp_path / "other.onnx")
    (tmp_path / "other.onnx").unlink()
    io.save(wide, tmp_path / "o.onnx", external=False)
    assert not _data_names(tmp_path)


def test_files_that_are_not_ours_are_kept(tmp_path: Path, wide: ir.Model) -> None:
    foreign = ["o.0123456789ab.data", "o.data", "p.0123456789ab.data", ".o.onnx.swp"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"mine")
    io.save(wide, tmp_path / "o.onnx", external=True)
    io.save(wide, tmp_path / "o.onnx")
    assert _names(tmp_path) == {"in", "o.onnx", *foreign}


def test_a_data_name_that_is_a_folder(tmp_path: Path, wide: ir.Model) -> None:
    saved = io.save(wide, tmp_path / "o.onnx", external=True)
    assert saved.data_path is not None
    saved.data_path.unlink()
    saved.data_path.mkdir()
    before = saved.path.read_bytes()
    with pytest.raises(DataError, match="DATA-OUTPUT-NOT-A-FILE"):
        io.save(wide, tmp_path / "o.onnx", external=True)
    assert saved.path.read_bytes() == before
    assert _names(tmp_path) == {"in", "o.onnx", saved.data_path.name}


# ------------------------------------------------------------------------------- bad outputs


def test_a_link_at_the_output_is_replaced_not_followed(tmp_path: Path, wide: ir.Model) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "o.onnx").symlink_to("precious")
    io.save(wide, tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_mode_of_the_old_file_is_kept(tmp_path: Path, wide: ir.Model) -> None:
    path = io.save(wide, tmp_path / "o.onnx").path
    path.chmod(0o600)
    io.save(wide, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no/such/o.onnx", "DATA-OUTPUT-FOLDER-MISSING"),
        ("in", "DATA-OUTPUT-NOT-A-FILE"),
        ("fifo", "DATA-OUTPUT-NOT-A-FILE"),
        ("file/o.onnx", "DATA-OUTPUT-FOLDER-MISSING"),
        ("o" * 300, "DATA-OUTPUT-NAME"),
        ("o" * 245 + ".onnx", "DATA-OUTPUT-NAME"),
    ],
)
def test_bad_output(tmp_path: Path, wide: ir.Model, name: str, code: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        io.save(wide, tmp_path / name)
    assert caught.value.code == code
    assert caught.value.hint
    assert _names(tmp_path) == {"in", "fifo", "file"}


def test_device_as_output(wide: ir.Model) -> None:
    with pytest.raises(DataError, match="DATA-OUTPUT-NOT-A-FILE"):
        io.save(wide, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116


def test_a_save_that_still_runs_keeps_its_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "o.onnx"
    with atomic.temporary_for(target) as running:
        assert atomic.remove_stale(target) == []
        assert running.path.exists()
    assert _names(tmp_path) == set()
    stale = tmp_path / f".o.onnx.12345678{atomic.TEMPORARY_SUFFIX}"
    stale.write_bytes(b"left by a killed process")
    other = tmp_path / f".other.onnx.12345678{atomic.TEMPORARY_SUFFIX}"
    other.write_bytes(b"of another target")
    assert atomic.remove_stale(target) == [stale]
    assert _names(tmp_path) == {other.name}


def test_two_saves_at_once(tmp_path: Path) -> None:
    """Four processes save two different models to one target: one of the two is there, whole."""
    sources = [write(wide_model(seed=seed), tmp_path / f"{seed}.onnx") for seed in (0, 10)]
    prints = {io.fingerprint(io.load(source)) for source in sources}
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys; from onnxq.graph import io\n"
        "for i in range(8): io.save(io.load(sys.argv[1]), sys.argv[2], external=True)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, source, out / "o.onnx"], cwd=ROOT)
        for source in sources * 2
    ]
    assert [child.wait(60) for child in children] == [0] * 4
    assert io.fingerprint(io.load(out / "o.onnx")) in prints
    assert len(_names(out)) == 2


# ------------------------------------------------------------------------------------ faults


def _faults(tmp_path: Path, storage: str, kind: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    write(wide_model(), tmp_path / "new.onnx")
    write(wide_model(seed=10), tmp_path / "old.onnx")
    driver = Path(__file__).with_name("save_faults.py")
    tmp_path.chmod(0o755)
    result = subprocess.run(
        [sys.executable, driver, tmp_path, storage, kind],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, *points = [json.loads(line) for line in result.stdout.splitlines()]
    assert points
    return first["clean"], points


def _check_point(point: dict[str, Any], clean: dict[str, str], prints: dict[str, str]) -> None:
    """The output is the old or the new model, whole, and saving again gives a clean folder."""
    target = point["after"]["out.onnx"]
    assert target in (point["old"]["out.onnx"], clean["out.onnx"]), point
    is_new = target == clean["out.onnx"]
    assert point["fingerprint"] == prints["new" if is_new else "old"], point
    needed = clean if is_new else point["old"]
    assert needed.items() <= point["after"].items(), point
    assert point["resumed"] == clean, point


def _litter(point: dict[str, Any], clean: dict[str, str]) -> set[str]:
    is_new = point["after"]["out.onnx"] == clean["out.onnx"]
    return set(point["after"]) - set(clean if is_new else point["old"])


@pytest.mark.parametrize("storage", ["internal", "external"])
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGINT", "ENOSPC", "EIO", "FSIZE"])
def test_fault_at_every_point(tmp_path: Path, storage: str, kind: str) -> None:
    prints = {
        name: io.fingerprint(io.load(write(wide_model(seed=seed), tmp_path / f"{name}-p.onnx")))
        for name, seed in (("new", 0), ("old", 10))
    }
    clean, points = _faults(tmp_path, storage, kind)
    hit = 0
    for point in points:
        _check_point(point, clean, prints)
        litter = _litter(point, clean)
        status = point["status"]
        if kind in ("SIGKILL", "SIGTERM"):
            assert status in (0, -signal.Signals[kind])
            assert all(
                name.startswith(".out.onnx.") and name.endswith(atomic.TEMPORARY_SUFFIX)
                for name in litter - set(clean) - set(point["old"])
            ), point
        else:
            expected = 130 if kind == "SIGINT" else 5
            assert status in (0, expected), point
            # an interrupt after the graph was replaced may leave the old data for the next save
            assert litter <= set(point["old"]), point
        hit += status != 0
    assert hit >= len(points) - 6, [point["point"] for point in points if point["status"] == 0]


def test_folder_of_another_user(tmp_path: Path) -> None:
    """As root the child gives up its rights first, as no mode binds root."""
    here = tmp_path
    while here != here.parent and here.stat().st_uid == os.getuid() and here != Path("/tmp"):
        here.chmod(here.stat().st_mode | 0o055)
        here = here.parent
    clean, (point,) = _faults(tmp_path, "internal", "READONLY")
    assert point["status"] == 5
    assert point["after"] == point["old"]
    assert point["resumed"] == clean


def test_really_full_disk(tmp_path: Path, wide: ir.Model) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", disk],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        path = io.save(wide, disk / "o.onnx").path
        before = path.read_bytes()
        for external in (False, True):
            with pytest.raises(DataError) as caught:
                io.save(wide, path, external=external)
            assert caught.value.code == "DATA-DISK-FULL"
            assert path.read_bytes() == before
            assert _names(disk) == {"o.onnx"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    codes = {
        errno.ENOSPC: "DATA-DISK-FULL",
        errno.EDQUOT: "DATA-DISK-FULL",
        errno.EROFS: "DATA-OUTPUT-UNWRITABLE",
        errno.EIO: "DATA-WRITE-FAILED",
    }
    for number, code in codes.items():
        with pytest.raises(DataError) as caught, atomic.reported(tmp_path / "o"):
            raise OSError(number, os.strerror(number))
        assert caught.value.code == code


# --------------------------------------------------------------------- identity and provenance


def test_fingerprint_ignores_storage_and_notes(tmp_path: Path) -> None:
    base = small_model()
    expected = io.fingerprint(io.load(write(base, tmp_path / "a.onnx")))
    typed = small_model()
    tensor = typed.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend(weight().ravel().tolist())
    typed.producer_name = "somebody"
    typed.doc_string = typed.graph.doc_string = typed.graph.node[0].doc_string = "words"
    typed.metadata_props.add(key="k", value="v")
    typed.graph.node[5].attribute[0].g.node[0].doc_string = "words inside"
    assert io.fingerprint(io.load(write(typed, tmp_path / "b.onnx"))) == expected
    external = external_model(tmp_path, data=weight().tobytes())
    assert io.fingerprint(io.load(external)) == expected


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    def printed(change: Any) -> str:
        model = small_model()
        change(model)
        return io.fingerprint(io.load(write(model, tmp_path / "m.onnx")))

    changes = [
        lambda m: m.graph,
        lambda m: setattr(m.graph.initializer[0], "raw_data", weight(seed=1).tobytes()),
        lambda m: m.graph.node[5].attribute[0].g.initializer[0].float_data.__setitem__(0, 9.0),
        lambda m: m.functions[0].node[0].attribute[0].t.float_data.__setitem__(0, 9.0),
        lambda m: setattr(m.graph.node[4], "op_type", "Less"),
        lambda m: setattr(m.graph.node[0], "name", "n"),
        lambda m: setattr(m.opset_import[0], "version", 19),
        lambda m: setattr(m.graph.node[2].attribute[0], "i", 1),
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "M"),
    ]
    assert len({printed(change) for change in changes}) == len(changes)


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert io.file_hash(tmp_path / "f") == (  # FIPS 180-2, appendix B.1
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_provenance(tmp_path: Path, wide: ir.Model) -> None:
    wide.metadata_props["author"] = "somebody"
    wide.metadata_props["onnxq.old"] = "1"
    io.set_provenance(wide, {"seed": 7, "pipeline": ["a{x=1}", "b"], "hashes": {"b": 1, "a": "ü"}})
    back = io.load(io.save(wide, tmp_path / "o.onnx").path)
    facts = {"hashes": {"a": "ü", "b": 1}, "pipeline": ["a{x=1}", "b"], "seed": 7}
    assert io.get_provenance(back) == facts
    assert back.metadata_props["onnxq.hashes"] == '{"a":"ü","b":1}'
    assert back.metadata_props["author"] == "somebody"
    assert list(back.metadata_props)[1:] == ["onnxq.hashes", "onnxq.pipeline", "onnxq.seed"]
    back.metadata_props["onnxq.note"] = "not json"
    assert io.get_provenance(back)["note"] == "not json"


def test_size_on_disk_needs_its_data(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    with pytest.raises(DataError, match="DATA-EXTERNAL-MISSING"):
        io.size_on_disk(path)
