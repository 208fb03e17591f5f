"""Classification: images of a folder (top-1, top-5) and sentences of a table (accuracy)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from onnxq.data.images import ImageSpec, load_images
from onnxq.data.text import token_feeds, tokenize
from onnxq.errors import DataError
from onnxq.evaluation.base import (
    Array,
    EvalResult,
    Setting,
    Task,
    accuracy_percent,
    check_labels,
    input_specs,
    pick_output,
    read_lines,
    require_finite,
    run_session,
)

LABELS_FILE = "labels.txt"


@dataclass(frozen=True)
class ImageNet(Task):
    """Options of the task.

    Attributes:
        spec: preprocessing, see :class:`onnxq.data.images.ImageSpec`.
        offset: added to every label, 1 for models with a background class.
    """

    name: ClassVar[str] = "imagenet"
    summary: ClassVar[str] = "image classification, top-1 in percent"
    data_format: ClassVar[str] = "folder with labels.txt: file name, tab, class index[, tab, name]"
    default_batch: ClassVar[int] = 16
    needs_tokenizer: ClassVar[bool] = False

    spec: str = "resize=256,crop=224,mean=127,std=128,layout=nchw"
    offset: int = 0

    def run(self, setting: Setting) -> EvalResult:
        """Top-1 in percent, with top-5 in the details."""
        spec = ImageSpec.parse(self.spec)
        examples = setting.limited(read_image_labels(setting.data))
        specs = input_specs(setting.session)
        if len(specs) != 1:
            raise DataError(
                "DATA-INPUT-UNKNOWN",
                f"the model has {len(specs)} inputs, this task feeds one image tensor",
                "evaluate an image classifier",
            )
        output = pick_output(setting.session, ("logits",), (2,))
        top1 = top5 = 0
        for batch in setting.batches(examples):
            images = load_images([path for path, _ in batch], spec).astype(specs[0].dtype)
            (logits,) = run_session(setting.session, [output], {specs[0].name: images})
            labels = [label + self.offset for _, label in batch]
            _check_logits(logits, labels, setting.data)
            ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
            hits = ranked == np.asarray(labels)[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(axis=1).sum())
        total = len(examples)
        details = {
            "top5-percent": accuracy_percent(top5, total),
            "spec": str(spec),
            "offset": self.offset,
        }
        return EvalResult(
            self.name, "accuracy-percent", accuracy_percent(top1, total), total, details
        )


@dataclass(frozen=True)
class Sst2(Task):
    """Options of the task.

    Attributes:
        max_length: tokens a sentence is cut to.
    """

    name: ClassVar[str] = "sst2"
    summary: ClassVar[str] = "sentence classification, accuracy in percent"
    data_format: ClassVar[str] = "tab-separated file: sentence, class index (a header is skipped)"
    default_batch: ClassVar[int] = 32
    needs_tokenizer: ClassVar[bool] = True

    max_length: int = 128

    def run(self, setting: Setting) -> EvalResult:
        """Accuracy in percent."""
        examples = setting.limited(read_labelled_sentences(setting.data))
        specs = input_specs(setting.session)
        output = pick_output(setting.session, ("logits",), (2,))
        tokenizer = setting.text_tokenizer()
        # Sentences of like length share a batch, so that little is padded; the mean needs no order.
        ordered = sorted(examples, key=lambda example: len(example[0]))
        hits = 0
        for batch in setting.batches(ordered):
            tokens = tokenize([text for text, _ in batch], tokenizer, self.max_length)
            (logits,) = run_session(setting.session, [output], token_feeds(tokens, specs))
            labels = [label for _, label in batch]
            _check_logits(logits, labels, setting.data)
            hits += int((logits.argmax(axis=1) == np.asarray(labels)).sum())
        value = accuracy_percent(hits, len(examples))
        details = {"max_length": self.max_length}
        return EvalResult(self.name, "accuracy-percent", value, len(examples), details)


def _check_logits(logits: Array, labels: list[int], data: Path) -> None:
    """``[N, classes]``, finite, with a class for every label."""
    if logits.ndim != 2 or logits.shape[0] != len(labels):
        raise DataError(
            "DATA-OUTPUT-UNKNOWN",
            f"the model's output is {list(logits.shape)} for {len(labels)} examples",
            "evaluate a classifier, one row of logits an example",
        )
    check_labels(labels, logits.shape[1], data)
    require_finite(float(np.abs(logits.astype(np.float64)).max()), "the largest logit")


def read_image_labels(folder: Path) -> list[tuple[Path, int]]:
    """(image, class) of every line of ``labels.txt`` in ``folder``.

    Raises:
        DataError: ``DATA-FILE``, ``DATA-COLUMNS``, or ``DATA-IMAGE`` for a file that is not there.
    """
    labels = folder / LABELS_FILE
    if not labels.is_file():
        raise DataError(
            "DATA-FILE", f"{folder} has no {LABELS_FILE}", "one line an image: file, tab, class"
        )
    examples = []
    for number, line in enumerate(read_lines(labels), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) < 2 or not cells[1].strip().lstrip("-").isdigit():
            raise _columns(labels, number, "a file name, a tab and a class index")
        path = folder / cells[0]
        if not path.is_file():
            raise DataError(
                "DATA-IMAGE", f"{labels} line {number}: there is no {path}", "mend the list"
            )
        examples.append((path, int(cells[1])))
    return examples


def read_labelled_sentences(path: Path) -> list[tuple[str, int]]:
    """(sentence, class) of every line; a first line whose class is no number is a header.

    Raises:
        DataError: ``DATA-FILE``, ``DATA-COLUMNS``.
    """
    examples = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        numeric = len(cells) == 2 and cells[1].strip().lstrip("-").isdigit()
        if numeric:
            examples.append((cells[0], int(cells[1])))
        elif number > 1 or len(cells) != 2:
            raise _columns(path, number, "a sentence, a tab and a class index")
    return examples


def _columns(path: Path, number: int, wanted: str) -> DataError:
    return DataError(
        "DATA-COLUMNS", f"{path} line {number} is not {wanted}", "mend the line or the format"
    )
