"""Run a model that is still in memory, exactly as it is written.

Weights are handed to onnxruntime by reference, so that a check costs no second copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxq.errors import DataError
from onnxq.graph.check import walk_tensors
from onnxq.graph.tensors import placeholders, skeleton

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

Sample = Mapping[str, np.ndarray]

_SHARE_BYTES = 1 << 12
"""Smaller weights are copied into the session's protobuf: shape inputs must be readable there."""


def memory_session(
    model: ir.Model, *, optimise: bool = False, threads: int = 1, outputs: Sequence[str] = ()
) -> ort.InferenceSession:
    """A CPU session of ``model``, whose weights it shares.

    Args:
        model: any model below 2 GiB of graph; the weights do not count.
        optimise: let onnxruntime rewrite the graph; off for checks of equivalence.
        threads: of one operator.
        outputs: names of inner values of the main graph that become outputs as well.

    Raises:
        DataError: ``DATA-ORT-REFUSED``, with onnxruntime's message.
    """
    import onnxruntime as ort

    main = {id(v.const_value) for v in model.graph.initializers.values()}
    proto, taken = skeleton(
        model,
        lambda tensor, is_initializer: (
            is_initializer and tensor.nbytes >= _SHARE_BYTES and id(tensor) in main
        ),
    )
    names: list[str] = []
    arrays: list[np.ndarray] = []
    shared = {id(t) for t in proto.graph.initializer}
    for tensor, index in placeholders(walk_tensors(proto)):
        if index is None:
            continue
        array = _plain(taken[index])
        if id(tensor) in shared and array is not None:
            tensor.external_data.add(key="length", value=str(array.nbytes))
            names.append(tensor.name)
            arrays.append(array)
        else:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = taken[index].tobytes()
    _expose(proto, outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]
    if values:
        options.add_external_initializers(names, values)
    try:
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's classes have no common base
        text = " ".join(str(error).split())[:600]
        raise DataError(
            "DATA-ORT-REFUSED",
            f"onnxruntime cannot load the model: {text}",
            "run `onnxq inspect` on the model; --bisect names the pass if one broke it",
        ) from error
    return session


def _plain(tensor: ir.TensorProtocol) -> np.ndarray | None:
    """The weight as an array that onnxruntime can share, or None for types numpy lacks."""
    array = np.ascontiguousarray(tensor.numpy())
    return array if array.dtype.isbuiltin == 1 and array.dtype.kind in "fiub" else None


def _expose(proto: onnx.ModelProto, outputs: Sequence[str]) -> None:
    present = {o.name for o in proto.graph.output}
    for name in outputs:
        if name not in present:
            proto.graph.output.add(name=name)


def run_samples(
    session: ort.InferenceSession, samples: Sequence[Sample]
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs for each sample, by name.

    Raises:
        DataError: ``DATA-ORT-RUN``: onnxruntime failed on a sample.
    """
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    for number, sample in enumerate(samples):
        feeds = {name: array for name, array in sample.items() if name in wanted}
        try:
            values: Sequence[Any] = session.run(names, feeds)
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            raise DataError(
                "DATA-ORT-RUN",
                f"onnxruntime failed on sample {number}: {text}",
                "check that names, shapes and types of the samples are the model's",
            ) from error
        yield dict(zip(names, values, strict=True))
