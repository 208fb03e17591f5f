from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.registry import _module_name
from onnxq.errors import DataError, InternalError, PreconditionError, UnsupportedError
from onnxq.runtime import Library, session
from tests.custom_ops.cases import CASES, same_bits, single_node_model

REPOSITORY = Path(__file__).parents[2]
PER_TOKEN = "DynamicQuantizePerToken"


def empty_model(opset: int = 21, ir_version: int = 10) -> ir.Model:
    return ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": opset}), ir_version=ir_version)


def test_everything_lists_the_same_operators() -> None:
    """ops.def, the definitions and the contract test's cases name the same operators."""
    folder = REPOSITORY / "custom_ops" / "defs"
    defined = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert defined == {_module_name(name) for name in custom_ops.names()}
    assert set(CASES) == set(custom_ops.names())
    for name in custom_ops.names():
        assert custom_ops.get(name).name == name


def test_the_library_has_the_kernels_of_ops_def(library: Library) -> None:
    assert set(library.kernels) == {k for k in custom_ops.kernels() if k.provider == "CPU"}


def test_every_row_of_ops_def_is_read() -> None:
    text = (REPOSITORY / "custom_ops" / "ops.def").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("ONNXQ_KERNEL")]
    assert len(rows) == len(custom_ops.kernels()) > 0


def test_every_cpu_source_is_built() -> None:
    cmake = (REPOSITORY / "custom_ops" / "CMakeLists.txt").read_text(encoding="utf-8")
    for source in (REPOSITORY / "custom_ops" / "cpu").glob("*.cc"):
        assert f"cpu/{source.name}" in cmake


@pytest.mark.parametrize("name", custom_ops.names())
def test_definition_matches_its_body(name: str) -> None:
    operator = custom_ops.get(name)
    assert list(operator.function.input) == list(operator.inputs)
    assert list(operator.function.output) == list(operator.outputs)
    assert operator.function.domain == custom_ops.DOMAIN
    assert set(operator.function.attribute) == {a.name for a in operator.attributes}


@pytest.mark.parametrize("name", custom_ops.names())
def test_operator_is_documented(name: str) -> None:
    """docs/operators.md holds the definition's own text."""
    page = (REPOSITORY / "docs" / "operators.md").read_text(encoding="utf-8")
    assert f"## {name}" in page
    assert custom_ops.get(name).doc.strip() in page


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no operator 'Nonsense'") as caught:
        custom_ops.get("Nonsense")
    assert caught.value.code == "UNSUPPORTED-OPERATOR"
    assert PER_TOKEN in caught.value.hint


def test_attach_adds_body_and_imports_once() -> None:
    model = empty_model(opset=22, ir_version=7)
    custom_ops.attach(model, PER_TOKEN)
    custom_ops.attach(model, PER_TOKEN)
    assert len(model.functions) == 1
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 22
    assert model.opset_imports[custom_ops.DOMAIN] == custom_ops.domain_version()
    assert model.ir_version == 8


def test_attach_refuses_an_old_opset_and_changes_nothing() -> None:
    model = empty_model(opset=17)
    with pytest.raises(PreconditionError, match="needs opset 18") as caught:
        custom_ops.attach(model, PER_TOKEN)
    assert caught.value.code == "PRECONDITION-OPSET"
    assert not model.functions
    assert custom_ops.DOMAIN not in model.opset_imports


def test_make_node_refuses_other_attributes() -> None:
    with pytest.raises(InternalError, match="attributes"):
        custom_ops.make_node(PER_TOKEN, [ir.Value(name="x")], {"axis": -1})
    with pytest.raises(InternalError, match="1 inputs"):
        custom_ops.make_node(PER_TOKEN, [])


@pytest.mark.parametrize("dtype", [ir.DataType.DOUBLE, ir.DataType.FLOAT8E5M2, ir.DataType.INT32])
def test_make_node_refuses_a_type_without_a_kernel(dtype: ir.DataType) -> None:
    with pytest.raises(UnsupportedError, match="it takes bfloat16, float16, float32") as caught:
        custom_ops.make_node(PER_TOKEN, [ir.Value(name="x", type=ir.TensorType(dtype))])
    assert caught.value.code == "UNSUPPORTED-OPERATOR-DTYPE"


def test_output_shapes_are_inferred(library: Library) -> None:
    model = onnx.load_from_string(single_node_model(PER_TOKEN, "float32"))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", 7])
    model.graph.input[0].CopyFrom(value)
    made = session(model.SerializeToString(), threads=1, library=library.path)
    assert [output.shape for output in made.get_outputs()] == [["M", 7], ["M", 1]]


def test_scalar_input_is_refused_by_name(library: Library) -> None:
    made = session(single_node_model(PER_TOKEN, "float32"), threads=1, library=library.path)
    with pytest.raises(Exception, match=r"com\.onnxq:DynamicQuantizePerToken: x is a scalar"):
        made.run(None, {"x": np.array(1.0, np.float32)})


@pytest.mark.parametrize("level", ["sse9", "AVX2", " "])
def test_unknown_isa_is_refused(
    level: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXQ_ISA", level)
    with pytest.raises(DataError, match="known levels: scalar, avx2, avx512bw, avx512vnni"):
        session(single_node_model(PER_TOKEN, "float32"), threads=1, library=library.path)


def test_kernel_in_a_branch_and_in_a_nested_function(library: Library) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21, "com.onnxq" : 1, "local" : 1]>
        g (float[M,K] x, bool c) => (int8[M,K] q) {
            q = If (c) <
                then_branch = t () => (int8[M,K] a) {
                    a, b = com.onnxq.DynamicQuantizePerToken (x)
                },
                else_branch = e () => (int8[M,K] d) { d = local.Outer (x) }
            >
        }
        <domain: "local", opset_import: ["" : 21, "com.onnxq" : 1]>
        Outer (x) => (q) { q, s = com.onnxq.DynamicQuantizePerToken (x) }
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    custom_ops.attach(model, PER_TOKEN)
    source = ir.to_proto(model).SerializeToString()
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    expected, _ = custom_ops.get(PER_TOKEN).reference(x)
    for which in (False, library.path):
        for optimize in (True, False):
            made = session(source, threads=1, optimize=optimize, library=which)
            for condition in (True, False):
                (got,) = made.run(None, {"x": x, "c": np.array(condition)})
                assert same_bits(got, expected)
