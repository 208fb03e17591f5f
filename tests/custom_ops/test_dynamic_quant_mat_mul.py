"""DynamicQuantMatMul: the rule of LLM.int8(), what outliers cost without it, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxq.custom_ops.packed_weight import PackedWeight, pack_weight
from onnxq.formats import Granularity, parse_format
from onnxq.runtime import Library, session
from tests.custom_ops.cases import Array, Case, model_of, same_bits

OP = "DynamicQuantMatMul"
K, N = 256, 96


def weight(seed: int = 3) -> tuple[Array, PackedWeight]:
    """INT8 by column: the numbers ``[N, K]`` and the same packed."""
    w = np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32)
    fmt = parse_format("int8")
    params = fmt.params(w, Granularity.per_channel(0))
    codes = fmt.encode(w, params)
    packed = pack_weight(fmt, codes, params, int8_activations=True, scale_type="float32")
    return fmt.decode(codes, params), packed


def activations(m: int = 7) -> Array:
    """Normal numbers, with three columns of outliers as transformers have them."""
    x = np.random.default_rng(4).normal(size=(m, K)).astype(np.float32)
    x[:, [5, 77, 200]] *= 60
    return x


def case_of(x: Array, outliers: list[int], threshold: float) -> Case:
    packed = weight()[1]
    constants = {**packed.inputs, "outliers": np.array(outliers, np.int64)}
    return Case("", {"x": x}, constants, {**packed.attributes, "threshold": threshold})


def product(case: Case, op: str = OP) -> Array:
    result: Array = session(model_of(op, case), threads=1, library=True).run(None, case.inputs)[0]
    return result


@pytest.mark.parametrize(("named", "threshold"), [([5, 77, 200], 0.0), ([], 6.0), ([77, 77], 6.0)])
def test_is_the_rule_of_the_paper(named: list[int], threshold: float, library: Library) -> None:
    """Rows quantized by the largest magnitude outside of the outlier columns; those in float64."""
    x, (w, _) = activations(), weight()
    outlier = (np.abs(x) >= threshold).any(axis=0) if threshold else np.zeros(K, bool)
    outlier[named] = True
    inner = np.where(outlier, 0, x).astype(np.float64)
    scale = np.abs(inner).max(axis=1, keepdims=True) / 127
    expected = (np.rint(inner / scale) * scale) @ w.T.astype(np.float64)
    expected += np.where(outlier, x, 0).astype(np.float64) @ w.T
    got = product(case_of(x, named, threshold))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_without_outliers_it_is_quant_mat_mul(library: Library) -> None:
    x, packed = activations(), weight()[1]
    plain = product(Case("", {"x": x}, packed.inputs, packed.attributes), "QuantMatMul")
    assert same_bits(product(case_of(x, [], 0.0)), plain)
    assert same_bits(product(case_of(x, [], 1e6)), plain)


def test_outliers_in_float_are_worth_it(library: Library) -> None:
    """One scale a token loses the small columns; with the large ones apart they are kept."""
    x, (w, packed) = activations(64), weight()
    exact = x.astype(np.float64) @ w.T
    plain = product(Case("", {"x": x}, packed.inputs, packed.attributes), "QuantMatMul")
    apart = product(case_of(x, [], 6.0))
    errors = [float(np.linalg.norm(y - exact)) for y in (plain, apart)]
    assert errors[1] < errors[0] / 20


def test_a_nan_stays_in_its_row(library: Library) -> None:
    x = activations()
    clean = product(case_of(x, [], 6.0))
    x[2, 9] = np.nan
    got = product(case_of(x, [], 6.0))
    assert np.isnan(got[2]).all()
    others = [0, 1, 3, 4, 5, 6]
    assert np.isfinite(got[others]).all()
    # Column 9 is now float in all rows: nearer to the truth, not equal.
    assert np.abs(got[others] - clean[others]).max() < 0.05 * np.abs(clean).max()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("int8_activations", 0, "int8_activations must be 1"),
        ("threshold", -1.0, "threshold is negative"),
        ("threshold", float("nan"), "threshold is negative or not finite"),
        ("layout", 2, "layout 2"),
        ("K", K - 4, "codes has shape"),
    ],
)
def test_wrong_attributes_are_refused(
    attribute: str, value: Any, message: str, library: Library
) -> None:
    model = onnx.load_from_string(model_of(OP, case_of(activations(), [1], 0.0)))
    for found in model.graph.node[0].attribute:
        if found.name == attribute:
            found.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(Exception, match=rf"com\.onnxq:{OP}: .*{message}"):
        session(model.SerializeToString(), threads=1, library=library.path)


@pytest.mark.parametrize("column", [-1, K])
def test_columns_out_of_range_are_refused(column: int, library: Library) -> None:
    case = case_of(activations(), [column], 0.0)
    model = onnx.load_from_string(model_of(OP, case_of(activations(), [1], 0.0)))
    for tensor in model.graph.initializer:
        if tensor.name == "outliers":
            array = np.array([column], np.int64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "outliers"))
    made = session(model.SerializeToString(), threads=1, library=library.path)
    with pytest.raises(Exception, match=rf"{OP}: outlier column {column} is not in 0 to 255"):
        made.run(None, case.inputs)
