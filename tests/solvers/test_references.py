"""Slow comparison with public implementations, which are not a part of this project.

Set ONNXQ_REFERENCES to a folder that holds checkouts named ``gptq`` (IST-DASLab), ``GPTAQ`` and
``hqq``; torch must be importable, and for Qronos the package ``brevitas``. Without them the tests
are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.formats import parse_format
from onnxq.solvers.gptaq import gptaq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.hessian import output_error
from onnxq.solvers.hqq import hqq
from onnxq.solvers.qronos import qronos

pytestmark = pytest.mark.slow
# The references work in float32 and form the inverse; a weight near a tie may fall either way,
# and what follows it in the row then differs too.
SAME_CODES = 0.99
SAME_LOSS = 0.01


class Stub(types.ModuleType):
    """Stands for a package that a reference imports and does not use here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reference(folder: str, path: str, stubs: tuple[str, ...] = ()) -> types.ModuleType:
    pytest.importorskip("torch")
    root = os.environ.get("ONNXQ_REFERENCES")
    if root is None or not (Path(root) / folder).is_dir():
        pytest.skip(f"ONNXQ_REFERENCES has no {folder}")
    for stub in stubs:
        sys.modules[stub] = Stub(stub)
    file = Path(root, folder, path)
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def solve(module: Any, cls: str, layer: Any, H: np.ndarray, bits: int, sym: bool, **options: Any):
    import torch

    quant = reference("gptq", "quant.py")
    linear = torch.nn.Linear(layer.W.shape[1], layer.W.shape[0], bias=False)
    linear.weight.data = torch.tensor(layer.W)
    solver = getattr(module, cls)(linear)
    solver.H = torch.tensor(H, dtype=torch.float32)
    solver.quantizer = quant.Quantizer()
    solver.quantizer.configure(bits, perchannel=True, sym=sym, mse=False)
    find = solver.quantizer.find_params
    solver.quantizer.find_params = lambda x, **_: find(x, weight=True)
    solver.quantizer.ready = lambda: False
    quantize = quant.quantize
    solver.quantizer.quantize = lambda x: quantize(
        x, solver.quantizer.scale, solver.quantizer.zero, solver.quantizer.maxq
    )
    return solver, linear, options


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["", "asym"])
def test_gptq_is_that_of_its_authors(
    layer: Any, act_order: bool, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale per row, so that both have the same grid."""
    module = reference("gptq", "gptq.py", ("transformers",))
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    solver, linear, _ = solve(module, "GPTQ", layer, layer.H, 4, not scheme)
    solver.fasterquant(blocksize=128, percdamp=0.01, groupsize=-1, actorder=act_order)
    theirs = linear.weight.data.numpy()
    fmt = parse_format("int4" + scheme)
    # Their symmetric grid has 15 steps over [-amax, amax], ours 14: give ours their scale.
    params = fmt.params(layer.W, gptq(layer.W, layer.H, fmt).params.granularity)
    scale = solver.quantizer.scale.numpy().reshape(-1)
    params.scale[...] = scale
    ours = gptq(layer.W, layer.H, fmt, params=params, act_order=act_order).values()
    assert np.mean(np.rint((ours - theirs) / scale[:, None]) == 0) > SAME_CODES
    losses = [output_error(layer.W, v, layer.H) for v in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=SAME_LOSS)


def test_gptaq_is_that_of_its_authors(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, for between blocks the reference applies its correction to rounded columns."""
    stubs = ("utils", "quant_utils", "model_utils", "tqdm", "transformers")
    module = reference("GPTAQ", "fake_quant/gptaq_utils.py", stubs)
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    solver, linear, _ = solve(module, "GPTAQ", layer, layer.H, 4, True)
    solver.dXXT = torch.tensor(layer.D, dtype=torch.float32)
    solver.fasterquant(blocksize=layer.W.shape[1], groupsize=-1, actorder=True)
    theirs = linear.weight.data.numpy()
    fmt = parse_format("int4")
    params = gptq(layer.W, layer.H, fmt).params
    scale = solver.quantizer.scale.numpy().reshape(-1)
    params.scale[...] = scale
    ours = gptaq(layer.W, layer.H, layer.D, fmt, params=params, act_order=True).values()
    assert np.mean(np.rint((ours - theirs) / scale[:, None]) == 0) > SAME_CODES
    losses = [layer.loss(v) for v in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=SAME_LOSS)


def of_brevitas(layer: Any, scale: np.ndarray, damping: float, act_order: bool) -> np.ndarray:
    """The weight that brevitas's Qronos leaves, on the grid of 4-bit integers times ``scale``."""
    pytest.importorskip("torch")
    module = pytest.importorskip("brevitas.graph.qronos")
    import torch

    steps = torch.tensor(scale)[:, None]

    class OnOurGrid(module.Qronos):  # type: ignore[name-defined, misc]
        """Scales of brevitas follow the weights while they change; here they stay."""

        def __init__(self) -> None:
            weight = torch.tensor(layer.W)
            quantizer = types.SimpleNamespace(requires_quant_input=False)
            self.layer = types.SimpleNamespace(
                weight=types.SimpleNamespace(data=weight),
                weight_orig=types.SimpleNamespace(data=weight.clone()),
                weight_quant=quantizer,
            )
            self.name, self.groups, self.columns = "layer", 1, weight.shape[1]
            self.blocksize, self.alpha, self.act_order = 16, 1.0, act_order
            self.device, self.dtype = "cpu", torch.float64
            self.H = torch.tensor(layer.H)[None]
            self.G = torch.tensor(layer.G)[None]

        @property
        def use_intermediate_buffer(self) -> bool:
            return False

        def rounded(self) -> Any:
            values = self.layer.weight.data
            return torch.clip(torch.round(values / steps), -8, 7) * steps

        def get_quant_weights(
            self, i: int, i1: int, order: Any, with_quant_history: bool = False
        ) -> Any:
            found, column = self.rounded()[None], i + i1
            if with_quant_history:
                return found[:, :, order[0][:column]]
            return found[0, :, order[0][column]][None]

    # They damp by a part of the largest eigenvalue, we by a part of the mean diagonal.
    solver = OnOurGrid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "power_iteration", lambda *_: damping)
        solver.single_layer_update()
    return np.asarray(solver.rounded().numpy())


@pytest.mark.parametrize("act_order", [False, True])
def test_qronos_is_that_of_brevitas(layer: Any, act_order: bool) -> None:
    """The package of its authors; H, G and grid are the same."""
    fmt = parse_format("int4")
    params = gptq(layer.W, layer.H, fmt).params
    scale = params.scale.reshape(-1)
    damping = 0.01 * float(np.mean(np.diag(layer.H)))
    theirs = of_brevitas(layer, scale, damping, act_order)
    found = qronos(layer.W, layer.H, fmt, G=layer.G, params=params, act_order=act_order, damp=0.01)
    ours = found.values()
    assert np.mean(np.rint((ours - theirs) / scale[:, None]) == 0) > SAME_CODES
    losses = [layer.loss(v) for v in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=SAME_LOSS)
    plain = gptq(layer.W, layer.H, fmt, params=params, act_order=act_order).values()
    assert np.mean(np.rint((plain - theirs) / scale[:, None]) == 0) < 0.9


def test_hqq_loses_no_more_than_that_of_its_authors(layer: Any) -> None:
    module = reference("hqq", "hqq/core/optimize.py")
    import torch

    fmt = parse_format("uint4g64")
    rows = layer.W.reshape(-1, 64)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    inverse = torch.tensor(15 / (high - low))
    codes, scale, zero = module.optimize_weights_proximal_legacy(
        torch.tensor(rows), inverse, torch.tensor(-low) * inverse, [0, 15], axis=1, device="cpu"
    )
    theirs = ((codes - zero) / scale).numpy()
    ours = hqq(layer.W, fmt).values().reshape(-1, 64)
    norms = [np.sum(np.abs(v - rows) ** 0.7) for v in (ours, theirs)]
    assert norms[0] <= norms[1]
