from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest


@pytest.fixture
def text_model() -> Callable[[str], ir.Model]:
    """A model from ONNX text."""
    return ir.from_onnx_text


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240)


@pytest.fixture
def shared() -> Path:
    """The folder with real models and data."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("ONNXQ_SHARED", root.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set ONNXQ_SHARED")
    return folder
