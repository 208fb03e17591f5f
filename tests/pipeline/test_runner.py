"""Pipelines on a model in memory: contract, checks between passes, dumps and resumed runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import DataError, EquivalenceError, InternalError, SpecError
from onnxq.graph import io
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.hooks import Hook
from onnxq.pipeline.runner import Pipeline
from onnxq.runtime.workspace import Workspace, run_samples
from tests.pipeline.tiny import MEAN, REGISTRY, Observe, Round, samples, tiny_model, weight

FULL = "observe,rescale{factor=3.0},observe,round"


def pipeline(text: str) -> Pipeline:
    return Pipeline(text, registry=REGISTRY)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def data(model):
    return open_data(samples(), model)


def reference_outputs(model: ir.Model, sample: dict) -> np.ndarray:
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, sample)[0]


def test_workspace_sessions_compute_what_the_reference_evaluator_does(model):
    # Weights above the threshold are mapped from a file, the others stay in the graph.
    model.graph.initializers["w1"].const_value = ir.tensor(
        np.random.default_rng(3).standard_normal((4, 2051)).astype(np.float32), name="w1"
    )
    for name, shape in (("b1", (2051,)), ("w2", (2051, 3))):
        array = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    for value in model.graph.initializers.values():
        value.shape = ir.Shape(value.const_value.shape)
    with Workspace() as space:
        session = space.session(model, outputs=["h"])
        again = space.session(model)
    (sample,) = samples(1)
    (found,) = run_samples(session, [sample])
    np.testing.assert_allclose(found["y"], reference_outputs(model, sample), rtol=1e-4, atol=1e-4)
    assert found["h"].shape == (2, 2051)
    np.testing.assert_array_equal(next(run_samples(again, [sample]))["y"], found["y"])


def test_the_given_model_is_unchanged_and_the_new_one_is_not(model, data):
    before = io.serialized(model)
    result = pipeline(FULL).run(model, data=data)
    assert io.serialized(model) == before
    assert not np.array_equal(weight(result.model, "w1"), weight(model, "w1"))
    assert [s.spec for s in result.reports] == FULL.split(",")
    assert [len(s.report.changed) for s in result.reports] == [1, 3, 1, 3]


def test_provenance_says_what_was_run_and_is_in_the_model(model, data):
    result = pipeline(FULL).run(model, data=data, seed=7, target="openvino")
    expected = {
        "version": "0.1.0",
        "pipeline": FULL,
        "input": io.fingerprint(model),
        "calibration": data.digest(),
        "target": "openvino",
        "seed": 7,
    }
    assert result.provenance == expected
    assert io.get_provenance(result.model) == expected


def test_provenance_of_a_quantized_model_that_is_processed_again_is_kept(model, data):
    once = pipeline("observe").run(model, data=data)
    twice = pipeline("rescale").run(once.model, data=data)
    assert twice.provenance["earlier"] == once.provenance


def test_equal_runs_give_equal_bytes(model, data):
    runs = [pipeline(FULL).run(tiny_model(), data=data, threads=n) for n in (1, 2)]
    assert io.serialized(runs[0].model) == io.serialized(runs[1].model)
    other = pipeline(FULL).run(tiny_model(), data=open_data(samples(seed=9), model))
    assert io.serialized(other.model) != io.serialized(runs[0].model)


def test_stale_artifacts_are_gone(model, data):
    assert MEAN in pipeline("observe").run(model, data=data).artifacts
    assert MEAN not in pipeline("observe,rescale").run(model, data=data).artifacts


def test_verification_measures_the_error_of_passes_with_a_tolerance(model, data):
    errors = [s.max_error for s in pipeline(FULL).run(model, data=data).reports]
    assert errors[0] == 0.0  # nothing was touched
    assert 0 < errors[1] < 1e-6  # a factor of 3 rounds
    assert errors[3] is None  # changes numerics by intent


def test_a_broken_promise_names_pass_output_error_and_tolerance(model, data):
    broken = pipeline("rescale{factor=1.5 forget=true}")
    with pytest.raises(EquivalenceError) as caught:
        broken.run(model, data=data)
    details = caught.value.details
    assert details["pass_number"] == 1
    assert details["output"] == "y"
    assert details["error_norm"] == pytest.approx(0.5, rel=1e-4)  # all of y grew by the factor
    assert details["tolerance"] == 1e-5
    assert broken.run(model, data=data, verify=False).reports[0].max_error is None


def test_each_pass_is_held_to_what_it_adds_itself(model, data):
    drift = "rescale{factor=1.000008 forget=true}"
    result = pipeline(f"{drift},{drift}").run(model, data=data)
    assert [s.max_error for s in result.reports] == pytest.approx([8e-6, 8e-6], rel=0.05)


def test_without_samples_the_report_says_that_nothing_was_verified(model):
    result = pipeline("rescale").run(model)
    assert result.reports[0].report.notes == ["not verified: the run has no samples"]
    assert result.reports[0].max_error is None


def test_an_invalid_graph_names_the_pass(model):
    with pytest.raises(InternalError, match="after pass 1 `corrupt`"):
        pipeline("corrupt").run(model)


def test_a_promised_artifact_must_be_provided(model):
    with pytest.raises(InternalError, match="declares that it provides `mean`, and did not"):
        pipeline("lazy").run(model)


def test_an_undeclared_artifact_cannot_be_read(model, data):
    with pytest.raises(InternalError, match="`nosy` tried to read `mean`, which it does not"):
        pipeline("observe,nosy").run(model, data=data)


def test_passes_that_do_not_ask_for_data_do_not_get_any(model, data):
    seen = {}

    @dataclass(frozen=True)
    class Spy(Pass):
        name: ClassVar[str] = "spy"
        summary: ClassVar[str] = "look"

        def run(self, model: ir.Model, ctx: Context) -> PassReport:
            seen.update(data=ctx.data, upcoming=ctx.upcoming, seed=ctx.seed)
            return PassReport()

    Pipeline([Spy(), Observe()]).run(model, data=data, seed=5)
    assert seen == {"data": None, "upcoming": (Observe(),), "seed": 5}


def test_hooks_see_every_pass_before_and_after(model, data):
    calls = []

    class Log(Hook):
        def before_pass(self, step):
            calls.append(("before", str(step), len(step.report.changed)))

        def after_pass(self, step):
            calls.append(("after", str(step), len(step.report.changed)))

    pipeline("observe,round{sites=[w1,w2]}").run(model, data=data, hooks=[Log()])
    assert calls == [
        ("before", "pass 1 `observe`", 0),
        ("after", "pass 1 `observe`", 1),
        ("before", "pass 2 `round`", 0),
        ("after", "pass 2 `round`", 2),
    ]


def test_progress_is_told(model, data):
    told = []
    pipeline("observe,round").run(model, data=data, progress=lambda *a: told.append(a))
    assert told == [("observe", 0, 2), ("observe", 1, 2), ("round", 1, 2), ("round", 2, 2)]


def test_an_empty_pipeline_is_refused():
    with pytest.raises(SpecError, match="no passes"):
        Pipeline([])


class StoppedError(Exception):
    """Stands for a crash or Ctrl-C."""


class StopBefore(Hook):
    def __init__(self, number):
        self.number = number

    def before_pass(self, step):
        if step.number == self.number:
            raise StoppedError


@pytest.fixture
def stopped(tmp_path, model, data):
    """A dump of FULL that stopped before its last pass."""
    folder = tmp_path / "dump"
    with pytest.raises(StoppedError):
        pipeline(FULL).run(model, data=data, dump_dir=folder, hooks=[StopBefore(4)])
    return folder


def test_a_dump_holds_model_report_and_artifacts_of_every_step(stopped):
    names = sorted(p.name for p in stopped.iterdir())
    steps = ["01-observe", "02-rescale", "03-observe"]
    expected = {f"{s}.{e}" for s in steps for e in ("onnx", "json")}
    expected |= {f"{s}.mean.{e}" for s in ("01-observe", "03-observe") for e in ("json", "npz")}
    assert names == sorted(expected | {"run.json"})
    step = json.loads((stopped / "02-rescale.json").read_text())
    assert step["fingerprint"] == io.fingerprint(io.load(stopped / "02-rescale.onnx"))
    assert [c["site"] for c in step["report_json"]["changed"]] == ["w1", "b1", "w2"]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_resumed_run_skips_what_is_done_and_gives_the_same_bytes(tmp_path, model, data, number):
    whole = pipeline(FULL).run(model, data=data)
    folder = tmp_path / "dump"
    try:
        pipeline(FULL).run(model, data=data, dump_dir=folder, hooks=[StopBefore(number)])
    except StoppedError:
        assert number < 5
    resumed = pipeline(FULL).run(model, data=data, dump_dir=folder, resume=True)
    assert [s.resumed for s in resumed.reports] == [n < number for n in range(1, 5)]
    assert io.serialized(resumed.model) == io.serialized(whole.model)
    assert [s.report for s in resumed.reports] == [s.report for s in whole.reports]
    assert resumed.provenance == whole.provenance


def test_provenance_names_the_input_as_it_came_in(tmp_path):
    """The passes share the input's tensors, and lifting a constant names its tensor."""
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[N, 2] y) {
            c = Constant <value = float[2] {1.0, 2.0}> ()
            y = Add(x, c)
        }"""
    )
    before = io.fingerprint(model)
    whole = Pipeline("canonicalize").run(model, dump_dir=tmp_path)
    assert whole.provenance["input"] == before
    assert "c" in whole.model.graph.initializers


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"target": "tensorrt"}, "target"),
        ({"data": 99}, "calibration"),
        ({"text": FULL + ",early"}, "pipeline"),
        ({"model": True}, "input"),
    ],
)
def test_a_run_with_other_inputs_does_not_resume(stopped, model, data, change, named):
    other = dict(change)
    if "model" in other:
        other.pop("model")
        model.graph.initializers["w1"].const_value = ir.tensor(
            np.ones((4, 8), np.float32), name="w1"
        )
    if "data" in other:
        data = open_data(samples(seed=other.pop("data")), model)
    with pytest.raises(DataError, match=f"another {named}") as caught:
        pipeline(other.pop("text", FULL)).run(
            model, data=data, dump_dir=stopped, resume=True, **other
        )
    assert caught.value.code == "DATA-RESUME-STALE"


def test_a_changed_model_in_the_dump_is_refused(stopped, model, data):
    tampered = io.load(stopped / "03-observe.onnx")
    tampered.graph.initializers["b1"].const_value = ir.tensor(np.ones(8, np.float32), name="b1")
    data_bytes = io.serialized(tampered)
    (stopped / "03-observe.onnx").write_bytes(data_bytes)
    with pytest.raises(DataError, match=r"03-observe\.onnx has changed"):
        pipeline(FULL).run(model, data=data, dump_dir=stopped, resume=True)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_changed_artifact_in_the_dump_is_refused(stopped, model, data, suffix):
    file = stopped / f"03-observe.mean.{suffix}"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="is missing or has changed") as caught:
        pipeline(FULL).run(model, data=data, dump_dir=stopped, resume=True)
    assert caught.value.code == "DATA-RESUME-STALE"


def test_a_damaged_dump_is_refused(stopped, model, data):
    (stopped / "01-observe.json").write_text("{")
    with pytest.raises(DataError) as caught:
        pipeline(FULL).run(model, data=data, dump_dir=stopped, resume=True)
    assert caught.value.code == "DATA-RESUME-DAMAGED"


def test_a_new_run_replaces_an_old_dump_but_no_other_files(stopped, tmp_path, model, data):
    pipeline("observe").run(model, data=data, dump_dir=stopped)
    names = sorted(p.name for p in stopped.iterdir())
    stems = ["json", "mean.json", "mean.npz", "onnx"]
    assert names == [*(f"01-observe.{s}" for s in stems), "run.json"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        pipeline("observe").run(model, data=data, dump_dir=foreign)
    assert caught.value.code == "DATA-DUMP-FOLDER"
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_resume_needs_a_folder(model, data):
    with pytest.raises(SpecError, match="only from a dump folder"):
        pipeline(FULL).run(model, data=data, resume=True)


def test_the_parsed_and_the_built_pipeline_are_one():
    text = "observe,round{bits=4}"
    assert Pipeline([Observe(), Round(4)]).passes == parse(text, REGISTRY)
    assert str(Pipeline([Observe(), Round(4)])) == text


def test_the_model_that_is_given_stays_as_it_is():
    """Tensors of Constant nodes have no name as a rule, and lifting them gives them one."""
    import onnx.parser

    from onnxq.passes.prepare.canonicalize import Canonicalize

    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 4] x) => (float[1, 4] y) {
        c = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
        y = Mul(x, c)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    model.graph[0].attributes["value"].as_tensor().name = None
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    Pipeline([Canonicalize()]).run(model)
    assert not model.graph[0].attributes["value"].as_tensor().name
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_models_and_samples_are_taken_as_users_have_them(model, data):
    expected = io.serialized(pipeline(FULL).run(model, data=data).model)
    proto = ir.to_proto(model)
    before = proto.SerializeToString()
    for given in (proto, model):
        assert io.serialized(pipeline(FULL).run(given, data=samples()).model) == expected
    assert proto.SerializeToString() == before


def test_protobuf_models_are_checked_as_files_are(model, data):
    proto = ir.to_proto(model)
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(DataError) as caught:
        pipeline(FULL).run(proto, data=data)
    assert caught.value.code == "DATA-EXTERNAL-PATH"
    proto = ir.to_proto(model)
    proto.graph.node[0].op_type = "Bogus"
    with pytest.raises(DataError) as caught:
        pipeline(FULL).run(proto, data=data)
    assert caught.value.code == "DATA-INVALID-MODEL"


def test_a_negative_seed_is_refused(model, data):
    with pytest.raises(SpecError) as caught:
        pipeline(FULL).run(model, data=data, seed=-1)
    assert caught.value.code == "SPEC-SEED"


def test_lists_hold_passes_and_texts():
    listed = Pipeline(
        ["observe", *parse("rescale{factor=3.0}", REGISTRY), "observe,round"], registry=REGISTRY
    )
    assert str(listed) == FULL
    with pytest.raises(SpecError) as caught:
        Pipeline(["observe", "bogus"], registry=REGISTRY)
    assert caught.value.code == "SPEC-PASS-UNKNOWN"
