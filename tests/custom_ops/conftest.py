from __future__ import annotations

import os

import pytest

from onnxq.runtime.library import Library, inspect_library, library_problem, shipped_path


@pytest.fixture(scope="session")
def library() -> Library:
    """The compiled kernels; continuous integration must have them, elsewhere they may be absent."""
    problem = library_problem()
    if problem is not None:
        if os.environ.get("CI"):
            pytest.fail(f"continuous integration needs the kernels: {problem}")
        pytest.skip(f"no kernels: {problem}")
    path = shipped_path()
    assert path is not None
    return inspect_library(path)
