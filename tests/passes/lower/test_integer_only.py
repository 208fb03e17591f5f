"""A small encoder in integers alone, and what the pass refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.custom_ops.integer_check import check_integer_only
from onnxq.errors import OnnxqError, SpecError
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.integer_only import IntegerOnly
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.runtime import session
from onnxq.solvers.integer_only import MAX_EXP_STEP
from tests.passes import helpers as h

D, HEADS, TABLE = 32, 2, 600


def encoder(
    activation: str = "g = Gelu (f)",
    mask: str = "m = Mul (absent, low)",
    *,
    norm: str = "LayerNormalization <epsilon = 1e-12>",
    extra: str = "",
    root: float = (D / HEADS) ** 0.5,
    up: float = 0.3,
) -> ir.Model:
    """Embedding, masked attention of two heads, MLP and two norms, on random weights."""
    beta = ", b{}" if norm.startswith("Layer") else ""
    body = f"""
        g (int64[B,S] ids, int64[B,S] attention_mask) => (float[B,S,{D}] y) {{
            e = Gather (table, ids)
            x = {norm} (e, g0{beta.format(0)})
            axes = Constant <value_ints = [1, 2]> ()
            mask4 = Unsqueeze (attention_mask, axes)
            present = Cast <to = 1> (mask4)
            absent = Sub (one, present)
            {mask}
            shape = Constant <value_ints = [0, 0, {HEADS}, {D // HEADS}]> ()
            q0 = MatMul (x, wq)
            q1 = Add (q0, bq)
            q2 = Reshape (q1, shape)
            q = Transpose <perm = [0, 2, 1, 3]> (q2)
            k0 = MatMul (x, wk)
            k2 = Reshape (k0, shape)
            k = Transpose <perm = [0, 2, 3, 1]> (k2)
            v0 = MatMul (x, wv)
            v2 = Reshape (v0, shape)
            v = Transpose <perm = [0, 2, 1, 3]> (v2)
            scores = MatMul (q, k)
            scaled = Div (scores, root)
            masked = Add (scaled, m)
            p = Softmax <axis = -1> (masked)
            c = MatMul (p, v)
            c1 = Transpose <perm = [0, 2, 1, 3]> (c)
            flat = Constant <value_ints = [0, 0, {D}]> ()
            c2 = Reshape (c1, flat)
            o0 = MatMul (c2, wo)
            o = Add (o0, bo)
            r = Add (o, x)
            n = {norm} (r, g1{beta.format(1)})
            f0 = MatMul (n, wi)
            f = Add (f0, bi)
            {activation}
            d0 = MatMul (g, wd)
            d = Add (d0, bd)
            {extra or "r2 = Add (d, n)"}
            y = {norm} (r2, g2{beta.format(2)})
        }}"""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    weights = {"table": normal(TABLE, D), "one": np.float32(1), "low": np.float32(-10000)}
    weights |= {"root": np.float32(root), "half": np.float32(0.37)}
    weights["zero"] = np.float32(0)
    for name, rows, columns in (("q", D, D), ("k", D, D), ("v", D, D), ("o", D, D)):
        weights[f"w{name}"] = normal(rows, columns, scale=rows**-0.5)
    weights["wi"], weights["wd"] = normal(D, 4 * D, scale=up), normal(4 * D, D, scale=0.1)
    for name, width in (("q", D), ("o", D), ("i", 4 * D), ("d", D)):
        weights[f"b{name}"] = normal(width, scale=0.3)
    for i in range(3):
        weights[f"g{i}"], weights[f"b{i}"] = 1 + normal(D, scale=0.2), normal(D, scale=0.2)
        weights[f"g{i}"][5] = 0
    opset = 23 if norm.startswith("RMS") else 21
    used = {name: np.asarray(array) for name, array in weights.items() if name in body}
    return h.model_of(body, used, opset=opset, ir_version=10)


def feeds(count: int = 8, length: int = 12) -> list[h.Feeds]:
    rng = np.random.default_rng(1)
    made = []
    for index in range(count):
        mask = np.ones((2, length), np.int64)
        mask[1, length - index % 5 :] = 0
        made.append({"ids": rng.integers(0, TABLE, size=(2, length)), "attention_mask": mask})
    return made


def lowered(model: ir.Model, **options: Any) -> ir.Model:
    passes = [Canonicalize(), Calibrate(), Assign(), IntegerOnly(**options)]
    return h.apply(model, *passes, samples=feeds()).model


def outputs(model: ir.Model, fed: h.Feeds, *, library: bool, optimize: bool = True) -> Any:
    source = onnx.ModelProto.SerializeToString(ir.to_proto(model))
    made = session(source, threads=1, library=library, optimize=optimize)
    return made.run(None, fed)[0]


SILU = "s = Sigmoid (f)\n g = Mul (f, s)"
CASES: dict[str, dict[str, str]] = {
    "gelu": {},
    "relu": {"activation": "g = Relu (f)"},
    "silu": {"activation": SILU},
    "tanh": {"activation": "g = Tanh (f)"},
    "rmsnorm": {"norm": "RMSNormalization <epsilon = 1e-5>"},
    "where": {"mask": "there = Cast <to = 9> (mask4)\n m = Where (there, zero, low)"},
    "scaled": {"activation": "g0_ = Gelu (f)\n g = Mul (g0_, half)"},
    "gelu of a sum": {"extra": "s1 = Add (d, n)\n r2 = Gelu (s1)"},
    "tanh of a sum": {"extra": "s1 = Add (d, n)\n r2 = Tanh (s1)"},
    "silu of a sum": {"extra": "s1 = Add (d, n)\n s2 = Sigmoid (s1)\n r2 = Mul (s1, s2)"},
    "a number added": {"extra": "s1 = Add (d, n)\n r2 = Add (s1, half)"},
}


def variant(name: str) -> ir.Model:
    return encoder(**CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_kept_in_integers(name: str) -> None:
    original = variant(name)
    fed = feeds(9)[8]
    exact = h.run(original, fed)["y"]
    made = lowered(variant(name))
    real = fed["attention_mask"].astype(bool)
    got = outputs(made, fed, library=False)
    assert h.cosine(got[real], exact[real]) > 0.999
    assert (outputs(made, fed, library=True) == got).all()
    dtypes = {v.dtype for v in made.graph.initializers.values() if v.const_value is not None}
    floats = [v.name for v in made.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert len(floats) == 1, floats  # the scale of the last DequantizeLinear
    assert ir.DataType.INT8 in dtypes
    assert h.ops(made)["DequantizeLinear"] == 1
    assert "QuantizeLinear" not in h.ops(made)


def test_the_same_bits_with_kernels_bodies_threads_and_splits() -> None:
    made = lowered(encoder())
    (fed,) = feeds(1, length=37)
    body = outputs(made, fed, library=False)
    assert (outputs(made, fed, library=False, optimize=False) == body).all()
    assert (outputs(made, fed, library=True) == body).all()
    for row in range(2):
        part = {name: array[row : row + 1] for name, array in fed.items()}
        assert (outputs(made, part, library=True)[0] == body[row]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (0, 5), (2, 0)])
@pytest.mark.parametrize("present", [0, 1])
def test_borders_of_the_batch(shape: tuple[int, int], present: int) -> None:
    """One sample, one token, none; a mask of zeros alone counts for nothing."""
    original, made = encoder(), lowered(encoder())
    ids = np.random.default_rng(4).integers(0, TABLE, size=shape)
    fed = {"ids": ids, "attention_mask": np.full(shape, present, np.int64)}
    body = outputs(made, fed, library=False)
    assert (outputs(made, fed, library=True) == body).all()
    everyone = {**fed, "attention_mask": np.ones(shape, np.int64)}
    assert (outputs(made, everyone, library=True) == body).all()
    assert not ids.size or h.cosine(body, h.run(original, fed)["y"]) > 0.99


SHARP = 0.4
"""A divisor of the scores whose step is then coarser than the exponential takes."""


@pytest.mark.parametrize("root", [4.0, SHARP])
def test_padding_changes_no_bit(root: float) -> None:
    made = lowered(encoder(root=root))
    ids = np.random.default_rng(2).integers(0, TABLE, size=(1, 9))
    short = {"ids": ids, "attention_mask": np.ones((1, 9), np.int64)}
    padded = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in short.items()}
    got = outputs(made, padded, library=True)
    assert (got[:, :9] == outputs(made, short, library=True)).all()


def _exp_steps(model: ir.Model) -> list[float]:
    """What the steps of the exponentials are worth, by their ln 2."""
    softmax = [n for n in model.graph if n.op_type == "IntegerSoftmax"]
    return [0.6931 / n.attributes["ln2"].as_int() for n in softmax]


def test_coarse_scores_are_refined_before_the_exponential() -> None:
    fed = feeds(9)[8]
    real = fed["attention_mask"].astype(bool)
    exact = h.run(encoder(root=SHARP), fed)["y"]
    made, plain = lowered(encoder(root=SHARP)), lowered(encoder())
    assert h.ops(plain)["Mul"] == h.ops(made)["Mul"] - 1
    assert max(_exp_steps(made) + _exp_steps(plain)) <= MAX_EXP_STEP
    body = outputs(made, fed, library=False)
    assert h.cosine(body[real], exact[real]) > 0.98
    assert (outputs(made, fed, library=True) == body).all()
    assert check_integer_only(made, max_extent=64).worst is not None


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"root": 1e-3}, "attention `p`: scores of 16 products"),
        ({"up": 900.0}, "layer `g`: a step of"),
    ],
)
def test_ranges_out_of_reach_are_refused_by_name(made: dict[str, float], named: str) -> None:
    with pytest.raises(OnnxqError, match=named) as caught:
        lowered(encoder(**made))  # type: ignore[arg-type]
    assert caught.value.code == "UNSUPPORTED-SCALE-RANGE"


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"polynomial": 3}, 0.99),
        ({"polynomial": 4, "softmax_rounding": "down"}, 0.99),
        ({"softmax_bits": 5}, 0.98),
        ({"residual_bits": 8}, 0.98),
    ],
)
def test_options(options: dict[str, Any], least: float) -> None:
    fed = feeds(9)[8]
    exact = h.run(encoder(), fed)["y"]
    real = fed["attention_mask"].astype(bool)
    plain = outputs(lowered(encoder()), fed, library=True)
    got = outputs(lowered(encoder(), **options), fed, library=True)
    assert h.cosine(got[real], exact[real]) > least
    assert (got != plain).any()


@pytest.mark.parametrize(
    "options", [{"polynomial": 5}, {"softmax_bits": 9}, {"softmax_bits": 3}, {"residual_bits": 12}]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        IntegerOnly(**options)


@pytest.mark.parametrize(
    ("model", "code", "named"),
    [
        (encoder(activation="g = Sin (f)"), "UNSUPPORTED-INTEGER-FORM", "Sin"),
        (encoder(activation="g = Softplus (f)"), "UNSUPPORTED-INTEGER-FORM", "Softplus"),
        (encoder(mask="m = Mul (absent, half)"), "UNSUPPORTED-INTEGER-FORM", "half"),
        (encoder(mask="m = Exp (absent)"), "UNSUPPORTED-INTEGER-FORM", "Exp"),
    ],
)
def test_what_has_no_integer_form_is_named(model: ir.Model, code: str, named: str) -> None:
    with pytest.raises(OnnxqError, match=named) as caught:
        lowered(model)
    assert caught.value.code == code


def _decoder(kind: str) -> ir.Model:
    body = {
        "rotary": "g (float[B,4] x) => (float[B,4] y) { h = MatMul (x, w)\n n = Neg (h)\n"
        " r = Concat <axis = -1> (n, h)\n y = MatMul (r, v) }",
        "cache": "g (float[B,4] x, float[P,4] past) => (float[T,4] y) { h = MatMul (x, w)\n"
        " r = Concat <axis = 0> (past, h)\n y = MatMul (r, w) }",
    }[kind]
    weights = {"w": np.eye(4, dtype=np.float32), "v": np.ones((8, 4), np.float32)}
    return h.model_of(body, {n: a for n, a in weights.items() if f" {n})" in body}, opset=21)


@pytest.mark.parametrize(("kind", "named"), [("rotary", "rotary"), ("cache", "cache of keys")])
def test_decoders_are_refused_as_such(kind: str, named: str) -> None:
    fed = {"x": np.ones((2, 4), np.float32), "past": np.ones((3, 4), np.float32)}
    fed = {name: array for name, array in fed.items() if kind == "cache" or name == "x"}
    with pytest.raises(OnnxqError, match=f"is a decoder: {named}") as caught:
        h.apply(_decoder(kind), Calibrate(), Assign(), IntegerOnly(), samples=[fed])
    assert caught.value.code == "UNSUPPORTED-INTEGER-DECODER"


def test_a_plan_with_float_layers_is_refused() -> None:
    from onnxq.passes.decide.partial import Partial

    passes = [Calibrate(), Assign(), Partial(op_types=("MatMul",)), IntegerOnly()]
    with pytest.raises(OnnxqError) as caught:
        h.apply(encoder(), *passes, samples=feeds())
    assert caught.value.code == "PASS-INTEGER-PLAN"


def test_a_dynamic_plan_is_refused() -> None:
    with pytest.raises(OnnxqError) as caught:
        h.apply(encoder(), Calibrate(), Assign(mode="dynamic"), IntegerOnly(), samples=feeds())
    assert caught.value.code == "PASS-INTEGER-PLAN"


def test_missing_calibration_is_refused() -> None:
    with pytest.raises(OnnxqError, match="calibrate"):
        h.apply(encoder(), Assign(), IntegerOnly(), samples=feeds())
