"""LayerNorm and RMSNorm: every spelling, computed again by the formula, and near misses."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.graph.match import analyze

from . import match_helpers as mh

X = np.random.default_rng(0).normal(1.0, 2.0, size=(2, 3, 4)).astype(np.float32)

HEAD = """g (float[B, S, 4] x) => (float[B, S, 4] y)
<float[4] gamma = {1, 2, 3, 4}, float[4] beta = {0.1, 0.2, 0.3, 0.4},
 int64[1] last = {-1}, float two = {2}, float half = {0.5}, float mhalf = {-0.5},
 float one = {1}, float eps = {0.01}>"""
#: x -> d = x - mean, v = mean(d^2) + eps, s = sqrt(v)
CENTRE = "m = ReduceMean(x, last)\n d = Sub(x, m)\n"
VARIANCE = "q = Pow(d, two)\n p = ReduceMean(q, last)\n v = Add(p, eps)\n"
DEVIATION = CENTRE + VARIANCE + "s = Sqrt(v)\n"
AFFINE = "a = Mul(n, gamma)\n y = Add(a, beta)"
MEAN_SQUARE = "q = Mul(x, x)\n p = ReduceMean(q, last)\n v = Add(eps, p)\n"

LAYERNORM = {
    "operator": "y = LayerNormalization<epsilon = 0.01>(x, gamma, beta)",
    "operator, axis 2": "y = LayerNormalization<axis = 2, epsilon = 0.01>(x, gamma, beta)",
    "Pow, Sqrt, Div": DEVIATION + "n = Div(d, s)\n" + AFFINE,
    "operands swapped": CENTRE
    + "q = Mul(d, d)\n p = ReduceMean(q, last)\n v = Add(eps, p)\n s = Sqrt(v)\n"
    + "n = Div(d, s)\n a = Mul(gamma, n)\n y = Add(beta, a)",
    "Reciprocal, Mul": DEVIATION + "r = Reciprocal(s)\n n = Mul(r, d)\n" + AFFINE,
    "1/s, Mul": DEVIATION + "r = Div(one, s)\n n = Mul(d, r)\n" + AFFINE,
    "Pow by half": CENTRE + VARIANCE + "s = Pow(v, half)\n n = Div(d, s)\n" + AFFINE,
    "Pow by minus half": CENTRE + VARIANCE + "s = Pow(v, mhalf)\n n = Mul(d, s)\n" + AFFINE,
    "two copies of x - mean": DEVIATION
    + "m2 = ReduceMean(x, last)\n d2 = Sub(x, m2)\n n = Div(d2, s)\n"
    + AFFINE,
    "casts around": "x32 = Cast<to = 1>(x)\n m = ReduceMean(x32, last)\n d = Sub(x32, m)\n"
    + VARIANCE
    + "s = Sqrt(v)\n n32 = Div(d, s)\n n = Cast<to = 1>(n32)\n"
    + AFFINE,
    "cast before the square": CENTRE
    + "c = Cast<to = 1>(d)\n q = Pow(c, two)\n p = ReduceMean(q, last)\n v = Add(p, eps)\n"
    + "s = Sqrt(v)\n n = Div(d, s)\n"
    + AFFINE,
}
RMSNORM = {
    "SimplifiedLayerNormalization": "y = com.microsoft.SimplifiedLayerNormalization"
    "<axis = -1, epsilon = 0.01>(x, gamma)",
    "Sqrt, Div": MEAN_SQUARE + "s = Sqrt(v)\n n = Div(x, s)\n y = Mul(n, gamma)",
    "Reciprocal, gamma first": MEAN_SQUARE
    + "s = Sqrt(v)\n r = Reciprocal(s)\n n = Mul(x, r)\n y = Mul(gamma, n)",
    "Pow, Pow": "q = Pow(x, two)\n p = ReduceMean(q, last)\n v = Add(p, eps)\n"
    "r = Pow(v, mhalf)\n n = Mul(r, x)\n y = Mul(n, gamma)",
    "Llama's casts": "c = Cast<to = 1>(x)\n q = Pow(c, two)\n p = ReduceMean(q, last)\n"
    "v = Add(p, eps)\n s = Sqrt(v)\n r = Div(one, s)\n n = Mul(c, r)\n k = Cast<to = 1>(n)\n"
    "y = Mul(gamma, k)",
}


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [("layernorm", s) for s in LAYERNORM] + [("rmsnorm", s) for s in RMSNORM],
)
def test_spelling_matches_and_computes_the_output(kind: str, spelling: str) -> None:
    body = (LAYERNORM if kind == "layernorm" else RMSNORM)[spelling]
    # onnxruntime knows the Simplified operator in the default domain only, so run that.
    model = mh.model_from(f"{HEAD} {{ {body} }}")
    structure = analyze(model)
    assert not structure.rejected
    (norm,) = structure.norms
    assert norm.kind == kind
    assert (norm.x.name, norm.output.name) == ("x", "y")
    assert norm.epsilon == pytest.approx(0.01)
    assert norm.gamma.name == "gamma"
    assert (norm.beta is None) == (kind == "rmsnorm")
    assert norm.nodes[-1].outputs[0] is norm.output
    assert set(norm.nodes) == set(model.graph), "every node belongs to the region"
    assert structure.norm_of(norm.output) is norm
    if "com.microsoft" in body:
        model.graph.node(0).domain = ""
    mh.check_against_runtime(model, structure, {"x": X})


def test_axes_as_attribute_and_as_positive_number() -> None:
    body = f"""{HEAD} {{ m = ReduceMean<axes = [2]>(x)\n d = Sub(x, m)\n q = Pow(d, two)
    p = ReduceMean<axes = [-1]>(q)\n v = Add(p, eps)\n s = Sqrt(v)\n n = Div(d, s)\n {AFFINE} }}"""
    assert len(mh.structure_of(body, opset=17).norms) == 1


@pytest.mark.parametrize(
    ("operator", "gamma", "beta"),
    [
        ("SkipLayerNormalization<epsilon = 0.01>(x, x, gamma, beta)", True, True),
        ("SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, x, gamma)", True, False),
    ],
)
def test_skip_operators_name_both_addends_and_the_sum(
    operator: str, gamma: bool, beta: bool
) -> None:
    body = f"{HEAD} {{ y, m, i, total = com.microsoft.{operator} }}"
    model = mh.model_from(body)
    (norm,) = analyze(model).norms
    assert norm.skip is not None
    assert norm.sum_output is not None
    assert norm.sum_output.name == "total"
    assert (norm.gamma is not None, norm.beta is not None) == (gamma, beta)
    values = mh.run(model, {"x": X}, ["y", "total"])
    np.testing.assert_allclose(values["total"], X + X, mh.RTOL, mh.ATOL)
    expected = mh.expected_norm(norm, values["total"])
    np.testing.assert_allclose(values["y"], expected, mh.RTOL, mh.ATOL)


#: one thing changed -> (nodes, words of the reason)
NEGATIVES = {
    "another axis": (
        DEVIATION.replace("ReduceMean(q, last)", "ReduceMean(q, first)")
        + "n = Div(d, s)\n"
        + AFFINE,
        "axis 1, not the last",
    ),
    "both axes": (
        DEVIATION.replace("ReduceMean(x, last)", "ReduceMean(x, both)")
        + "n = Div(d, s)\n"
        + AFFINE,
        "exactly one known axis",
    ),
    "Gemma's 1 + weight": (
        MEAN_SQUARE + "s = Sqrt(v)\n n = Div(x, s)\n g1 = Add(gamma, one)\n y = Mul(n, g1)",
        "1 + weight",
    ),
    "no gamma": (MEAN_SQUARE + "s = Sqrt(v)\n n = Div(x, s)\n y = Relu(n)", "no gamma"),
    "gamma is an activation": (
        MEAN_SQUARE + "s = Sqrt(v)\n n = Div(x, s)\n y = Mul(n, x)",
        "by an activation",
    ),
    "another numerator": (
        DEVIATION + "n = Div(x, s)\n" + AFFINE,
        "is not x - mean(x) of the same x",
    ),
    "inner value read outside": (
        DEVIATION + "n = Div(d, s)\n t = Mul(n, gamma)\n u = Add(t, beta)\n y = Add(u, d)",
        "also read by",
    ),
    "deviation read twice": (
        DEVIATION + "n = Div(d, s)\n t = Mul(n, gamma)\n u = Add(t, beta)\n y = Add(u, s)",
        "read more than once",
    ),
    "multiplied by the deviation": (DEVIATION + "n = Mul(d, s)\n" + AFFINE, "not by a division"),
    "wrong order of the division": (DEVIATION + "n = Div(s, d)\n" + AFFINE, "not by a division"),
    "gamma of one number": (
        DEVIATION + "n = Div(d, s)\n a = Mul(n, one)\n y = Add(a, beta)",
        "one number a channel",
    ),
    "operator over two axes": (
        "y = LayerNormalization<axis = 1>(x, wide, wide)",
        "several axes",
    ),
    "operator with computed gamma": (
        "h = Relu(gamma)\n y = LayerNormalization(x, h, beta)",
        "gamma is not constant",
    ),
}


@pytest.mark.parametrize("case", NEGATIVES)
def test_near_miss_gives_its_reason(case: str) -> None:
    body, reason = NEGATIVES[case]
    more = ", int64[1] first = {1}, int64[2] both = {1, 2}, float[3,4] wide = {"
    head = HEAD[:-1].replace("B, S", "2, 3") + more + ", ".join("1" * 12) + "}>"
    structure = mh.structure_of(f"{head} {{ {body} }}")
    assert not structure.norms
    (given,) = mh.reasons(structure, "norm")
    assert reason in given


@pytest.mark.parametrize(
    "body",
    [
        CENTRE + "q = Pow(d, half)\n p = ReduceMean(q, last)\n v = Add(p, eps)\n s = Sqrt(v)\n"
        "n = Div(d, s)\n" + AFFINE,
        CENTRE + "q = Pow(d, two)\n p = ReduceMax(q, last)\n v = Add(p, eps)\n s = Sqrt(v)\n"
        "n = Div(d, s)\n" + AFFINE,
        "y = Sqrt(x)",
    ],
)
def test_what_takes_no_root_of_a_mean_square_is_no_near_miss(body: str) -> None:
    structure = mh.structure_of(f"{HEAD} {{ {body} }}")
    assert not structure.norms
    assert not mh.reasons(structure, "norm")


def test_a_constant_added_to_an_rmsnorm_stays_outside() -> None:
    body = MEAN_SQUARE + "s = Sqrt(v)\n n = Div(x, s)\n" + AFFINE
    (norm,) = mh.structure_of(f"{HEAD} {{ {body} }}").norms
    assert (norm.kind, norm.beta, norm.output.name) == ("rmsnorm", None, "a")


def test_a_leading_cast_that_others_read_stays_outside() -> None:
    body = RMSNORM["Llama's casts"].replace("y = Mul(gamma, k)", "z = Mul(gamma, k)\ny = Add(z, c)")
    (norm,) = mh.structure_of(f"{HEAD} {{ {body} }}").norms
    assert norm.x.name == "c"
    assert "Cast" not in [node.op_type for node in norm.nodes[:1]]
