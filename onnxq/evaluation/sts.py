"""Semantic textual similarity (Cer et al. 2017, arXiv:1708.00055): Spearman correlation x 100.

Both sentences of a pair are embedded (mean of the token vectors that are not padding), and the
cosine of the two is ranked against the human score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.data.text import token_feeds, tokenize
from onnxq.errors import DataError
from onnxq.evaluation.base import (
    EvalResult,
    Progress,
    Session,
    Setting,
    Task,
    input_specs,
    pick_output,
    read_lines,
    require_finite,
    run_session,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FloatArray = npt.NDArray[np.float32]

_SCORE, _FIRST, _SECOND = 4, 5, 6
"""Columns of the STS benchmark files; further ones (the source) are ignored."""


@dataclass(frozen=True)
class Sts(Task):
    """Options of the task.

    Attributes:
        max_length: tokens a sentence is cut to.
        pad_to: pad every sentence to so many tokens; 0 pads to the longest of its batch.
    """

    name: ClassVar[str] = "sts"
    summary: ClassVar[str] = "sentence similarity: mean pooling, cosine, Spearman x 100"
    data_format: ClassVar[str] = (
        "STS benchmark file: tab-separated, columns 5-7 score and sentences"
    )
    default_batch: ClassVar[int] = 32
    needs_tokenizer: ClassVar[bool] = True

    max_length: int = 128
    pad_to: int = 0

    def run(self, setting: Setting) -> EvalResult:
        """Spearman x 100 over the pairs, with Pearson x 100 in the details."""
        from scipy import stats

        pairs = setting.limited(read_pairs(setting.data))
        gold = [score for score, _, _ in pairs]
        if len(set(gold)) < 2:
            raise DataError(
                "DATA-TOO-FEW",
                f"{len(pairs)} pairs with {len(set(gold))} different scores have no correlation",
                "use more pairs",
            )
        texts = [text for _, first, second in pairs for text in (first, second)]
        vectors = embed(
            setting.session,
            texts,
            setting.text_tokenizer(),
            batch=setting.batch,
            max_length=self.max_length,
            pad_to=self.pad_to or None,
            progress=setting.progress,
        )
        cosines = np.sum(vectors[0::2] * vectors[1::2], axis=1)
        if np.ptp(cosines) == 0:
            require_finite(float("nan"), "the correlation")
        value = require_finite(
            100 * float(stats.spearmanr(cosines, gold).statistic), "the correlation"
        )
        details = {
            "pearson-x100": 100 * float(stats.pearsonr(cosines, gold).statistic),
            "max_length": self.max_length,
            "pad_to": self.pad_to,
        }
        return EvalResult(self.name, "spearman-x100", value, len(pairs), details)


def embed(
    session: Session,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch: int = 32,
    max_length: int = 128,
    pad_to: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> FloatArray:
    """Unit sentence vectors ``[N, D]`` f32, in the order of ``texts``.

    A model with token vectors ``[N, S, D]`` is mean-pooled over the attention mask; one whose
    output is ``[N, D]`` is taken as it is. Texts run in order of length, so that little is padded.

    Raises:
        DataError: the model's inputs or outputs do not fit, or its outputs are not finite.
    """
    if not texts:
        raise DataError("DATA-EMPTY", "there are no texts to embed", "give at least one text")
    specs = input_specs(session)
    output = pick_output(session, ("last_hidden_state", "sentence_embedding"), (3, 2))
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    rows: list[FloatArray] = []
    for start in range(0, len(order), batch):
        chunk = [texts[i] for i in order[start : start + batch]]
        tokens = tokenize(chunk, tokenizer, max_length, pad_to)
        (hidden,) = run_session(session, [output], token_feeds(tokens, specs))
        vectors = hidden.astype(np.float32)
        if vectors.ndim == 3:
            weights = tokens.mask[:, :, None].astype(np.float32)
            vectors = (vectors * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        require_finite(float(norms.sum()), "the norm of the sentence vectors")
        rows.extend(vectors / np.maximum(norms, np.finfo(np.float32).tiny))
        progress(min(start + batch, len(order)), len(order))
    result = np.empty((len(texts), len(rows[0])), dtype=np.float32)
    result[order] = rows
    return result


def read_pairs(path: Path) -> list[tuple[float, str, str]]:
    """(score, sentence, sentence) of every line of an STS benchmark file.

    Raises:
        DataError: ``DATA-COLUMNS`` names the first line that does not fit.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        try:
            pairs.append((float(cells[_SCORE]), cells[_FIRST], cells[_SECOND]))
        except (IndexError, ValueError) as error:
            raise DataError(
                "DATA-COLUMNS",
                f"{path} line {number}: {len(cells)} tab-separated columns, need a score in column "
                "5 and sentences in columns 6 and 7",
                "give a file of the STS benchmark, such as sts-dev.csv",
            ) from error
    return pairs
