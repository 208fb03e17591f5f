"""Second moments, summed from files sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.passes.weights.stream import MomentTask, Stream, sum_moments, token_weights

K = 12


def streams(tmp_path: Path) -> tuple[np.ndarray, np.ndarray, MomentTask]:
    rng = np.random.default_rng(0)
    rounded, exact = rng.standard_normal((2, 3, 2, 5, K)).astype(np.float32)
    for name, samples in (("rounded", rounded), ("exact", exact)):
        stream = Stream(tmp_path / name)
        for number, array in enumerate(samples):
            stream.put(number, {"x": array})
    task = MomentTask(str(tmp_path / "rounded"), str(tmp_path / "exact"), "x", "x", range(3), 0.0)
    return rounded.reshape(-1, K), exact.reshape(-1, K), task


def test_moments_are_those_of_all_samples_at_once(tmp_path: Path) -> None:
    rounded, exact, task = streams(tmp_path)
    found = sum_moments(task)
    assert found.cross is not None
    np.testing.assert_allclose(found.gram, rounded.T.astype(float) @ rounded, atol=1e-4)
    np.testing.assert_allclose(found.cross, exact.T.astype(float) @ rounded, atol=1e-4)
    assert found.gram.dtype == found.cross.dtype == np.float64


def test_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    *_, task = streams(tmp_path)
    parts = [
        sum_moments(MomentTask(task.rounded, "", "x", "x", range(i, i + 1), 0.0)) for i in range(3)
    ]
    total = parts[0].plus(parts[1]).plus(parts[2])
    assert total.cross is None
    np.testing.assert_array_equal(total.gram, sum_moments(task).gram)


def test_a_cap_scales_loud_tokens_down_to_it() -> None:
    rows = np.ones((5, K), np.float32)
    rows[2] *= 10
    np.testing.assert_allclose(token_weights(rows, 4.0), [1, 1, 4 / 100, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(token_weights(np.zeros((3, K), np.float32), 4.0), 1)


def test_the_cap_reaches_the_moments(tmp_path: Path) -> None:
    rows = np.ones((4, K), np.float32)
    rows[0] *= 10
    Stream(tmp_path / "s").put(0, {"x": rows})
    found = sum_moments(MomentTask(str(tmp_path / "s"), "", "x", "x", range(1), 2.0))
    assert found.gram[0, 0] == pytest.approx(3 + 2, rel=1e-6)
