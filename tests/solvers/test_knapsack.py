"""choose against all combinations, and scipy's integer programming."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from onnxq.solvers.knapsack import choose


def total(options, picks, which):
    return sum(each[i][which] for each, i in zip(options, picks, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_combinations(seed):
    rng = np.random.default_rng(seed)
    options = [
        [(float(c), float(d)) for c, d in rng.integers(0, 20, (rng.integers(1, 4), 2))]
        for _ in range(5)
    ]
    least = sum(min(c for c, _ in each) for each in options)
    budget = least + 15.0
    picks = choose(options, budget, steps=1500)
    assert picks is not None
    assert total(options, picks, 0) <= budget
    everything = itertools.product(*(range(len(each)) for each in options))
    best = min(total(options, p, 1) for p in everything if total(options, p, 0) <= budget)
    assert total(options, picks, 1) == best


def test_a_large_one_against_integer_programming():
    rng = np.random.default_rng(0)
    options = [[(float(c), float(d)) for c, d in rng.uniform(0.1, 1, (3, 2))] for _ in range(40)]
    budget = 1.3 * sum(min(c for c, _ in each) for each in options)
    picks = choose(options, budget)
    assert picks is not None
    assert total(options, picks, 0) <= budget
    cost = np.array([c for each in options for c, _ in each])
    damage = np.array([d for each in options for _, d in each])
    one = np.kron(np.eye(40), np.ones(3))
    exact = milp(
        damage,
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(cost[None], 0, budget)],
        bounds=Bounds(0, 1),
        integrality=np.ones(120),
    )
    assert total(options, picks, 1) <= 1.01 * exact.fun


def test_no_budget_left_and_none_at_all():
    options = [[(2.0, 5.0), (1.0, 9.0)], [(1.0, 3.0), (4.0, 0.0)]]
    assert choose(options, 2.0) == [1, 0]
    assert choose(options, 1.9) is None
