"""What a model expects of its inputs, and whether a sample gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import DataError, UnsupportedError

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
Dim: TypeAlias = int | str | None


@dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes:
        name: as in the graph.
        dtype: numpy dtype; ``object`` for strings.
        shape: sizes, names of symbolic ones and None for unknown ones; None without a rank.
        required: False when the graph has a default for it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...] | None
    required: bool = True

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else f"[{', '.join(map(_dim, self.shape))}]"
        return f"{self.name}: {self.dtype.name} {dims}"

    @property
    def batch_free(self) -> bool:
        """The first dimension is free or 1, so that samples can lie along it."""
        if not self.shape:
            return False
        return not isinstance(self.shape[0], int) or self.shape[0] == 1


def _dim(dim: Dim) -> str:
    return "?" if dim is None else str(dim)


def model_inputs(model: ir.Model) -> list[ModelInput]:
    """The inputs of ``model``.

    Raises:
        UnsupportedError: CALIB-INPUT-TYPE for a sequence, map, optional or untyped input.
    """
    found = []
    for value in model.graph.inputs:
        dtype = value.dtype
        if value.name is None or dtype is None or not isinstance(value.type, ir.TensorType):
            raise UnsupportedError(
                "CALIB-INPUT-TYPE",
                f"input `{value.name}` is not a dense tensor of a known type",
                "calibration feeds tensors; remove or replace that input",
            )
        numpy_dtype = np.dtype(object if dtype is ir.DataType.STRING else dtype.numpy())
        shape = None if value.shape is None else tuple(_ir_dim(d) for d in value.shape)
        required = value.const_value is None and value.name not in model.graph.initializers
        found.append(ModelInput(value.name, numpy_dtype, shape, required))
    return found


def _ir_dim(dim: int | ir.SymbolicDim) -> Dim:
    return dim if isinstance(dim, int) else dim.value


class Checker:
    """Makes feeds fit a model's inputs, or says why they do not.

    Args:
        inputs: of the model.
        notes: casts and added axes are described here, each once.
    """

    def __init__(self, inputs: Sequence[ModelInput], notes: list[str]) -> None:
        self.inputs = {i.name: i for i in inputs}
        self._notes = notes

    def names(self, given: Iterable[str], where: str) -> None:
        """The names must be the model's required inputs, and perhaps optional ones.

        Raises:
            DataError: CALIB-INPUT-MISSING or CALIB-INPUT-UNKNOWN.
        """
        given = list(given)
        missing = [i.name for i in self.inputs.values() if i.required and i.name not in given]
        unknown = [name for name in given if name not in self.inputs]
        expected = "; ".join(map(str, self.inputs.values()))
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.inputs, n=1)
            guess = f"did you mean `{close[0]}`? " if close else ""
            raise DataError(
                "CALIB-INPUT-UNKNOWN",
                f"{where} gives `{unknown[0]}`, which is not an input of the model",
                f"{guess}the model takes {expected}",
            )
        if missing:
            raise DataError(
                "CALIB-INPUT-MISSING",
                f"{where} lacks the model's input `{missing[0]}`",
                f"the model takes {expected}",
            )

    def fit(self, feeds: Mapping[str, Any], where: str) -> Feeds:
        """The feeds as arrays of the model's types and shapes.

        Args:
            feeds: by input name; anything that numpy takes.
            where: the sample, for messages.

        Raises:
            DataError: CALIB-INPUT-MISSING, CALIB-INPUT-UNKNOWN, CALIB-DTYPE, CALIB-RANK,
                CALIB-SHAPE, CALIB-SYMBOL or CALIB-NAN.
        """
        if not isinstance(feeds, Mapping):
            raise DataError(
                "CALIB-SAMPLE",
                f"{where} is a {type(feeds).__name__}",
                "a sample is a dict from input name to array",
            )
        self.names(feeds, where)
        fitted: Feeds = {}
        symbols: dict[str, tuple[str, int]] = {}
        for name, value in feeds.items():
            spec = self.inputs[name]
            array = self._cast(_array(value, spec, where), spec, where, loose=_is_plain(value))
            array = self._shape(array, spec, where)
            self._symbols(array, spec, where, symbols)
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise DataError(
                    "CALIB-NAN",
                    f"{where}: input `{name}` holds {int(np.isnan(array).sum())} NaN",
                    "remove that sample, or repair how it was made",
                )
            fitted[name] = array
        return fitted

    def _cast(self, array: Array, spec: ModelInput, where: str, *, loose: bool) -> Array:
        if array.dtype == spec.dtype:
            return array
        if not _lossless(array, spec.dtype, loose):
            raise DataError(
                "CALIB-DTYPE",
                f"{where}: input `{spec.name}` is {array.dtype.name}, the model takes"
                f" {spec.dtype.name}",
                "store it in the model's type; only casts that keep every value are made",
            )
        if not loose:
            self._note(f"input `{spec.name}`: {array.dtype.name} cast to {spec.dtype.name}")
        return array.astype(spec.dtype)

    def _shape(self, array: Array, spec: ModelInput, where: str) -> Array:
        if spec.shape is None:
            return array
        rank = len(spec.shape)
        if array.ndim == rank - 1 and spec.batch_free and _agree(spec.shape[1:], array.shape):
            self._note(f"input `{spec.name}`: a leading axis of size 1 added to each sample")
            array = array[None]
        if array.ndim != rank:
            raise DataError(
                "CALIB-RANK",
                f"{where}: input `{spec.name}` has {array.ndim} dimensions {list(array.shape)},"
                f" the model takes {rank}",
                f"expected {spec}",
            )
        for axis, (wanted, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(wanted, int) and wanted != got:
                raise DataError(
                    "CALIB-SHAPE",
                    f"{where}: input `{spec.name}` has size {got} in dimension {axis}, the model"
                    f" takes {wanted}",
                    f"expected {spec}",
                )
        return array

    def _symbols(
        self, array: Array, spec: ModelInput, where: str, symbols: dict[str, tuple[str, int]]
    ) -> None:
        for dim, size in zip(spec.shape or (), array.shape, strict=False):
            if not isinstance(dim, str):
                continue
            owner, known = symbols.setdefault(dim, (spec.name, size))
            if known != size:
                raise DataError(
                    "CALIB-SYMBOL",
                    f"{where}: dimension `{dim}` is {known} in `{owner}` and {size} in"
                    f" `{spec.name}`",
                    "make the inputs of a sample agree in the sizes they share",
                )

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


def _array(value: Any, spec: ModelInput, where: str) -> Array:
    try:
        array = np.asarray(value, object if spec.dtype == object else None)
    except ValueError as error:
        raise DataError(
            "CALIB-RAGGED",
            f"{where}: input `{spec.name}` has rows of different lengths",
            "pad them to one length",
        ) from error
    if array.dtype.kind in "USO" and spec.dtype != object:
        raise DataError(
            "CALIB-DTYPE",
            f"{where}: input `{spec.name}` holds {array.dtype.name}, the model takes"
            f" {spec.dtype.name}",
            "give numbers; texts need a tokenizer",
        )
    return array


def _agree(dims: Sequence[Dim], sizes: Sequence[int]) -> bool:
    """No fixed size differs."""
    return all(d == size for d, size in zip(dims, sizes, strict=True) if isinstance(d, int))


def _is_plain(value: Any) -> bool:
    """A Python number or list, as JSON gives them, has no type of its own."""
    return not isinstance(value, np.ndarray | np.generic)


def _lossless(array: Array, dtype: np.dtype[Any], loose: bool) -> bool:
    """Whether a cast keeps every value (floats: up to the precision of ``dtype``)."""
    kind = array.dtype.kind
    if "O" in (kind, dtype.kind):
        return dtype.kind == "O"
    if dtype.kind in "iu":
        if not array.size:
            return True
        info = np.iinfo(dtype)
        return kind in "iub" and info.min <= int(array.min()) <= int(array.max()) <= info.max
    if dtype.kind == "b":
        return kind in "iu" and bool(np.isin(array, (0, 1)).all())
    floating = kind == "f" or array.dtype.name in ("bfloat16",)
    return floating or (loose and kind in "iub") or bool(np.can_cast(array.dtype, dtype, "safe"))
