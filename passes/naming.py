"""Errors from layers below, told with the name of the site that they are about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from onnxq.errors import DataError, UnsupportedError


@contextmanager
def about(site: str) -> Iterator[None]:
    """Put ``site`` before the cause of errors that formats and solvers raise on its arrays.

    Raises:
        DataError: as inside.
        UnsupportedError: as inside.
    """
    try:
        yield
    except (DataError, UnsupportedError) as error:
        if re.search(rf"(?<![\w/.]){re.escape(site)}(?![\w/])", error.cause):
            raise
        named = type(error)(error.code, f"{site}: {error.cause}", error.hint, **error.details)
        raise named from error
