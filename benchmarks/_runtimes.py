"""Run one ONNX model in one runtime: ``python _runtimes.py NAME MODEL FEEDS.npz OUT.npz``.

A process of its own for each, because a runtime that cannot take a model may take the process down.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_WEB = """
const ort = require('onnxruntime-web'), fs = require('fs');
const [model, manifest, out] = process.argv.slice(2);
const kinds = {float32: Float32Array, int64: BigInt64Array};
(async () => {
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model, {executionProviders: ['wasm']});
  const feeds = {};
  for (const {name, dtype, dims, file} of JSON.parse(fs.readFileSync(manifest))) {
    const bytes = fs.readFileSync(file);
    const copy = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
    feeds[name] = new ort.Tensor(dtype, new kinds[dtype](copy), dims);
  }
  const tensor = (await session.run(feeds))[session.outputNames[0]];
  fs.writeFileSync(out, Buffer.from(tensor.data.buffer, tensor.data.byteOffset,
                                    tensor.data.byteLength));
})().catch(e => { console.error(String(e)); process.exit(1); });
"""


def ort_cpu(model: Path, feeds: Feeds) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


def web_wasm(model: Path, feeds: Feeds) -> Array:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = []
        for number, (key, array) in enumerate(feeds.items()):
            array.tofile(folder / f"{number}.bin")
            manifest.append(
                {
                    "name": key,
                    "dtype": array.dtype.name,
                    "dims": array.shape,
                    "file": str(folder / f"{number}.bin"),
                }
            )
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "run.cjs").write_text(_WEB)
        files = [folder / "run.cjs", model, folder / "manifest.json", folder / "out.bin"]
        _call("node", *files)
        return np.fromfile(folder / "out.bin", np.float32)


def openvino(model: Path, feeds: Feeds) -> Array:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    return np.asarray(compiled(dict(feeds))[compiled.output(0)])


def qnn(model: Path, feeds: Feeds) -> Array:
    """The HTP backend, in its simulator on x86; nothing may fall back to the CPU."""
    import onnxruntime as ort
    import onnxruntime_qnn

    ort.register_execution_provider_library("qnn", onnxruntime_qnn.get_library_path())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == "qnn"]
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices[:1], backend)
    return np.asarray(ort.InferenceSession(str(model), options).run(None, dict(feeds))[0])


def iree(model: Path, feeds: Feeds) -> Array:
    import iree.runtime

    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder) / "model.mlir", Path(folder) / "model.vmfb"
        _call(tools / "iree-import-onnx", model, "-o", text)
        _call(
            tools / "iree-compile",
            text,
            "--iree-hal-target-device=local",
            "--iree-hal-local-target-device-backends=llvm-cpu",
            "--iree-llvmcpu-target-cpu=host",
            "-o",
            binary,
        )
        module = iree.runtime.load_vm_flatbuffer_file(str(binary), driver="local-sync")
        plain = (n for n in module.vm_module.function_names if "$" not in n and "__" not in n)
        found = module[next(iter(plain))](*feeds.values())
        first = found[0] if isinstance(found, tuple | list) else found
        return np.asarray(first.to_host())


def tract(model: Path, feeds: Feeds) -> Array:
    import tract as runtime

    loaded = runtime.onnx().load(str(model))
    return np.asarray(loaded.into_model().into_runnable().run(list(feeds.values()))[0].to_numpy())


Runner = Callable[[Path, Feeds], Array]
RUNTIMES: dict[str, tuple[Runner, tuple[str, ...]]] = {
    "cpu": (ort_cpu, ("onnxruntime",)),
    "web-wasm": (web_wasm, ()),
    "openvino": (openvino, ("openvino",)),
    "qnn": (qnn, ("onnxruntime_qnn",)),
    "iree": (iree, ("iree", "iree.compiler", "iree.runtime")),
    "tract": (tract, ("tract",)),
}
"""By target: how to run a model, and the modules that takes."""


def missing(name: str) -> str | None:
    """Why the runtime of target ``name`` cannot be used here, or None."""
    if name == "web-wasm":
        return _missing_web()
    absent = [module for module in RUNTIMES[name][1] if importlib.util.find_spec(module) is None]
    return f"no module {absent[0]}" if absent else None


def _missing_web() -> str | None:
    if shutil.which("node") is None:
        return "no node"
    probe = ["node", "-e", "require.resolve('onnxruntime-web')"]
    found = subprocess.run(probe, capture_output=True, check=False)
    return None if found.returncode == 0 else "no onnxruntime-web for node (NODE_PATH)"


def run(name: str, model: Path, feeds: Feeds) -> Array | str:
    """The first output of ``model`` in the runtime of target ``name``, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "feeds.npz", Path(folder) / "out.npz"
        np.savez(given, **dict(feeds))
        command = [sys.executable, __file__, name, str(model), str(given), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        if child.returncode == 0:
            return np.load(out)["out"]
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        return lines[-1][-160:]


def _call(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(" ".join(done.stderr.split())[-160:])


def _main() -> None:
    name, model, given, out = sys.argv[1:]
    with np.load(given) as feeds:
        np.savez(out, out=RUNTIMES[name][0](Path(model), dict(feeds)))


if __name__ == "__main__":
    _main()
