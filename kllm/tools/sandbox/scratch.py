"""The folder that a worker may write to: made, held, measured, removed, also if its owner was killed."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

SCRATCH_FILES = 1000
SCRATCH_SIZES = 16  # the folder's limit, in largest files
SCRATCH_DEPTH = 50

_PREFIX = "kllm-python-"
_NAME = re.compile(_PREFIX + r"\d+-\w+")  # the number, the owner's, is for people
_ATTEMPTS = 10
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


def make_scratch() -> tuple[Path, int]:
    """A new folder, and the descriptor whose lock says that the folder's owner lives.

    The lock ends with the process, whatever ends it. A process number in its place would be wrong where
    containers share the folder of temporary files, and may be another process's by now.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            held = _held(path)
        except BaseException:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        if held is not None:
            return path, held
    raise FileExistsError("the folder for its files is removed as soon as it is made")


def _held(path: Path) -> int | None:
    """A descriptor with the lock; None if a sweep took the folder for a dead owner's before it was held."""
    try:
        held = os.open(path, _FOLDER)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, held)
        try:
            _lock(held)
        except BlockingIOError:
            return None
        except OSError:  # no locks in this file system: no sweep gets one either
            pass
        if not path.exists():
            return None
        undo.pop_all()
    return held


def _lock(folder: int) -> None:
    import fcntl  # not where there is no sandbox

    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_stale() -> None:
    """Removes the folders of this user whose owners died without a chance to."""
    with contextlib.suppress(OSError):
        for path in list(Path(tempfile.gettempdir()).iterdir()):
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    folder = _opened(path)
    try:
        _lock(folder)  # fails if its owner lives
        if _identity(folder) == (found.st_dev, found.st_ino):
            remove_scratch(path)
    finally:
        os.close(folder)


def scratch_is_full(folder: Path, limit: int) -> bool:
    """Whether the files there hold over `limit` bytes or are too many, too deep, or hidden from us."""
    total = count = 0
    waiting = [(str(folder), 1)]
    try:
        while waiting:
            path, depth = waiting.pop()
            with os.scandir(path) as entries:
                for entry in entries:
                    count += 1
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, depth + 1))
                    if total > limit or count > SCRATCH_FILES or depth > SCRATCH_DEPTH:
                        return True
    except FileNotFoundError:
        return False
    except OSError:  # unreadable, or a path beyond PATH_MAX
        return True
    return False


def remove_scratch(folder: Path) -> None:
    """Removes a folder however deep, step by step: no path grows too long, no recursion, no link followed."""
    with contextlib.suppress(OSError):
        folder.rmdir()  # most are empty, and this needs no descriptor
        return
    with contextlib.suppress(OSError):
        _empty(_opened(folder))
        folder.rmdir()


def _empty(here: int) -> None:
    """Empties and closes an open folder."""
    above: list[tuple[list[str], tuple[int, int]]] = []  # the way down: which folder, and what it has left
    try:
        left = _clear(here)
        while left or above:
            if left:
                above.append((left, _identity(here)))
                _step(here, _opened(left[-1], here))
                left = _clear(here)
                continue
            left, known = above.pop()
            _step(here, os.open("..", _FOLDER, dir_fd=here))
            if _identity(here) != known:  # a worker that is not quite dead moved it: this may be anywhere
                return
            os.rmdir(left.pop(), dir_fd=here)
    finally:
        os.close(here)


def _step(here: int, there: int) -> None:
    """From now on `here` is the folder that `there` was."""
    os.dup2(there, here, inheritable=False)
    os.close(there)


def _clear(folder: int) -> list[str]:
    """Removes the files and empty folders in an open folder; returns the folders that are left."""
    os.fchmod(folder, 0o700)
    left = []
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=folder)
            continue
        try:
            os.rmdir(entry.name, dir_fd=folder)
        except OSError:
            left.append(entry.name)
    return left


def _opened(name: str | Path, above: int | None = None) -> int:
    """An open folder that is no link; what the code made unreadable is readable after."""
    try:
        return os.open(name, _FOLDER, dir_fd=above)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
    handle = os.open(name, os.O_PATH | _FOLDER, dir_fd=above)
    try:
        Path(f"/proc/self/fd/{handle}").chmod(0o700)  # a name could have become a link
    finally:
        os.close(handle)
    return os.open(name, _FOLDER, dir_fd=above)


def _identity(folder: int) -> tuple[int, int]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino
