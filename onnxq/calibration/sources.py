"""Where calibration samples come from: one class per kind of source.

A source knows how many samples it has and reads those it is asked for in ascending order, one at
a time. Samples are what the source holds, not yet checked against a model.
"""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np

from onnxq.calibration.feeds import Array, Dim, ModelInput
from onnxq.errors import DataError, OnnxqError

Sample: TypeAlias = tuple[str, Mapping[str, Any]]
"""A name for messages, and the feeds."""


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples with the given ascending numbers."""
        ...


class NpyRows:
    """Rows along the first axis of an array in an open ``.npy`` stream, read one at a time.

    Raises:
        DataError: CALIB-READ when it is not an array of numbers or is cut short.
    """

    def __init__(self, stream: IO[bytes], label: str) -> None:
        self._stream, self._label = stream, label
        try:
            version = np.lib.format.read_magic(stream)
            reader: Callable[..., Any] = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, self.dtype = reader(stream)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise _unreadable(label, error) from error
        if self.dtype.hasobject:
            raise DataError(
                "CALIB-READ",
                f"{label} holds Python objects, which are never unpickled",
                "store arrays of numbers",
            )
        self._start = stream.tell()
        self._whole: Array | None = None
        if fortran and len(self.shape) > 1:
            count = int(np.prod(self.shape))
            flat = np.frombuffer(self._read(count * self.dtype.itemsize), self.dtype)
            self._whole = flat.reshape(self.shape[::-1]).T

    def rows(self, start: int, stop: int) -> Array:
        """``[stop - start, ...]``."""
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[start:stop])
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._stream.seek(self._start + start * row)
        data = self._read((stop - start) * row)
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def all(self) -> Array:
        """The whole array."""
        if not self.shape:
            self._stream.seek(self._start)
            return np.frombuffer(self._read(self.dtype.itemsize), self.dtype).reshape(())
        return self.rows(0, self.shape[0])

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _unreadable(self._label, error) from error
        if len(data) != size:
            raise _unreadable(self._label, "it is cut short")
        return data


def _unreadable(label: str, why: object) -> DataError:
    return DataError("CALIB-READ", f"{label} cannot be read: {why}", "write the file again")


class Arrays:
    """Arrays by input name, in one ``.npz`` or several ``.npy``, of one or of many samples.

    Relative to the input's rank r an array holds: r + 1 dimensions, a stack of samples; r, samples
    along its first axis where the model leaves that free (all such arrays must agree), or else one
    sample; a scalar, a value that all samples share.
    """

    def __init__(
        self, files: Mapping[str, tuple[Path, str | None]], inputs: Sequence[ModelInput]
    ) -> None:
        self._files = files
        specs = {i.name: i for i in inputs}
        with ExitStack() as stack:
            shapes = {name: self._open(name, stack).shape for name in files}
        self._stacked = {
            name
            for name, shape in shapes.items()
            if name in specs and len(shape) == _rank(specs[name], shape) + 1
        }
        along = {
            name
            for name, shape in shapes.items()
            if name in specs and name not in self._stacked and shape and specs[name].batch_free
        }
        sizes = {shapes[name][0] for name in along}
        splittable = bool(along) and len(sizes) == 1 and not self._stacked
        self._sliced = along if splittable and sizes != {1} else set()
        counts = {name: shapes[name][0] for name in (*self._stacked, *self._sliced)}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            raise DataError(
                "CALIB-SAMPLES",
                f"the arrays hold different numbers of samples: {listed}",
                "stack the same number of samples in each",
            )
        self._count = next(iter(counts.values()), 1)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        with ExitStack() as stack:
            readers = {name: self._open(name, stack) for name in self._files}
            shared = {
                name: reader.all()
                for name, reader in readers.items()
                if name not in self._stacked and name not in self._sliced
            }
            for index in indices:
                feeds: dict[str, Array] = dict(shared)
                for name in (*self._stacked, *self._sliced):
                    row = readers[name].rows(index, index + 1)
                    feeds[name] = row[0] if name in self._stacked else row
                yield f"sample {index}", {name: feeds[name] for name in self._files}

    def _open(self, name: str, stack: ExitStack) -> NpyRows:
        path, member = self._files[name]
        try:
            if member is None:
                return NpyRows(stack.enter_context(path.open("rb")), str(path))
            archive = stack.enter_context(zipfile.ZipFile(path))
            return NpyRows(stack.enter_context(archive.open(member)), f"`{name}` of {path}")
        except (OSError, zipfile.BadZipFile) as error:
            raise _unreadable(str(path), error) from error


def _rank(spec: ModelInput, shape: tuple[int, ...]) -> int:
    return len(shape) if spec.shape is None else len(spec.shape)


def npz_members(path: Path) -> dict[str, tuple[Path, str | None]]:
    """The arrays of an ``.npz`` by name.

    Raises:
        DataError: CALIB-READ when it is not one, CALIB-EMPTY when it holds nothing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(str(path), error) from error
    if not names:
        raise DataError("CALIB-EMPTY", f"{path} holds no array", "store one array per input")
    return {name.removesuffix(".npy"): (path, name) for name in names}


class NpzFiles:
    """A folder of ``.npz`` files, one sample each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            path = self._paths[index]
            try:
                with np.load(path, allow_pickle=False) as archive:
                    feeds = {name: archive[name] for name in archive.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise _unreadable(str(path), error) from error
            yield path.name, feeds


class NpyFiles:
    """A folder of ``.npy`` files, one sample each, for a model with one input."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._paths, self._name = paths, name

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            path = self._paths[index]
            try:
                array = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise _unreadable(str(path), error) from error
            yield path.name, {self._name: array}


class Lines:
    """A JSONL file, one object of inputs a line; empty lines are left out.

    Args:
        path: the file.
        encode: turns a text into feeds for lines of the form ``{"text": ...}``, or None.
    """

    def __init__(self, path: Path, encode: Callable[[str], Mapping[str, Array]] | None) -> None:
        self._path, self._encode = path, encode
        self._offsets: list[tuple[int, int]] = []
        with path.open("rb") as file:
            position = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append((number, position))
                position += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        with self._path.open("rb") as file:
            for index in indices:
                number, offset = self._offsets[index]
                file.seek(offset)
                where = f"line {number} of {self._path.name}"
                yield where, self._feeds(file.readline(), where)

    def _feeds(self, line: bytes, where: str) -> Mapping[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(
                "CALIB-READ", f"{where} is not JSON: {error}", "write one JSON object a line"
            ) from error
        if not isinstance(found, dict):
            raise DataError(
                "CALIB-READ",
                f"{where} is a JSON {type(found).__name__}, not an object",
                'write {"input name": [values], ...}, or {"text": "..."} with a tokenizer',
            )
        if set(found) != {"text"}:
            return found
        if self._encode is None:
            raise DataError(
                "CALIB-TOKENIZER",
                f"{where} is a text, and there is no tokenizer",
                "give the tokenizer.json that belongs to the model with --tokenizer",
            )
        return self._encode(str(found["text"]))


class Texts:
    """Texts, encoded one at a time."""

    def __init__(
        self, texts: Sequence[str], encode: Callable[[str], Mapping[str, Array]], label: str
    ) -> None:
        self._texts, self._encode, self._label = texts, encode, label

    def __len__(self) -> int:
        return len(self._texts)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            yield f"text {index} of {self._label}", self._encode(self._texts[index])


_TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "question")
_SNIFFED_ROWS = 20
_WORDS_OF_A_TEXT = 3.0


def read_texts(path: Path, column: str | None, notes: list[str]) -> list[str]:
    """The non-empty lines of a text file, or a column of a ``.csv`` or ``.tsv``.

    Args:
        path: the file, UTF-8.
        column: a name in the header or a number from 0; None: the column called text or
            sentence, else the first one with several words a cell, which a note then says.
        notes: gets that note.

    Raises:
        DataError: CALIB-READ when it is not UTF-8, CALIB-COLUMN when no column fits.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), error) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() not in (".csv", ".tsv"):
        if column is not None:
            raise DataError(
                "CALIB-COLUMN", f"{path} has no columns", "leave out what follows the #"
            )
        return lines
    if lines and "\t" in lines[0]:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        rows = list(csv.reader(lines))
    if not rows:
        return []
    index, first = _column(rows, column, path, notes)
    cells = (row[index].strip() for row in rows[first:] if len(row) > index)
    return [cell for cell in cells if cell]


def _column(
    rows: Sequence[Sequence[str]], column: str | None, path: Path, notes: list[str]
) -> tuple[int, int]:
    """Index of the column with the texts, and of the first row below the header."""
    header = [cell.strip().lower() for cell in rows[0]]
    wanted = _TEXT_COLUMNS if column is None else (column.lower(),)
    for name in wanted:
        if name in header:
            return header.index(name), 1
    if column is not None and column.isdecimal() and int(column) < len(header):
        return int(column), 0
    if column is None:
        sniffed = rows[:_SNIFFED_ROWS]
        for index in range(len(header)):
            words = [len(row[index].split()) for row in sniffed if len(row) > index]
            if sum(words) >= _WORDS_OF_A_TEXT * len(sniffed):
                notes.append(f"{path.name}: texts taken from column {index} (counted from 0)")
                return index, 0
    raise DataError(
        "CALIB-COLUMN",
        f"{path} has no column {column!r}" if column else f"{path} has no column of texts",
        f"name one of {', '.join(header)} or a number from 0, as in {path.name}#{len(header) - 1}",
    )


class Images:
    """Image files, prepared one at a time by ``load``."""

    def __init__(self, paths: Sequence[Path], name: str, load: Callable[[Path], Array]) -> None:
        self._paths, self._name, self._load = paths, name, load

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            path = self._paths[index]
            yield path.name, {self._name: self._load(path)[None]}


class Listed:
    """Feeds in a Python sequence."""

    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            yield f"sample {index}", self._feeds[index]


class Function:
    """A callable that returns or yields feeds, called anew for every sweep.

    It is run once at the start to count its samples; it must give the same ones every time.
    """

    def __init__(self, function: Callable[[], Iterable[Mapping[str, Any]]], label: str) -> None:
        self._function, self._label = function, label
        self._count = sum(1 for _ in self._call())

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        wanted = iter(indices)
        following = next(wanted, None)
        for index, feeds in enumerate(self._call()):
            if following is None:
                return
            if index == following:
                yield f"sample {index} of {self._label}", feeds
                following = next(wanted, None)
        if following is not None:
            raise DataError(
                "CALIB-FUNCTION",
                f"{self._label} gave {self._count} samples at first and fewer later",
                "let it give the same samples at every call",
            )

    def _call(self) -> Iterator[Mapping[str, Any]]:
        try:
            found = self._function()
            if isinstance(found, Mapping):
                found = [found]
            yield from found
        except OnnxqError:
            raise
        except Exception as error:
            raise DataError(
                "CALIB-FUNCTION",
                f"{self._label} failed: {type(error).__name__}: {error}",
                "it must return or yield dicts from input name to array",
            ) from error


class Random:
    """Random inputs: for trying things out, never for accuracy.

    Floats are standard normal; integers lie in ``[0, limit)``, where limit comes from the tables
    that the model indexes with them, else 2; masks are one; position ids count up.
    """

    def __init__(
        self,
        inputs: Sequence[ModelInput],
        limits: Mapping[str, int],
        *,
        samples: int,
        batch: int,
        length: int,
        seed: int,
    ) -> None:
        self._inputs = [i for i in inputs if i.required]
        self._limits, self._samples, self._seed = limits, samples, seed
        self._batch, self._length = batch, length

    def __len__(self) -> int:
        return self._samples

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :class:`Source`."""
        for index in indices:
            rng = np.random.default_rng([self._seed, index])
            yield f"random sample {index}", {i.name: self._draw(i, rng) for i in self._inputs}

    def _draw(self, spec: ModelInput, rng: np.random.Generator) -> Array:
        dims = spec.shape or ()
        shape = tuple(self._size(dim, axis) for axis, dim in enumerate(dims))
        if _is_recurrent_state(dims):
            shape = (shape[0], self._batch, shape[2])
        name = spec.name.lower()
        if "mask" in name and spec.dtype.kind in "iub":
            return np.ones(shape, spec.dtype)
        if "position" in name and spec.dtype.kind in "iu":
            return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(spec.dtype)
        if spec.dtype.kind == "b":
            return np.ones(shape, spec.dtype)
        if spec.dtype.kind in "iu":
            return rng.integers(0, self._limits.get(spec.name, 2), shape).astype(spec.dtype)
        return rng.standard_normal(shape).astype(spec.dtype)

    def _size(self, dim: Dim, axis: int) -> int:
        """Past lengths are 0, the first axis is the batch, other free sizes a length."""
        if isinstance(dim, int):
            return dim
        name = (dim or "").lower()
        if "+" in name:
            return sum(self._size(part.strip(), axis) for part in name.split("+"))
        if "past" in name and "total" not in name:
            return 0
        return self._batch if axis == 0 or "batch" in name else self._length


def _is_recurrent_state(dims: Sequence[Dim]) -> bool:
    """``[layers, free, width]``: the free size in the middle is the batch."""
    return len(dims) == 3 and [isinstance(d, int) for d in dims] == [True, False, True]
