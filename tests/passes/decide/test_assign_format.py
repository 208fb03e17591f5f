"""assign-format and set-format: the plan that comes out, against brute force and by bytes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PreconditionError, SpecError, UnsupportedError
from onnxq.passes.contract import Pass
from onnxq.passes.decide import assign_format as module
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.assign_format import AssignFormat, Option
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.set_format import SetFormat
from onnxq.passes.keys import PLAN
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.plan import WeightPlan

from .. import helpers as h

K, V = 64, 2048
BODY = f"""g (int64[T] ids) => (float[T,{V}] logits) {{
    e = Gather(table, ids)  a = MatMul(e, wa)  t = Tanh(a)  b = MatMul(t, wb)
    back = Transpose<perm = [1, 0]>(table)  logits = MatMul(b, back) }}"""
HEAVY = np.random.default_rng(3).standard_t(2, (K, K)).astype(np.float32)
FLAT = np.random.default_rng(4).uniform(-1, 1, (K, K)).astype(np.float32)
WEIGHTS = {"table": h.normal(V, K, seed=1), "wa": HEAVY, "wb": FLAT}
FEEDS = [{"ids": np.random.default_rng(s).integers(0, V, 24)} for s in range(4)]
W4 = Assign(mode="weight-only", weights="int4", block=32)


def run(*passes: Pass, target: str = "cpu") -> Any:
    model = h.model_of(BODY, WEIGHTS, opset=21)
    return h.apply(model, *passes, samples=FEEDS, target=target)


def formats(result: Any) -> dict[str, str]:
    sites = result.artifacts.get(PLAN).sites
    return {name: site.weight.format for name, site in sites.items()}


def test_heavy_tails_get_floats_and_flat_weights_get_integers() -> None:
    chosen = formats(run(Calibrate(), W4, AssignFormat(formats=("int4g16", "fp4g16"))))
    assert chosen["a"] == "fp4g16"
    assert chosen["b"] == "int4"


def test_candidates_with_more_bits_than_the_first_are_left_out() -> None:
    assert set(
        formats(run(Calibrate(), W4, AssignFormat(formats=("int4g32", "int8g32")))).values()
    ) == {"int4", "int8"}  # the table is int8
    chosen = formats(run(Calibrate(), W4, AssignFormat(formats=("int8g32", "int4g32"))))
    assert chosen["a"] == chosen["b"] == "int8"


def test_a_budget_is_kept_and_nearly_used() -> None:
    for bits in (5.0, 6.0, 7.5):
        result = run(Calibrate(), W4, AssignFormat(formats=("int4g32", "int8g32"), bits=bits))
        (note,) = h.report_of(result, "assign-format").notes
        assert bits - 4.01 <= float(note.split()[0]) <= bits


def test_the_mix_under_a_budget_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    weight = WeightPlan("int4")
    for _ in range(20):
        options = {}
        for site in "abcd":
            errors = np.sort(rng.uniform(0, 1, 3))[::-1] ** 3
            options[site] = [Option(f"f{i}", weight, 4.0 * 2**i, e) for i, e in enumerate(errors)]
        for budget in (16.0, 20.0, 28.0, 40.0, 64.0):
            found = module._under_budget(options, budget)
            error = sum(o.error for o in found.values())
            mixes = itertools.product(*options.values())
            best = min(
                sum(o.error for o in mix) for mix in mixes if sum(o.bits for o in mix) <= budget
            )
            assert sum(o.bits for o in found.values()) <= budget
            # Greedy steps along convex hulls miss by less than one step of one layer.
            assert error - best <= max(o[0].error for o in options.values())
            if budget in (16.0, 64.0):
                assert error == pytest.approx(best)


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(PreconditionError, match="budget"):
        run(Calibrate(), W4, AssignFormat(bits=2.0))
    with pytest.raises(SpecError, match="one budget"):
        AssignFormat(bits=4.0, megabytes=1.0)


def test_set_format_changes_matching_layers_alone() -> None:
    change = SetFormat(layers=("b",), format="uint8g16")
    result = run(W4, change, Qdq())
    assert formats(run(W4, change)) == {"e": "int8", "a": "int4", "b": "uint8", "logits": "int4"}
    nodes = {n.name: n for n in result.model.graph if n.op_type == "MatMulNBits"}
    found = {name: (n.attributes["bits"].as_int(), n.attributes["block_size"].as_int())
             for name, n in nodes.items()}  # fmt: skip
    assert found["b_MatMulNBits"] == (8, 16)
    assert found["a_MatMulNBits"] == (4, 32)


def table_bytes(model: ir.Model) -> int:
    return sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.const_value.nbytes >= V * K // 16
    )


def test_an_int4_table_of_its_own_or_shared_with_the_tied_layer() -> None:
    plain = run(W4, Qdq()).model
    own = run(W4, SetFormat(layers=("e",), format="int4"), Qdq()).model
    shared = run(W4, SetFormat(layers=("e",), share=True), Qdq()).model
    for model in (own, shared):
        assert h.ops(model)["GatherBlockQuantized"] == 1
        assert h.ops(model)["Gather"] == 0
        (gather,) = [n for n in model.graph if n.op_type == "GatherBlockQuantized"]
        name = gather.outputs[0].name
        rows = h.values(model, FEEDS[0], [name])[name]
        assert h.relative_error(WEIGHTS["table"][FEEDS[0]["ids"]], rows) < 0.12
        written, kept = (h.run(model, FEEDS[0], optimised=o)["logits"] for o in (False, True))
        assert h.relative_error(written, kept) < 1e-5
    codes, scales = V * K // 2, V * K // 32 * 4
    assert table_bytes(shared) == codes + scales
    assert table_bytes(own) == 2 * (codes + scales)
    assert table_bytes(plain) == V * K + 4 * V + codes + scales  # a scale a row


def test_the_shared_table_holds_the_rows_of_the_tied_layer() -> None:
    """Tokens come out of GatherBlockQuantized as rows of what MatMulNBits multiplies by."""
    model = run(W4, SetFormat(layers=("e",), share=True), Qdq()).model
    rows = h.values(model, FEEDS[0], [n.outputs[0].name for n in model.graph
                                      if n.op_type == "GatherBlockQuantized"])  # fmt: skip
    (found,) = rows.values()
    packed, scale = h.const(model, "logits_weight_packed"), h.const(model, "logits_weight_scale")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(V, -1, 32).astype(np.float32)
    table = ((codes - 8) * scale[:, :, None]).reshape(V, K)
    np.testing.assert_allclose(found, table[FEEDS[0]["ids"]], rtol=1e-6)


def test_targets_without_the_operator_refuse_blocks() -> None:
    with pytest.raises(UnsupportedError, match="openvino"):
        run(W4, SetFormat(layers=("e",), format="int4"), target="openvino")
    with pytest.raises(UnsupportedError, match="no layer"):
        run(Assign(mode="weight-only", weights="nvfp4"), SetFormat(layers=("e",), share=True))


def test_a_glob_that_matches_nothing_is_reported() -> None:
    report = h.report_of(
        run(W4, SetFormat(layers=("nothing*", "a"), format="int8g32")), "set-format"
    )
    assert "nothing*: matches no planned layer" in h.reasons(report)
