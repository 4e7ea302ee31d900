"""Writing without halves: aside, fsync, rename. A crash leaves the old file or the new one.

Disk-full and permission errors become one-line failures that say where and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kllm.errors import KllmError

_REASONS = {
    errno.ENOSPC: ("no space left on the device", "free some space, then run the same command again"),
    errno.EDQUOT: ("disk quota exceeded", "free some space, then run the same command again"),
    errno.EROFS: ("the file system is read-only", "give another --out"),
    errno.EACCES: ("permission denied", "give another --out or change its permissions"),
    errno.EPERM: ("permission denied", "give another --out or change its permissions"),
    errno.EEXIST: ("a file stands where a directory should be", "give another --out"),
    errno.ENOTDIR: ("a file stands where a directory should be", "give another --out"),
}


@contextlib.contextmanager
def io_errors(where: Path | str) -> Iterator[None]:
    """Turns the operating system's refusals into a KllmError that names `where`."""
    try:
        yield
    except OSError as e:
        if e.errno not in _REASONS:
            raise
        message, hint = _REASONS[e.errno]
        raise KllmError(f"cannot write: {message}", where=str(where), hint=hint) from e


def fsync_path(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write the yielded sibling; it is renamed at the end.

    The sibling has the same suffix. An existing `path` is replaced; errors name `path`, not the sibling.
    """
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
        try:
            with _errors_name(path, aside):
                yield aside
            fsync_path(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def _errors_name(path: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    except KllmError as e:
        if e.where is not None:
            e.where = e.where.replace(str(aside), str(path))
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step, its directory made if needed."""
    with new_file(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, in one step."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all: fill the yielded sibling; it is renamed at the end.

    An existing `path` is replaced (moved aside first, removed after).
    """
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with _errors_name(path, aside):
                yield aside
            for file in sorted(aside.rglob("*")):
                fsync_path(file)
            fsync_path(aside)
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            aside.rename(path)
            fsync_path(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_leftovers(directory: Path) -> list[Path]:
    """Deletes torn siblings that a killed process left in `directory`; returns what went."""
    torn = [p for p in directory.glob(".*") if ".tmp-" in p.name or ".old-" in p.name]
    for path in torn:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return torn
