"""A folder beside the output in which it is written and checked before it replaces the old one."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from onnxq.graph.atomic import reported

SUFFIX: Final = ".onnxq-stage"
"""End of the name of every staging folder: ``.<output>.<random><suffix>``."""

_LOCK: Final = "lock"
"""A file in the folder; the folder itself is locked by the save into it."""


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder in ``target``'s folder, gone at the end of the block, whatever happens.

    It is locked as long as the block lasts; folders that a killed process left unlocked are
    removed first.

    Raises:
        DataError: the folder cannot be made.
    """
    _remove_stale(target)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
    with reported(target):
        folder.mkdir()
    descriptor = -1
    try:
        with reported(target):
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def _remove_stale(target: Path) -> None:
    with suppress(OSError):  # an unreadable parent is reported when the folder is made
        for folder in target.parent.glob(f".{target.name}.*{SUFFIX}"):
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
