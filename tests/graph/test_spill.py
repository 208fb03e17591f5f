"""Large tensors go to disk and come back bit by bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import DataError
from onnxq.graph.spill import LARGE, spill_new_tensors, spilled
from onnxq.graph.tensors import copy_to_edit, tensor_slots


def test_large_arrays_lie_on_disk_and_come_back() -> None:
    array = np.random.default_rng(0).integers(0, 255, (3, LARGE), np.uint8)
    tensor = spilled(array)
    assert not isinstance(tensor, np.ndarray)
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.tobytes() == array.tobytes()
    small = np.zeros(4, np.float32)
    assert spilled(small) is small


def test_a_missing_temporary_folder_is_an_error_with_a_code(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError) as caught:
        spilled(np.zeros(LARGE, np.uint8))
    assert caught.value.code == "DATA-WRITE-FAILED"


def _model(**arrays: np.ndarray) -> ir.Model:
    values = [ir.val(n, const_value=ir.tensor(a, name=n)) for n, a in arrays.items()]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g"), ir_version=10)


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {tensor.name or "": tensor for _, tensor, _ in tensor_slots(model)}


def test_only_new_large_tensors_move() -> None:
    rng = np.random.default_rng(1)
    old, new = rng.standard_normal((2, LARGE // 4), np.float32)
    reference = _model(old=old)
    model = _model(old=old, new=new, small=new[:8].copy())
    before = _tensors(model)
    held = _tensors(reference)["old"]
    next(iter(tensor_slots(model)))[0](held)
    spill_new_tensors(model, reference)
    after = _tensors(model)
    assert after["old"] is held
    assert after["small"] is before["small"]
    assert isinstance(after["new"], ir.LazyTensor)
    np.testing.assert_array_equal(after["new"].numpy(), new)
    assert after["new"].shape == before["new"].shape


def test_elements_that_the_reference_holds_stay_in_memory() -> None:
    reference = _model(old=np.zeros(LARGE, np.float32))
    copied = copy_to_edit(reference)
    assert _tensors(copied)["old"] is not _tensors(reference)["old"]
    spill_new_tensors(copied, reference)
    assert type(_tensors(copied)["old"]) is ir.Tensor
