"""Sites measured segment by segment give the whole model's scores, bit by bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.passes.contract import Artifacts, Context, DeclaredArtifacts
from onnxq.passes.decide import chain
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.measure import PlanMeter, with_only
from onnxq.passes.decide.sensitivity import Sensitivity
from onnxq.passes.keys import PLAN
from onnxq.passes.targets import parse_target
from tests.passes.helpers import Feeds, apply, light_models, made_up_feeds, model_of, normal
from tests.passes.transform.wide import llama


def cnn() -> tuple[ir.Model, list[Feeds]]:
    """Convolutions around a residual add, whose outputs static plans quantize too."""
    weights = {f"w{i}": normal(4, 4, 3, 3, seed=i, scale=0.3) for i in range(4)}
    body = """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] early, float[1, 4, 8, 8] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w0)
        ar = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (ar, w1)
        s = Add (ar, b)
        early = Relu (s)
        c = Conv <pads = [1, 1, 1, 1]> (early, w2)
        cr = Relu (c)
        y = Conv <pads = [1, 1, 1, 1]> (cr, w3)
    }"""
    return model_of(body, weights), [{"x": normal(1, 4, 8, 8, seed=9 + i)} for i in range(2)]


def branched() -> tuple[ir.Model, list[Feeds]]:
    """An If whose branches read a value from before the cut."""
    weights = {f"w{i}": normal(6, 6, seed=i) for i in range(4)}
    body = """g (float[3, 6] x, bool which) => (float[3, 6] y) {
        a = MatMul (x, w0)
        b = MatMul (a, w1)
        c = If (which) <then_branch = t () => (float[3, 6] p) { p = Add (a, b) },
                        else_branch = e () => (float[3, 6] q) { q = Sub (a, b) }>
        d = MatMul (c, w2)
        y = MatMul (d, w3)
    }"""
    feeds = [{"x": normal(3, 6, seed=s), "which": np.array(bool(s))} for s in range(2)]
    return model_of(body, weights), feeds


def decoder() -> tuple[ir.Model, list[Feeds]]:
    model = llama(double=False)
    rng = np.random.default_rng(0)
    return model, [{"input_ids": rng.integers(0, 50, (1, 7))} for _ in range(2)]


def sequence() -> tuple[ir.Model, list[Feeds]]:
    """A sequence lives across the cut, which no session takes as a tensor."""
    weights = {f"w{i}": normal(6, 6, seed=i) for i in range(3)}
    body = """g (float[3, 6] x) => (float[3, 6] y) {
        a = MatMul (x, w0)
        s = SequenceConstruct (a, x)
        b = MatMul (a, w1)
        zero = Constant <value_int = 0> ()
        back = SequenceAt (s, zero)
        c = Add (b, back)
        y = MatMul (c, w2)
    }"""
    return model_of(body, weights), [{"x": normal(3, 6, seed=4)}]


GRAPHS = {f.__name__: f for f in (cnn, branched, decoder, sequence)}


def scores(
    model: ir.Model, samples: list[Feeds], metric: Any, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each site: in segments, and each on the whole model."""
    made = apply(model, Calibrate(), Assign(**options), samples=samples)
    plan = made.artifacts.get(PLAN)
    data = open_data(samples, made.model)
    owner = Sensitivity()
    ctx = Context(
        DeclaredArtifacts(Artifacts(), owner), parse_target("cpu"), data, data, made.model
    )
    sites = [s.site for s in plan.sites.values() if s.kind != "op"]
    assert len(sites) > 2
    with PlanMeter(made.model, ctx, samples, metric, None) as meter:
        cut = dict(chain.measure_each(meter, made.model, plan, sites))
        assert dict(chain.measure_each(meter, made.model, plan, sites[-2:])) == {
            site: cut[site] for site in sites[-2:]
        }
        whole = {site: meter.measure(with_only(plan, site)) for site in sites}
    return cut, whole


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("cnn", "static"), *itertools.product(list(GRAPHS)[1:], ["static", "dynamic", "weight-only"])],
)
def test_segments_score_as_the_whole_model(name, mode, size, monkeypatch):
    monkeypatch.setattr(chain, "SITES_A_SEGMENT", size)
    model, samples = GRAPHS[name]()
    cut, whole = scores(model, samples, "sqnr", {"mode": mode})
    assert cut == whole


def test_logits_too(monkeypatch):
    monkeypatch.setattr(chain, "SITES_A_SEGMENT", 3)
    model, samples = decoder()
    for metric in ("kl", "perplexity"):
        cut, whole = scores(model, samples, metric, {})
        assert cut == whole


@pytest.mark.slow
@pytest.mark.parametrize("path", light_models(), ids=lambda p: p.rpartition("/")[2])
def test_well_known_cnns(path):
    from onnxq.graph import io
    from onnxq.passes.prepare.canonicalize import Canonicalize

    model = apply(io.load(path), Canonicalize()).model
    cut, whole = scores(model, made_up_feeds(model, 1), "sqnr", {})
    assert cut == whole


def test_what_lies_before_a_segment_is_run_once(monkeypatch):
    """No session of the last segment holds the first layers."""
    monkeypatch.setattr(chain, "SITES_A_SEGMENT", 2)
    seen: list[set[str]] = []
    opened = PlanMeter.open

    def watch(self, model, workspace=None):
        seen.append({node.op_type for node in model.graph} | {n.name or "" for n in model.graph})
        return opened(self, model, workspace)

    monkeypatch.setattr(PlanMeter, "open", watch)
    model, samples = branched()
    for at, node in enumerate(model.graph):
        node.name = f"n{at}"
    made = apply(model, Calibrate(), Assign(), samples=samples)
    plan, data = made.artifacts.get(PLAN), open_data(samples, made.model)
    owner = Sensitivity()
    ctx = Context(
        DeclaredArtifacts(Artifacts(), owner), parse_target("cpu"), data, data, made.model
    )
    with PlanMeter(made.model, ctx, samples, "sqnr", None) as meter:
        list(chain.measure_each(meter, made.model, plan, ["n0", "n1", "n3", "n4"]))
    assert len(seen) == 8  # all; two segments of: float, rest (the last has none), two sites
    assert all("n0" not in names for names in seen[5:])
