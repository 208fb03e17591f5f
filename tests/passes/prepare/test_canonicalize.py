"""canonicalize: the function stays, one spelling is left, and a second time finds nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxq.graph import io
from onnxq.graph.io import serialized
from onnxq.graph.match import analyze
from onnxq.passes.prepare.canonicalize import Canonicalize

from .. import helpers as h

REAL_TOLERANCE = 1e-4
"""The tolerance that the pass declares; real models fold BatchNorm in float32."""


def batch_norm_case(bias: str, epsilon: str, *, extra: str = "") -> ir.Model:
    weights = {
        "w": h.normal(6, 3, 3, 3),
        "gamma": h.normal(6, seed=1),
        "beta": h.normal(6, seed=2),
        "mean": h.normal(6, seed=3),
        "var": np.abs(h.normal(6, seed=4)) + 0.01,
    }
    if bias:
        weights["b"] = h.normal(6, seed=5)
    return h.model_of(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 6, 8, 8] y{extra}) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, w{bias})
            y = BatchNormalization {epsilon} (c, gamma, beta, mean, var)
        }}""",
        weights,
    )


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("epsilon", ["", "<epsilon = 0.5>"])
def test_batch_norm_goes_into_the_convolution(bias: str, epsilon: str) -> None:
    model = batch_norm_case(bias, epsilon)
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done) == {"Conv": 1}
    feeds = [{"x": h.normal(1, 3, 8, 8, seed=s)} for s in range(3)]
    h.assert_same_function(model, done, feeds)
    # the published inference formula (Ioffe and Szegedy 2015) in float64, beside onnxruntime
    eps = 0.5 if epsilon else 1e-5
    c = h.values(model, feeds[0], ["c"])["c"].astype(np.float64)
    p = {k: h.const(model, k).reshape(-1, 1, 1) for k in ("gamma", "beta", "mean", "var")}
    want = p["gamma"] * (c - p["mean"]) / np.sqrt(p["var"] + eps) + p["beta"]
    assert h.relative_error(want, h.run(done, feeds[0])["y"]) <= h.SAME


def test_batch_norm_stays_when_the_convolution_is_read_elsewhere() -> None:
    model = batch_norm_case("", "", extra=", float[1, 6, 8, 8] c")
    result = h.apply(model, Canonicalize())
    assert h.ops(result.model)["BatchNormalization"] == 1
    assert "other readers" in h.reasons(h.report_of(result, "canonicalize"))


def test_two_convolutions_with_one_weight_each_get_their_own_batch_norm() -> None:
    vectors = {f"v{i}": np.abs(h.normal(3, seed=i)) + 0.1 for i in range(8)}
    model = h.model_of(
        """g (float[1, 3, 8, 8] x) => (float[1, 3, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            n = BatchNormalization (a, v0, v1, v2, v3)
            b = Conv <pads = [1, 1, 1, 1]> (n, w)
            y = BatchNormalization (b, v4, v5, v6, v7)
        }""",
        {"w": h.normal(3, 3, 3, 3), **vectors},
    )
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done) == {"Conv": 2}
    h.assert_same_function(model, done, [{"x": h.normal(1, 3, 8, 8)}])


@pytest.mark.parametrize("own", ["", "pads = [1, 0, 2, 1], ", 'auto_pad = "VALID", '])
def test_pad_goes_into_the_convolution(own: str) -> None:
    model = h.model_of(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, A, B] y) {{
            p = Pad (x, amounts, zero)
            y = Conv <{own}strides = [2, 2]> (p, w)
        }}""",
        {
            "w": h.normal(4, 3, 3, 3),
            "amounts": np.array([0, 0, 1, 2, 0, 0, 3, 0], np.int64),
            "zero": np.array(0, np.float32),
        },
    )
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done) == {"Conv": 1}
    h.assert_same_function(model, done, [{"x": h.normal(1, 3, 8, 8)}])


@pytest.mark.parametrize(
    ("amounts", "fill", "mode"),
    [
        ([0, 1, 1, 1, 0, 0, 1, 1], 0.0, "constant"),  # channels
        ([0, 0, 1, 1, 0, 0, 1, 1], 1.5, "constant"),  # not zero
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, "reflect"),
        ([0, 0, -1, 1, 0, 0, 1, 1], 0.0, "constant"),  # crops
    ],
)
def test_pads_of_another_kind_stay(amounts: list[int], fill: float, mode: str) -> None:
    channels = 3 + amounts[1]
    model = h.model_of(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, A, B] y) {{
            p = Pad <mode = "{mode}"> (x, amounts, fill)
            y = Conv (p, w)
        }}""",
        {
            "w": h.normal(4, channels, 3, 3),
            "amounts": np.array(amounts, np.int64),
            "fill": np.array(fill, np.float32),
        },
    )
    result = h.apply(model, Canonicalize())
    assert h.ops(result.model)["Pad"] == 1
    assert h.report_of(result, "canonicalize").skipped
    h.assert_same_function(model, result.model, [{"x": h.normal(1, 3, 8, 8)}])


@pytest.mark.parametrize("rank", [2, 3])
def test_a_product_of_matrices_and_its_bias_become_one_gemm(rank: int) -> None:
    """Only matrices: Gemm knows no batches."""
    dims = ", ".join(["N"] * (rank - 1))
    model = h.model_of(
        f"""g (float[{dims}, 8] x) => (float[{dims}, 6] y) {{
            n = Neg(x)
            m = MatMul(n, w)
            y = Add(b, m)
        }}""",
        {"w": h.normal(8, 6), "b": h.normal(6)},
    )
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done)["Gemm"] == (rank == 2)
    h.assert_same_function(model, done, [{"x": h.normal(*[4] * (rank - 1), 8)}])


def test_constants_become_initializers_and_what_hangs_on_them_is_folded() -> None:
    model = h.model_of(
        """g (float[2, 4] x) => (float[2, 3] y) {
            w = Constant <value = float[3, 4] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> ()
            t = Transpose <perm = [1, 0]> (w)
            one = Constant <value = float {1.0}> ()
            two = Add(one, one)
            m = MatMul(x, t)
            y = Mul(m, two)
        }"""
    )
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done) == {"MatMul": 1, "Mul": 1}
    x = h.normal(2, 4)
    w = np.arange(1, 13, dtype=np.float64).reshape(3, 4)
    assert h.relative_error(2 * (x @ w.T), h.run(done, {"x": x})["y"]) <= h.SAME


def test_a_large_transposed_weight_is_folded_but_a_tied_one_is_not_doubled() -> None:
    weights = {"w": h.normal(1200, 40), "e": h.normal(50, 40, seed=1)}
    model = h.model_of(
        """g (float[2, 40] x, int64[2] i) => (float[2, 1200] y, float[2, 50] z, float[2, 40] r) {
            wt = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, wt)
            et = Transpose <perm = [1, 0]> (e)
            z = MatMul(x, et)
            r = Gather(e, i)
        }""",
        weights,
    )
    done = h.apply(model, Canonicalize()).model
    assert h.ops(done) == {"MatMul": 2, "Transpose": 1, "Gather": 1}
    h.assert_same_function(model, done, [{"x": h.normal(2, 40), "i": np.array([3, 1])}])


def test_identity_and_doubled_work_go_but_outputs_keep_their_names() -> None:
    model = h.model_of(
        """g (float[2, 4] x) => (float[2, 4] y, float[2, 4] z, float[2, 4] out) {
            a = Identity(x)
            b = Relu(a)
            c = Relu(x)
            y = Add(b, c)
            z = Identity(y)
            out = Identity(x)
        }"""
    )
    done = h.apply(model, Canonicalize()).model
    assert [v.name for v in done.graph.outputs] == ["y", "z", "out"]
    assert h.ops(done)["Relu"] == 1
    h.assert_same_function(model, done, [{"x": h.normal(2, 4)}])


def test_a_branch_that_hands_out_an_outer_value_stays_valid() -> None:
    model = h.model_of(
        """g (float[2, 4] x, bool c) => (float[2, 4] y) {
            r = Relu(x)
            y = If (c) <
                then_branch = t () => (float[2, 4] a) { a = Identity(r) },
                else_branch = e () => (float[2, 4] b) { k = Identity(r) b = Neg(k) }
            >
        }"""
    )
    done = h.apply(model, Canonicalize()).model
    for c in (True, False):
        h.assert_same_function(model, done, [{"x": h.normal(2, 4), "c": np.array(c)}])
    assert h.ops(done) == {"Relu": 1, "If": 1, "Identity": 1, "Neg": 1}


@pytest.mark.parametrize("opset", [8, 9, 12])
def test_the_opset_is_raised(opset: int) -> None:
    model = h.model_of(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x)
            y = Conv (p, w)
        }"""
        if opset < 11
        else """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            y = Conv <pads = [1, 1, 1, 1]> (x, w)
        }""",
        {"w": h.normal(4, 3, 3, 3)},
        opset=opset,
        ir_version=4,
    )
    done = h.apply(model, Canonicalize()).model
    assert done.opset_imports[""] == 13
    assert h.ops(done) == {"Conv": 1}
    h.assert_same_function(model, done, [{"x": h.normal(1, 3, 8, 8)}])


def test_the_opset_that_is_asked_for_also_raises_the_ir_version() -> None:
    """The runtime refuses opset 21 in a file of IR version 7."""
    model = h.model_of("g (float[4] x) => (float[4] y) { y = Relu(x) }", ir_version=7)
    done = h.apply(model, Canonicalize(opset=21)).model
    assert done.opset_imports[""] == 21
    assert done.ir_version >= 10
    h.assert_same_function(model, done, [{"x": h.normal(4)}])


def test_initializers_listed_as_inputs_in_old_files_become_constants() -> None:
    """Before IR version 4 they had to be listed; nobody could override them in practice."""
    text = """<ir_version: 3, opset_import: ["" : 8]>
        g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = MatMul(x, w) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(h.normal(4, 3), "w"))
    model = ir.from_proto(proto)
    done = h.apply(model, Canonicalize()).model
    assert [v.name for v in done.graph.inputs] == ["x"]
    assert [linear.kind for linear in analyze(done).linears] == ["matmul"]
    h.assert_same_function(model, done, [{"x": h.normal(2, 4)}])


def test_nodes_get_names_that_say_which_is_meant() -> None:
    model = h.model_of(
        """g (float[4] x) => (float[4] z) {
            a = Relu(x)
            b = Neg(a)
            z = Abs(b)
        }"""
    )
    nodes = list(model.graph)
    nodes[0].name, nodes[1].name, nodes[2].name = "twice", "twice", ""
    done = h.apply(model, Canonicalize()).model
    assert [n.name for n in done.graph] == ["twice", "twice_2", "z"]


def test_quantized_constants_stay_quantized() -> None:
    """Folding DequantizeLinear would turn small integer weights back into floats."""
    model = h.model_of(
        """g (float[2, 4] x) => (float[2, 3] y) {
            w = DequantizeLinear(codes, scale)
            y = MatMul(x, w)
        }""",
        {"codes": np.arange(12, dtype=np.int8).reshape(4, 3), "scale": np.float32(0.5).reshape(())},
    )
    assert h.ops(h.apply(model, Canonicalize()).model) == {"DequantizeLinear": 1, "MatMul": 1}


def _twice_is_once(model: ir.Model) -> ir.Model:
    once = h.apply(model, Canonicalize())
    twice = h.apply(once.model, Canonicalize())
    assert not h.report_of(twice, "canonicalize").changed
    same = serialized(_bare(once.model)) == serialized(_bare(twice.model))
    assert same, "the bytes differ"  # pytest would look for the place in megabytes
    return once.model


def _bare(model: ir.Model) -> ir.Model:
    """Without the provenance, which tells how often the pass ran."""
    model.metadata_props.clear()
    return model


@pytest.mark.parametrize("path", h.shared_models())
def test_real_models_keep_their_function(path: str) -> None:
    model = io.load(h.shared("models", path))
    done = _twice_is_once(model)
    if "superresolution" in path:
        return  # its operators are in no runtime that we have
    h.assert_same_function(model, done, h.made_up_feeds(model, 2), REAL_TOLERANCE)


@pytest.mark.parametrize("path", h.light_models(), ids=lambda p: p.rsplit("/", 1)[-1])
def test_known_cnns_keep_their_function(path: str) -> None:
    model = io.load(path)
    if "vgg19" in path or "densenet" in path:
        pytest.skip("takes long: 19 GFLOP, or hundreds of BatchNorms")
    done = _twice_is_once(model)
    h.assert_same_function(model, done, h.made_up_feeds(model, 1), REAL_TOLERANCE)
