"""load: what is read, and every file that is refused, with its code."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnxq.errors import DataError, InternalError, UnsupportedError
from onnxq.graph import check, io
from tests.graph.io_helpers import refused, small_model, weight, wide_model, write


def test_load_gives_the_graph_and_its_numbers(tmp_path: Path) -> None:
    model = io.load(write(small_model(), tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph][:2] == ["MatMul", "twice"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight())


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    model = io.load(write(wide_model(), tmp_path / "m.onnx"))
    tensor = model.graph.initializers["w2"].const_value
    assert isinstance(tensor, io.FileTensor)
    assert not tensor.external
    np.testing.assert_array_equal(tensor.numpy(), weight(256, 256, 2))
    assert not tensor.numpy().flags.writeable
    assert tensor.tobytes() == weight(256, 256, 2).tobytes()
    np.testing.assert_array_equal(np.asarray(tensor, dtype=np.float64), weight(256, 256, 2))
    np.testing.assert_array_equal(tensor.load().numpy(), weight(256, 256, 2))
    np.testing.assert_array_equal(np.from_dlpack(tensor), weight(256, 256, 2))
    again = pickle.loads(pickle.dumps(tensor))
    np.testing.assert_array_equal(again.numpy(), weight(256, 256, 2))


@pytest.mark.parametrize(
    "dtype",
    [
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
    ],
)
def test_lazy_tensors_decode_as_onnx_does(tmp_path: Path, dtype: ir.DataType) -> None:
    shape = (3, 100_001)  # odd, so that 4-bit values end in half a byte
    count = (3 * 100_001 * dtype.bitwidth + 7) // 8
    raw = np.random.default_rng(1).integers(0, 2, count, dtype=np.uint8).tobytes()
    proto = onnx.TensorProto(name="w0", data_type=dtype.value, dims=shape, raw_data=raw)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["w0"], ["y"])],
            "g",
            [],
            [onnx.helper.make_tensor_value_info("y", dtype.value, shape)],
            [proto],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 23)],
        ir_version=11,
    )
    tensor = io.load(write(model, tmp_path / "m.onnx")).graph.initializers["w0"].const_value
    assert isinstance(tensor, io.FileTensor)
    expected = onnx.numpy_helper.to_array(proto)
    assert tensor.numpy().dtype == expected.dtype
    assert tensor.numpy().tobytes() == expected.tobytes()


def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path) -> None:
    path = write(wide_model(), tmp_path / "m.onnx")
    tensor = io.load(path).graph.initializers["w0"].const_value
    assert tensor is not None
    write(wide_model(seed=1), path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError) as caught:
        tensor.numpy()
    assert caught.value.code == "DATA-FILE-CHANGED"
    path.unlink()
    with pytest.raises(DataError, match="DATA-FILE-CHANGED"):
        tensor.tobytes()


def test_load_follows_a_link_that_the_user_named(tmp_path: Path) -> None:
    write(wide_model(), tmp_path / "real.onnx")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    tensor = io.load(tmp_path / "link.onnx").graph.initializers["w0"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight(256, 256, 0))


def test_missing_file(tmp_path: Path) -> None:
    error = refused(tmp_path / "no.onnx", "DATA-FILE-MISSING")
    assert "no.onnx" in error.cause
    refused(tmp_path / "no" / "no.onnx", "DATA-FILE-MISSING")


def test_not_a_regular_file(tmp_path: Path) -> None:
    refused(tmp_path, "DATA-NOT-A-FILE")
    os.mkfifo(tmp_path / "fifo.onnx")
    refused(tmp_path / "fifo.onnx", "DATA-NOT-A-FILE")
    refused(Path("/dev/null"), "DATA-NOT-A-FILE")
    refused(Path("/dev/zero"), "DATA-NOT-A-FILE")


def test_name_with_a_nul(tmp_path: Path) -> None:
    refused(tmp_path / "a\0b.onnx", "DATA-UNREADABLE")


FOREIGN = {
    "DATA-EMPTY-FILE": [b""],
    "DATA-GIT-LFS-POINTER": [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
    ],
    "DATA-HTML-PAGE": [b"<!DOCTYPE html><html>404</html>", b"\n <html><body>login</body></html>"],
    "DATA-TORCH-CHECKPOINT": [pickle.dumps({"w": 1}), pickle.dumps({"w": 1}, protocol=2)],
    "DATA-NOT-ONNX": [
        b"GGUF\x03\0\0\0",
        b"\x1c\0\0\0TFL3abcd",
        b"{}",
        b'{"model": 1}',
        (2).to_bytes(8, "little") + b"{}",
        b"\x7fELF\x02\x01",
        b"hello, I am not a model",
        b"\x00" * 64,
        b"\xff" * 64,
        b"<\n  ir_version: 8\n>\ng (float x) => (float y) { y = Neg(x) }",
        b"ir_version: 8\nproducer_name: 'text format'\n",
    ],
}


@pytest.mark.parametrize(
    ("code", "content"), [(code, content) for code, many in FOREIGN.items() for content in many]
)
def test_foreign_file(tmp_path: Path, code: str, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, code)


@pytest.mark.parametrize(
    ("member", "code"),
    [("archive/data.pkl", "DATA-TORCH-CHECKPOINT"), ("model.onnx", "DATA-ZIP-ARCHIVE")],
)
def test_zip(tmp_path: Path, member: str, code: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.onnx", "w") as archive:
        archive.writestr(member, "content")
    refused(tmp_path / "m.onnx", code)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = wide_model(1, 130).SerializeToString()
    path = tmp_path / "m.onnx"
    codes = set()
    for size in [*range(1, 40), *range(40, len(whole), len(whole) // 50), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises((DataError, UnsupportedError)) as caught:
            io.load(path)
        codes.add(caught.value.code)
    assert "DATA-TRUNCATED" in codes
    assert codes <= {"DATA-TRUNCATED", "DATA-NO-GRAPH", "DATA-NOT-ONNX", "DATA-OPSET"}


def test_damage_inside_is_not_called_truncation(tmp_path: Path) -> None:
    content = bytearray(small_model().SerializeToString())
    where = content.index(b"MatMul") - 1
    content[where] = 0xFF  # the length of the operator's name
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "DATA-CORRUPT")


def test_two_graphs_are_merged_as_protobuf_does(tmp_path: Path) -> None:
    model = wide_model(1)
    tail = onnx.ModelProto()
    tail.graph.doc_string = "more"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString() + tail.SerializeToString())
    assert io.load(path).graph.doc_string == "more"


Change = Callable[[onnx.ModelProto], object]


def _duplicate(version: int, domain: str = "") -> Change:
    return lambda model: model.opset_import.add(domain=domain, version=version)


def _function_chain(depth: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for i in range(depth):
            callee = f"f{i + 1}" if i + 1 < depth else "twice"
            body = onnx.helper.make_node(callee, ["a"], ["b"], domain="local")
            imports = [
                onnx.helper.make_opsetid("", 18),
                onnx.helper.make_opsetid("local", 1),
            ]
            function = onnx.helper.make_function("local", f"f{i}", ["a"], ["b"], [body], imports)
            model.functions.append(function)
        model.graph.node[1].op_type = "f0"

    return change


def _function_bomb(model: onnx.ModelProto) -> None:
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("local", 1)]
    for i in range(40):
        callee = f"f{i + 1}" if i < 39 else "twice"
        nodes = [
            onnx.helper.make_node(callee, ["a"], ["t"], domain="local"),
            onnx.helper.make_node(callee, ["t"], ["b"], domain="local"),
        ]
        model.functions.append(
            onnx.helper.make_function("local", f"f{i}", ["a"], ["b"], nodes, imports)
        )
    model.graph.node[1].op_type = "f0"


def _recursive(model: onnx.ModelProto) -> None:
    node = model.functions[0].node[1]
    node.op_type, node.domain = "twice", "local"
    model.functions[0].opset_import.add(domain="local", version=1)


def _sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64)))


def _sparse_attribute(model: onnx.ModelProto) -> None:
    attribute = (
        model.functions[0]
        .node[0]
        .attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    )
    attribute.sparse_tensor.dims.append(4)


def _short_raw(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def _short_in_function(model: onnx.ModelProto) -> None:
    tensor = model.functions[0].node[0].attribute[0].t
    tensor.float_data.append(1.0)


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "g"


def _map_input(model: onnx.ModelProto) -> None:
    value = model.graph.input.add(name="m")
    value.type.map_type.key_type = onnx.TensorProto.INT64
    value.type.map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _set(**fields: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for name, value in fields.items():
            setattr(model, name, value)

    return change


BROKEN: list[tuple[str, Change]] = [
    ("DATA-NO-GRAPH", lambda m: m.ClearField("graph")),
    ("DATA-NO-GRAPH", lambda m: m.graph.ClearField("output")),
    ("DATA-IR-VERSION", lambda m: m.ClearField("ir_version")),
    ("UNSUPPORTED-IR-VERSION", _set(ir_version=999)),
    ("UNSUPPORTED-IR-VERSION", _set(ir_version=2)),
    ("DATA-OPSET", lambda m: m.ClearField("opset_import")),
    ("DATA-OPSET", lambda m: setattr(m.opset_import[0], "version", 0)),
    ("UNSUPPORTED-OPSET", lambda m: setattr(m.opset_import[0], "version", 9999)),
    ("UNSUPPORTED-OPSET", _duplicate(99, "ai.onnx.ml")),
    ("UNSUPPORTED-OPSET", lambda m: setattr(m.functions[0].opset_import[0], "version", 9999)),
    ("DATA-OPSET-CONFLICT", _duplicate(17)),
    ("DATA-OPSET-CONFLICT", _duplicate(17, "ai.onnx")),
    ("DATA-FUNCTION-DEPTH", _function_chain(check.MAX_FUNCTION_DEPTH + 1)),
    ("DATA-FUNCTION-DEPTH", _function_chain(3000)),
    ("DATA-FUNCTION-EXPANSION", _function_bomb),
    ("DATA-FUNCTION-CYCLE", _recursive),
    ("UNSUPPORTED-SPARSE", _sparse),
    ("UNSUPPORTED-SPARSE", _sparse_attribute),
    ("UNSUPPORTED-TRAINING", lambda m: m.training_info.add()),
    ("UNSUPPORTED-FEATURE", _map_input),
    ("DATA-TENSOR-SIZE", _short_raw),
    ("DATA-TENSOR-SIZE", _short_in_function),
    ("DATA-TENSOR-SIZE", lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 60)),
    ("DATA-TENSOR-SHAPE", lambda m: m.graph.initializer[0].dims.__setitem__(0, -4)),
    ("DATA-TENSOR-TYPE", lambda m: setattr(m.graph.initializer[0], "data_type", 77)),
    ("DATA-CYCLE", _cycle),
    ("DATA-UNDEFINED-VALUE", lambda m: m.graph.node[0].input.__setitem__(1, "nothing")),
    ("DATA-UNDEFINED-VALUE", lambda m: m.functions[0].node[1].input.__setitem__(0, "nothing")),
    ("DATA-INVALID-MODEL", lambda m: m.graph.node[0].input.append("x")),
    ("DATA-INVALID-MODEL", lambda m: setattr(m.graph.node[0], "op_type", "NoSuchOp")),
    ("DATA-INVALID-MODEL", lambda m: m.functions.append(m.functions[0])),
    ("DATA-INVALID-MODEL", lambda m: m.graph.node.add(op_type="Neg", input=["x"], output=["h"])),
]


@pytest.mark.parametrize(("code", "change"), BROKEN)
def test_broken_model(tmp_path: Path, code: str, change: Change) -> None:
    model = small_model()
    change(model)
    refused(write(model, tmp_path / "m.onnx"), code)


def test_a_function_chain_at_the_limit_loads(tmp_path: Path) -> None:
    model = small_model()
    _function_chain(check.MAX_FUNCTION_DEPTH - 1)(model)  # and "twice" at the end of it
    loaded = io.load(write(model, tmp_path / "m.onnx"))
    assert len(loaded.functions) == check.MAX_FUNCTION_DEPTH


def test_equal_duplicate_opset_imports_become_one(tmp_path: Path) -> None:
    model = small_model()
    model.opset_import.add(domain="ai.onnx", version=18)
    model.opset_import.add(domain="local", version=1)
    loaded = io.load(write(model, tmp_path / "m.onnx"))
    assert loaded.opset_imports == {"": 18, "local": 1}
    saved = onnx.load(io.save(loaded, tmp_path / "o.onnx").path)
    assert [(o.domain, o.version) for o in saved.opset_import] == [("", 18), ("local", 1)]


def test_unsorted_nodes_are_sorted_and_keep_their_order_otherwise(tmp_path: Path) -> None:
    model = small_model()
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([nodes[5], nodes[1], nodes[3], nodes[0], nodes[2], nodes[4]])
    loaded = io.load(write(model, tmp_path / "m.onnx"))
    names = [node.op_type for node in loaded.graph]
    assert names == ["Constant", "MatMul", "twice", "ReduceMax", "Greater", "If"]
    onnx.checker.check_model(onnx.load(io.save(loaded, tmp_path / "o.onnx").path))


def test_copy_model_leaves_the_original_alone(tmp_path: Path) -> None:
    model = io.load(write(small_model(), tmp_path / "m.onnx"))
    before = io.serialized(model)
    copy = io.copy_model(model)
    assert io.serialized(copy) == before
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    copy.graph[0].op_type = "Gemm"
    copy.graph.initializers["w"].const_value = ir.tensor(weight(seed=9), name="w")
    copy.metadata_props["a"] = "b"
    copy.graph.opset_imports["new"] = 1
    next(iter(copy.functions.values())).graph[0].doc_string = "changed"
    branch = copy.graph[5].attributes["then_branch"].as_graph()
    branch[0].op_type = "Sub"
    branch.initializers["b"].const_value = ir.tensor(np.zeros(3, np.float32), name="b")
    assert io.serialized(model) == before
    with pytest.raises(DataError, match="is the input"):
        io.save(copy, tmp_path / "m.onnx")  # the copy knows where it came from


def test_an_initializer_without_numbers_is_a_bug_of_a_pass(tmp_path: Path) -> None:
    model = io.load(write(small_model(), tmp_path / "m.onnx"))
    model.graph.initializers["w"].const_value = None
    with pytest.raises(InternalError) as caught:
        io.save(model, tmp_path / "o.onnx")
    assert caught.value.code == "INTERNAL-EMPTY-INITIALIZER"
    assert not (tmp_path / "o.onnx").exists()


def test_a_function_may_be_written_for_another_opset(tmp_path: Path) -> None:
    model = small_model()
    model.opset_import[0].version = 20
    assert model.functions[0].opset_import[0].version == 18
    loaded = io.load(write(model, tmp_path / "m.onnx"))
    io.check_loads(io.save(loaded, tmp_path / "o.onnx").path)
