"""Comparisons of two models, against numpy and figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import distance

from onnxq.errors import DataError
from onnxq.graph import io
from onnxq.pipeline.compare import compare_models, measure, per_layer
from onnxq.runtime.metrics import cosine, relative_error, sqnr_db
from tests.pipeline.tiny import samples, set_weight, tiny_model, weight

FINITE = hnp.arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32))


@given(FINITE, FINITE)
def test_cosine_is_scipys(a, b):
    if np.linalg.norm(a) < 1e-3 or np.linalg.norm(b) < 1e-3:
        return
    expected = 1 - distance.cosine(a.astype(np.float64), b.astype(np.float64))
    assert cosine(a, b) == pytest.approx(expected, abs=1e-9)


def test_cosine_of_zeros_and_non_finites():
    zero, one = np.zeros(3), np.ones(3)
    assert cosine(zero, zero) == 1.0
    assert cosine(zero, one) == cosine(one, zero) == 0.0
    assert math.isnan(cosine(one, np.array([1, np.nan, 1])))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 3.5], 0.1),
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], math.inf),
        ([-math.inf, 5.0], [-math.inf, 5.5], 0.1),
        ([-math.inf, 5.0], [math.inf, 5.0], math.inf),
        ([-math.inf, 5.0], [-1e9, 5.0], math.inf),
        ([math.nan, 5.0], [math.nan, 5.0], 0.0),
        ([1.0, 2.0], [1.0], math.inf),
        ([], [], 0.0),
        (["a"], ["a"], 0.0),
        (["a"], ["b"], math.inf),
    ],
)
def test_relative_error(a, b, expected):
    assert relative_error(np.array(a), np.array(b)) == pytest.approx(expected, rel=1e-12)


def test_relative_error_looks_into_sequences_and_maps():
    one, two = np.ones(2, np.float32), np.full(3, 2.0)
    assert relative_error([one, {"a": two}], [one, {"a": two}]) == 0.0
    assert relative_error([one, {"a": two}], [one, {"a": 1.5 * two}]) == pytest.approx(0.5)
    assert relative_error([one, two], [one]) == math.inf
    assert relative_error({"a": one}, {"b": one}) == math.inf
    assert relative_error(None, None) == 0.0
    assert relative_error(None, one) == math.inf


def test_sqnr():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def scaled(factor: float) -> ir.Model:
    model = tiny_model()
    set_weight(model, "w2", weight(model, "w2") * factor)
    return model


def test_a_model_equals_itself():
    found = compare_models(tiny_model(), tiny_model(), samples(), seconds=0)
    (out,) = found.outputs
    assert (out.cosine_mean, out.sqnr_db, out.max_abs, out.samples) == (1.0, math.inf, 0.0, 12)
    assert found.latency is None
    assert found.speedup is None


def test_a_scaled_output_has_the_sqnr_of_its_factor():
    found = compare_models(tiny_model(), scaled(1.1), samples(), seconds=0)
    (out,) = found.outputs
    assert out.cosine_min == pytest.approx(1.0, abs=1e-6)
    assert out.sqnr_db == pytest.approx(20.0, abs=1e-3)  # 20 log10(1 / 0.1)
    reference = onnx.reference.ReferenceEvaluator(ir.to_proto(tiny_model()))
    largest = max(np.abs(reference.run(None, s)[0]).max() for s in samples())
    assert out.max_abs == pytest.approx(0.1 * largest, rel=1e-4)
    assert out.flags == ()


def test_cosines_are_per_sample():
    noisy = tiny_model()
    set_weight(noisy, "w2", weight(noisy, "w2") + 0.3)
    before, after = (
        onnx.reference.ReferenceEvaluator(ir.to_proto(m)) for m in (tiny_model(), noisy)
    )
    each = [
        1 - distance.cosine(before.run(None, s)[0].ravel(), after.run(None, s)[0].ravel())
        for s in samples()
    ]
    (out,) = compare_models(tiny_model(), noisy, samples(), seconds=0).outputs
    assert out.cosine_mean == pytest.approx(np.mean(each), abs=1e-5)
    assert out.cosine_min == pytest.approx(np.min(each), abs=1e-5)


@pytest.mark.parametrize(
    ("factor", "flag"), [(0.0, "all-zero"), (math.nan, "non-finite"), (math.inf, "non-finite")]
)
def test_broken_outputs_are_flagged(factor, flag):
    found = compare_models(tiny_model(), scaled(factor), samples(), seconds=0)
    assert found.flagged[0].flags == (flag,)
    assert found.worst is found.outputs[0]
    assert found.outputs[0].to_json()["cosine_mean"] in (0.0, None)


def model_of(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def test_classes_are_compared_by_equality_and_masks_by_their_finite_part():
    models = []
    for op in ("Identity", "Neg"):
        body = f"""{HEAD} g (float[4] x, float[4] mask) => (int64[1] c, float[4] m)
        {{ n = {op}(x) c = ArgMax <axis=0> (n) m = Add(x, mask) }}"""
        models.append(model_of(body))
    feeds = [
        {
            "x": np.array(x, np.float32),
            "mask": np.array([0, 0, -np.inf, 0], np.float32),
        }
        for x in ([1, 2, 3, 4], [5, 5, 5, 5])
    ]
    classes, masked = compare_models(*models, feeds, seconds=0).outputs
    assert (classes.is_float, classes.cosine_mean, classes.cosine_min) == (False, 0.5, 0.0)
    assert masked.cosine_mean == pytest.approx(1.0, abs=1e-12)
    assert (masked.max_abs, masked.flags) == (0.0, ())


def test_another_shape_is_flagged():
    one = model_of(f"{HEAD} g (float[4] x) => (float[N] y) {{ y = Identity(x) }}")
    two = model_of(f"{HEAD} g (float[4] x) => (float[N] y) {{ y = Concat <axis=0> (x, x) }}")
    found = compare_models(one, two, [{"x": np.ones(4, np.float32)}], seconds=0)
    assert found.outputs[0].flags == ("shape",)


def test_a_missing_output_and_missing_samples_are_refused():
    other = model_of(f"{HEAD} g (float[N, 4] x) => (float[N, 4] z) {{ z = Relu(x) }}")
    with pytest.raises(DataError, match="no output `y`"):
        compare_models(tiny_model(), other, samples(), seconds=0)
    with pytest.raises(DataError, match="no samples"):
        compare_models(tiny_model(), tiny_model(), [], seconds=0)
    with pytest.raises(DataError) as caught:
        compare_models(tiny_model(), tiny_model(), [{"x": np.ones((2, 5), np.float32)}])
    assert caught.value.code == "DATA-ORT-RUN"


def test_files_are_compared_with_their_sizes(tmp_path):
    path = io.save(tiny_model(), tmp_path / "m.onnx").path
    found = compare_models(path, path, samples(), repeats=3, limit=2)
    assert found.reference_bytes == found.candidate_bytes == path.stat().st_size
    assert found.outputs[0].samples == 2
    assert found.latency.rounds == 3
    assert found.speedup == pytest.approx(1.0, abs=0.95)
    assert found.to_json()["size_ratio"] == 1.0


class FakeSession:
    """Notes when it runs; takes no time."""

    def __init__(self, label, log):
        self.label, self.log = label, log

    def get_inputs(self):
        return []

    def get_outputs(self):
        return []

    def run(self, names, feeds):
        self.log.append(self.label)
        return []


def test_runs_are_interleaved_and_the_first_one_changes():
    log = []
    sessions = {label: FakeSession(label, log) for label in "AB"}
    found = measure(sessions, {}, threads=1, repeats=4, warmup=1)
    assert "".join(log) == "AB" + "AB" + "BA" + "AB" + "BA"
    assert (found.rounds, found.threads) == (4, 1)


def test_layers_are_compared_in_graph_order():
    other = tiny_model()
    set_weight(other, "b1", weight(other, "b1") * 0)
    found = per_layer(tiny_model(), other, samples())
    assert [(d.name, d.op) for d in found] == [
        ("m", "MatMul"),
        ("a", "Add"),
        ("h", "Relu"),
        ("y", "MatMul"),
    ]
    assert found[0].sqnr_db == math.inf
    assert all(d.sqnr_db < 20 and d.cosine < 0.999 for d in found[1:])
    bias = weight(tiny_model(), "b1").astype(np.float64)
    products = [s["x"].astype(np.float64) @ weight(other, "w1") for s in samples()[:4]]
    signal = sum(float(((p + bias) ** 2).sum()) for p in products)
    noise = sum(float(np.broadcast_to(bias**2, p.shape).sum()) for p in products)
    assert found[1].sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_layers_in_many_sweeps_are_the_same(monkeypatch):
    other = scaled(0.5)
    set_weight(other, "w1", weight(other, "w1") * 0.9)
    whole = per_layer(tiny_model(), other, samples())
    monkeypatch.setattr("onnxq.pipeline.compare.VALUES_A_SWEEP", 1)
    assert per_layer(tiny_model(), other, samples()) == whole


def test_renamed_values_are_found_through_provenance():
    other = tiny_model()
    for node in other.graph:
        if node.op_type == "Relu":
            node.outputs[0].name = "h_new"
    assert [d.name for d in per_layer(tiny_model(), other, samples())] == ["m", "a", "y"]
    io.set_provenance(other, {"values": {"h": "h_new"}})
    assert [d.name for d in per_layer(tiny_model(), other, samples())] == ["m", "a", "h", "y"]
    assert [d.name for d in per_layer(tiny_model(), other, samples(), names=["h"])] == ["h"]
