"""The benchmarks of the deciding passes run, and what they claim holds on little data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import figure, rows_of, shared  # noqa: F401


@pytest.mark.slow
def test_a_cache_in_eight_bits_costs_little(shared: Path) -> None:  # noqa: F811
    rows = rows_of("kv_cache.py")
    assert figure(rows, "int8 perplexity", "fp32")["ratio"] > 0.98
    assert figure(rows, "int4-rotated shrink", "fp32")["ours"] > 2.5


@pytest.mark.slow
def test_equalization_and_bias_correction_help(shared: Path) -> None:  # noqa: F811
    rows = rows_of("cnn_per_tensor.py")
    assert figure(rows, "both sqnr", "per-tensor")["ratio"] > 1.3


@pytest.mark.slow
def test_groups_and_splits_beat_one_range_a_tensor(shared: Path) -> None:  # noqa: F811
    rows = rows_of("minilm_mixed.py", "--cases", "w8a8,outlier-split,mixed-1.3")
    assert figure(rows, "outlier-split noise", "w8a8")["ratio"] > 1.3
    assert 0.98 < figure(rows, "mixed-1.3 size", "w8a8")["ratio"] < 1.02
