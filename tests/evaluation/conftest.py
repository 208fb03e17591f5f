"""Small models whose scores can be worked out by hand, and the shared folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

REPOSITORY = Path(__file__).parents[2]
WORDS = ["[PAD]", "<s>", "a", "b", "c", "d"]
"""Id of a word is its place; the tokenizer puts <s> in front."""


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("ONNXQ_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    return folder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path = tmp_path / "t.json"
    built.save(str(path))
    return path


@pytest.fixture
def save_model(tmp_path) -> Callable[..., Path]:
    """Write a model given as ONNX text, with arrays as initializers."""

    def save(text: str, **weights: np.ndarray) -> Path:
        model = onnx.parser.parse_model(text)
        for name, value in weights.items():
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        path = tmp_path / "m.onnx"
        onnx.save(model, path)
        return path

    return save


@pytest.fixture
def bigram(save_model) -> tuple[Path, np.ndarray]:
    """logits[n, s] = table[ids[n, s]]: the next token depends on the last one alone."""
    table = np.random.default_rng(0).normal(0, 2, (len(WORDS), len(WORDS))).astype(np.float32)
    path = save_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int64[n, s] input_ids) => (float[n, s, 6] logits) {
            logits = Gather(table, input_ids)
        }""",
        table=table,
    )
    return path, table
