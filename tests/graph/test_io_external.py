"""The guard in front of external data: twelve attacks, for load and for a read after load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.errors import DataError
from onnxq.graph import external, io
from tests.graph.io_helpers import external_model, refused, small_model, weight, write

SECRET = b"s" * 48


def _outside(folder: Path) -> Path:
    """A secret of the right length outside the model's folder."""
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (outside / "w.data").write_bytes(SECRET)
    return outside


def _parent(folder: Path) -> Path:
    return external_model(folder, location=f"../{_outside(folder).name}/w.data")


def _detour(folder: Path) -> Path:
    (folder / "a").mkdir()
    (folder / "w.data").write_bytes(SECRET)
    return external_model(folder, location="a/../w.data")


def _absolute(folder: Path) -> Path:
    return external_model(folder, location=str(_outside(folder) / "w.data"))


def _symlink(folder: Path) -> Path:
    (folder / "w.data").symlink_to(_outside(folder) / "w.data")
    return external_model(folder)


def _symlinked_folder(folder: Path) -> Path:
    (folder / "d").symlink_to(_outside(folder), target_is_directory=True)
    return external_model(folder, location="d/w.data")


def _hard_link(folder: Path) -> Path:
    (folder / "w.data").hardlink_to(_outside(folder) / "w.data")
    return external_model(folder)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.data")
    return external_model(folder)


def _device(folder: Path) -> Path:
    try:
        os.mknod(folder / "w.data", 0o666 | 0o020000, os.makedev(1, 5))  # another /dev/zero
    except PermissionError:
        pytest.skip("making a device node needs root")
    return external_model(folder)


def _past_the_end(folder: Path) -> Path:
    return external_model(folder, offset="1", data=SECRET)


def _huge_length(folder: Path) -> Path:
    return external_model(folder, length=str(1 << 40), data=SECRET)


def _short_length(folder: Path) -> Path:
    return external_model(folder, length="47", data=SECRET)


def _huge_total(folder: Path) -> Path:
    """Sixteen tensors of 16 GiB that all point at one sparse file."""
    model = small_model()
    with (folder / "w.data").open("wb") as file:
        file.truncate(1 << 34)
    for i in range(16):
        tensor = model.graph.initializer.add(
            name=f"t{i}",
            data_type=onnx.TensorProto.FLOAT,
            dims=[1 << 32],
            data_location=onnx.TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value="w.data")
    return write(model, folder / "model.onnx")


ATTACKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent": (_parent, "DATA-EXTERNAL-PATH"),
    "detour": (_detour, "DATA-EXTERNAL-PATH"),
    "absolute": (_absolute, "DATA-EXTERNAL-PATH"),
    "symlink": (_symlink, "DATA-EXTERNAL-LINK"),
    "symlinked folder": (_symlinked_folder, "DATA-EXTERNAL-LINK"),
    "hard link": (_hard_link, "DATA-EXTERNAL-LINK"),
    "fifo": (_fifo, "DATA-EXTERNAL-NOT-REGULAR"),
    "device": (_device, "DATA-EXTERNAL-NOT-REGULAR"),
    "past the end": (_past_the_end, "DATA-EXTERNAL-RANGE"),
    "length 2^40": (_huge_length, "DATA-EXTERNAL-LENGTH"),
    "short length": (_short_length, "DATA-EXTERNAL-LENGTH"),
    "huge total": (_huge_total, "DATA-EXTERNAL-TOTAL"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    return inside


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_before_its_file_is_opened(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, code = ATTACKS[name]
    path = build(folder)
    opened: list[str] = []
    real_open = os.open

    def spy(target: str, *args: object, **options: object) -> int:
        opened.append(os.fspath(target))
        return real_open(target, *args, **options)  # type: ignore[arg-type]

    def never(*_: object, **__: object) -> None:
        pytest.fail("onnx_ir was asked to deserialize a refused model")

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr("onnx_ir.from_proto", never)
    refused(path, code)
    touched = [name for name in opened if name.endswith("w.data")]
    needs_size = code == "DATA-EXTERNAL-RANGE"  # only an open file says how long it is
    assert bool(touched) == needs_size


@pytest.mark.parametrize("name", ["symlink", "hard link", "fifo", "device"])
def test_attack_after_load_is_refused_at_the_read(folder: Path, name: str) -> None:
    """The file is good when the model is loaded, and swapped before its bytes are used."""
    path = external_model(folder, data=weight().tobytes())
    tensor = io.load(path).graph.initializers["w"].const_value
    assert tensor is not None
    (folder / "w.data").unlink()
    ATTACKS[name][0](folder)
    with pytest.raises(DataError) as caught:
        tensor.tobytes()
    assert caught.value.code == ATTACKS[name][1]


def test_a_swapped_or_shortened_file_is_refused_at_the_read(folder: Path) -> None:
    path = external_model(folder, data=weight().tobytes())
    tensor = io.load(path).graph.initializers["w"].const_value
    assert tensor is not None
    (folder / "new").write_bytes(SECRET)
    (folder / "new").replace(folder / "w.data")
    with pytest.raises(DataError) as caught:
        tensor.numpy()
    assert caught.value.code == "DATA-FILE-CHANGED"
    os.truncate(folder / "w.data", 8)
    with pytest.raises(DataError, match="DATA-FILE-CHANGED"):
        tensor.tobytes()


def test_a_file_swapped_for_a_link_between_look_and_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check by name sees a plain file, the open meets a link: O_NOFOLLOW refuses it."""
    path = external_model(folder, data=weight().tobytes())
    outside = _outside(folder)
    real_check = external._check_kind

    def swap(parent: int, part: str, location: str, *, folder_wanted: bool) -> None:
        real_check(parent, part, location, folder_wanted=folder_wanted)
        (folder / "w.data").unlink()
        (folder / "w.data").symlink_to(outside / "w.data")

    monkeypatch.setattr(external, "_check_kind", swap)
    refused(path, "DATA-EXTERNAL-LINK")


@pytest.mark.parametrize(
    "location", ["", ".", "a\\..\\w.data", "C:w.data", "w.data\n", "w\x7f.data", "\0"]
)
def test_odd_location(folder: Path, location: str) -> None:
    refused(external_model(folder, location=location, data=SECRET), "DATA-EXTERNAL-PATH")


@pytest.mark.parametrize("value", ["-1", "+1", "1e3", "0x10", " 1", "", "٣", "9" * 30, "1.0"])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_odd_number(folder: Path, key: str, value: str) -> None:
    fields = {key: value}
    refused(external_model(folder, data=SECRET, **fields), "DATA-EXTERNAL-FIELDS")


def test_a_key_given_twice(folder: Path) -> None:
    model = onnx.load(external_model(folder, data=SECRET), load_external_data=False)
    model.graph.initializer[0].external_data.add(key="location", value="w.data")
    refused(write(model, folder / "model.onnx"), "DATA-EXTERNAL-FIELDS")


def test_missing_data_file(folder: Path) -> None:
    refused(external_model(folder), "DATA-EXTERNAL-MISSING")
    refused(external_model(folder, location="no/w.data"), "DATA-EXTERNAL-MISSING")
    (folder / "f").write_bytes(b"")
    refused(external_model(folder, location="f/w.data"), "DATA-EXTERNAL-MISSING")


def test_data_is_a_folder(folder: Path) -> None:
    (folder / "w.data").mkdir()
    refused(external_model(folder), "DATA-EXTERNAL-NOT-REGULAR")


def test_data_with_a_name_that_is_too_long(folder: Path) -> None:
    refused(external_model(folder, location="w" * 300), "DATA-EXTERNAL-UNREADABLE")


def test_external_strings_are_refused(folder: Path) -> None:
    model = onnx.load(external_model(folder, data=SECRET), load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING
    refused(write(model, folder / "model.onnx"), "UNSUPPORTED-EXTERNAL-STRING")


def test_data_inside_and_outside_at_once(folder: Path) -> None:
    model = onnx.load(external_model(folder, data=SECRET), load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [4, 1 << 15]
    tensor.raw_data = bytes(1 << 19)
    refused(write(model, folder / "model.onnx"), "DATA-INVALID-MODEL")


@pytest.mark.parametrize("where", ["function", "branch", "constant"])
def test_the_guard_sees_every_place_that_holds_a_tensor(folder: Path, where: str) -> None:
    model = small_model()
    tensor = {
        "function": model.functions[0].node[0].attribute[0].t,
        "branch": model.graph.node[5].attribute[0].g.initializer[0],
        "constant": model.graph.node[3].attribute[0].t,
    }[where]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    refused(write(model, folder / "model.onnx"), "DATA-EXTERNAL-PATH")


def test_placeholder_names_in_the_input_mean_nothing(folder: Path) -> None:
    """Locations that look like our own stand-ins are paths like any other."""
    refused(external_model(folder, location="onnxq-placeholder-0"), "DATA-EXTERNAL-MISSING")


@pytest.mark.parametrize("length", [None, "48"])
@pytest.mark.parametrize("location", ["w.data", "sub/w.data", "./w.data"])
def test_good_external_data(folder: Path, location: str, length: str | None) -> None:
    (folder / "sub").mkdir()
    content = b"12345678" + weight().tobytes() + b"rest"
    (folder / "sub" / "w.data").write_bytes(content)
    path = external_model(folder, location=location, offset="8", length=length, data=content)
    model = io.load(path)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, io.FileTensor)
    assert tensor.external
    np.testing.assert_array_equal(tensor.numpy(), weight())
    assert io.size_on_disk(path) == path.stat().st_size + len(content)


def test_external_data_relative_to_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external_model(folder, data=weight().tobytes())
    monkeypatch.chdir(folder)
    tensor = io.load("model.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight())


def test_external_data_in_a_function_is_read(folder: Path) -> None:
    model = small_model()
    tensor = model.functions[0].node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    (folder / "w.data").write_bytes(np.float32(5).tobytes())
    loaded = io.load(write(model, folder / "model.onnx"))
    constant = next(iter(loaded.functions.values())).graph[0].attributes["value"].as_tensor()
    assert constant.numpy() == 5
    saved = io.save(loaded, folder / "out.onnx")
    assert onnx.load(saved.path).functions[0].node[0].attribute[0].t.raw_data == (
        np.float32(5).tobytes()
    )


def test_the_cap_is_an_option(folder: Path) -> None:
    path = external_model(folder, data=weight().tobytes())
    io.load(path, max_external_bytes=48)
    with pytest.raises(DataError, match="DATA-EXTERNAL-TOTAL"):
        io.load(path, max_external_bytes=47)
