"""smooth-quant: the function stays, outliers shrink, and what cannot take a scale says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.passes.transform.scaling_sites import apply_scale, find_scaling_sites
from onnxq.passes.transform.smooth_quant import SmoothQuant

from .. import helpers as h
from ..blocks import HEAD, Block, D, block, samples

FIXED = SmoothQuant(alpha=0.5)


def smoothed(
    model: ir.Model, how: SmoothQuant = FIXED, feeds: list[h.Feeds] | None = None
) -> tuple[ir.Model, ir.Model, PassReport]:
    """The clean model, the smoothed one and the report."""
    clean = h.apply(model, Canonicalize()).model
    result = h.apply(clean, Calibrate(), how, samples=feeds or samples())
    return clean, result.model, h.report_of(result, "smooth-quant")


def places(report: PassReport) -> list[str]:
    return [change.what for change in report.changed]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Block(), ["1/s in norm", "1/s in norm", "1/s in value layer", "1/s in a Mul"]),
        (Block(heads=1), ["1/s in norm", "1/s in norm", "1/s in value layer", "1/s in a Mul"]),
        (
            Block(gated=True, bias=False),
            ["1/s in norm", "1/s in norm", "1/s in value layer", "1/s in up layer"],
        ),
        (
            Block(gemm=True),
            ["1/s in norm", "1/s in norm", "1/s in a Mul", "1/s in a Mul"],
        ),
    ],
)
def test_the_function_stays_wherever_the_scale_goes(kind: Block, expected: list[str]) -> None:
    clean, done, report = smoothed(block(kind, outliers=True))
    assert places(report) == expected
    h.assert_same_function(clean, done, samples())


def test_outliers_move_from_the_activation_into_the_weights() -> None:
    clean, done, _ = smoothed(block(outliers=True))
    (before, after) = (h.values(m, samples()[0], ["n1"])["n1"] for m in (clean, done))
    spread = [np.abs(x).max(axis=(0, 1)) for x in (before, after)]
    ratios = [s.max() / np.median(s) for s in spread]
    assert ratios[0] > 20
    assert ratios[1] < ratios[0] / 2


def test_the_scale_is_the_published_one() -> None:
    """``s_j = amax_j^alpha / wmax_j^(1 - alpha)`` (arXiv 2211.10438, eq. 4), no dead channels.

    The factor that all channels share is free; it is 1 in the geometric mean. Channels below the
    median are lifted to it first.
    """
    clean, done, _ = smoothed(block(outliers=True), SmoothQuant(alpha=0.7))
    feeds = samples()
    amax = np.max([np.abs(h.values(clean, f, ["n1"])["n1"]).max(axis=(0, 1)) for f in feeds], 0)
    lifted = np.maximum(amax, np.median(amax)).astype(np.float64)
    weights = np.concatenate([h.const(clean, f"{n}_w") for n in "qkv"], axis=1)
    published = lifted**0.7 / np.abs(weights.astype(np.float64)).max(axis=1) ** 0.3
    published /= np.exp(np.log(published).mean())
    got = h.const(clean, "n1_gamma").astype(np.float64) / h.const(done, "n1_gamma")
    np.testing.assert_allclose(got, published, rtol=1e-5)
    for name in "qk":  # the value layer's columns also carry the next site's scale
        ratio = h.const(done, f"{name}_w") / h.const(clean, f"{name}_w")
        np.testing.assert_allclose(ratio, published[:, None] * np.ones_like(ratio), rtol=1e-5)


def test_repeated_heads_share_one_scale() -> None:
    """With one value head for two query heads, both copies of a channel get the same factor."""
    clean, done, _ = smoothed(block(Block(heads=1), outliers=True))
    ratio = (h.const(done, "o_w") / h.const(clean, "o_w"))[:, 0]
    assert ratio.shape == (D,)
    np.testing.assert_allclose(ratio[:HEAD], ratio[HEAD:], rtol=1e-6)
    assert np.ptp(np.log(ratio)) > 0.1
    np.testing.assert_allclose(h.const(clean, "v_b") / h.const(done, "v_b"), ratio[:HEAD], 1e-5)


def test_the_tied_scale_is_the_largest_that_was_asked_for() -> None:
    model = h.apply(block(Block(heads=1)), Canonicalize()).model
    sites, _ = find_scaling_sites(analyze(model))
    (site,) = (s for s in sites if s.writer == "value")
    wanted = np.arange(1, D + 1, dtype=np.float32)
    np.testing.assert_array_equal(site.constrain(wanted), np.tile(wanted[HEAD:], 2))


def test_an_exact_power_of_two_changes_nothing_at_all() -> None:
    """Powers of two are exact in floats, so any difference would be a misplaced factor."""
    model = h.apply(block(Block(gated=True, bias=False)), Canonicalize()).model
    done = ir.from_proto(ir.to_proto(model))
    scale = np.float32(2.0) ** np.random.default_rng(0).integers(-3, 4, 64)
    for site in find_scaling_sites(analyze(done))[0]:
        apply_scale(done.graph, site, site.constrain(scale[: site.channels].astype(np.float32)))
    for feeds in samples():
        np.testing.assert_array_equal(h.run(model, feeds)["y"], h.run(done, feeds)["y"])


def test_auto_helps_where_outliers_hurt_and_says_by_how_much() -> None:
    _, _, report = smoothed(block(outliers=True), SmoothQuant())
    details = {change.what: change.detail for change in report.changed}
    assert "dB" in details["1/s in norm"]
    assert float(details["1/s in norm"].split("+")[1].split()[0]) > 1


def test_auto_leaves_even_activations_alone() -> None:
    model = h.model_of(MUL, {"w": np.sign(h.normal(32, 8))})
    feeds = [{"x": h.normal(64, 32, seed=s)} for s in range(4)]
    clean, done, report = smoothed(model, SmoothQuant(), feeds)
    assert not report.changed
    assert report.skipped
    np.testing.assert_array_equal(h.const(clean, "w"), h.const(done, "w"))


def outlier_feeds(rows: int = 64) -> list[h.Feeds]:
    size = np.ones(32, np.float32)
    size[5] = 80
    return [{"x": h.normal(rows, 32, seed=s) * size} for s in range(4)]


MUL = "g (float[N, 32] x) => (float[N, 8] y) { y = MatMul(x, w) }"


def test_a_mul_remains_in_front_of_a_graph_input_only_if_it_pays() -> None:
    model = h.model_of(MUL, {"w": h.normal(32, 8)})
    clean, done, report = smoothed(model, SmoothQuant(), outlier_feeds())
    assert places(report) == ["1/s in a Mul"]
    h.assert_same_function(clean, done, outlier_feeds())
    _, _, dear = smoothed(model, SmoothQuant(min_gain_db=60.0), outlier_feeds())
    assert "a Mul would gain" in h.reasons(dear)
    _, _, none = smoothed(model, SmoothQuant(mul="none"), outlier_feeds())
    assert "mul=none" in h.reasons(none)


def test_too_few_rows_are_no_ground_for_a_choice() -> None:
    model = h.model_of(MUL, {"w": h.normal(32, 8)})
    _, _, report = smoothed(model, SmoothQuant(), [outlier_feeds(1)[0]])
    assert "too few" in h.reasons(report)


def test_channels_of_which_nothing_finite_was_seen_do_no_harm() -> None:
    factor = np.ones(32, np.float32)
    factor[9] = np.inf
    model = h.model_of(
        "g (float[N, 32] x) => (float[N, 8] y) { z = Mul(x, f) y = MatMul(z, w) }",
        {"w": h.normal(32, 8), "f": factor},
    )
    _, done, _ = smoothed(model, FIXED, outlier_feeds())
    assert np.isfinite(h.const(done, "w")).all()


def test_a_tied_weight_is_left_alone() -> None:
    model = h.model_of(
        """g (int64[N, 3] i) => (float[N, 3, 200] y) {
            e = Gather(table, i)
            n = LayerNormalization <axis = -1> (e, gamma)
            t = Transpose <perm = [1, 0]> (table)
            y = MatMul(n, t)
        }""",
        {"table": h.normal(200, 16), "gamma": np.ones(16, np.float32)},
        opset=17,
    )
    feeds = [{"i": np.array([[1, 2, 3]])}]
    clean, done, report = smoothed(model, FIXED, feeds)
    assert not report.changed
    assert "other readers" in h.reasons(report)
    h.assert_same_function(clean, done, feeds)


def test_a_norm_whose_sum_goes_on_gets_a_mul_instead() -> None:
    """The output of a post-norm block's norm is also the next residual."""
    model = h.model_of(
        """g (float[N, 5, 16] x) => (float[N, 5, 16] y) {
            n = LayerNormalization <axis = -1> (x, gamma, beta)
            m = MatMul(n, w)
            y = Add(m, n)
        }""",
        {"gamma": np.ones(16, np.float32), "beta": h.normal(16), "w": h.normal(16, 16, seed=1)},
        opset=17,
    )
    feeds = [{"x": h.normal(2, 5, 16)}]
    clean, done, report = smoothed(model, FIXED, feeds)
    assert places(report) == ["1/s in a Mul"]
    h.assert_same_function(clean, done, feeds)


def test_a_norm_that_is_an_output_keeps_its_numbers() -> None:
    clean, done, report = smoothed(block(extra_output="n1"))
    assert "1/s in a Mul" in places(report)
    h.assert_same_function(clean, done, samples())


def test_an_up_layer_that_is_an_output_keeps_its_numbers() -> None:
    kind = Block(gated=True, bias=False)
    clean, done, report = smoothed(block(kind, extra_output="up_layer"))
    assert "read twice" in h.reasons(report)
    h.assert_same_function(clean, done, samples())


def test_a_gamma_that_is_also_the_beta_is_scaled_once() -> None:
    model = h.model_of(
        """g (float[N, 5, 16] x) => (float[N, 5, 16] y) {
            n = LayerNormalization <axis = -1> (x, both, both)
            y = MatMul(n, w)
        }""",
        {"both": np.abs(h.normal(16)) + 0.5, "w": h.normal(16, 16, seed=1)},
        opset=17,
    )
    feeds = [{"x": h.normal(2, 5, 16)}]
    clean, done, report = smoothed(model, FIXED, feeds)
    assert places(report) == ["1/s in norm"]
    h.assert_same_function(clean, done, feeds)


def test_a_skip_norm_takes_the_scale_and_leaves_the_sum() -> None:
    model = h.model_of(
        """g (float[N, 5, 16] x, float[N, 5, 16] r)
            => (float[N, 5, 16] y, float[N, 5, 16] s) {
            n, , , s = com.microsoft.SkipSimplifiedLayerNormalization (x, r, gamma)
            y = MatMul(n, w)
        }""",
        {"gamma": np.abs(h.normal(16)) + 0.5, "w": h.normal(16, 16, seed=1)},
    )
    feeds = [{"x": h.normal(2, 5, 16), "r": h.normal(2, 5, 16, seed=1)}]
    clean, done, report = smoothed(model, FIXED, feeds)
    assert places(report) == ["1/s in norm"]
    h.assert_same_function(clean, done, feeds)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"rows": 3}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError) as caught:
        SmoothQuant(**options)  # type: ignore[arg-type]
    assert caught.value.code == "SPEC-RANGE"
