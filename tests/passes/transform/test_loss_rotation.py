"""Rotations learned by the loss: torch against onnxruntime, the function kept, the loss falling."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer

from onnxq import models
from onnxq.errors import DataError, SpecError, UnsupportedError
from onnxq.graph import io
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.passes.transform.fold_norm import FoldNorm
from onnxq.passes.transform.learn_rotation import LearnRotation
from onnxq.passes.transform.online_hadamard import OnlineHadamard
from onnxq.passes.transform.rotate import Rotate
from onnxq.passes.transform.torch_graph import TorchGraph
from tests.passes.helpers import (
    apply,
    model_of,
    normal,
    ops,
    reasons,
    relative_error,
    report_of,
    run,
)
from tests.passes.transform.wide import llama, pre_layernorm

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
RNG = np.random.default_rng(4)
SAMPLES = [{"input_ids": RNG.integers(0, 50, (2, 12))} for _ in range(3)]
decoder = functools.partial(llama, hidden=32, heads=4, kv_heads=2, double=False)


def learn(
    model: ir.Model, samples: list[dict[str, Any]] = SAMPLES, **options: Any
) -> tuple[ir.Model, PassReport]:
    passes = (FoldNorm(), Calibrate(), LearnRotation(objective="loss", **options))
    result = apply(model, *passes, samples=samples)
    return result.model, report_of(result, "learn-rotation")


@needs_torch
@pytest.mark.parametrize("make", [decoder, functools.partial(decoder, tied=False)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_graph_in_torch_computes_what_onnxruntime_does(make: Any, turned: bool) -> None:
    passes = (
        [FoldNorm(), Rotate(), OnlineHadamard(sites=("down", "qk"))] if turned else [FoldNorm()]
    )
    model = apply(make(), *passes).model
    wanted = run(model, SAMPLES[0])["logits"]
    got = TorchGraph(model).run(SAMPLES[0], {})["logits"].numpy()
    assert relative_error(wanted, got) < 1e-5


@needs_torch
@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("spelling", ["operator", "decomposed"])
def test_layernorms_in_torch(spelling: str, opset: int) -> None:
    model = pre_layernorm(spelling=spelling, opset=opset)
    feeds = {"input_ids": RNG.integers(0, 50, (2, 9))}
    got = TorchGraph(model).run(feeds, {})["logits"].numpy()
    assert relative_error(run(model, feeds)["logits"], got) < 1e-5


@needs_torch
@pytest.mark.parametrize("block", [0, 8])
def test_the_function_stays_and_the_loss_falls(block: int) -> None:
    model = decoder(outlier=20.0)
    ids = RNG.integers(0, 50, (8, 12))
    for place in range(1, 12):  # what the model says itself: rounding can only take away from it
        ids[:, place] = run(model, {"input_ids": ids})["logits"][:, place - 1].argmax(-1)
    learned, report = learn(model, samples=[{"input_ids": ids}], steps=60, bits=3, block=block)
    assert (
        relative_error(run(model, SAMPLES[0])["logits"], run(learned, SAMPLES[0])["logits"]) < 1e-4
    )
    assert ops(learned) == ops(model)
    assert [c.what[:2] for c in report.changed] == ["R1", "R2", "R2"]
    before, after = (float(w.split()[0]) for w in report.notes[0].split(": ")[1].split(", then "))
    assert after < before


@needs_torch
def test_the_gradient_is_that_of_the_loss() -> None:
    """Of a loss without rounding steps: 16 bits leave straight-through as good as exact."""
    import torch

    from onnxq.passes.transform.loss_rotation import Grid, rounded

    x = torch.from_numpy(normal(5, 16)).requires_grad_()
    rounded(torch, x, Grid(16, 8)).pow(3).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 3 * x.detach().numpy() ** 2, rtol=2e-3, atol=2e-3)
    coarse = rounded(torch, x, Grid(4, 8)).detach().numpy().reshape(-1, 8)
    assert all(len(np.unique(row)) <= 16 for row in coarse)


@needs_torch
@pytest.mark.slow
def test_a_real_decoder_gets_better_on_text_that_it_did_not_learn_from(tmp_path: Path) -> None:
    shared = Path(os.environ.get("ONNXQ_SHARED", Path(__file__).parents[4] / "shared"))
    folder = shared / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    path = tmp_path / "stories.onnx"
    models.build("stories260k", path, checkpoint=folder)
    tokenizer = Tokenizer.from_file(str(tmp_path / "stories.tokenizer.json"))
    text = next(folder.glob("*.txt")).read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    batches = [{"input_ids": windows[at : at + 16]} for at in range(0, 96, 16)]
    fresh = windows[96:]
    tail = (Assign(mode="per-token", weights="int8", activations="int4-asym"), Qdq())

    def loss(turn: Any) -> float:
        before = (Canonicalize(opset=21), FoldNorm(), OnlineHadamard(), Calibrate())
        done = apply(io.load(path), *before, turn, *tail, samples=batches).model
        logits = run(done, {"input_ids": fresh})["logits"][:, :-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(-np.take_along_axis(logits, fresh[:, 1:, None], -1).mean())

    learned = loss(LearnRotation(objective="loss", steps=60, seed=0))
    assert learned < loss(Rotate(seed=0)) - 0.01


@needs_torch
def test_what_cannot_be_learned_is_said() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(4, 4)})
    passes = (FoldNorm(), Calibrate(), LearnRotation(objective="loss"))
    text = reasons(
        report_of(apply(model, *passes, samples=[{"x": normal(2, 4)}]), "learn-rotation")
    )
    assert "no norms" in text
    assert "no attention" in text
    blind = decoder()
    blind.graph.inputs[0].name = "tokens"
    with pytest.raises(DataError, match="input_ids"):
        apply(blind, *passes, samples=[{"tokens": SAMPLES[0]["input_ids"]}])


@needs_torch
def test_operators_that_torch_has_no_form_for_are_named() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = Softplus (x) }"
    with pytest.raises(UnsupportedError, match="Softplus") as caught:
        TorchGraph(model_of(body))
    assert caught.value.code == "UNSUPPORTED-TORCH-OP"


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *args: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UnsupportedError) as caught:
        learn(decoder(), steps=1)
    assert caught.value.code == "UNSUPPORTED-TORCH"
    assert "onnxq[torch]" in caught.value.hint


def test_bits_out_of_range() -> None:
    with pytest.raises(SpecError, match="bits=1"):
        LearnRotation(bits=1)
