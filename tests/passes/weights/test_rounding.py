"""gptq, gpfq and opt-rtn on one small layer: what they promise, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxq.errors import SpecError, UnsupportedError
from onnxq.formats import parse_format
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.keys import ROUNDED
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights.gpfq import Gpfq
from onnxq.passes.weights.gptq import Gptq
from onnxq.passes.weights.opt_rtn import OptRtn
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.passes.weights.rounding import searched_scales
from onnxq.solvers.scale_search import mse_params

from ..helpers import apply, model_of, normal, relative_error, report_of, run

Array = npt.NDArray[Any]

K, N, ROWS = 96, 48, 40
W4 = Assign(mode="weight-only", weights="int4", block=32)
ASYM = Assign(mode="weight-only", weights="uint4", block=32, symmetric_weights=False)


MIXING = normal(K, K // 4, seed=3) * np.exp(normal(K, 1, seed=4, scale=0.5))


def correlated(seed: int) -> Array:
    """Rows whose channels depend on each other and differ in size, as those of real layers do."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, K // 4)) @ MIXING.T + 0.3 * rng.standard_normal((ROWS, K))
    return rows.astype(np.float32)


SAMPLES = [{"x": correlated(seed)} for seed in range(16)]
WEIGHTS = {"w": normal(K, N, seed=1, scale=0.1), "b": normal(N, seed=2)}
MATMUL = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ m = MatMul(x, w)  y = Add(m, b) }}"
GEMM = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = Gemm<transB = 1>(x, w, b) }}"


def error_of(*passes: Pass, body: str = MATMUL, weights: dict[str, Array] | None = None) -> float:
    """Output error of the lowered model on rows that no pass saw."""
    model = model_of(body, weights or WEIGHTS, opset=21)
    after = apply(model, Calibrate(), *passes, Qdq(), samples=SAMPLES).model
    fresh = {"x": np.concatenate([correlated(seed) for seed in range(100, 108)])}
    return relative_error(run(model, fresh)["y"], run(after, fresh)["y"])


@pytest.mark.parametrize("assign", [W4, ASYM], ids=["symmetric", "asymmetric"])
def test_gptq_halves_the_output_error_of_rounding_to_nearest(assign: Assign) -> None:
    assert error_of(assign, Gptq(damping=0.01)) < 0.5 * error_of(assign)


def test_every_solver_beats_rounding_to_nearest_and_gptq_is_best() -> None:
    nearest = error_of(W4)
    gptq, gpfq, opt = error_of(W4, Gptq()), error_of(W4, Gpfq()), error_of(W4, OptRtn())
    assert gptq < gpfq < nearest
    assert gptq < opt < nearest


def test_the_clip_search_sees_correlations() -> None:
    two = Assign(mode="weight-only", weights="uint2", block=32, symmetric_weights=False)
    assert error_of(two, OptRtn(clip=True)) < 0.95 * error_of(two, OptRtn()) < error_of(two)


def test_error_diffusion_of_mx_blocks() -> None:
    mx = Assign(mode="weight-only", weights="mxfp4")
    assert error_of(mx, Gpfq(refresh=True)) < 0.8 * error_of(mx)
    with pytest.raises(UnsupportedError, match=r"m: .*refresh=true"):
        error_of(W4, Gpfq(refresh=True))


def test_a_gemm_with_a_transposed_weight_is_rounded_alike() -> None:
    transposed = {"w": np.ascontiguousarray(WEIGHTS["w"].T), "b": WEIGHTS["b"]}
    plain, turned = error_of(W4, Gptq()), error_of(W4, Gptq(), body=GEMM, weights=transposed)
    assert turned == pytest.approx(plain, rel=1e-3)


def test_channel_scales_of_static_int8_are_rounded_too() -> None:
    assert error_of(Assign(), Gptq()) < error_of(Assign()) < 0.03


def test_targets_without_packed_operators_get_positive_scales() -> None:
    body = f"g (float[20,128] x) => (float[20,{N}] y) {{ m = MatMul(x, w)  y = Add(m, b) }}"
    samples = [{"x": normal(20, 128, seed=seed)} for seed in range(16)]
    model = model_of(body, {"w": normal(128, N, seed=1), "b": normal(N, seed=2)}, opset=21)
    blocks = Assign(mode="weight-only", weights="int4", block=64)
    result = apply(model, Calibrate(), blocks, Gptq(), Qdq(), samples=samples, target="tensorrt")
    scales = [v for name, v in result.model.graph.initializers.items() if name.endswith("_scale")]
    assert len(scales) == 1
    assert (scales[0].const_value.numpy() > 0).all()  # type: ignore[union-attr]
    error = relative_error(run(model, samples[0])["y"], run(result.model, samples[0])["y"])
    assert error < 0.2


def test_the_report_states_the_error_that_was_left() -> None:
    model = model_of(MATMUL, WEIGHTS, opset=21)
    result = apply(model, Calibrate(), W4, Gptq(), Qdq(), samples=SAMPLES)
    (change,) = report_of(result, "gptq").changed
    stated = float(change.detail.removeprefix("output SQNR ").removesuffix(" dB"))
    rows = np.concatenate([s["x"] for s in SAMPLES])
    exact = rows.astype(np.float64) @ WEIGHTS["w"]
    # MatMulNBits rounds activations as well, so its codes are decoded here.
    rounded = _decoded(result.model)
    measured = np.square(exact).sum() / np.square(rows.astype(np.float64) @ rounded - exact).sum()
    assert stated == pytest.approx(10 * np.log10(measured), abs=0.06)


def _decoded(model: Any) -> Array:
    """``[K, N]`` weights of the model's MatMulNBits node, unpacked here by its definition."""
    (node,) = [n for n in model.graph if n.op_type == "MatMulNBits"]
    packed, scale = (node.inputs[i].const_value.numpy() for i in (1, 2))
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(N, -1, 32).astype(np.float64)
    return ((codes - 8) * scale.reshape(N, -1, 1)).reshape(N, -1)[:, :K].T


def test_rounded_weights_survive_storage() -> None:
    model = model_of(MATMUL, WEIGHTS, opset=21)
    found = apply(model, Calibrate(), W4, Gptq(), samples=SAMPLES).artifacts.get(ROUNDED)
    back = RoundedWeights.from_storage(*found.to_storage())
    (site,) = found
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(back.get(site), name), getattr(found.get(site), name))


def test_damping_out_of_range_is_refused() -> None:
    with pytest.raises(SpecError, match="damping=0"):
        Gptq(damping=0.0)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6e2m3", "mxint8"])
def test_mx_scales_leave_room_for_what_columns_take_up(name: str) -> None:
    """Ranges are never halved, though where errors of large weights count little it would gain."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((96, 64)).astype(np.float32)
    rows[:, ::8] *= 1.9
    energy = np.ones(64)
    energy[::8] = 1e-3
    fmt = parse_format(name)
    params = searched_scales(rows, np.diag(energy), fmt, 32)
    floor = fmt.params(rows, params.granularity).scale.astype(np.float32)
    assert set(np.unique(params.scale.astype(np.float32) / floor)) <= {1.0, 2.0}
    free = mse_params(rows, fmt, group=32, norm=2, importance=energy)
    assert 0.5 in free.scale.astype(np.float32) / floor
