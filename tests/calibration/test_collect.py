from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxq.calibration.collect import collect
from onnxq.calibration.data import open_data
from onnxq.calibration.observe import named_values
from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import DataError, InternalError, UnsupportedError

R = StatRequest

MLP = """
<ir_version: 8, opset_import: ["" : {opset}]>
mlp (float[N, S, 8] x) => (float[N, S, 6] y) {{
    h = MatMul (x, w1)
    r = Relu (h)
    z = MatMul (r, w2)
    y = Tanh (z)
}}
"""


def mlp(opset: int = 18) -> ir.Model:
    rng = np.random.default_rng(1)
    model = ir.from_onnx_text(MLP.format(opset=opset))
    for name, shape in (("w1", (8, 12)), ("w2", (12, 6))):
        value = next(i for n in model.graph for i in n.inputs if i.name == name)
        value.const_value = ir.tensor(rng.normal(size=shape).astype(np.float32), name=name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
    return model


def samples(count: int = 5, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": (rng.normal(size=(1, 3 + k % 3, 8)) * (1 + k)).astype(np.float32)}
        for k in range(count)
    ]


def all_values(
    model: ir.Model, data: Iterable[dict[str, np.ndarray]], name: str
) -> list[np.ndarray]:
    """The value in every sample, by ONNX's own reference evaluator."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    evaluator = ReferenceEvaluator(proto)
    return [np.asarray(evaluator.run([name], feeds)[0]) for feeds in data]


@pytest.mark.parametrize("opset", [8, 12, 13, 17, 18, 21])
@pytest.mark.parametrize("value", ["x", "h", "r", "y"])
def test_streaming_equals_the_whole_array(opset: int, value: str) -> None:
    model, data = mlp(opset), samples()
    requests = [R(value, kind, limit=100) for kind in ("range", "channel", "histogram", "rows")]
    stats = collect(
        model,
        [*requests, R(value, "moment"), R(value, "channel", axis=1 - 3)],
        [{k: v[:, :3] for k, v in s.items()} for s in data],
    )
    arrays = all_values(model, [{k: v[:, :3] for k, v in s.items()} for s in data], value)
    rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays]).astype(np.float64)

    ranged = stats.range(value)
    assert (ranged.lo, ranged.hi) == pytest.approx((rows.min(), rows.max()), rel=1e-5)
    expected = np.mean([a.min() for a in arrays]), np.mean([a.max() for a in arrays])
    assert ranged.mean == pytest.approx(expected, rel=1e-5)

    channel = stats.channel(value, axis=-1)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(channel.lo, rows.min(0), **close)
    np.testing.assert_allclose(channel.hi, rows.max(0), **close)
    np.testing.assert_allclose(channel.mean, rows.mean(0), **close)
    np.testing.assert_allclose(channel.mean_abs, np.abs(rows).mean(0), **close)
    np.testing.assert_allclose(channel.mean_sq, (rows**2).mean(0), **close)
    np.testing.assert_array_equal(channel.count, len(rows))
    middle = np.stack(arrays).transpose(2, 0, 1, 3).reshape(3, -1)
    np.testing.assert_allclose(stats.channel(value, axis=-2).lo, middle.min(1), **close)

    histogram = stats.histogram(value)
    assert histogram.total == rows.size
    assert (histogram.lo, histogram.hi) == (ranged.lo, ranged.hi)
    counts, _ = np.histogram(rows, histogram.edges())
    assert np.abs(np.cumsum(counts - histogram.counts)).max() <= 2  # rounding at edges

    sampled = stats.rows(value)
    assert sampled.seen == len(rows) == len(sampled.rows)
    found = np.sort(sampled.rows.astype(np.float64) @ np.arange(1, rows.shape[1] + 1))
    np.testing.assert_allclose(
        found, np.sort(rows @ np.arange(1, rows.shape[1] + 1)), rtol=1e-4, atol=1e-4
    )

    moment = stats.moment(value)
    assert moment.count == len(rows)
    np.testing.assert_allclose(moment.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_model_and_its_outputs_are_left_alone() -> None:
    model = mlp()
    before = ir.to_proto(model).SerializeToString()
    collect(model, [R("h", "range"), R("r", "histogram")], samples(2))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -3])
def test_any_axis_can_be_the_channel(axis: int) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1, 3, H, W] x) => (float[1, 3, H, W] y)'
        "{ y = Relu (x) }"
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    stats = collect(
        model,
        [R("y", k, axis=axis, limit=999) for k in ("channel", "moment", "rows")],
        [{"x": x}, {"x": -x}],
    )
    flat = np.moveaxis(np.maximum(np.stack([x, -x]), 0), axis % 4 + 1, -1)
    flat = flat.reshape(-1, flat.shape[-1]).astype(np.float64)
    np.testing.assert_allclose(stats.channel("y").sum, flat.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(stats.channel("y").count, len(flat))
    np.testing.assert_allclose(stats.moment("y").gram, flat.T @ flat, rtol=1e-5, atol=1e-6)
    rows = stats.rows("y").rows
    np.testing.assert_allclose(
        np.sort(rows.sum(1, dtype=np.float64)), np.sort(flat.sum(1)), rtol=1e-5, atol=1e-6
    )


def test_result_does_not_depend_on_the_memory_limit_and_sweeps_are_split() -> None:
    requests = [R(v, k, limit=5) for v in ("x", "h", "r", "z") for k in ("histogram", "rows")]
    data = _Counted(samples(4))
    one = collect(mlp(), requests, data)
    assert data.iterations == 2  # one for the first sample's shapes, one sweep
    data.iterations = 0
    many = collect(mlp(), requests, data, memory_limit_mb=1e-6)
    assert data.iterations == 1 + 4
    assert_same(one, many)


class _Counted:
    source = "counted"

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds, self.iterations = feeds, 0

    def __len__(self) -> int:
        return len(self.feeds)

    def __iter__(self):
        self.iterations += 1
        return iter(self.feeds)


def assert_same(one: Statistics, other: Statistics) -> None:
    (h1, a1), (h2, a2) = one.to_storage(), other.to_storage()
    assert h1 == h2
    for name in a1:
        np.testing.assert_array_equal(a1[name], a2[name], err_msg=name)


ALL = [
    R(v, k, limit=7)
    for v in ("x", "h", "y")
    for k in ("range", "channel", "histogram", "rows", "moment")
]


def test_equal_runs_give_equal_bits_with_any_number_of_threads() -> None:
    first = collect(mlp(), ALL, samples())
    assert_same(first, collect(mlp(), ALL, samples()))
    assert_same(first, collect(mlp(), ALL, samples(), threads=2))


def test_parts_collected_apart_merge_to_the_whole() -> None:
    data = samples(6)
    whole = collect(mlp(), ALL, data)
    a, b, c = (collect(mlp(), ALL, data[i : i + 2]) for i in (0, 2, 4))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
        for request in ALL:
            (_, expected), (_, found) = (
                whole.get(request).to_storage(),
                merged.get(request).to_storage(),
            )
            # Moments add up in float32, and the order shows in the last bits.
            tolerance = 1e-6 if request.kind == "moment" else 1e-12
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=tolerance)
    assert a.merge(b).samples == 4


def test_order_of_samples_changes_no_histogram_row_or_extreme() -> None:
    data = samples(6)
    one, other = collect(mlp(), ALL, data), collect(mlp(), ALL, data[::-1])
    for value in ("x", "h", "y"):
        np.testing.assert_array_equal(one.histogram(value).counts, other.histogram(value).counts)
        np.testing.assert_array_equal(one.rows(value).rows, other.rows(value).rows)
        np.testing.assert_array_equal(one.channel(value).lo, other.channel(value).lo)


def test_equal_requests_count_once() -> None:
    stats = collect(mlp(), [R("h", "range"), R("h", "range")], samples(3))
    assert len(stats) == 1
    assert stats.range("h").batches == 3


def test_progress_reaches_its_total() -> None:
    seen: list[tuple[str, int, int | None]] = []
    collect(
        mlp(),
        [R("h", "histogram"), R("r", "histogram")],
        samples(3),
        progress=lambda *a: seen.append(a),
        memory_limit_mb=1e-6,
    )
    assert seen == [("calibrate", k, 6) for k in range(1, 7)]


ATTENTION = """
<ir_version: 8, opset_import: ["" : 18]>
attention (float[B, S, 16] q, float[B, S, 16] k, float[B, S, 16] v, float[B, 1, S] mask)
    => (float[B, S, 16] y) {
    kt = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul (q, kt)
    masked = Add (scores, mask)
    p = Softmax <axis = -1> (masked)
    y = MatMul (p, v)
}
"""
MASKS = {
    "-inf": -np.inf,
    "-1e9": -1e9,
    "-1e4": -1e4,
    "finfo.min": float(np.finfo(np.float32).min),
}


def attention_samples(constant: float, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    found = []
    for k in range(count):
        feeds = {n: rng.normal(size=(1, 6, 16)).astype(np.float32) for n in "qkv"}
        mask = np.zeros((1, 1, 6), np.float32)
        mask[..., 3 + k % 3 :] = constant
        found.append({**feeds, "mask": mask})
    return found


@pytest.mark.parametrize("constant", MASKS.values(), ids=MASKS)
def test_masked_positions_never_enter(constant: float) -> None:
    model, data = ir.from_onnx_text(ATTENTION), attention_samples(constant)
    kinds = ("range", "channel", "histogram")
    stats = collect(model, [R("masked", kind, mask="mask") for kind in kinds], data)
    scores = [
        s[:, :, : 3 + k % 3].astype(np.float64).ravel()
        for k, s in enumerate(all_values(model, data, "scores"))
    ]
    real = np.concatenate(scores)
    for found in (stats.range("masked"), stats.histogram("masked")):
        assert (found.lo, found.hi) == pytest.approx((real.min(), real.max()), rel=1e-5)
    assert stats.histogram("masked").total == real.size
    channel = stats.channel("masked")
    np.testing.assert_array_equal(channel.count[:3], 4 * 6)
    assert channel.count[5] == 0
    assert channel.lo[5] == np.inf
    assert channel.amax[5] == 0
    assert np.isfinite(channel.sum).all()
    assert channel.sum.sum() == pytest.approx(real.sum(), rel=1e-4)


def test_infinities_stay_out_without_a_mask_too() -> None:
    model, data = ir.from_onnx_text(ATTENTION), attention_samples(-np.inf)
    plain = [R("masked", kind) for kind in ("range", "channel", "histogram")]
    masked = [R("masked", kind, mask="mask") for kind in ("range", "channel", "histogram")]
    stats = collect(model, [*plain, *masked], data)
    for one, other in zip(plain, masked, strict=True):
        (h1, a1), (h2, a2) = stats.get(one).to_storage(), stats.get(other).to_storage()
        assert h1 == h2
        for name in a1:
            np.testing.assert_array_equal(a1[name], a2[name])


@pytest.mark.parametrize("constant", [-1e9, -1e4], ids=["-1e9", "-1e4"])
def test_a_finite_constant_is_not_guessed_away(constant: float) -> None:
    stats = collect(
        ir.from_onnx_text(ATTENTION), [R("masked", "range")], attention_samples(constant)
    )
    assert stats.range("masked").lo == pytest.approx(constant, rel=0.01)


def test_a_value_that_turns_infinite_late_is_counted_once() -> None:
    """The session is rebuilt at the third sample, and no sample counts twice."""
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1, N] x) => (float[1, N] y)'
        "{ y = Log (x) }"
    )
    data = [{"x": np.array([[a, 1.0, 2.0]], np.float32)} for a in (1.0, 3.0, 0.0, -1.0, 0.5)]
    kinds = ("range", "channel", "moment", "histogram")
    stats = collect(model, [*(R("y", k) for k in kinds), R("x", "range")], data)
    assert stats.range("x").batches == stats.range("y").batches == 5
    assert stats.range("y").lo == pytest.approx(np.log(0.5))
    np.testing.assert_array_equal(stats.channel("y").count, [3, 5, 5])
    assert stats.histogram("y").total == 13
    assert stats.moment("y").count == 3  # rows with an infinity or a NaN are left out
    assert stats.moment("y").gram[0, 0] == pytest.approx(np.log(3) ** 2 + np.log(0.5) ** 2)


def test_rows_with_masked_or_infinite_elements_are_left_out() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18]>'
        "g (float[1, S, 2] x, float[1, S, 1] mask) => (float[1, S, 2] y) { y = Neg (x) }"
    )
    x = np.arange(10, dtype=np.float32).reshape(1, 5, 2)
    x[0, 1, 1] = np.inf
    mask = np.array([0, 0, -1e9, 0, 0], np.float32).reshape(1, 5, 1)
    stats = collect(
        model,
        [R("y", "rows", limit=9, mask="mask"), R("y", "moment", mask="mask")],
        [{"x": x, "mask": mask}],
    )
    good = -x[0, [0, 3, 4]]
    rows = stats.rows("y").rows
    np.testing.assert_array_equal(rows[np.argsort(-rows[:, 0])], good)
    np.testing.assert_array_equal(stats.moment("y").gram, good.T @ good)
    assert stats.moment("y").count == 3


def test_a_boolean_mask_keeps_where_it_is_true() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18]>'
        "g (float[1, S] x, bool[1, S] keep, float low) => (float[1, S] y)"
        "{ y = Where (keep, x, low) }"
    )
    feeds = {
        "x": np.array([[1, -5, 3]], np.float32),
        "keep": np.array([[True, False, True]]),
        "low": np.array(-3e38, np.float32),
    }
    stats = collect(
        model, [R("y", "range", mask="keep"), R("y", "histogram", mask="keep")], [feeds]
    )
    assert (stats.range("y").lo, stats.range("y").hi) == (1, 3)
    assert stats.histogram("y").total == 2


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [("float16", np.float16), ("double", np.float64), ("bfloat16", ml_dtypes.bfloat16)],
)
def test_other_float_types(type_name: str, dtype: type) -> None:
    # ONNX text takes 16-bit floats as their bits.
    one = {"float16": 0x3C00, "double": 1, "bfloat16": 0x3F80}[type_name]
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    g ({type_name}[N, 4] x) => (float[N, 3] y) {{
        one = Constant <value = {type_name}[1] {{{one}}}> ()
        a = Add (x, one)
        h = MatMul (a, w)
        y = Cast <to = 1> (h)
    }}"""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(5)
    w = rng.normal(size=(4, 3)).astype(dtype)
    value = next(i for n in model.graph for i in n.inputs if i.name == "w")
    value.const_value = ir.tensor(w, name="w")
    value.shape, value.type = ir.Shape(w.shape), ir.TensorType(value.const_value.dtype)
    model.graph.register_initializer(value)
    data = [{"x": rng.normal(size=(5, 4)).astype(dtype)} for _ in range(3)]
    stats = collect(
        model, [R("h", k, limit=3) for k in ("range", "channel", "histogram", "rows")], data
    )
    h = np.concatenate([(d["x"].astype(np.float64) + 1) @ w.astype(np.float64) for d in data])
    tolerance = {"float16": 5e-3, "double": 1e-6, "bfloat16": 1e-5}[type_name]
    assert stats.range("h").hi == pytest.approx(h.max(), rel=tolerance)
    assert stats.histogram("h").lo == pytest.approx(h.min(), rel=tolerance)
    np.testing.assert_allclose(stats.channel("h").mean_sq, (h**2).mean(0), rtol=10 * tolerance)
    assert model.graph.inputs[0].dtype.name == type_name.upper()


BRANCHES = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[N] x, bool c) => (float[N] y) {
    y = If (c) <
        then_branch = t () => (float[N] a) { inner = Abs (x)  a = Relu (inner) },
        else_branch = e () => (float[N] b) { b = Neg (x) }
    >
}
"""


def test_what_cannot_be_observed_is_refused_with_a_reason() -> None:
    feeds = {"x": np.ones(3, np.float32), "c": np.array(True)}
    cases = [
        (BRANCHES, [R("inner", "range")], feeds, UnsupportedError, "STAT-IN-SUBGRAPH"),
        (BRANCHES, [R("nope", "range")], feeds, InternalError, "STAT-UNKNOWN-VALUE"),
        (BRANCHES, [R("c", "range")], feeds, UnsupportedError, "STAT-NOT-FLOAT"),
        (BRANCHES, [R("x", "channel", axis=1)], feeds, UnsupportedError, "STAT-AXIS"),
        (
            ATTENTION,
            [R("q", "range", mask="mask")],
            attention_samples(0)[0],
            UnsupportedError,
            "STAT-MASK-SHAPE",
        ),
    ]
    for text, requests, sample, kind, code in cases:
        with pytest.raises(kind) as caught:
            collect(ir.from_onnx_text(text), requests, [sample])
        assert caught.value.code == code
    stats = collect(ir.from_onnx_text(BRANCHES), [R("y", "range")], [feeds])
    assert stats.range("y").hi == 1


def test_channels_that_change_between_samples_are_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        collect(mlp(), [R("h", "channel", axis=1)], samples())
    assert caught.value.code == "STAT-CHANNELS"


def test_no_samples_and_no_finite_element() -> None:
    with pytest.raises(DataError) as none:
        collect(mlp(), [R("h", "range")], [])
    assert none.value.code == "CALIB-EMPTY"
    nothing = {"x": np.full((1, 2, 8), np.inf, np.float32)}
    for kind in ("range", "channel", "histogram", "rows"):
        with pytest.raises(DataError) as unseen:
            collect(mlp(), [R("x", kind, limit=1)], [nothing])
        assert unseen.value.code == "CALIB-NOTHING-SEEN"


def test_a_failing_sample_is_named() -> None:
    bad = {"x": np.ones((1, 2, 9), np.float32)}
    with pytest.raises(DataError, match="sample 2") as caught:
        collect(mlp(), [R("h", "range")], [*samples(2), bad])
    assert caught.value.code == "CALIB-RUN"


def test_a_model_that_onnxruntime_cannot_load() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 18, "nowhere" : 1]> g (float[N] x) => (float[N] y)'
        "{ y = nowhere.Thing (x) }"
    )
    with pytest.raises(UnsupportedError) as caught:
        collect(model, [R("y", "range")], [{"x": np.ones(2, np.float32)}])
    assert caught.value.code == "CALIB-SESSION"


def test_old_opset_with_infinities_says_so() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 4, opset_import: ["" : 8]> g (float[N] x) => (float[N] y) { y = Log (x) }'
    )
    with pytest.raises(UnsupportedError) as caught:
        collect(model, [R("y", "range")], [{"x": np.zeros(2, np.float32)}])
    assert caught.value.code == "CALIB-OPSET"


def test_nothing_asked_runs_nothing() -> None:
    assert len(collect(mlp(), [], [])) == 0


def test_no_folder_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    collect(mlp(), [R("h", "range")], samples(1))
    with pytest.raises(DataError):
        collect(mlp(), [R("h", "range")], [{"x": np.ones((1, 2, 9), np.float32)}])
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("onnxq.calibration.sessions.ir.save", full)
    with pytest.raises(DataError, match="No space left") as caught:
        collect(mlp(), [R("h", "range")], samples(1))
    assert caught.value.code == "CALIB-NO-SPACE"
    assert list(tmp_path.iterdir()) == []


_MEMORY = textwrap.dedent("""
    import resource, sys
    import numpy as np, onnx_ir as ir
    from onnxq.calibration.collect import collect
    from onnxq.calibration.requests import StatRequest as R

    class Data:
        source = "made up"
        def __len__(self):
            return int(sys.argv[1])
        def __iter__(self):
            for k in range(len(self)):
                yield {"x": np.random.default_rng(k).normal(size=(64, 4096)).astype(np.float32)}

    model = ir.from_onnx_text('''<ir_version: 8, opset_import: ["" : 18]>
        g (float[64, 4096] x) => (float[64, 4096] c) { a = Relu (x) b = Tanh (a) c = Neg (b) }''')
    kinds = ("histogram", "range", "channel", "rows")
    collect(model, [R(v, k, limit=32) for v in "xabc" for k in kinds], Data())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
""")

MEMORY_NOISE_MB = 12
"""A sample of the test is 1 MB; 48 more that were kept would show as 192 MB."""


@pytest.mark.slow
def test_ranges_of_bert_are_those_of_onnxruntimes_calibrator(shared: Path, tmp_path: Path) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    folder = shared / "models" / "sst2-bert-tiny"
    bert = ir.load(folder / "model.onnx")
    data = open_data(
        shared / "data" / "stsb" / "sts-train.csv",
        bert,
        tokenizer=folder / "tokenizer.json",
        samples=8,
    )
    theirs = calibrate.create_calibrator(
        folder / "model.onnx",
        ["MatMul"],
        augmented_model_path=str(tmp_path / "augmented.onnx"),
        calibrate_method=calibrate.CalibrationMethod.MinMax,
    )

    class Reader(calibrate.CalibrationDataReader):
        feeds = iter(data)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    theirs.collect_data(Reader())
    expected = theirs.compute_data().data
    names = [
        v for v in named_values(bert.graph) if v in expected and v not in bert.graph.initializers
    ]
    assert len(names) > 10
    stats = collect(bert, [R(name, "range") for name in names], data)
    for name in names:
        lo, hi = (np.asarray(x).item() for x in expected[name].range_value)
        assert (stats.range(name).lo, stats.range(name).hi) == pytest.approx((lo, hi), rel=1e-4)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    def peak(count: int) -> int:
        command = [sys.executable, "-c", _MEMORY, str(count)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert peak(64) - peak(16) < MEMORY_NOISE_MB
