"""Jobs that the benchmarks run in child processes, ours and the peers', through public APIs.

Not a benchmark itself: ``_common.run_job`` starts it with one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Options = Mapping[str, Any]
Job = Callable[[Options], dict[str, Any] | None]


def build_model(options: Options) -> None:
    """Write a model from its checkpoint: ``name``, ``out``, ``settings``, ``checkpoint``."""
    from onnxq import models

    models.build(
        options["name"],
        options["out"],
        checkpoint=options.get("checkpoint"),
        **options.get("settings", {}),
    )


def write_feeds(options: Options) -> None:
    """The samples that onnxq makes of the lines of a text file, as ``.npz`` for the peers.

    ``model``, ``texts``, ``tokenizer``, ``pad_to`` (null: unpadded), folder ``out``.
    """
    _write(options, options["texts"], tokenizer=options["tokenizer"], pad=options.get("pad_to"))


def write_image_feeds(options: Options) -> None:
    """The same of a folder of images: ``model``, ``images``, ``spec``, folder ``out``."""
    _write(options, options["images"], images=options["spec"])


def _write(options: Options, source: str, **settings: Any) -> None:
    import numpy as np

    from onnxq.calibration.data import open_data
    from onnxq.graph import io

    out = Path(options["out"])
    out.mkdir(exist_ok=True)
    data = open_data(source, io.load(options["model"]), **settings)
    for number, feeds in enumerate(data):
        arrays: dict[str, Any] = dict(feeds)
        np.savez(out / f"{number:04}.npz", **arrays)


def onnxq_run(options: Options) -> dict[str, Any]:
    """The whole of ``onnxq run``: ``model``, ``passes``, ``out``, keywords in ``keywords``."""
    import onnxq

    summary = onnxq.run(
        options["model"], options["passes"], out=options["out"], **options.get("keywords", {})
    )
    return {"cosine": summary.cosine, "samples": summary.samples}


def onnxq_passes(options: Options) -> dict[str, Any]:
    """Passes alone, without checks: ``model``, ``passes``, ``out``, ``feeds``, ``target``."""
    import onnxq
    from onnxq.calibration.data import open_data
    from onnxq.graph import io

    model = io.load(options["model"])
    data = open_data(options["feeds"], model) if options.get("feeds") else None
    target = options.get("target", "cpu")
    pipeline = onnxq.Pipeline(options["passes"])
    result = pipeline.run(model, data=data, verify=False, target=target)
    io.save(result.model, options["out"])
    return {"changed": sum(len(step.report.changed) for step in result.reports)}


def onnxq_rounded(options: Options) -> None:
    """The float graph with the values that weights are rounded to: as ``onnxq_passes``.

    What `qdq` writes computes with the same weights; formats that no kernel of onnxruntime knows
    are decoded by standard operators there, at every run.
    """
    import dataclasses

    import onnxq
    from onnxq.calibration.data import open_data
    from onnxq.formats import IntFormat, parse_format
    from onnxq.graph import io
    from onnxq.graph.match import analyze
    from onnxq.passes.keys import PLAN, ROUNDED
    from onnxq.passes.lower.weights import to_nearest
    from onnxq.passes.transform.folding import put_weight
    from onnxq.passes.weights.rounded import RoundedWeights
    from onnxq.passes.weights.rounding import rows_of

    model = io.load(options["model"])
    data = open_data(options["feeds"], model) if options.get("feeds") else None
    steps = options["passes"].removesuffix(", qdq")
    result = onnxq.Pipeline(steps).run(model, data=data, verify=False)
    plan = result.artifacts.get(PLAN)
    known = ROUNDED in result.artifacts
    rounded = result.artifacts.get(ROUNDED) if known else RoundedWeights()
    for layer in analyze(result.model).linears:
        site = plan.sites.get(layer.name)
        if site is None or site.weight is None:
            continue
        weight = rounded.get(layer.name)
        if weight is None:
            fmt = parse_format(site.weight.format)
            if isinstance(fmt, IntFormat):
                scheme = "sym" if site.weight.symmetric else "asym"
                fmt = dataclasses.replace(fmt, block=0, scheme=scheme)
            weight = to_nearest(rows_of(layer), fmt, site.weight)
        put_weight(layer, weight.values().T.astype("float64"))
    io.save(result.model, options["out"])


def onnxq_calibrate(options: Options) -> None:
    """Collect statistics and choose ranges, nothing else: ``model``, ``method``, ``feeds``."""
    import onnxq
    from onnxq.calibration.data import open_data
    from onnxq.graph import io

    model = io.load(options["model"])
    data = open_data(options["feeds"], model)
    spec = f"canonicalize, calibrate{{method={options['method']}}}, assign"
    onnxq.Pipeline(spec).run(model, data=data, verify=False)


def ort_calibrate(options: Options) -> None:
    """ONNX Runtime's calibrator: ``model``, ``method``, ``feeds``, ``op_types`` (null: all)."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    calibrator = create_calibrator(
        Path(options["model"]),
        options["op_types"],
        augmented_model_path="augmented.onnx",
        calibrate_method=methods[options["method"]],
    )
    calibrator.collect_data(_Reader(options["feeds"]))
    calibrator.compute_data()


def ort_prepare(options: Options) -> None:
    """``quant_pre_process``: ``model``, ``out``; symbolic shape inference fails on such models."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(options["model"], options["out"], skip_symbolic_shape=True)


def ort_dynamic(options: Options) -> None:
    """``quantize_dynamic``: ``model``, ``out``, keywords in ``keywords``."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(options["model"], options["out"], **options.get("keywords", {}))


def ort_static(options: Options) -> None:
    """``quantize_static``.

    ``model``, ``out``, ``feeds``; ``unsigned`` for UINT8 activations, which its documentation
    recommends on x86-64 with VNNI; ``weights_only`` is what an expert does on an encoder: the
    MatMuls with a constant weight and the largest embedding, inputs alone and not the outputs.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    model = options["model"]
    keywords: dict[str, Any] = dict(options.get("keywords", {}))
    if options.get("unsigned"):
        keywords["activation_type"] = QuantType.QUInt8
    if options.get("weights_only"):
        keywords["nodes_to_quantize"] = _weight_nodes(model)
        keywords["extra_options"] = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gather"]}
    quantize_static(model, options["out"], _Reader(options["feeds"]), **keywords)


def _weight_nodes(path: str) -> list[str]:
    import onnx

    graph = onnx.load(path).graph
    sizes = {t.name: max(t.dims, default=0) for t in graph.initializer}
    tables = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in sizes]
    matmuls = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in sizes]
    return [n.name for n in (*matmuls, max(tables, key=lambda n: sizes[n.input[0]]))]


def ort_w4(options: Options) -> None:
    """``MatMulNBitsQuantizer``: ``model``, ``out``; int8 arithmetic.

    ``block`` (32), ``symmetric`` (true), ``method`` (``default`` or ``hqq``), ``exclude``: nodes
    that stay float; ``external``: save the weights in a file beside the model.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        HQQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    block = options.get("block", 32)
    config: Any = DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=options.get("symmetric", True), accuracy_level=4
    )
    if options.get("method") == "hqq":
        config = HQQWeightOnlyQuantConfig(block_size=block, bits=4)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(options["model"]),
        algo_config=config,
        nodes_to_exclude=options.get("exclude", []),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(
        options["out"], use_external_data_format=options.get("external", False)
    )


def ort_gptq(options: Options) -> None:
    """ONNX Runtime's GPTQ, which it has from Neural Compressor: ``model``, ``out``, ``feeds``.

    ``block`` (32), ``symmetric`` (false), ``exclude``: nodes that stay float. Its public
    ``MatMulNBitsQuantizer`` calls the same function, but rounds excluded nodes too.
    """
    import onnx
    from onnxruntime.quantization.neural_compressor import gptq_quantize

    done = gptq_quantize(
        onnx.load(options["model"]),
        ((feeds, None) for feeds in _Reader(options["feeds"])),
        weight_config=dict.fromkeys(options.get("exclude", []), "fp32"),
        group_size=options.get("block", 32),
        scheme="sym" if options.get("symmetric") else "asym",
        n_samples=-1,
        accuracy_level=4,
    )
    done.save_model_to_file(options["out"], use_external_data_format=False)


def olive_w4(options: Options) -> None:
    """Olive's weight-only passes: ``model``, ``out``; ``method``: ``rtn``, ``hqq`` or ``kquant``.

    ``block`` (32), ``exclude``: nodes that stay float; so do embedding tables, which Olive would
    round with the rest.
    """
    import importlib
    import shutil

    import onnx
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    module, name = {
        "rtn": ("rtn_quantization", "OnnxBlockWiseRtnQuantization"),
        "hqq": ("hqq_quantization", "OnnxHqqQuantization"),
        "kquant": ("kquant_quantization", "OnnxKQuantQuantization"),
    }[options["method"]]
    owner = getattr(importlib.import_module(f"olive.passes.onnx.{module}"), name)
    graph = onnx.load(options["model"], load_external_data=False).graph
    tables = [node.name for node in graph.node if node.op_type == "Gather"]
    settings = {
        "block_size": options.get("block", 32),
        "nodes_to_exclude": [*options.get("exclude", []), *tables],
    }
    made = create_pass_from_dict(owner, settings, disable_search=True)
    done = made.run(ONNXModelHandler(str(options["model"])), str(Path("olive").resolve()))
    shutil.copy(done.model_path, options["out"])


class _Reader:
    """The samples of a folder of ``.npz`` files, as ONNX Runtime wants to be given them."""

    def __init__(self, folder: str) -> None:
        self._samples = self._read(Path(folder))

    @staticmethod
    def _read(folder: Path) -> Iterator[dict[str, Any]]:
        import numpy as np

        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as arrays:
                yield dict(arrays)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._samples, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._samples

    def set_range(self, start_index: int, end_index: int) -> None:
        raise NotImplementedError


JOBS: dict[str, Job] = {
    job.__name__: job
    for job in (
        build_model, write_feeds, write_image_feeds, onnxq_run, onnxq_passes, onnxq_rounded,
        onnxq_calibrate,
        ort_calibrate, ort_dynamic, ort_prepare, ort_gptq,
        ort_static, ort_w4, olive_w4,
    )
}  # fmt: skip


def _cpu_seconds() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def _peak_mb() -> float:
    """High-water mark of this process alone; ``ru_maxrss`` would count the parent's as well."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kib) * 1024 / 1e6


def main() -> None:
    """Run the job named on the command line and write the answer file."""
    options = json.loads(sys.argv[1])
    result, error = None, None
    if options.get("limit_gb"):
        limit = int(options["limit_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = JOBS[options["job"]](options)
    except Exception as failure:  # a peer may raise anything; its first line is the finding
        text = str(failure).strip()
        error = f"{type(failure).__name__}: {text.splitlines()[0] if text else ''}"
    answer = {
        "cpu_s": _cpu_seconds(),
        "peak_mb": _peak_mb(),
        "error": error,
        "result": result or {},
    }
    Path(options["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
