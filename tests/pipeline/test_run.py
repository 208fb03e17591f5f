"""From file to checked file: what is written, what is refused, and that refusals write nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxq
from onnxq.errors import DataError, NoopError, OnnxqError, PipelineError, QualityError, SpecError
from onnxq.graph import io
from onnxq.pipeline.run import dry_run, run
from onnxq.pipeline.stage import staging
from onnxq.pipeline.verdict import POOR_COSINE
from tests.pipeline.tiny import REGISTRY, samples, tiny_model

FULL = "observe,rescale,observe,round"
OLD = b"the old output"


@pytest.fixture
def source(tmp_path):
    return io.save(tiny_model(), tmp_path / "m.onnx").path


@pytest.fixture(autouse=True)
def _load_here(monkeypatch):
    """Half a second a run: the child process of the load check has tests of its own."""
    here = functools.partial(io.check_loads, isolated=False)
    monkeypatch.setattr("onnxq.pipeline.run.io.check_loads", here)


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "q.onnx"
    path.write_bytes(OLD)
    return path


def go(source, out, passes=FULL, **options):
    given = {"calib": samples(), "registry": REGISTRY, "speed_seconds": 0, "threads": 1}
    return run(source, passes, out=out, **{**given, **options})


def untouched(out: Path) -> bool:
    """The old output is there, and nothing else was left beside it."""
    names = {p.name for p in out.parent.iterdir()}
    return out.read_bytes() == OLD and names == {"m.onnx", "q.onnx"}


def test_a_run_writes_a_checked_model_and_its_recipe(source, out):
    summary = go(source, out, speed_seconds=0.01)
    assert {p.name for p in out.parent.iterdir()} == {"m.onnx", "q.onnx", "q.onnx.recipe.toml"}
    assert summary.samples == "6 samples from 12 samples in memory, 6 more held back"
    assert summary.warnings == ["only 6 of 12 samples are held back for the comparison"]
    assert summary.bytes_after == out.stat().st_size
    assert 0.999 < summary.cosine < 1.0
    assert summary.comparison.speedup > 0
    assert summary.comparison.outputs[0].samples == 6
    assert io.get_provenance(io.load(out)) == summary.result.provenance
    assert [(r["pass"], r["changed"], r["skipped"]) for r in summary.table()] == [
        ("observe", 1, 0),
        ("rescale", 3, 0),
        ("observe", 1, 0),
        ("round", 3, 0),
    ]
    found = json.loads(json.dumps(summary.to_json()))
    assert found["comparison"]["outputs"][0]["name"] == "y"
    assert found["passes"][3]["changed"][0]["site"] == "w1"


def test_the_recipe_beside_the_output_repeats_the_run(source, out, tmp_path):
    go(source, out, seed=3, target="openvino")
    recipe = out.with_name("q.onnx.recipe.toml")
    table = tomllib.loads(recipe.read_text())
    assert (table["passes"], table["target"], table["seed"]) == (FULL, "openvino", 3)
    assert table["result"]["cosine"] > 0.999
    again = tmp_path / "again.onnx"
    summary = go(source, again, f"@{recipe}")
    assert (summary.target, summary.seed) == ("openvino", 3)
    assert again.read_bytes() == out.read_bytes()


def test_equal_runs_write_equal_bytes_in_any_process(source, tmp_path):
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.pipeline.test_run import go\n"
        "go(sys.argv[1], sys.argv[2], threads=int(sys.argv[3]))"
    )
    written = set()
    for number, (hash_seed, threads) in enumerate([("0", "1"), ("1", "2")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", script, str(source), str(folder / "q.onnx"), threads],
            check=True,
            cwd=Path(onnxq.__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        written.add(tuple(p.read_bytes() for p in sorted(folder.iterdir())))
    assert len(written) == 1


def test_a_model_with_external_data_keeps_it(tmp_path, out):
    model = tiny_model()
    for name, shape in (("w1", (4, 512)), ("b1", (512,)), ("w2", (512, 3))):
        array = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(shape)
    folder = tmp_path / "in"
    folder.mkdir()
    saved = io.save(model, folder / "m.onnx", external=True)
    summary = go(saved.path, out)
    (data,) = list(out.parent.glob("q.*.data"))
    assert summary.bytes_after == out.stat().st_size + data.stat().st_size
    assert not list(out.parent.glob(".*"))


def test_without_data_the_comparison_is_on_random_numbers_and_says_so(source, out):
    summary = go(source, out, "rescale", calib=None)
    assert summary.samples == "4 random samples"
    assert "random numbers" in summary.warnings[0]
    assert summary.comparison.outputs[0].cosine_min > 0.999999
    assert summary.steps[0].max_error < 1e-5  # verified on them, too


def test_a_single_sample_is_not_held_back_and_that_is_said(source, out):
    summary = go(source, out, calib=samples(1))
    assert summary.warnings == ["compared on samples that were calibrated on: none are held back"]


def test_random_data_is_loud(source, out):
    summary = go(source, out, calib="random")
    assert any("random numbers" in w for w in summary.warnings)


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"passes": "observe,rond"}, SpecError, "SPEC-PASS-UNKNOWN"),
        ({"passes": "round"}, PipelineError, "PIPELINE-MISSING"),
        ({"calib": None}, DataError, "DATA-NEEDED"),
        ({"calib": []}, DataError, "CALIB-EMPTY"),
        ({"calib": [{"z": np.ones(3)}]}, DataError, "CALIB-INPUT-UNKNOWN"),
        ({"calib": "nowhere.npz"}, DataError, "CALIB-NOT-FOUND"),
        ({"target": "toaster"}, SpecError, "SPEC-TARGET"),
        ({"holdout": -1}, SpecError, "SPEC-HOLDOUT"),
        ({"passes": "observe,round{sites=[nothing]}"}, NoopError, "NOOP"),
        ({"min_cosine": 0.9999999}, QualityError, "QUALITY-COSINE"),
        ({"passes": "observe,round{ruin=w2}"}, QualityError, "QUALITY-ALL-ZERO"),
        ({"resume": True}, SpecError, "SPEC-RESUME"),
    ],
)
def test_a_refusal_writes_nothing(source, out, options, error, code):
    with pytest.raises(error) as caught:
        go(source, out, **options)
    assert caught.value.code == code
    assert caught.value.hint
    assert untouched(out)


def test_files_that_cannot_be_used_are_refused(source, out, tmp_path):
    cases = {
        "DATA-OUTPUT-IS-INPUT": (source, source),
        "DATA-FILE-MISSING": (tmp_path / "none.onnx", out),
        "DATA-OUTPUT-FOLDER-MISSING": (source, tmp_path / "none" / "q.onnx"),
        "DATA-OUTPUT-NOT-A-FILE": (source, tmp_path),
    }
    for code, (model, output) in cases.items():
        with pytest.raises(OnnxqError) as caught:
            go(model, output)
        assert caught.value.code == code
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    with pytest.raises(DataError):
        go(text, out)
    text.unlink()
    assert untouched(out)


def test_files_that_a_run_reads_are_never_written(out, tmp_path):
    folder = tmp_path / "external"
    folder.mkdir()
    model = tiny_model()
    onnx.save(
        ir.to_proto(model),
        folder / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    np.savez(folder / "c.npz", **{k: np.stack([s[k] for s in samples()]) for k in samples()[0]})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "link.onnx").symlink_to("m.data")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name, role in {
        "m.data": "external data",
        "link.onnx": "external data",
        "c.npz": "calibration data",
        "tokenizer.json": "tokenizer",
    }.items():
        with pytest.raises(DataError, match=role) as caught:
            go(
                folder / "m.onnx",
                folder / name,
                calib=folder / "c.npz",
                tokenizer=folder / "tokenizer.json",
            )
        assert caught.value.code == "DATA-OUTPUT-IS-INPUT"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_model_that_onnxruntime_cannot_load_is_refused(out, tmp_path):
    model = tiny_model()
    next(n for n in model.graph if n.op_type == "Relu").domain = "com.nobody"
    model.graph.opset_imports["com.nobody"] = 1
    path = io.save(model, tmp_path / "m.onnx").path
    with pytest.raises(OnnxqError) as caught:
        go(path, out)
    assert caught.value.code == "UNSUPPORTED-CUSTOM-OP"
    assert untouched(out)


def test_an_idle_pass_can_be_accepted(source, out):
    summary = go(source, out, "observe,round{sites=[nothing]}", allow_noop=True)
    assert summary.table()[1]["reasons"] == {"no such weight": 1}


def test_an_idle_pass_says_why(source, out):
    with pytest.raises(NoopError, match=r"pass 2 `round` matched nothing.*: `no such weight`"):
        go(source, out, "observe,round{sites=[nothing]}")


def test_in_a_recipe_an_idle_pass_is_a_warning_as_long_as_another_quantizes(source, out, tmp_path):
    recipe = tmp_path.parent / f"{tmp_path.name}.toml"
    idle = "observe,round{sites=[nothing]}"
    recipe.write_text(f"passes = '{idle},observe,round'")
    summary = go(source, out, f"@{recipe}")
    assert summary.warnings[-1].startswith("pass 2 `round` of the recipe matched nothing")
    recipe.write_text(f"passes = '{idle}'")
    with pytest.raises(NoopError):
        go(source, out, f"@{recipe}")


def test_a_bad_result_can_be_kept_and_is_still_an_error(source, out):
    with pytest.raises(QualityError) as caught:
        go(source, out, min_cosine=0.9999999, keep_bad=True)
    assert caught.value.exit_code == 3
    assert caught.value.hint.endswith("the output was kept")
    assert io.load(out).graph.name == "tiny"


def test_a_poor_result_is_written_with_a_loud_warning(source, out):
    fine = go(source, out)
    assert fine.cosine >= POOR_COSINE
    assert not fine.is_poor
    poor = go(source, out, "observe,round{bits=2}")
    assert poor.cosine < POOR_COSINE
    assert poor.is_poor
    assert poor.to_json()["is_poor"] is True
    (warning,) = [w for w in poor.warnings if w.startswith("POOR RESULT: output ")]
    assert f"cosine {poor.cosine:.4f}" in warning
    assert "--min-cosine" in warning


def test_samples_of_nothing_but_zeros_are_warned_of(source, out):
    zeros = [{name: np.zeros_like(a) for name, a in s.items()} for s in samples()]
    assert any("is ZERO in all inputs" in w for w in go(source, out, calib=zeros).warnings)
    assert not any("ZERO" in w for w in go(source, out).warnings)
    almost = [*zeros[:-1], samples()[0]]
    assert not any("ZERO" in w for w in go(source, out, calib=almost, holdout=0).warnings)


def test_a_threshold_that_cannot_be_measured_is_refused(out, tmp_path):
    import onnx

    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (string[2] x) => (string[2] y) { y = Identity(x) }"""
    path = io.save(ir.from_proto(onnx.parser.parse_model(text)), tmp_path / "m.onnx").path
    with pytest.raises(DataError, match="no samples to measure it on"):
        go(path, out, "early", calib=None, min_cosine=0.9)
    assert go(path, out, "early", calib=None).comparison is None


def test_dry_run_resolves_the_pipeline(source):
    text, found = dry_run(source, "observe,round{bits=4}", registry=REGISTRY)
    assert text == "observe,round{bits=4}"
    assert [(p.number, p.spec) for p in found] == [(1, "observe"), (2, "round{bits=4}")]
    with pytest.raises(PipelineError):
        dry_run(source, "round", registry=REGISTRY)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("kind", [signal.SIGKILL, *SLOW])
def test_a_killed_run_leaves_the_old_output_and_the_next_run_cleans_up(source, out, kind):
    script = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "import onnxq.pipeline.run as module\n"
        "from tests.pipeline.test_run import go\n"
        f"module.compare_models = lambda *a, **k: os.kill(os.getpid(), {int(kind)})\n"
        "go(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(out)],
        check=False,
        capture_output=True,
        cwd=Path(onnxq.__file__).parents[1],
    )
    assert done.returncode != 0
    assert out.read_bytes() == OLD
    go(source, out)
    assert {p.name for p in out.parent.iterdir()} == {"m.onnx", "q.onnx", "q.onnx.recipe.toml"}


def test_a_staging_folder_in_use_is_left_alone(tmp_path):
    target = tmp_path / "q.onnx"
    with staging(target) as one, staging(target) as two:
        assert one.is_dir()
        assert two.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_the_old_output_stays(source, out, monkeypatch):
    import errno

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnxq.graph.write.wire.write_model", full)
    with pytest.raises(DataError) as caught:
        go(source, out)
    assert "SPACE" in caught.value.code or "FULL" in caught.value.code
    assert untouched(out)


def test_a_model_in_memory_is_referred_to_the_pipeline(tmp_path):
    with pytest.raises(SpecError) as caught:
        onnxq.run(ir.to_proto(tiny_model()), "w8a8", out=tmp_path / "q.onnx")
    assert caught.value.code == "SPEC-MODEL"
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_threads_is_refused(source, out):
    with pytest.raises(SpecError, match="at least one thread"):
        run(source, "observe", out=out, threads=0, registry=REGISTRY)
    assert out.read_bytes() == OLD
