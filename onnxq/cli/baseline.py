"""The float model that quantization is judged against, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxq.graph.io import copy_model
from onnxq.pipeline.hooks import Hook

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.pipeline.hooks import Step


class KeepBaseline(Hook):
    """Keeps the model as it is before the first pass that changes numerics.

    Passes before it preserve the function but not every inner value (a bias that is folded into the
    next layer, a scale into a norm): compared with the input, such values would look like errors.
    Weights are shared with the model, not copied.

    Attributes:
        model: None until such a pass comes, and in a run that was resumed behind it.
    """

    def __init__(self) -> None:
        self.model: ir.Model | None = None

    def before_pass(self, step: Step) -> None:
        """Keep the model once."""
        if self.model is None and step.owner.tolerance is None:
            self.model = copy_model(step.model)
