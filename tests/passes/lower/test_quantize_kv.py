"""quantize-kv against numpy: the cache's codes, and the float decoder fed with a rounded cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.evaluation.decode import CachedDecoder
from onnxq.models.checkpoints import LlamaCheckpoint, LlamaConfig
from onnxq.models.llama import build_llama
from onnxq.passes.lower.quantize_kv import QuantizeKv
from onnxq.passes.transform.online_hadamard import OnlineHadamard
from tests.passes.helpers import apply, model_of, reasons, report_of, shared

HEAD = 8
EXACT = 2e-5
"""Relative error of logits: the same numbers in other orders of float32 sums."""


@pytest.fixture(scope="module")
def decoder() -> ir.Model:
    """The random decoder in float32."""
    proto = build_llama(_checkpoint(), kv_cache=True, dtype="float32", metadata={})
    return ir.from_proto(proto)


def _checkpoint() -> LlamaCheckpoint:
    """Two layers of random weights; 4 heads of 8 channels, 2 of them of keys."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, norm_eps=1e-5, rope_theta=1e4,
        max_positions=256,
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (50, 32), "model.norm.weight": (32,)}
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (32,),
            f"{at}.post_attention_layernorm.weight": (32,),
            f"{at}.self_attn.q_proj.weight": (32, 32),
            f"{at}.self_attn.k_proj.weight": (16, 32),
            f"{at}.self_attn.v_proj.weight": (16, 32),
            f"{at}.self_attn.o_proj.weight": (32, 32),
            f"{at}.mlp.gate_proj.weight": (48, 32),
            f"{at}.mlp.up_proj.weight": (48, 32),
            f"{at}.mlp.down_proj.weight": (32, 48),
        }
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) * (0.4 if len(shape) == 2 else 1.0)
        for name, shape in shapes.items()
    }
    return LlamaCheckpoint(config, weights, {})


def open_decoder(model: ir.Model) -> CachedDecoder:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return CachedDecoder(session)


def rounded(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """What codes of ``x`` stand for, min to max along ``axis``."""
    low = x.min(axis, keepdims=True)
    step = (x.max(axis, keepdims=True) - low) / np.float32(2**bits - 1)
    step = np.maximum(step, np.finfo(np.float32).tiny)
    return (np.rint((x - low) / step) * step + low).astype(np.float32)


def reference_cache(
    x: np.ndarray, spec: QuantizeKv, *, is_key: bool, starts: list[int]
) -> np.ndarray:
    """``x [N, H, T, d]`` as the cache gives it back after steps that began at ``starts``."""
    grouped = spec.keys == "channel"
    group = spec.group if grouped else 1
    done = min(spec.prefix, x.shape[2])
    whole = x.copy()
    for end in [*starts[1:], x.shape[2]]:
        count = max(end - done - spec.window, 0) // group * group
        for at in range(done, done + count, group):
            chunk = x[:, :, at : at + group]
            axis = 2 if grouped and is_key else 3
            whole[:, :, at : at + group] = rounded(chunk, spec.bits, axis)
        done += count
    return whole


SPECS = [
    QuantizeKv(),
    QuantizeKv(bits=4),
    QuantizeKv(bits=2),
    QuantizeKv(bits=4, prefix=3),
    QuantizeKv(bits=4, window=5),
    QuantizeKv(bits=2, keys="channel", group=4),
    QuantizeKv(bits=4, keys="channel", group=3, prefix=2, window=4),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_it_decodes_as_the_float_model_on_a_rounded_cache(decoder, spec, size):
    """The oracle is the float decoder; numpy rounds its cache between the steps."""
    ids = np.random.default_rng(1).integers(0, 50, (2, 17))
    ours, exact = open_decoder(apply(decoder, spec).model), open_decoder(decoder)
    ours.reset(), exact.reset()
    stored: dict[str, np.ndarray] = {}
    starts: list[int] = []
    for at in range(0, 17, size):
        starts.append(at)
        logits = exact.step(ids[:, at : at + size])
        np.testing.assert_allclose(
            ours.step(ids[:, at : at + size]), logits, rtol=0, atol=EXACT * np.abs(logits).max()
        )
        for name, grown in exact.cache.items():
            new = grown[:, :, at:]
            stored[name] = np.concatenate([stored[name], new], 2) if at else new
            exact._past[name] = reference_cache(
                stored[name], spec, is_key=name.endswith(".key"), starts=starts
            )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_cache_grows_as_described(decoder, spec):
    ours = open_decoder(apply(decoder, spec).model)
    ids = np.random.default_rng(2).integers(0, 50, (1, 14))
    group = spec.group if spec.keys == "channel" else 1
    for total in range(1, 15):
        ours.step(ids[:, total - 1 : total])
        cache = {k.rpartition("_")[2]: v for k, v in ours.cache.items() if ".0.key" in k}
        prefix = min(spec.prefix, total)
        coded = max(total - prefix - spec.window, 0) // group * group
        assert cache["codes"].shape == (1, 2, coded, HEAD * spec.bits // 8)
        per_channel = spec.keys == "channel"
        pairs = (coded // group, HEAD) if per_channel else (coded, 1)
        assert cache["scale"].shape == cache["offset"].shape == (1, 2, *pairs)
        if spec.prefix:
            assert cache["prefix"].shape[2] == prefix
        if "window" in cache:
            assert cache["window"].shape[2] == total - prefix - coded
        assert sum(cache[p].shape[2] for p in ("prefix", "codes", "window") if p in cache) == total


def test_codes_lie_low_bits_first(decoder):
    """A byte holds its first code in the low bits, as ONNX packs INT4."""
    plain, packed = (open_decoder(apply(decoder, QuantizeKv(bits=bits)).model) for bits in (8, 4))
    exact = open_decoder(decoder)
    ids = np.array([[7, 3, 9]])
    for each in (plain, packed, exact):
        each.step(ids)
    x = exact.cache["past_key_values.0.value"]
    low, high = x.min(3, keepdims=True), x.max(3, keepdims=True)
    codes = np.rint((x - low) / ((high - low) / np.float32(15))).astype(np.uint8)
    found = packed.cache["past_key_values.0.value_codes"]
    np.testing.assert_array_equal(found & 15, codes[..., ::2])
    np.testing.assert_array_equal(found >> 4, codes[..., 1::2])
    fine = plain.cache["past_key_values.0.value_codes"]
    np.testing.assert_array_equal(fine, np.rint((x - low) / ((high - low) / np.float32(255))))


def test_equal_numbers_and_zeros_come_back_exactly():
    """A cache of one number has no range; its offset is that number."""
    model = model_of(
        """g (float[1, 2, S, 8] q, float[1, 2, S, 8] k, float[1, 2, P, 8] past_k,
            float[1, 2, P, 8] past_v)
            => (float[1, 2, S, 8] y, float[1, 2, T, 8] present_k, float[1, 2, T, 8] present_v)
        {
            present_k = Concat <axis = 2> (past_k, k)
            present_v = Concat <axis = -2> (past_v, k)
            kt = Transpose <perm = [0, 1, 3, 2]> (present_k)
            s = MatMul (q, kt)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, present_v)
        }""",
        opset=18,
    )
    result = apply(model, QuantizeKv(bits=4))
    session = ort.InferenceSession(
        ir.to_proto(result.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    k = np.full((1, 2, 3, 8), -2.5, np.float32)
    k[:, :, 1] = 0
    empty = {
        i.name: np.zeros(
            [d if isinstance(d, int) else 0 for d in i.shape],
            np.uint8 if "codes" in i.name else np.float32,
        )
        for i in session.get_inputs()[2:]
    }
    names = [o.name for o in session.get_outputs()]
    first = dict(zip(names, session.run(names, {"q": k, "k": k, **empty}), strict=True))
    assert not first["present_k_codes"].any()
    np.testing.assert_array_equal(first["present_k_offset"][..., 0], k[..., 0])
    cache = {i.name: first[i.name.replace("past", "present")] for i in session.get_inputs()[2:]}
    again = session.run(["y"], {"q": k, "k": k, **cache})[0]
    twice = np.concatenate([k, k], 2).astype(np.float64)
    scores = np.exp(k.astype(np.float64) @ np.swapaxes(twice, 2, 3))
    want = scores / scores.sum(-1, keepdims=True) @ twice
    np.testing.assert_allclose(again, want, rtol=1e-6, atol=1e-6)


def test_a_rotation_of_the_keys_moves_before_the_cache(decoder):
    """R3 then keeps the function, is computed on new keys alone, and is what is stored."""
    rotated = apply(decoder, OnlineHadamard(sites=("qk",)))
    result = apply(rotated.model, QuantizeKv(bits=8))
    assert {c.detail for c in report_of(result, "quantize-kv").changed} == {
        "keys, their rotation moved before the cache",
        "values",
    }
    ids = np.random.default_rng(3).integers(0, 50, (1, 6))
    ours, exact = open_decoder(result.model), open_decoder(decoder)
    want = exact.run(ids, 6)
    got = ours.run(ids, 6)  # one step reads no codes
    np.testing.assert_allclose(got, want, rtol=0, atol=EXACT * np.abs(want).max())
    keys = exact.cache["past_key_values.1.key"]
    offset = ours.cache["past_key_values.1.key_offset"]
    from scipy.linalg import hadamard

    turned = keys @ (hadamard(HEAD) / np.sqrt(HEAD))
    np.testing.assert_allclose(offset[..., 0], turned.min(3), rtol=1e-4, atol=1e-4)
    stepped = ours.run(ids, 1)
    assert 0 < np.abs(stepped - want).max() < 0.05 * np.abs(want).max()


def test_fewer_bits_cost_more(decoder):
    ids = np.random.default_rng(4).integers(0, 50, (2, 20))
    want = open_decoder(decoder).run(ids, 1)
    errors = []
    for bits in (8, 4, 2):
        got = open_decoder(apply(decoder, QuantizeKv(bits=bits)).model).run(ids, 1)
        errors.append(float(np.square(got - want).mean()))
    assert errors[0] * 30 < errors[1] < errors[2] / 5


def test_float16_caches_keep_their_type():
    proto = build_llama(_checkpoint(), kv_cache=True, dtype="float16", metadata={})
    model = ir.from_proto(proto)
    ours, exact = open_decoder(apply(model, QuantizeKv(bits=8)).model), open_decoder(model)
    ids = np.random.default_rng(5).integers(0, 50, (1, 8))
    want, got = exact.run(ids, 1), ours.run(ids, 1)
    assert ours.cache["past_key_values.0.key_scale"].dtype == np.float16
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_models_without_a_cache_are_told():
    body = "g (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }"
    report = report_of(apply(model_of(body, opset=18), QuantizeKv()), "quantize-kv")
    assert not report.changed
    assert "has no cache that is an input" in reasons(report)
    old = report_of(apply(model_of(body, opset=13), QuantizeKv()), "quantize-kv")
    assert "needs opset 18" in reasons(old)


def test_running_it_twice_changes_nothing_more(decoder):
    once = apply(decoder, QuantizeKv())
    twice = apply(once.model, QuantizeKv())
    assert not report_of(twice, "quantize-kv").changed
    assert "in codes already" in reasons(report_of(twice, "quantize-kv"))


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"group": 1}, {"prefix": -1}, {"window": -1}], ids=str
)
def test_options_out_of_range(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        QuantizeKv(**options)


def test_a_model_without_a_cache_cannot_decode():
    model = model_of(
        """g (int64[N, S] input_ids) => (float[N, S, 1] logits) {
            axis = Constant <value_ints = [2]> ()
            wide = Unsqueeze (input_ids, axis)
            logits = Cast <to = 1> (wide)
        }""",
        opset=18,
    )
    with pytest.raises(DataError, match="has no cache"):
        open_decoder(model)


@pytest.mark.slow
def test_stories_keep_their_perplexity(tmp_path: Path):
    """INT8 changes nothing to speak of; INT4 with rotated keys and a float prefix little."""
    from onnxq import models
    from onnxq.evaluation import evaluate
    from onnxq.graph import io

    folder = shared("data", "stories260k")
    path = tmp_path / "m.onnx"
    models.build("stories260k", path, checkpoint=folder, kv_cache=True)
    text = next(folder.glob("*.txt"))

    def perplexity(spec: str) -> float:
        from onnxq.pipeline.runner import Pipeline

        out = path
        if spec:
            out = tmp_path / "q.onnx"
            io.save(Pipeline(spec).run(path, verify=False).model, out)
        tokenizer = tmp_path / "m.tokenizer.json"
        found = evaluate(
            out, "perplexity", text, tokenizer=tokenizer, limit=4, window=128, decode=1
        )
        return found.value

    exact = perplexity("")
    assert perplexity("quantize-kv") < 1.005 * exact
    assert perplexity("quantize-kv{bits=4 keys=channel}") < 1.05 * exact
