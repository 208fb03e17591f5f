"""Raising a model's opset with ONNX's own converter."""

from __future__ import annotations

import onnx_ir as ir

from onnxq.passes.contract import PassReport


def raise_opset(model: ir.Model, lowest: int, report: PassReport) -> bool:
    """Convert ``model`` in place if its default opset is below ``lowest``; say if it was.

    A model that ONNX's converter refuses stays as it is, and the report says why.
    """
    import onnx
    import onnx.version_converter

    current = model.opset_imports.get("", lowest)
    if current >= lowest:
        return False
    try:
        converted = onnx.version_converter.convert_version(ir.to_proto(model), lowest)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as error:
        first_line = str(error).strip().splitlines()[-1]
        report.skip("model", f"opset {current} stays: ONNX's converter says: {first_line}")
        return False
    raised = ir.from_proto(converted)
    model.graph = raised.graph
    model.opset_imports.update(raised.opset_imports)
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    least = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
    model.ir_version = max(model.ir_version, raised.ir_version, least)
    return True
