"""prefix-tokens: the model behind the prefix is the model on prefix and text, caches included."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxq.errors import DataError, PipelineError, SpecError
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.prefix_tokens import PrefixTokens
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from tests.passes.helpers import apply, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, llama, outputs

Array = npt.NDArray[Any]
PREFIX = (7, 3)
TEXT = np.array([[11, 4, 42, 8, 19], [1, 2, 3, 4, 5]])


def feeds_of(model: ir.Model, ids: Array, past: dict[str, Array] | None = None) -> dict[str, Array]:
    """What a decoder is fed for ``ids`` behind ``past``."""
    batch, length = ids.shape
    feeds: dict[str, Array] = {"input_ids": ids}
    before = 0
    for value in model.graph.inputs:
        name, shape = str(value.name), value.shape
        assert shape is not None
        if len(shape) != 4:
            continue
        empty = np.zeros((batch, int(shape[1]), 0, int(shape[3])))  # type: ignore[arg-type]
        feeds[name] = empty if past is None else past[name]
        before = feeds[name].shape[2]
    feeds["attention_mask"] = np.ones((batch, before + length), np.int64)
    feeds["position_ids"] = np.tile(np.arange(before, before + length), (batch, 1))
    return feeds


def named(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, outputs(model, feeds), strict=True))


def prefixed(model: ir.Model, **options: object) -> tuple[ir.Model, PassReport]:
    samples = [feeds_of(model, TEXT[:1])]
    result = apply(model, PrefixTokens(**options), samples=samples)  # type: ignore[arg-type]
    return result.model, report_of(result, "prefix-tokens")


def test_text_is_read_as_behind_the_prefix() -> None:
    model = llama(kv_cache=True)
    done, report = prefixed(model, tokens=PREFIX)
    assert len(report.changed) == 4
    behind = np.concatenate([np.tile(PREFIX, (2, 1)), TEXT], axis=1)
    want = named(model, feeds_of(model, behind))
    got = named(done, feeds_of(done, TEXT))
    assert got.keys() == want.keys()
    assert relative_error(want["logits"][:, 2:], got["logits"]) <= EXACT
    for name in want.keys() - {"logits"}:
        assert relative_error(want[name][:, :, 2:], got[name]) <= EXACT


def test_decoding_goes_on_from_the_caches_that_came_out() -> None:
    model = llama(kv_cache=True)
    done, _ = prefixed(model, tokens=PREFIX)
    whole = named(done, feeds_of(done, TEXT))["logits"]
    first = named(done, feeds_of(done, TEXT[:, :3]))
    past = {
        name.replace("present", "past_key_values"): array
        for name, array in first.items()
        if name != "logits"
    }
    rest = named(done, feeds_of(done, TEXT[:, 3:], past))["logits"]
    assert relative_error(whole[:, 3:], rest) <= EXACT


def test_padding_on_the_left_stays_unseen() -> None:
    model = llama(kv_cache=True)
    done, _ = prefixed(model, tokens=PREFIX)
    padded = np.concatenate([np.full((2, 2), 9), TEXT], axis=1)
    feeds = feeds_of(done, padded)
    feeds["attention_mask"][:, :2] = 0
    feeds["position_ids"] = np.tile([0, 0, 0, 1, 2, 3, 4], (2, 1))
    want = named(done, feeds_of(done, TEXT))["logits"]
    assert relative_error(want, named(done, feeds)["logits"][:, 2:]) <= EXACT


def test_outliers_are_found_on_data() -> None:
    """Token 5 has an embedding that drives one MLP channel to hundreds of times the rest."""
    model = llama(kv_cache=True)
    table = next(v for v in model.graph.initializers.values() if "embed_tokens" in str(v.name))
    assert table.const_value is not None
    array = table.const_value.numpy().copy()
    up = next(v for v in model.graph.initializers.values() if "layers.0.mlp.up" in str(v.name))
    gate = next(v for v in model.graph.initializers.values() if "layers.0.mlp.gate" in str(v.name))
    assert up.const_value is not None
    assert gate.const_value is not None
    weights = [v.const_value.numpy().copy() for v in (up, gate)]  # type: ignore[union-attr]
    array[5] = 0
    array[5, 3] = 50.0
    array[:5, 3] = array[6:, 3] = 0
    for weight in weights:
        weight[3, 7] = 40.0
    for value, new in zip((table, up, gate), (array, *weights), strict=True):
        value.const_value = ir.tensor(new, name=value.name)
    samples = [feeds_of(model, np.array([[1, 2, 5, 9, 11, 12, 14]])) for _ in range(3)]
    result = apply(model, PrefixTokens(ratio=10.0), samples=samples)
    report = report_of(result, "prefix-tokens")
    assert "tokens 5" in report.notes
    calm = [feeds_of(model, np.array([[1, 2, 6, 9, 11, 12, 14]])) for _ in range(3)]
    result = apply(model, PrefixTokens(), samples=calm)
    assert "nothing to gain" in reasons(report_of(result, "prefix-tokens"))


def test_a_graph_without_a_cache_is_said() -> None:
    model = llama()
    result = apply(model, PrefixTokens(tokens=PREFIX), samples=[{"input_ids": TEXT}])
    report = report_of(result, "prefix-tokens")
    assert ops(result.model) == ops(model)
    assert "no key/value cache" in reasons(report)


def test_searching_needs_data() -> None:
    with pytest.raises(DataError, match="`prefix-tokens`"):
        apply(llama(kv_cache=True), PrefixTokens())


@pytest.mark.parametrize("options", [{"tokens": (-1,)}, {"ratio": 1.0}, {"most": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        PrefixTokens(**options)


def test_it_stands_before_the_plan() -> None:
    with pytest.raises(PipelineError):
        validate(parse("calibrate, assign, prefix-tokens"))
