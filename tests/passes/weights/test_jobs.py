"""Rounding in other processes: the same bytes, errors with names, and runs that were cut off."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import DataError, SpecError, UnsupportedError
from onnxq.graph import io
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.keys import ROUNDED
from onnxq.passes.weights.gptq import Gptq
from onnxq.passes.weights.hqq import Hqq
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.passes.weights.sequential import Sequential
from onnxq.passes.work import run_tasks
from onnxq.pipeline.executors import open_executor
from onnxq.pipeline.runner import Pipeline

from .. import helpers as h

K = 64
W4 = Assign(mode="weight-only", weights="uint4", block=32, symmetric_weights=False)
BODY = f"""g (float[R,{K}] x) => (float[R,{K}] y) {{
    a = MatMul(x, wa)  b = MatMul(x, wb)  s = Sigmoid(a)  p = Mul(s, b)
    c = MatMul(p, wc)  r = Add(x, c)  t = Tanh(r)  y = MatMul(t, wd) }}"""
WEIGHTS = {f"w{name}": h.normal(K, K, seed=i, scale=0.2) for i, name in enumerate("abcd")}
SAMPLES = [{"x": h.normal(24, K, seed=50 + i)} for i in range(10)]
SOLVERS: list[tuple[Pass, ...]] = [
    (Calibrate(), W4, Gptq()),
    (W4, Hqq()),
    (W4, Sequential()),
    (W4, Sequential(solver="gptaq")),
]


def run(*passes: Pass, executor: Any = None, weights: Any = None) -> RoundedWeights:
    model = h.model_of(BODY, weights or WEIGHTS, opset=21)
    data = open_data(SAMPLES, model)
    pipeline = Pipeline(list(passes))
    result = pipeline.run(model, data=data, verify=False, executor=executor)
    return result.artifacts.get(ROUNDED)


def assert_equal(one: RoundedWeights, other: RoundedWeights) -> None:
    assert list(one) == list(other)
    for site in one:
        for field in ("codes", "scale", "zero_point"):
            left, right = getattr(one.get(site), field), getattr(other.get(site), field)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes(), (site, field)


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    with open_executor(jobs=2) as executor:
        yield executor


@pytest.mark.parametrize("passes", SOLVERS, ids=lambda p: "+".join(map(str, p)))
def test_other_processes_give_the_same_bytes(pool: Any, passes: tuple[Pass, ...]) -> None:
    assert_equal(run(*passes), run(*passes, executor=pool))


class Spy:
    """Runs tasks at once, and keeps what would have been sent."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def submit(self, function: Any, /, *arguments: Any) -> Future[Any]:
        packed = pickle.dumps((function, arguments))
        self.sent.append(len(packed))
        loaded, given = pickle.loads(packed)
        future: Future[Any] = Future()
        future.set_result(loaded(*given))
        return future


def test_tasks_carry_paths_and_no_weights(tmp_path: Path) -> None:
    saved = io.save(h.model_of(BODY, WEIGHTS, opset=21), tmp_path / "m.onnx", external=True)
    model = io.load(saved.path)
    spy = Spy()
    pipeline = Pipeline([W4, Sequential()])
    result = pipeline.run(model, data=open_data(SAMPLES, model), verify=False, executor=spy)
    assert len(spy.sent) > 8
    assert max(spy.sent) < 2000 < WEIGHTS["wa"].nbytes
    assert_equal(result.artifacts.get(ROUNDED), run(W4, Sequential()))


def test_an_error_in_a_worker_is_the_users_error(pool: Any) -> None:
    broken = {**WEIGHTS, "wc": np.full((K, K), np.nan, np.float32)}
    with pytest.raises(DataError, match="c: NaN or Inf in the weights") as caught:
        run(W4, Hqq(), executor=pool, weights=broken)
    assert caught.value.code == "DATA-NOT-FINITE"
    assert caught.value.hint == "repair the checkpoint"


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_worker_that_dies_is_reported() -> None:
    with (
        open_executor(jobs=2) as executor,
        pytest.raises(DataError, match="a worker process died") as caught,
    ):
        list(run_tasks(executor, die, [1, 2, 3]))
    assert caught.value.code == "WORK-LOST"


def test_finished_layers_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq.passes.weights import gptq as module

    whole = run(Calibrate(), W4, Gptq())
    calls = []
    real = module.gptq

    def counts(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    monkeypatch.setattr(module, "gptq", counts)
    kept = Gptq(cache=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(Calibrate(), W4, kept)
    again = run(Calibrate(), W4, kept)
    assert len(calls) == 5  # two before, one cut off, and the two that were left
    assert_equal(whole, again)
    changed = {**WEIGHTS, "wd": WEIGHTS["wd"] * np.float32(2)}
    run(Calibrate(), W4, kept, weights=changed)
    assert len(calls) == 6  # the last layer alone is another
    run(Calibrate(), W4, Gptq(damping=0.1, cache=str(tmp_path)))
    assert len(calls) == 10


SCRIPT = """
import sys, time
import numpy as np
from onnxq.passes.weights import sequential
from tests.passes.weights import test_jobs as t

pause, cache, out = sys.argv[1:]
finish = sequential._Walk._finish

def slow(self, *arguments):
    finish(self, *arguments)
    print("stage", flush=True)
    time.sleep(float(pause))

sequential._Walk._finish = slow
_, arrays = t.run(t.W4, t.Sequential(cache=cache)).to_storage()
np.savez(out, **arrays)
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    root, out = str(Path(__file__).parents[3]), tmp_path / "o.npz"

    def start(pause: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(pause), str(tmp_path / "cache"), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )

    first = start(30.0)
    assert first.stdout is not None
    assert first.stdout.readline() == "stage\n"
    first.kill()
    first.communicate()
    assert not out.exists()
    second = start(0.0)
    told, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    stages = 3  # wa and wb, wc, wd
    assert told.count("stage") == stages - 1
    with np.load(out) as stored:
        _, wanted = run(W4, Sequential()).to_storage()
        assert set(stored.files) == set(wanted)
        for name, array in wanted.items():
            assert stored[name].tobytes() == array.tobytes()


def test_numbers_and_addresses_that_cannot_work() -> None:
    with pytest.raises(SpecError, match="jobs=0"), open_executor(jobs=0):
        pass
    with pytest.raises(SpecError, match="beside the cluster"), open_executor(2, "tcp://h:1"):
        pass


def test_without_the_package_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UnsupportedError, match="distributed") as caught,
        open_executor(cluster="tcp://localhost:8786"),
    ):
        pass
    assert "onnxq[dask]" in caught.value.hint


@pytest.mark.slow
def test_an_address_without_a_scheduler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("onnxq.pipeline.executors.CONNECT_SECONDS", 1)
    with (
        pytest.raises(DataError, match="no dask scheduler") as caught,
        open_executor(cluster="tcp://127.0.0.1:1"),
    ):
        pass
    assert caught.value.code == "WORK-NO-CLUSTER"


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gptq", "gptaq"])
def test_a_cluster_that_loses_a_worker_gives_the_same_bytes(solver: Any) -> None:
    distributed = pytest.importorskip("distributed")
    passes = (W4, Sequential(solver=solver))
    wanted = run(*passes)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    killed = []
    with cluster, open_executor(cluster=cluster.scheduler_address) as executor:

        class Murderer:
            """Kills one worker while it has tasks."""

            count = 0

            def submit(self, function: Any, /, *arguments: Any) -> Future[Any]:
                self.count += 1
                future: Future[Any] = executor.submit(function, *arguments)
                if self.count == 8:
                    pids = distributed.Client(cluster).run(os.getpid)
                    victim = sorted(pids.values())[0]
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)
                return future

        assert_equal(wanted, run(*passes, executor=Murderer()))
    assert killed
