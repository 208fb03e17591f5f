"""Embeddings, residual adds, gated MLPs and the questions a pass asks about readers."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxq.graph.match import analyze

from . import match_helpers as mh

W = "float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}"
W2, W3 = W.replace(" w ", " w2 "), W.replace(" w ", " w3 ")


def _square(body: str, more: str = "", inputs: str = "float[2,3,4] x") -> str:
    return f"g ({inputs}) => (float[2,3,4] y) <{W}, {W2}, {W3}{more}> {{ {body} }}"


# Residual adds --------------------------------------------------------------------------------


@pytest.mark.parametrize("add", ["Add(h, x)", "Add(x, h)"])
def test_residual_add_in_either_order(add: str) -> None:
    structure = mh.structure_of(_square(f"m = MatMul(x, w)\n h = Relu(m)\n y = {add}"))
    (residual,) = structure.residual_adds
    assert (residual.skip.name, residual.branch.name, residual.output.name) == ("x", "h", "y")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("a = MatMul(x, w)\n c = MatMul(x, w2)\n y = Add(a, c)", "float[2,3,4] x"),
        ("a = MatMul(x, w)\n y = Add(a, z)", "float[2,3,4] x, float[2,3,4] z"),
        ("a = MatMul(x, w)\n y = Add(a, b)", "float[2,3,4] x"),
        ("a = ReduceMax(x, last)\n y = Add(a, x)", "float[2,3,4] x"),
        ("a = Add(x, x)\n y = Relu(a)", "float[2,3,4] x"),
        ("s = Shape(x)\n a = Cast<to = 1>(s)\n y = Add(x, a)", "float[2,3,4] x"),
    ],
    ids=["parallel branches", "two inputs", "bias", "broadcast", "itself", "through its shape"],
)
def test_what_is_no_residual_add(body: str, inputs: str) -> None:
    more = ", float[4] b = {1,2,3,4}, int64[1] last = {-1}"
    text = _square(body, more, inputs)
    model = mh.model_from(text)
    if "ReduceMax" in body:
        model.graph.node(0).outputs[0].shape = ir.Shape([2, 3, 1])
    assert not analyze(model).residual_adds


def test_residual_chain_keeps_its_order_and_skips() -> None:
    body = """n = LayerNormalization(x, g, g)\n a = MatMul(n, w)\n r = Add(x, a)
    n2 = LayerNormalization(r, g, g)\n c = MatMul(n2, w2)\n y = Add(r, c)"""
    structure = mh.structure_of(_square(body, ", float[4] g = {1,1,1,1}"))
    assert [(r.skip.name, r.branch.name) for r in structure.residual_adds] == [
        ("x", "a"),
        ("r", "c"),
    ]


# Embeddings -----------------------------------------------------------------------------------


def test_embeddings_are_gathers_of_rows_from_float_tables() -> None:
    structure = mh.structure_of(
        """g (int64[2,3] ids) => (float[2,3,2] y, float[2,3] z, int64[2,3,2] u, float[4,2,3] v)
        <float[4,2] table = {1,2,3,4,5,6,7,8}, float[4] row = {1,2,3,4},
         int64[4,2] whole = {1,2,3,4,5,6,7,8}>
        { t = Identity(table)\n y = Gather(t, ids)\n z = Gather(row, ids)
          u = Gather(whole, ids)\n v = Gather<axis = 1>(table, ids) }"""
    )
    (embedding,) = structure.embeddings
    assert (embedding.table.name, embedding.indices.name, embedding.output.name) == (
        "table",
        "ids",
        "y",
    )
    assert embedding.is_table_shared


# Gated MLPs -----------------------------------------------------------------------------------

GATED = "g = MatMul(x, w)\n u = MatMul(x, w2)\n s = Sigmoid(g)\n a = Mul(g, s)\n"


@pytest.mark.parametrize("mul", ["Mul(a, u)", "Mul(u, a)"])
def test_gated_mlp_in_either_order(mul: str) -> None:
    structure = mh.structure_of(_square(f"{GATED} m = {mul}\n y = MatMul(m, w3)"))
    (mlp,) = structure.gated_mlps
    assert (mlp.gate.output.name, mlp.up.output.name, mlp.down.output.name) == ("g", "u", "y")
    assert mlp.act.kind == "silu"
    assert mlp.mul.outputs[0].name == "m"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{GATED} m = Mul(a, u)\n y = Relu(m)", None),
        (f"{GATED} m = Mul(a, w)\n y = MatMul(m, w3)", None),
        (f"{GATED} r = Relu(u)\n m = Mul(a, r)\n y = MatMul(m, w3)", None),
        (f"{GATED} m = Mul(a, u)\n d = MatMul(m, w3)\n y = Add(d, m)", "more than one"),
        (
            GATED.replace("MatMul(x, w2)", "MatMul(g, w2)") + "m = Mul(a, u)\n y = MatMul(m, w3)",
            "different values",
        ),
        (
            "h = MatMul(x, w)\n g, u = Split<axis = 2, num_outputs = 2>(h)\n s = Sigmoid(g)\n"
            "a = Mul(g, s)\n m = Mul(a, u)\n y = MatMul(m, w4)",
            "one linear layer that is split",
        ),
    ],
    ids=[
        "no down",
        "times a constant",
        "up is activated",
        "product read twice",
        "gate feeds up",
        "fused gate and up",
    ],
)
def test_what_is_no_gated_mlp(body: str, reason: str | None) -> None:
    structure = mh.structure_of(_square(body, ", float[2,4] w4 = {1,2,3,4,5,6,7,8}"))
    assert not structure.gated_mlps
    given = mh.reasons(structure, "gated-mlp")
    assert [reason in r for r in given] == [True] if reason else not given


# Readers --------------------------------------------------------------------------------------


def test_readers_look_through_what_keeps_the_channels() -> None:
    body = """n = LayerNormalization(x, g, g)\n i = Identity(n)\n c = Cast<to = 1>(i)
    a = MatMul(c, w)\n f = Reshape(n, flat)\n b = Gemm(f, w2)\n s = Shape(n)
    h = Reshape(n, heads)\n d = MatMul(h, w5)\n r = Relu(n)\n y = Add(n, a)"""
    more = """, float[4] g = {1,1,1,1}, int64[2] flat = {-1, 4}, int64[4] heads = {2,3,2,2},
    float[2,2] w5 = {1,2,3,4}"""
    structure = mh.structure_of(_square(body, more))
    value = structure.norms[0].output
    assert [linear.node.outputs[0].name for linear in structure.readers_of(value)] == ["a", "b"]
    others = structure.other_readers_of(value)
    assert sorted(node.outputs[0].name or "" for node in others) == ["h", "r", "y"]
    assert structure.channels_of(value) == 4
    assert structure.norm_of(structure.linears[0].x) is structure.norms[0]


def test_a_weight_operand_is_no_reader_and_outputs_are_told() -> None:
    structure = mh.structure_of(
        """g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1,2,3,4}>
        { h = Relu(x)\n a = MatMul(h, w)\n y = MatMul(a, h)\n z = Identity(h) }"""
    )
    value = structure.activations[0].output
    assert [linear.output.name for linear in structure.readers_of(value)] == ["a"]
    assert [node.outputs[0].name for node in structure.other_readers_of(value)] == ["y"]
    assert structure.is_output(value)
    assert not structure.is_output(structure.linears[0].output)
    assert structure.linear_of(structure.linears[0].output) is structure.linears[0]
    assert structure.activation_of(value) is structure.activations[0]
