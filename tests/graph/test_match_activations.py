"""Activations: every spelling, evaluated again by the published formula, and near misses."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.graph.match import analyze

from . import match_helpers as mh

X = np.linspace(-8, 8, 65, dtype=np.float32).reshape(5, 13)

HEAD = """g (float[5, 13] x) => (float[5, 13] y)
<float one = {1}, float half = {0.5}, float two = {2}, float three = {3}, float six = {6},
 float r2 = {1.4142135}, float ir2 = {0.70710678}, float c = {0.044715}, float k = {0.7978846},
 float c2 = {0.035677407}, float quick = {1.702}, float zero = {0}>"""
ERF = "e = Erf(d)\n p = Add(e, one)\n"
CUBE = "t = Tanh(i)\n p = Add(one, t)\n h = Mul(half, x)\n y = Mul(h, p)"

SPELLINGS = {
    "Gelu": ("gelu", "y = Gelu(x)"),
    "Gelu tanh": ("gelu_tanh", 'y = Gelu<approximate = "tanh">(x)'),
    "contrib Gelu": ("gelu", "y = com.microsoft.Gelu(x)"),
    "contrib FastGelu": ("gelu_tanh", "y = com.microsoft.FastGelu(x)"),
    "contrib QuickGelu": ("quick_gelu", "y = com.microsoft.QuickGelu<alpha = 1.702>(x)"),
    "x/sqrt2, (x*p)*half": ("gelu", f"d = Div(x, r2)\n {ERF} m = Mul(x, p)\n y = Mul(m, half)"),
    "(half*x)*p": ("gelu", f"d = Mul(ir2, x)\n h = Mul(half, x)\n {ERF} y = Mul(h, p)"),
    "x*(p*half)": ("gelu", f"d = Mul(x, ir2)\n {ERF} q = Mul(p, half)\n y = Mul(q, x)"),
    "x*p/two": ("gelu", f"d = Div(x, r2)\n {ERF} m = Mul(p, x)\n y = Div(m, two)"),
    "half*erf+half": (
        "gelu",
        "d = Div(x, r2)\n e = Erf(d)\n f = Mul(e, half)\n p = Add(f, half)\n y = Mul(x, p)",
    ),
    "tanh, Pow 3": (
        "gelu_tanh",
        f"q = Pow(x, three)\n u = Mul(q, c)\n s = Add(x, u)\n i = Mul(s, k)\n {CUBE}",
    ),
    "tanh, x*x*x": (
        "gelu_tanh",
        f"a = Mul(x, x)\n b = Mul(a, x)\n u = Mul(c, b)\n s = Add(u, x)\n i = Mul(k, s)\n {CUBE}",
    ),
    "tanh, factored": (
        "gelu_tanh",
        f"a = Mul(x, x)\n b = Mul(a, c2)\n u = Add(b, k)\n i = Mul(x, u)\n {CUBE}",
    ),
    "x*sigmoid(x)": ("silu", "s = Sigmoid(x)\n y = Mul(x, s)"),
    "sigmoid(x)*x": ("silu", "s = Sigmoid(x)\n y = Mul(s, x)"),
    "quick gelu": ("quick_gelu", "m = Mul(x, quick)\n s = Sigmoid(m)\n y = Mul(x, s)"),
    "Relu": ("relu", "y = Relu(x)"),
    "Clip": ("relu6", "y = Clip(x, zero, six)"),
    "HardSwish": ("hard_swish", "y = HardSwish(x)"),
    "x*HardSigmoid": (
        "hard_swish",
        "s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)\n y = Mul(x, s)",
    ),
    "x*relu6(x+3)/6": (
        "hard_swish",
        "a = Add(x, three)\n b = Clip(a, zero, six)\n m = Mul(x, b)\n y = Div(m, six)",
    ),
    "Mish": ("mish", "s = Softplus(x)\n t = Tanh(s)\n y = Mul(x, t)"),
    "Sigmoid": ("sigmoid", "y = Sigmoid(x)"),
    "Tanh": ("tanh", "y = Tanh(x)"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_matches_and_computes_the_output(spelling: str) -> None:
    kind, body = SPELLINGS[spelling]
    model = mh.model_from(f"{HEAD} {{ {body} }}")
    structure = analyze(model)
    (activation,) = structure.activations
    assert activation.kind == kind
    assert (activation.x.name, activation.output.name) == ("x", "y")
    assert set(activation.nodes) == set(model.graph), "every node belongs to the region"
    assert activation.root.outputs[0].name == "y"
    assert not structure.rejected
    assert not structure.residual_adds, "an Add inside an activation is no residual"
    mh.check_against_runtime(model, structure, {"x": X})


def test_swish_of_opset_24_and_clip_with_attributes() -> None:
    swish = mh.structure_of(f"{HEAD} {{ y = Swish<alpha = 1.0>(x) }}", opset=24)
    assert [a.kind for a in swish.activations] == ["silu"]
    clip = mh.structure_of(f"{HEAD} {{ y = Clip<min = 0.0, max = 6.0>(x) }}", opset=9)
    assert [a.kind for a in clip.activations] == ["relu6"]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("Gelu", "gelu"),
        ('Gelu<approximate = "tanh">', "gelu_tanh"),
        ("HardSwish", "hard_swish"),
        ("Mish", "mish"),
    ],
)
def test_the_standards_own_decomposition_matches(operator: str, kind: str) -> None:
    model = mh.expanded(
        f"g (float[5] x) => (float[5] y) {{ y = {operator}(x) }}", operator.split("<")[0]
    )
    assert len(model.graph) > 1
    assert [(a.kind, a.x.name, a.output.name) for a in analyze(model).activations] == [
        (kind, "x", "y")
    ]


def test_a_scaled_input_and_output_are_not_part_of_the_function() -> None:
    body = f"w = Mul(x, three)\n d = Div(w, r2)\n {ERF} m = Mul(w, p)\n g = Mul(m, half)\n"
    structure = mh.structure_of(f"{HEAD} {{ {body} y = Mul(g, quick) }}")
    (activation,) = structure.activations
    assert (activation.x.name, activation.output.name, activation.kind) == ("w", "g", "gelu")


def test_half_precision_constants_match() -> None:
    # the text format takes the bits: 1, 0.5 and 1.4141 in float16
    structure = mh.structure_of(
        """g (float16[5] x) => (float16[5] y)
        <float16 one = {15360}, float16 half = {14336}, float16 r2 = {15784}>
        { d = Div(x, r2)\n e = Erf(d)\n p = Add(e, one)\n m = Mul(x, p)\n y = Mul(m, half) }"""
    )
    assert [a.kind for a in structure.activations] == ["gelu"]


#: one thing changed -> (nodes, near misses)
NEGATIVES = {
    "no half": (f"d = Div(x, r2)\n {ERF} y = Mul(x, p)", 1),
    "another root": (f"d = Div(x, two)\n {ERF} m = Mul(x, p)\n y = Mul(m, half)", 1),
    "minus one": (
        "d = Div(x, r2)\n e = Erf(d)\n p = Sub(e, one)\n m = Mul(x, p)\n y = Mul(m, half)",
        1,
    ),
    "another coefficient": (
        f"q = Pow(x, three)\n u = Mul(q, c2)\n s = Add(x, u)\n i = Mul(s, k)\n {CUBE}",
        1,
    ),
    "a square for the cube": (
        f"q = Pow(x, two)\n u = Mul(q, c)\n s = Add(x, u)\n i = Mul(s, k)\n {CUBE}",
        1,
    ),
    "a read inner value": (
        f"d = Div(x, r2)\n {ERF} m = Mul(x, p)\n z = Mul(m, half)\n y = Add(z, d)",
        1,
    ),
    "another interval": ("y = Clip(x, zero, three)", 0),
    "another domain": ("y = com.microsoft.Sigmoid(x)", 0),
}


@pytest.mark.parametrize("case", NEGATIVES)
def test_one_change_makes_it_another_function(case: str) -> None:
    body, misses = NEGATIVES[case]
    structure = mh.structure_of(f"{HEAD} {{ {body} }}")
    assert not structure.activations
    assert len(mh.reasons(structure, "activation")) == misses


def test_a_gate_of_another_value_is_a_plain_sigmoid() -> None:
    structure = mh.structure_of(
        "g (float[5] x, float[5] z) => (float[5] y) { s = Sigmoid(x)\n y = Mul(z, s) }"
    )
    assert [(a.kind, a.output.name) for a in structure.activations] == [("sigmoid", "s")]
