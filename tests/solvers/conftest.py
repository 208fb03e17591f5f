"""The layer that the solver tests share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

N, K, T = 64, 256, 2048


@dataclass(frozen=True)
class Problem:
    """Weights W [N, K], float inputs X [K, T], inputs Y of a rounded prefix, and their moments."""

    W: np.ndarray
    X: np.ndarray
    Y: np.ndarray

    @property
    def H(self) -> np.ndarray:
        return 2 / T * self.Y @ self.Y.T

    @property
    def G(self) -> np.ndarray:
        return 2 / T * self.X @ self.Y.T

    @property
    def D(self) -> np.ndarray:
        return 2 / T * (self.X - self.Y) @ self.Y.T

    @property
    def H_float(self) -> np.ndarray:
        return 2 / T * self.X @ self.X.T

    def loss(self, W_hat: np.ndarray) -> float:
        """|W X - W_hat Y|^2 / |W X|^2: what the layer behind a rounded prefix loses."""
        exact = self.W.astype(np.float64) @ self.X
        return float(np.sum((exact - W_hat.astype(np.float64) @ self.Y) ** 2) / np.sum(exact**2))


@pytest.fixture(scope="session")
def layer() -> Problem:
    """Correlated inputs whose channels differ in size, as in a transformer."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((N, K)).astype(np.float32)
    X = rng.standard_normal((K, K)) / np.sqrt(K) @ rng.standard_normal((K, T))
    X *= np.exp(rng.standard_normal((K, 1)))
    Y = X + 0.1 * np.std(X, axis=1, keepdims=True) * rng.standard_normal((K, T))
    return Problem(W, X, Y * (1 + 0.1 * rng.standard_normal((K, 1))))
