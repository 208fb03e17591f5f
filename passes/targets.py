"""What the runtime that the model is for can do: the facts that the deciding passes ask about.

Facts are from measurements with onnxruntime 1.31 and from the runtimes' operator lists; a target
never lists what was not seen to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnxq.errors import SpecError


@dataclass(frozen=True)
class Target:
    """A runtime's abilities.

    Args:
        name: as the user types it.
        doc: one line for the docs and ``onnxq doctor``.
        activation: integer format of 8-bit activations that the runtime is fast with.
        matmul_nbits: the runtime has ``com.microsoft::MatMulNBits``.
        contrib_ops: the runtime has onnxruntime's other contrib operators.
        dynamic_quant: the runtime runs ``DynamicQuantizeLinear`` + ``MatMulInteger``.
        per_channel_matmul: MatMul weights may have one scale a column.
    """

    name: str
    doc: str
    activation: str = "uint8"
    matmul_nbits: bool = True
    contrib_ops: bool = True
    dynamic_quant: bool = True
    per_channel_matmul: bool = True


TARGETS: Final[dict[str, Target]] = {
    t.name: t
    for t in (
        Target("cpu", "onnxruntime on x86-64 and Arm CPUs"),
        Target("web-wasm", "onnxruntime-web, WebAssembly provider"),
        Target("openvino", "OpenVINO", matmul_nbits=False, contrib_ops=False),
        Target(
            "tensorrt",
            "TensorRT through ONNX: symmetric int8 with zero point 0",
            activation="int8",
            matmul_nbits=False,
            contrib_ops=False,
            dynamic_quant=False,
        ),
        Target(
            "qnn",
            "Qualcomm QNN HTP: per-tensor MatMul weights",
            matmul_nbits=False,
            contrib_ops=False,
            dynamic_quant=False,
            per_channel_matmul=False,
        ),
    )
}


def parse_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        SpecError: no such target; the hint lists those there are.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise SpecError(
            "SPEC-TARGET", f"there is no target `{name}`", f"one of: {', '.join(TARGETS)}"
        ) from None
