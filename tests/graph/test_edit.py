"""Edits keep the graph valid and the interface as it was; ``validate`` finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import InternalError, PreconditionError
from onnxq.graph import edit
from onnxq.graph.match import analyze

from . import match_helpers as mh

X = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)

CHAIN = """g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, float[2] b = {5,6}>
{ a = MatMul(x, w)\n h = Add(a, b)\n y = Relu(h) }"""
NESTED = """g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {1,2,3,4}>
{ h = MatMul(x, w)
  y = If (c) <
    then_branch = t () => (float[2,2] p) { p = Relu(h) },
    else_branch = e () => (float[2,2] q) <float[2,2] w_1 = {1,1,1,1}> { q = Add(h, w_1) }> }"""


def names(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


def value_of(model: ir.Model, name: str) -> ir.Value:
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name == name:
                return value
    return model.graph.initializers[name]


# Names and places -----------------------------------------------------------------------------


def test_fresh_names_avoid_subgraphs_and_their_initializers() -> None:
    graph = mh.model_from(NESTED).graph
    assert edit.fresh_name(graph, "new") == "new"
    assert edit.fresh_name(graph, "w") == "w_2", "w_1 is an initializer of the else branch"
    assert edit.fresh_name(graph, "p") == "p_1"
    taken = edit.Names(graph)
    assert [taken.fresh("n"), taken.fresh("n")] == ["n", "n_1"]


@pytest.mark.parametrize("anchor", ["x", "w", "a", "h"])
def test_nodes_are_inserted_where_their_input_exists(anchor: str) -> None:
    model = mh.model_from(CHAIN)
    value = model.graph.inputs[0] if anchor == "x" else value_of(model, anchor)
    node = ir.node("Identity", inputs=[value])
    edit.insert_after(value, node)
    edit.replace_value(value, node.outputs[0], except_nodes=[node])
    assert node.name
    assert node.outputs[0].name
    edit.validate(model)
    assert names(model) == (["x"], ["y"])
    before = mh.run(mh.model_from(CHAIN), {"x": X}, ["y"])
    np.testing.assert_array_equal(mh.run(model, {"x": X}, ["y"])["y"], before["y"])


def test_insert_before_keeps_the_order_of_several_nodes() -> None:
    model = mh.model_from(CHAIN)
    relu = model.graph.node(2)
    first = ir.node("Neg", inputs=[value_of(model, "h")])
    second = ir.node("Neg", inputs=[first.outputs[0]])
    edit.insert_before(relu, [first, second])
    relu.replace_input_with(0, second.outputs[0])
    edit.validate(model)
    assert [n.op_type for n in model.graph] == ["MatMul", "Add", "Neg", "Neg", "Relu"]


def test_a_detached_anchor_is_refused() -> None:
    with pytest.raises(InternalError, match="no graph"):
        edit.insert_before(ir.node("Relu", inputs=[]), ir.node("Neg", inputs=[]))


# Replacing values -----------------------------------------------------------------------------


def test_a_replaced_output_keeps_its_name() -> None:
    model = mh.model_from(CHAIN)
    old = value_of(model, "y")
    neg = ir.node("Neg", inputs=[old])
    edit.insert_after(old, neg)
    changed = edit.replace_value(old, neg.outputs[0], except_nodes=[neg])
    assert changed == 1
    assert names(model) == (["x"], ["y"])
    assert model.graph.outputs[0] is neg.outputs[0]
    assert str(model.graph.outputs[0].shape) == "[2,2]"
    edit.validate(model)
    before = mh.run(mh.model_from(CHAIN), {"x": X}, ["y"])["y"]
    np.testing.assert_array_equal(mh.run(model, {"x": X}, ["y"])["y"], -before)


@pytest.mark.parametrize("new", ["x", "w", "z"])
def test_an_output_replaced_by_an_interface_value_goes_through_identity(new: str) -> None:
    model = mh.model_from(
        """g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1,2,3,4}>
        { z = MatMul(x, w)\n h = Neg(x)\n y = Relu(h) }"""
    )
    value = model.graph.inputs[0] if new == "x" else value_of(model, new)
    edit.replace_value(value_of(model, "y"), value)
    edit.remove_dead(model.graph)
    edit.validate(model)
    assert names(model) == (["x"], ["y", "z"])
    got = mh.run(model, {"x": X}, ["y", "z"])
    w = np.array([[1, 2], [3, 4]], np.float32)
    expected = {"x": X, "w": w, "z": got["z"]}[new]
    np.testing.assert_array_equal(got["y"], expected)


def test_replacing_reaches_captures_in_subgraphs() -> None:
    model = mh.model_from(NESTED)
    old = value_of(model, "h")
    neg = ir.node("Neg", inputs=[old])
    edit.insert_after(old, neg)
    assert edit.replace_value(old, neg.outputs[0], except_nodes=[neg]) == 2
    edit.validate(model)
    got = mh.run(model, {"x": X, "c": np.array(True)}, ["y"])["y"]
    w = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_allclose(got, np.maximum(-(X @ w), 0), mh.RTOL, mh.ATOL)


def test_outputs_may_be_left_alone() -> None:
    model = mh.model_from(CHAIN)
    old = value_of(model, "y")
    assert edit.replace_value(old, value_of(model, "h"), outputs=False) == 0
    assert model.graph.outputs[0] is old


# Constants ------------------------------------------------------------------------------------

SHARED = """g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1,2,3,4}>
{ y = MatMul(x, w)\n z = MatMul(y, w) }"""


def test_a_private_constant_is_written_in_place_and_a_shared_one_copied() -> None:
    private, shared = mh.model_from(CHAIN), mh.model_from(SHARED)
    new = np.full((2, 2), 7, np.float32)
    assert edit.replace_const(private.graph.node(0), 1, new).name == "w"
    assert list(private.graph.initializers) == ["w", "b"]
    copy = edit.replace_const(shared.graph.node(1), 1, new)
    assert copy.name == "w_1"
    for model in (private, shared):
        edit.validate(model)
    got = mh.run(shared, {"x": X}, ["y", "z"])
    w = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_allclose(got["y"], X @ w, mh.RTOL, mh.ATOL)
    np.testing.assert_allclose(got["z"], X @ w @ new, mh.RTOL, mh.ATOL)


def test_a_constant_node_is_replaced_by_an_initializer() -> None:
    model = mh.model_from(
        """g (float[2] x) => (float[2] y)
        { c = Constant<value = float[2] {1, 2}>()\n y = Mul(x, c) }"""
    )
    edit.replace_const(model.graph.node(1), 1, np.array([3, 4], np.float32))
    assert [n.op_type for n in model.graph] == ["Mul"]
    edit.validate(model)
    got = mh.run(model, {"x": X[0]}, ["y"])["y"]
    np.testing.assert_array_equal(got, X[0] * np.array([3, 4], np.float32))


def test_an_overridable_default_is_never_written() -> None:
    model = mh.model_from(
        """g (float[2,2] x, float[2,2] w) => (float[2,2] y) <float[2,2] w = {1,2,3,4}>
        { y = MatMul(x, w) }"""
    )
    edit.replace_const(model.graph.node(0), 1, np.zeros((2, 2), np.float32))
    assert value_of(model, "w").const_value is not None
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [[1, 2], [3, 4]]
    edit.validate(model)


def test_new_constants_may_be_of_narrow_types_and_other_shapes() -> None:
    model = mh.model_from(CHAIN)
    narrow = edit.add_initializer(model.graph, "q", np.array([1, -8], ml_dtypes.int4))
    assert narrow.dtype == ir.DataType.INT4
    with pytest.raises(InternalError, match="exists already"):
        edit.add_initializer(model.graph, "w", X)
    value = edit.replace_const(model.graph.node(1), 1, np.ones((1, 2), np.float32))
    assert str(value.shape) == "[1,2]"
    edit.validate(model)


LINEARS = {
    "matmul": "y = MatMul(x, w)",
    "matmul and bias": "h = MatMul(x, w)\n y = Add(b, h)",
    "transposed": "t = Transpose<perm = [1,0]>(w)\n y = MatMul(x, t)",
    "gemm": "y = Gemm<transB = 1, beta = 2.0>(x, w, b)",
    "gemm without C": "y = Gemm(x, w)",
    "constant nodes": "v = Constant<value = float[2,2] {1,2,3,4}>()\n"
    "c = Constant<value = float[1,2] {1,2}>()\n h = MatMul(x, v)\n y = Add(h, c)",
    "shared": "h = MatMul(x, w)\n r = MatMul(x, w)\n y = Add(h, r)",
    "shared transpose": "t = Transpose<perm = [1,0]>(w)\n h = MatMul(x, t)\n r = MatMul(x, t)\n"
    "y = Add(h, r)",
}


@pytest.mark.parametrize("case", LINEARS)
def test_weight_and_bias_of_a_linear_layer_can_be_written(case: str) -> None:
    head = "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, float[2] b = {5,6}>"
    model = mh.model_from(f"{head} {{ {LINEARS[case]} }}")
    first = analyze(model).linears[0]
    weight, bias = np.array([[2, 3], [5, 7]], np.float32), np.array([11, 13], np.float32)
    others = [linear.w.copy() for linear in analyze(model).linears[1:]]
    edit.set_weight(first, weight)
    edit.set_bias(first, bias)
    edit.validate(model)
    assert names(model) == (["x"], ["y"])
    structure = analyze(model)
    assert np.array_equal(structure.linears[0].w, weight)
    assert structure.linears[0].b is not None
    assert np.array_equal(structure.linears[0].b, bias)
    for linear, before in zip(structure.linears[1:], others, strict=True):
        assert np.array_equal(linear.w, before), "another layer's weight has changed"
    mh.check_against_runtime(model, structure, {"x": X})


def test_the_element_type_stays_and_what_does_not_fit_is_refused() -> None:
    body = """g (float16[2,2] x) => (float16[2,2] y) <float16[2,2] w = {15360,0,0,15360}>
    { y = MatMul(x, w) }"""
    model = mh.model_from(body)
    (linear,) = analyze(model).linears
    edit.set_weight(linear, np.full((2, 2), 0.5, np.float64))
    assert value_of(model, "w").dtype == ir.DataType.FLOAT16
    assert linear.w.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(PreconditionError, match="not finite in float16") as error:
        edit.set_weight(linear, np.full((2, 2), 1e5))
    assert error.value.code == "EDIT-NOT-FINITE"


# Dead code ------------------------------------------------------------------------------------


def test_dead_nodes_go_with_their_subgraphs_and_constants() -> None:
    model = mh.model_from(
        """g (float[2,2] x, bool c, float[2] d) => (float[2,2] y)
        <float[2,2] w = {1,2,3,4}, float[2] unread = {1,2}, float[2] d = {1,2}>
        { h = MatMul(x, w)\n a = Neg(h)\n y = Relu(x)
          z = If (c) <
            then_branch = t () => (float[2,2] p) { p = Relu(a) },
            else_branch = e () => (float[2,2] q) { q = Neg(a) }> }"""
    )
    assert edit.remove_dead(model.graph) == edit.Removed(nodes=3, initializers=2)
    assert [n.op_type for n in model.graph] == ["Relu"]
    assert list(model.graph.initializers) == ["d"], "d is an input too"
    edit.validate(model)


def test_dead_code_inside_a_live_subgraph_goes() -> None:
    model = mh.model_from(
        """g (float[2,2] x, bool c) => (float[2,2] y)
        { y = If (c) <
            then_branch = t () => (float[2,2] p) <float[2] u = {1,2}> { r = Neg(x)\n p = Relu(x) },
            else_branch = e () => (float[2,2] q) { q = Neg(x) }> }"""
    )
    assert edit.remove_dead(model.graph) == edit.Removed(nodes=1, initializers=1)
    edit.validate(model)
    assert edit.remove_dead(model.graph) == edit.Removed()


# Validity -------------------------------------------------------------------------------------


def _swap(model: ir.Model) -> None:
    node = model.graph.node(0)
    model.graph.remove(node)
    model.graph.append(node)


def _double_name(model: ir.Model) -> None:
    model.graph.node(1).outputs[0].name = "a"


def _detached(model: ir.Model) -> None:
    model.graph.remove(model.graph.node(0))


def _foreign_domain(model: ir.Model) -> None:
    model.graph.node(2).domain = "org.example"


def _wrong_type(model: ir.Model) -> None:
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros(2, np.int64), name="b")


def _wrong_shape(model: ir.Model) -> None:
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros(3, np.float32), name="b")


def _no_output(model: ir.Model) -> None:
    model.graph.remove(model.graph.node(2))


def _unknown_operator(model: ir.Model) -> None:
    model.graph.node(2).op_type = "Rellu"


BROKEN: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "order": (_swap, "before it exists"),
    "name": (_double_name, "the name 'a' of"),
    "producer": (_detached, "defined nowhere around it"),
    "domain": (_foreign_domain, "uses domain 'org.example' unimported"),
    "type": (_wrong_type, "its data"),
    "shape": (_wrong_shape, "its data"),
    "output": (_no_output, "output 'y' is defined nowhere"),
    "operator": (_unknown_operator, "Rellu"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_validate_names_what_is_broken(case: str) -> None:
    breaks, words = BROKEN[case]
    model = mh.model_from(CHAIN)
    edit.validate(model)
    breaks(model)
    with pytest.raises(InternalError) as error:
        edit.validate(model, after="some-pass")
    assert error.value.code == "INTERNAL-INVALID-IR"
    assert words in error.value.cause
    assert "after some-pass" in error.value.cause
    assert edit.is_topologically_sorted(model.graph) == (case != "order")


def test_a_subgraph_may_not_reuse_an_outer_name() -> None:
    model = mh.model_from(NESTED)
    edit.validate(model)
    value_of(model, "p").name = "x"
    with pytest.raises(InternalError, match="the name 'x'"):
        edit.validate(model)


def test_validate_leaves_the_model_and_its_data_alone() -> None:
    big = np.zeros((64, 64), np.float32)
    model = mh.model_from(CHAIN)
    edit.add_initializer(model.graph, "big", big)
    before = ir.to_proto(model).SerializeToString()
    edit.validate(model)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    "parts", [("sst2-bert-tiny", "model.onnx"), ("odd", "silero_vad", "silero_vad.onnx")]
)
def test_real_models_are_valid(parts: tuple[str, ...]) -> None:
    model = ir.load(mh.shared("models", *parts))
    edit.validate(model)
    edit.remove_dead(model.graph)
    edit.validate(model)
