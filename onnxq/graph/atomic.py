"""Replace a file in one step, so that whoever looks sees the old one or the new one, whole.

The bytes go to a temporary file in the same folder, are flushed to the disk, and ``os.replace``
puts it in place. A process that is killed leaves the old file as it was and at most its temporary
file, which carries a name of its own and a lock: the next save to the same target finds it
unlocked and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from onnxq.errors import DataError

TEMPORARY_SUFFIX = ".onnxq-tmp"
"""End of the name of every temporary file: ``.<target>.<random><suffix>``."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Temporary:
    """An open temporary file that is to become ``target``."""

    file: IO[bytes]
    path: Path
    target: Path

    def put_in_place(self, target: Path | None = None) -> None:
        """Flush to the disk and move to ``target`` (default: the planned one), durably."""
        self.flush()
        self.path.replace(target or self.target)
        sync_folder(self.target.parent)

    def flush(self) -> None:
        """Bring all bytes to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def temporary_for(target: Path) -> Iterator[Temporary]:
    """A temporary file beside ``target``, open and locked as long as the block lasts.

    At the end of the block it is gone, whatever happens, Ctrl-C included, unless
    :meth:`Temporary.put_in_place` moved it.
    """
    remove_stale(target)
    file, path = _create(target)
    try:
        yield Temporary(file, path, target)
    finally:
        with suppress(OSError):  # the last flush of a file that is given up, on a full disk
            file.close()
        path.unlink(missing_ok=True)


@contextmanager
def reported(target: Path) -> Iterator[None]:
    """Turn an ``OSError`` of a write to ``target`` into an error with a code."""
    try:
        yield
    except OSError as error:
        raise _write_error(error, target) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder say EINVAL
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on ``folder``: two saves into it commit one after the other.

    Where the file system has no locks (some network mounts) it does nothing: the commit of a single
    process is safe without, only two at once to the same target are not.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_target(target: Path) -> None:
    """Refuse a path that cannot become a file, before any work is done for it."""
    if not target.name:
        raise DataError("DATA-OUTPUT-NOT-A-FILE", f"{target} names no file", "add a file name")
    folder = target.parent
    if not folder.is_dir():
        raise DataError(
            "DATA-OUTPUT-FOLDER-MISSING",
            f"the folder {folder} of the output does not exist",
            f"create it first: mkdir -p {folder}",
        )
    try:
        info = target.stat()
    except FileNotFoundError:
        info = None
    except OSError as error:
        raise _write_error(error, target) from error
    if info is not None and not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise DataError(
            "DATA-OUTPUT-NOT-A-FILE", f"the output {target} is {kind}", "name a file to write"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(target)


def remove_stale(target: Path) -> list[Path]:
    """Remove temporary files of ``target`` that a killed process left; returns those removed."""
    removed = []
    prefix = f".{target.name}."
    for entry in sorted(target.parent.iterdir()):
        if entry.name.startswith(prefix) and entry.name.endswith(TEMPORARY_SUFFIX):
            with suppress(OSError):
                descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    entry.unlink()
                    removed.append(entry)
                finally:
                    os.close(descriptor)
    return removed


def _create(target: Path) -> tuple[IO[bytes], Path]:
    mode = 0o666
    with suppress(OSError):
        mode = stat.S_IMODE(target.stat().st_mode)
    while True:
        name = f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        temporary = target.with_name(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, mode)
        except FileExistsError:
            continue
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else another save took it for stale before the lock
            return os.fdopen(descriptor, "w+b", buffering=1 << 20), temporary
        os.close(descriptor)


def _unwritable(target: Path) -> DataError:
    return DataError(
        "DATA-OUTPUT-UNWRITABLE",
        f"{target.parent} cannot be written to",
        "choose another folder for the output, or change its permissions",
    )


def _write_error(error: OSError, target: Path) -> DataError:
    if error.errno in _FULL:
        return DataError(
            "DATA-DISK-FULL",
            f"{target} cannot be written: {error.strerror}; nothing was changed",
            "free space, raise the quota or file size limit, or choose another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _unwritable(target)
    if error.errno == errno.ENAMETOOLONG:
        return DataError(
            "DATA-OUTPUT-NAME", f"the name of {target} is too long", "choose a shorter name"
        )
    return DataError(
        "DATA-WRITE-FAILED",
        f"{target} cannot be written: {error.strerror or error}; nothing was changed",
        "check the disk and run again",
    )
