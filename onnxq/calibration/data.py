"""Calibration samples: opened from many kinds of sources, checked against a model, streamed.

A sample is a dict from input name to array. Nothing is kept between samples, so that memory does
not grow with their number.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxq.calibration import sources
from onnxq.calibration.feeds import Array, Checker, Feeds, ModelInput, model_inputs
from onnxq.errors import DataError, UnsupportedError

Spec: TypeAlias = (
    str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
)

DEFAULT_RANDOM_SAMPLES = 16
RANDOM_LENGTH = 32
"""Size of free dimensions of random inputs, the batch and past lengths aside."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_TEXT_SUFFIXES = (".txt", ".csv", ".tsv")


class CalibrationData:
    """Samples that fit a model, read anew at every iteration.

    Args:
        origin: where they come from.
        indices: which ones, ascending.
        checker: makes them fit.
        source: description for reports.
        batch: samples joined along the first axis into one dict of feeds.
        is_random: they are random numbers, and results on them mean nothing.
        notes: what was decided or changed on the user's behalf; grows while reading.
    """

    def __init__(
        self,
        origin: sources.Source,
        indices: Sequence[int],
        checker: Checker,
        *,
        source: str,
        batch: int = 1,
        is_random: bool = False,
        notes: list[str] | None = None,
    ) -> None:
        self._origin, self._indices, self._checker = origin, list(indices), checker
        self._batch = batch
        self.source = source
        self.is_random = is_random
        self.notes = [] if notes is None else notes
        self._digest: str | None = None

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch)

    def __iter__(self) -> Iterator[Feeds]:
        """The samples.

        Raises:
            DataError: a sample does not fit the model; see :class:`Checker` for the codes.
        """
        waiting: list[Feeds] = []
        for where, feeds in self._origin.read(self._indices):
            waiting.append(self._checker.fit(feeds, where))
            if len(waiting) == self._batch:
                yield self._joined(waiting)
                waiting = []
        if waiting:
            yield self._joined(waiting)

    def _joined(self, samples: list[Feeds]) -> Feeds:
        if len(samples) == 1:
            return samples[0]
        try:
            return {
                name: np.concatenate([s[name] for s in samples]) if first.ndim else first
                for name, first in samples[0].items()
            }
        except (KeyError, ValueError) as error:
            raise DataError(
                "CALIB-BATCH",
                f"samples cannot be joined into a batch of {self._batch}: {error}",
                "pad them to one shape, or use a batch of 1",
            ) from error

    def take(self, n: int) -> CalibrationData:
        """The first ``n`` batches, or all if there are fewer."""
        return self._part(self._indices[: n * self._batch])

    def split(self, holdout: int) -> tuple[CalibrationData, CalibrationData]:
        """Samples to calibrate on and ``holdout`` samples, spread evenly, to check on.

        Raises:
            DataError: CALIB-TOO-FEW when nothing would be left to calibrate on.
        """
        total = len(self._indices)
        if not 0 <= holdout < total:
            raise DataError(
                "CALIB-TOO-FEW",
                f"{holdout} of {total} calibration samples cannot be held back",
                "give more samples, or hold back fewer",
            )
        kept_back = {(2 * k + 1) * total // (2 * holdout) for k in range(holdout)}
        return (
            self._part([x for place, x in enumerate(self._indices) if place not in kept_back]),
            self._part([x for place, x in enumerate(self._indices) if place in kept_back]),
        )

    def digest(self) -> str:
        """SHA-256, in hex, of the names, types, shapes and contents of all samples."""
        if self._digest is None:
            running = hashlib.sha256()
            for feeds in self:
                for name in sorted(feeds):
                    array = feeds[name]
                    running.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
                    running.update(_bytes(array))
            self._digest = running.hexdigest()
        return self._digest

    def _part(self, indices: Sequence[int]) -> CalibrationData:
        return CalibrationData(
            self._origin,
            indices,
            self._checker,
            source=self.source,
            batch=self._batch,
            is_random=self.is_random,
            notes=self.notes,
        )


def _bytes(array: Array) -> bytes:
    if array.dtype == object:
        return "\0".join(map(str, array.reshape(-1))).encode()
    return np.ascontiguousarray(array).tobytes()


def open_data(
    spec: Spec,
    model: ir.Model,
    *,
    tokenizer: str | Path | None = None,
    max_length: int = 128,
    pad: int | None = None,
    images: str | None = None,
    samples: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> CalibrationData:
    """Open calibration samples and check the first one against ``model``.

    Args:
        spec: one of

            - ``file.npz``: arrays by input name, a stack of samples or one sample;
            - a folder of ``.npz``, one sample each;
            - a folder of ``.npy``: one per input name with all samples stacked, or, for a model
              with one input, one sample each;
            - ``file.jsonl``: one object of inputs a line, or ``{"text": ...}`` with a tokenizer;
            - ``file.txt``, or ``file.csv``/``.tsv`` and optionally ``#column``, with a tokenizer;
            - a folder of images, with ``images`` for how to prepare them;
            - ``module:function``, which returns or yields dicts of feeds;
            - ``random``: random inputs, marked as such;
            - a Python iterable of dicts of feeds, or a callable that returns one. An iterator
              that can be read only once is kept in memory.
        model: gives the inputs' names, types and shapes.
        tokenizer: a ``tokenizer.json``.
        max_length: tokens that a text is cut to.
        pad: tokens that a text is padded to; by default none, or the model's fixed length.
        images: preprocessing, see :class:`onnxq.data.images.ImageSpec`.
        samples: how many to use, spread evenly over the source; all by default.
        batch: samples per dict of feeds.
        seed: of random inputs.

    Raises:
        DataError: the source is missing, empty or unreadable, its first sample does not fit, or a
            tokenizer or image preparation was given for what holds no texts or images.
        UnsupportedError: an input of the model that no array can feed.
    """
    inputs = model_inputs(model)
    notes: list[str] = []
    if batch < 1 or (samples is not None and samples < 1):
        raise DataError(
            "CALIB-EMPTY", f"samples={samples}, batch={batch}: nothing to read", "use at least 1"
        )
    opening = _Opening(inputs, notes, tokenizer, max_length, pad, images)
    is_random = spec == "random" and not Path("random").exists()
    if is_random:
        limits = _index_limits(model)
        origin: sources.Source = _random(inputs, limits, samples, max_length, pad, seed)
        label = f"random numbers (seed {seed})"
        notes.append("the samples are RANDOM: ranges and accuracy figures mean nothing")
    else:
        origin, label = opening.open(spec)
    opening.refuse_idle(label)
    total = len(origin)
    if not total:
        raise DataError(
            "CALIB-EMPTY", f"{label} holds no sample", "give at least one calibration sample"
        )
    count = total if samples is None else min(samples, total)
    indices = [k * total // count for k in range(count)]
    checker = Checker(inputs, notes)
    data = CalibrationData(
        origin, indices, checker, source=label, batch=batch, is_random=is_random, notes=notes
    )
    next(iter(data.take(1)))
    return data


class _Opening:
    """Finds out what kind of source a spec names."""

    def __init__(
        self,
        inputs: Sequence[ModelInput],
        notes: list[str],
        tokenizer: str | Path | None,
        max_length: int,
        pad: int | None,
        images: str | None,
    ) -> None:
        self._inputs, self._notes = inputs, notes
        self._tokenizer, self._max_length, self._pad = tokenizer, max_length, pad
        self._images = images
        self._used: set[str] = set()

    def refuse_idle(self, label: str) -> None:
        """Refuse a tokenizer or a way to prepare images that the source has no use for.

        Raises:
            DataError: ``CALIB-IDLE-OPTION``.
        """
        options = (
            ("tokenizer", self._tokenizer, "a text file, or .jsonl with texts"),
            ("images", self._images, "a folder of images"),
        )
        for name, value, use in options:
            if value is not None and name not in self._used:
                raise DataError(
                    "CALIB-IDLE-OPTION",
                    f"--{name} was given, and {label} has no use for it",
                    f"leave it out, or give {use}",
                )

    def open(self, spec: Spec) -> tuple[sources.Source, str]:
        """The source and its description."""
        if not isinstance(spec, str | Path):
            return self._python(spec)
        path = Path(spec)
        if path.is_dir():
            return self._folder(path), path.name
        name, hash_sign, column = str(spec).rpartition("#")
        if hash_sign and not path.exists():
            path = Path(name)
        if path.is_file():
            return self._file(path, column if hash_sign else None), path.name
        if _FUNCTION.fullmatch(str(spec)):
            return sources.Function(_load_function(str(spec)), str(spec)), str(spec)
        raise DataError(
            "CALIB-NOT-FOUND",
            f"there is no calibration data at {spec}",
            "give a .npz, .jsonl, .txt or .csv file, a folder of .npz, .npy or images,"
            " module:function or random",
        )

    def _python(self, spec: Any) -> tuple[sources.Source, str]:
        if callable(spec):
            label = getattr(spec, "__name__", "a callable")
            return sources.Function(spec, label), label
        if isinstance(spec, Mapping):
            spec = [spec]
        if not isinstance(spec, Iterable):
            raise DataError(
                "CALIB-KIND",
                f"a {type(spec).__name__} is no calibration data",
                "give a path, an iterable of dicts of feeds or a callable that returns one",
            )
        listed = spec if isinstance(spec, Sequence) else list(spec)
        return sources.Listed(listed), f"{len(listed)} samples in memory"

    def _file(self, path: Path, column: str | None) -> sources.Source:
        suffix = path.suffix.lower()
        if suffix == ".npz":
            return self._arrays(sources.npz_members(path), str(path))
        if suffix == ".npy" and len(self._inputs) == 1:
            return self._arrays({self._inputs[0].name: (path, None)}, str(path))
        if suffix == ".jsonl":
            return sources.Lines(path, self._encoder() if self._tokenizer else None)
        if suffix in _TEXT_SUFFIXES:
            if self._tokenizer is None:
                raise DataError(
                    "CALIB-TOKENIZER",
                    f"{path} holds texts, and there is no tokenizer",
                    "give the tokenizer.json that belongs to the model with --tokenizer",
                )
            texts = sources.read_texts(path, column, self._notes)
            return sources.Texts(texts, self._encoder(), path.name)
        raise DataError(
            "CALIB-KIND",
            f"{path} is not a kind of calibration data that is known",
            "use .npz, .jsonl, .txt, .csv or .tsv, or .npy for a model with one input",
        )

    def _arrays(self, files: Mapping[str, tuple[Path, str | None]], where: str) -> sources.Source:
        Checker(self._inputs, self._notes).names(files, where)
        return sources.Arrays(files, self._inputs)

    def _folder(self, path: Path) -> sources.Source:
        from onnxq.data.images import IMAGE_SUFFIXES

        files = sorted(entry for entry in path.iterdir() if entry.is_file())
        by_suffix: dict[str, list[Path]] = {}
        for entry in files:
            suffix = entry.suffix.lower()
            by_suffix.setdefault("image" if suffix in IMAGE_SUFFIXES else suffix, []).append(entry)
        if ".npz" in by_suffix:
            return sources.NpzFiles(by_suffix[".npz"])
        if ".npy" in by_suffix:
            return self._npy_folder(path, by_suffix[".npy"])
        if "image" in by_suffix:
            return self._image_folder(path, by_suffix["image"])
        raise DataError(
            "CALIB-EMPTY",
            f"{path} holds no .npz, .npy or image file",
            "put the samples directly in the folder",
        )

    def _npy_folder(self, path: Path, files: Sequence[Path]) -> sources.Source:
        names = {i.name for i in self._inputs}
        if {file.stem for file in files} <= names:
            return self._arrays({file.stem: (file, None) for file in files}, str(path))
        if len(self._inputs) == 1:
            return sources.NpyFiles(files, self._inputs[0].name)
        raise DataError(
            "CALIB-INPUT-UNKNOWN",
            f"{path} holds .npy files that are not named after the model's inputs",
            f"name them {', '.join(sorted(names))} (.npy), with all samples stacked,"
            " or give one .npz a sample",
        )

    def _image_folder(self, path: Path, files: Sequence[Path]) -> sources.Source:
        from onnxq.data.images import ImageSpec, load_image

        if self._images is None:
            raise DataError(
                "CALIB-IMAGES",
                f"{path} holds images, and nothing says how to prepare them",
                "add --images, for instance resize=256,crop=224,mean=127,std=128,layout=nchw",
            )
        pictures = [i for i in self._inputs if i.required]
        if len(pictures) != 1:
            raise DataError(
                "CALIB-IMAGES",
                f"the model has {len(pictures)} inputs; images can feed only one",
                "give the inputs as .npz",
            )
        self._used.add("images")
        spec = ImageSpec.parse(self._images)
        return sources.Images(files, pictures[0].name, lambda file: load_image(file, spec))

    def _encoder(self) -> Callable[[str], Mapping[str, Array]]:
        """A function that turns a text into feeds for the required inputs."""
        from onnxq.data.text import InputSpec, load_tokenizer, token_feeds, tokenize

        assert self._tokenizer is not None
        self._used.add("tokenizer")
        specs = [InputSpec(i.name, i.dtype, i.shape or ()) for i in self._inputs if i.required]
        loaded = load_tokenizer(self._tokenizer)
        pad, length = self._pad, self._max_length
        fixed = next((i.shape for i in self._inputs if i.name == "input_ids"), None)
        if pad is None and fixed and isinstance(fixed[-1], int):
            pad = fixed[-1]
            self._notes.append(f"texts padded to the model's fixed length of {pad} tokens")
        if pad is not None:
            length = min(length, pad)
        return lambda text: token_feeds(tokenize([text], loaded, length, pad), specs)


def _load_function(spec: str) -> Callable[[], Iterable[Mapping[str, Any]]]:
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise DataError(
            "CALIB-FUNCTION",
            f"{spec} cannot be imported: {type(error).__name__}: {error}",
            "the module is looked for in the current folder and among the installed packages",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise DataError(
            "CALIB-FUNCTION", f"{spec} is not callable", "name a function that yields feeds"
        )
    function: Callable[[], Iterable[Mapping[str, Any]]] = found
    return function


def _random(
    inputs: Sequence[ModelInput],
    limits: Mapping[str, int],
    samples: int | None,
    max_length: int,
    pad: int | None,
    seed: int,
) -> sources.Source:
    for spec in inputs:
        if spec.required and (spec.dtype == object or spec.shape is None):
            raise UnsupportedError(
                "CALIB-RANDOM",
                f"no random numbers for input {spec}",
                "give real samples: strings and inputs without a rank cannot be made up",
            )
    return sources.Random(
        inputs,
        limits,
        samples=DEFAULT_RANDOM_SAMPLES if samples is None else samples,
        batch=1,
        length=pad or min(RANDOM_LENGTH, max_length),
        seed=seed,
    )


def _index_limits(model: ir.Model) -> dict[str, int]:
    """For integer inputs that index tables: the size of the smallest table."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        for node, position in value.uses():
            if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or position != 1:
                continue
            table = node.inputs[0]
            attribute = node.attributes.get("axis")
            axis = 0 if attribute is None else attribute.as_int()
            shape = None if table is None else table.shape
            size = None if shape is None else shape[axis]
            if value.name and isinstance(size, int):
                limits[value.name] = min(size, limits.get(value.name, size))
    return limits
