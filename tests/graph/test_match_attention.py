"""Attention: masks, scales and guards in every spelling, channels from v to o, fused operators.

The judge of a channel map is the model itself: dividing the value layer by a scale and
multiplying the output layer by the same scale along the map must not change the result.
"""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.graph.match import FusedAttention, ValueToOutput, analyze

from . import match_helpers as mh

RNG = np.random.default_rng(0)
#: B, heads, S, D of the graphs that start at q, k and v.
Q = RNG.normal(size=(2, 2, 3, 4)).astype(np.float32)
KT = RNG.normal(size=(2, 2, 4, 3)).astype(np.float32)

HEAD = """g (float[2,2,3,4] q, float[2,2,4,3] k, float[2,2,3,4] v, float[2,1,1,3] mask,
  bool[2,1,1,3] keep) => (float[2,2,3,4] y)
<float eight = {8}, float eighth = {0.125}, float half = {0.5}, float low = {-1e9},
 float zero = {0}, int64[3] flat = {4, 3, 3}, int64[4] full = {2, 2, 3, 3},
 float[1,2,3,3] bias = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}>"""
PV = "p = Softmax<axis = -1>(i)\n y = MatMul(p, v)"

#: spelling -> (nodes, mask value, mask style, scale, addends)
SPELLINGS = {
    "no mask, no scale": (f"i = MatMul(q, k)\n {PV}", None, None, 1.0, 0),
    "Div, Add": (
        f"s = MatMul(q, k)\n d = Div(s, eight)\n i = Add(d, mask)\n {PV}",
        "mask",
        "add",
        0.125,
        1,
    ),
    "Mul, Add swapped": (
        f"s = MatMul(q, k)\n d = Mul(eighth, s)\n i = Add(mask, d)\n {PV}",
        "mask",
        "add",
        0.125,
        1,
    ),
    "mask before scale": (
        f"s = MatMul(q, k)\n d = Add(s, mask)\n i = Mul(d, half)\n {PV}",
        "mask",
        "add",
        0.5,
        1,
    ),
    "Sub": (f"s = MatMul(q, k)\n i = Sub(s, mask)\n {PV}", "mask", "add", 1.0, 1),
    "scales on q and k": (
        f"a = Mul(q, half)\n b = Mul(k, half)\n s = MatMul(a, b)\n i = Add(s, mask)\n {PV}",
        "mask",
        "add",
        0.25,
        1,
    ),
    "Where, kept": (f"s = MatMul(q, k)\n i = Where(keep, s, low)\n {PV}", "keep", "where", 1.0, 0),
    "Where, dropped": (
        f"s = MatMul(q, k)\n i = Where(keep, low, s)\n {PV}",
        "keep",
        "where",
        1.0,
        0,
    ),
    "bias, then mask": (
        f"s = MatMul(q, k)\n d = Add(s, bias)\n i = Add(d, mask)\n {PV}",
        "mask",
        "add",
        1.0,
        2,
    ),
    "Max and reshapes": (
        f"s = MatMul(q, k)\n m = Add(s, mask)\n x = Max(m, low)\n i = Reshape(x, full)\n {PV}",
        "mask",
        "add",
        1.0,
        1,
    ),
    "casts": (
        "s = MatMul(q, k)\n c = Cast<to = 1>(s)\n i = Add(c, mask)\n"
        "p = Softmax(i)\n r = Cast<to = 1>(p)\n y = MatMul(r, v)",
        "mask",
        "add",
        1.0,
        1,
    ),
    "guard against NaN": (
        "s = MatMul(q, k)\n i = Add(s, mask)\n p = Softmax(i)\n n = IsNaN(p)\n"
        "w = Where(n, zero, p)\n y = MatMul(w, v)",
        "mask",
        "add",
        1.0,
        1,
    ),
    "Dropout": (
        "s = MatMul(q, k)\n i = Add(s, mask)\n p = Softmax(i)\n w = Dropout(p)\ny = MatMul(w, v)",
        "mask",
        "add",
        1.0,
        1,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_matches(spelling: str) -> None:
    body, mask, style, scale, addends = SPELLINGS[spelling]
    structure = mh.structure_of(f"{HEAD} {{ {body} }}")
    (attention,) = structure.attentions
    assert not structure.rejected
    assert (None if attention.mask is None else attention.mask.name) == mask
    assert attention.mask_style == style
    assert (attention.mask_add is not None) == (style == "add")
    assert attention.scale == pytest.approx(scale)
    assert len(attention.addends) == addends
    assert attention.v.name == "v"
    assert attention.context.name == "y"
    assert attention.softmax_in.name == "i"
    assert attention.num_heads == 2
    assert attention.qk_matmul.outputs[0] is attention.scores
    assert attention.pv_matmul.inputs[0] is attention.probs
    assert not structure.residual_adds, "a mask is no residual"


def test_the_scale_is_what_the_graph_multiplies_by() -> None:
    body, *_ = SPELLINGS["scales on q and k"]
    model = mh.model_from(f"{HEAD} {{ {body} }}")
    (attention,) = analyze(model).attentions
    feeds = {
        "q": Q,
        "k": KT,
        "v": Q,
        "mask": np.zeros((2, 1, 1, 3), np.float32),
        "keep": np.ones((2, 1, 1, 3), bool),
    }
    scores = mh.run(model, feeds, [mh.name_of(attention.softmax_in)])
    assert attention.scale is not None
    np.testing.assert_allclose(scores["i"], attention.scale * (Q @ KT), mh.RTOL, mh.ATOL)


def test_a_scale_that_is_computed_is_not_known() -> None:
    structure = mh.structure_of(
        f"{HEAD} {{ r = Sqrt(q)\n a = Mul(q, r)\n s = MatMul(a, k)\n i = Add(s, mask)\n {PV} }}"
    )
    assert structure.attentions[0].scale is None


#: one thing changed -> (nodes, words of the reason)
NEGATIVES = {
    "another axis": (
        "i = MatMul(q, k)\n p = Softmax<axis = 1>(i)\n y = MatMul(p, v)",
        "axis 1, not the last",
    ),
    "probabilities on the right": (
        "i = MatMul(q, k)\n p = Softmax(i)\n y = MatMul(k, p)",
        "right operand",
    ),
    "soft cap": (f"s = MatMul(q, k)\n i = Tanh(s)\n {PV}", "does not read"),
    "two products": (f"s = MatMul(q, k)\n t = MatMul(v, k)\n i = Add(s, t)\n {PV}", "two products"),
    "probabilities as output": (
        "i = MatMul(q, k)\n p = Softmax(i)\n z = MatMul(p, v)\n y = Add(z, p)",
        "several nodes",
    ),
    "no PV product": ("i = MatMul(q, k)\n p = Softmax(i)\n y = Relu(p)", "by Relu, not by MatMul"),
    "constant keys": (f"i = MatMul(q, bias)\n {PV}", "does not read"),
}


@pytest.mark.parametrize("case", NEGATIVES)
def test_near_miss_gives_its_reason(case: str) -> None:
    body, reason = NEGATIVES[case]
    structure = mh.structure_of(f"{HEAD} {{ {body} }}")
    assert not structure.attentions
    (given,) = mh.reasons(structure, "attention")
    assert reason in given


def test_a_classifier_softmax_is_no_near_miss() -> None:
    structure = mh.structure_of("g (float[2,3] x) => (float[2,3] y) { y = Softmax(x) }")
    assert not structure.attentions
    assert not structure.rejected


# From v to o ----------------------------------------------------------------------------------


def _weight(name: str, *shape: int) -> str:
    numbers = np.random.default_rng(len(name) + shape[0]).normal(size=shape).reshape(-1)
    dims = ",".join(map(str, shape))
    return f"float[{dims}] {name} = {{{', '.join(f'{n:.4f}' for n in numbers)}}}"


def _block(v_nodes: str, o_nodes: str, kv: int = 2, extra: str = "") -> str:
    """x[B,S,8] -> 4 query heads and ``kv`` key-value heads of 2 -> o[B,S,8]."""
    weights = ", ".join(
        [
            _weight("wq", 8, 8),
            _weight("wk", 8, 8),
            _weight("wv", 8, 2 * kv),
            _weight("wo", 8, 8),
            _weight("bv", 2 * kv),
            "int64[4] split = {0, 0, 4, 2}",
            f"int64[4] kvsplit = {{0, 0, {kv}, 2}}",
            "int64[3] merge = {0, 0, 8}",
            f"int64[5] five = {{2, {kv}, {4 // kv}, 3, 2}}",
            "int64[4] four = {2, 4, 3, 2}",
            "int64[1] axis2 = {2}",
        ]
    )
    return f"""g (float[2,3,8] x) => (float[2,3,8] y{extra}) <{weights}> {{
        ql = MatMul(x, wq)\n qr = Reshape(ql, split)\n q = Transpose<perm = [0,2,1,3]>(qr)
        kl = MatMul(x, wk)\n kr = Reshape(kl, split)\n k = Transpose<perm = [0,2,3,1]>(kr)
        vm = MatMul(x, wv)\n vl = Add(vm, bv)\n vr = Reshape(vl, kvsplit)
        vt = Transpose<perm = [0,2,1,3]>(vr)
        {v_nodes}
        s = MatMul(q, k)\n p = Softmax(s)\n c = MatMul(p, v)
        {o_nodes}
    }}"""


MERGE = "ct = Transpose<perm = [0,2,1,3]>(c)\n cr = Reshape(ct, merge)\n y = MatMul(cr, wo)"
EXPAND = "vu = Unsqueeze(vt, axis2)\n ve = Expand(vu, five)\n v = Reshape(ve, four)"
REPEAT = "idx = Constant<value_ints = [0, 0, 1, 1]>()\n v = Gather<axis = 1>(vt, idx)"
TILE = "reps = Constant<value_ints = [1, 2, 1, 1]>()\n v = Tile(vt, reps)"

WAYS = {
    "one to one": (_block("v = Identity(vt)", MERGE, kv=4), 1, tuple(range(8))),
    "expanded": (_block(EXPAND, MERGE), 2, (0, 1, 0, 1, 2, 3, 2, 3)),
    "gathered": (_block(REPEAT, MERGE), 2, (0, 1, 0, 1, 2, 3, 2, 3)),
    "tiled": (_block(TILE, MERGE), 2, (0, 1, 2, 3, 0, 1, 2, 3)),
    "shape at run time": (
        _block(
            "v = Identity(vt)",
            "ct = Transpose<perm = [0,2,1,3]>(c)\n b = Shape<start = 0, end = 1>(x)\n"
            "l = Shape<start = 1, end = 2>(x)\n w = Constant<value_ints = [8]>()\n"
            "to = Concat<axis = 0>(b, l, w)\n cr = Reshape(ct, to)\n y = MatMul(cr, wo)",
            kv=4,
        ),
        1,
        tuple(range(8)),
    ),
}


@pytest.mark.parametrize("case", WAYS)
def test_channels_are_followed_from_v_to_o(case: str) -> None:
    body, repeats, channel_map = WAYS[case]
    model = mh.model_from(body)
    structure = analyze(model)
    (attention,) = structure.attentions
    way = structure.v_to_o(attention)
    assert isinstance(way, ValueToOutput), way
    assert way.channel_map == channel_map
    assert (way.num_heads, way.head_dim, way.repeats) == (4, 2, repeats)
    assert (mh.name_of(way.value.output), mh.name_of(way.output.node.outputs[0])) == ("vl", "y")
    mh.assert_scaling_changes_nothing(model, way, {"x": RNG.normal(size=(2, 3, 8))})


def test_channels_are_followed_in_a_model_of_fixed_size() -> None:
    body = _block("v = Identity(vt)", MERGE, kv=4).replace("2,3,8", "1,5,8")
    for free, fixed in (("{0, 0, 4, 2}", "{1, 5, 4, 2}"), ("{0, 0, 8}", "{-1, 5, 8}")):
        body = body.replace(free, fixed)
    model = mh.model_from(body)
    structure = analyze(model)
    way = structure.v_to_o(structure.attentions[0])
    assert isinstance(way, ValueToOutput), way
    assert way.channel_map == tuple(range(8))
    mh.assert_scaling_changes_nothing(model, way, {"x": RNG.normal(size=(1, 5, 8))})


NO_WAY = {
    "v is an output too": (
        _block("v = Identity(vt)", MERGE, 4, ", float[2,4,3,2] v"),
        "graph's outputs",
    ),
    "v is read elsewhere": (
        _block(
            "v = Identity(vt)",
            MERGE.replace("y = MatMul(cr, wo)", "o = MatMul(cr, wo)\n y = Add(o, vl)"),
            4,
        ),
        "is also read by",
    ),
    "v passes an operator": (_block("v = Relu(vt)", MERGE, 4), "passes Relu"),
    "v is cached": (_block("v = Concat<axis = 2>(vt, vt)", MERGE, 4), "Concat"),
    "o is no linear layer": (
        _block("v = Identity(vt)", MERGE.replace("MatMul(cr, wo)", "Relu(cr)"), 4),
        "passes Relu",
    ),
    "context not transposed": (
        _block("v = Identity(vt)", "cr = Reshape(c, merge8)\ny = MatMul(cr, wo)\n", 4).replace(
            "int64[1] axis2", "int64[3] merge8 = {2, 3, 8}, int64[1] axis2"
        ),
        "mixed",
    ),
}


@pytest.mark.parametrize("case", NO_WAY)
def test_no_way_from_v_to_o_gives_its_reason(case: str) -> None:
    body, reason = NO_WAY[case]
    structure = mh.structure_of(body)
    (attention,) = structure.attentions
    way = structure.v_to_o(attention)
    assert isinstance(way, str)
    assert reason in way


# Fused operators ------------------------------------------------------------------------------


def test_the_attention_operator_is_opaque_but_its_channels_can_be_followed() -> None:
    weights = ", ".join(
        [_weight("wq", 8, 8), _weight("wk", 8, 4), _weight("wv", 8, 4), _weight("wo", 8, 8)]
    )
    model = mh.model_from(
        f"""g (float[2,3,8] x) => (float[2,3,8] y) <{weights}> {{
        q = MatMul(x, wq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)
        c = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)
        y = MatMul(c, wo) }}""",
        opset=23,
    )
    structure = analyze(model)
    assert not structure.attentions
    (attention,) = structure.fused_attentions
    assert (attention.kind, attention.num_heads, attention.kv_heads) == ("Attention", 4, 2)
    assert attention.mask is None
    way = structure.v_to_o(attention)
    assert isinstance(way, ValueToOutput)
    assert way.channel_map == (0, 1, 0, 1, 2, 3, 2, 3)
    mh.assert_scaling_changes_nothing(model, way, {"x": RNG.normal(size=(2, 3, 8))})


@pytest.mark.parametrize(
    ("node", "kind", "heads"),
    [
        (
            "y = com.microsoft.MultiHeadAttention<num_heads = 4>(x, x, x)",
            "com.microsoft.MultiHeadAttention",
            4,
        ),
        ("y = com.microsoft.Attention<num_heads = 2>(x, w)", "com.microsoft.Attention", 2),
    ],
)
def test_contrib_operators_are_opaque(node: str, kind: str, heads: int) -> None:
    structure = mh.structure_of(
        f"g (float[2,3,8] x, float[8,24] w) => (float[2,3,8] y) {{ {node} }}"
    )
    (attention,) = structure.fused_attentions
    assert isinstance(attention, FusedAttention)
    assert (attention.kind, attention.num_heads) == (kind, heads)
    assert isinstance(structure.v_to_o(attention), str)


@pytest.mark.parametrize("shape", ["2,3,8", "2,2,3,4"])
def test_the_standards_own_decomposition_matches(shape: str) -> None:
    heads = "<q_num_heads = 4, kv_num_heads = 4>" if shape == "2,3,8" else ""
    text = (
        f"g (float[{shape}] q, float[{shape}] k, float[{shape}] v, float[3,3] m)"
        f" => (float[{shape}] y) {{ y = Attention{heads}(q, k, v, m) }}"
    )
    (attention,) = analyze(mh.expanded(text, "Attention")).attentions
    assert attention.mask is not None
    assert attention.mask_style == "add"
    assert attention.scale is None, "computed from the shape"
