"""Did-you-mean hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest of ``known``, or an empty text when none is near."""
    near = difflib.get_close_matches(word.lower().replace("_", "-"), list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
