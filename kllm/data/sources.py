"""From the name of a data source to a stream of records.

A source is a file, a directory, a glob, `builtin:SUBJECT/SPLIT` or a hub id (see hub.py). Reading is
lazy and takes constant memory whatever the size; each record comes with its place (`file:line`).
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kllm.data import hub
from kllm.data.readers import KNOWN, OnBad, file_kind, read_file
from kllm.errors import UserError

BUILTIN = {
    "world": ("pretrain", "sft", "preference", "rl", "tools", "eval", "preference-eval"),
    "identity": ("sft", "eval"),
    "reasoning": ("sft", "eval"),
    "tools": ("offers", "copy", "practice", "sft", "eval"),
}
_PREFIX = "builtin:"
_GLOB = frozenset("*?[")
_RACY_SECONDS = 2.0


def iter_records(
    path: str | Path, *, max_bytes: int | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields (where, object) for every record of a source, in a fixed order.

    Args:
        max_bytes: stop after about this many uncompressed bytes; several files share it by their size.
        on_bad: called with (where, reason) for a line that cannot be read, which is then skipped.
            Without it such a line raises UserError.

    Raises:
        UserError: nothing there, an unknown kind of file, an empty or damaged file.
    """
    source = str(path)
    if is_builtin(source):
        yield from _iter_builtin(source, max_bytes)
        return
    files = expand(source)
    single = len(files) == 1
    total = sum(file.stat().st_size for file in files)
    for file in files:
        size = file.stat().st_size
        if size == 0 and single:
            raise UserError("the file is empty", str(file))
        if size == 0:
            continue
        # A share for each file, so that a capped sample sees all of them.
        budget = None if max_bytes is None else max(1, max_bytes * size // total)
        yield from read_file(file, budget, on_bad)


def expand(source: str | Path) -> list[Path]:
    """The data files that a source means, sorted; [] for a builtin source. Fetches hub data sets."""
    text = str(source)
    if is_builtin(text):
        _builtin_parts(text)
        return []
    path = Path(text).expanduser()
    if path.exists():
        return _inside(path)
    if _GLOB & set(text):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        files = [file for file in found if file.is_file() and file_kind(file)]
        if not files:
            matched = f"{len(found)} matches are no data files" if found else "nothing matches"
            raise UserError(f"{matched} this pattern", text, f"known kinds: {KNOWN}")
        return files
    if hub.is_hub_id(text):
        return _inside(hub.fetch(text))
    raise _missing(path)


def is_builtin(source: str) -> bool:
    return source.startswith(_PREFIX)


def content_hash(source: str | Path, *, memo: Path | None = None) -> str:
    """Hash of what a source holds: the bytes of its files in order, or the built-in generator's code.

    Args:
        memo: a JSON file that remembers the hash of each file by path, size and modification time, so
            that large unchanged files are not read again.
    """
    text = str(source)
    total = hashlib.blake2b(digest_size=16)
    if is_builtin(text):
        total.update("/".join(_builtin_parts(text)).encode())
        here = Path(__file__).parent
        code = sorted((here / "builtin").rglob("*.py"))
        if "tools" in _builtin_parts(text):  # the tools' own schemas and results are in it
            code += sorted((here.parent / "tools").glob("*.py"))
        for file in code:
            total.update(file.read_bytes())
        return total.hexdigest()
    known = _load_memo(memo)
    for file in expand(text):
        # The kind decides how bytes become records, so it belongs to the content; the name does not.
        total.update(f"{file_kind(file)}:{_file_hash(file, known)}\n".encode())
    if memo is not None:
        _save_memo(memo, known)
    return total.hexdigest()


def _inside(path: Path) -> list[Path]:
    if not path.is_dir():
        if file_kind(path) is None:
            raise UserError(f"unknown kind of data file: {path.name}", str(path), f"known: {KNOWN}")
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file_kind(file)
        and not hub.is_metadata(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    # In a mixed folder the rows are in the data files; a readme is not a document to learn.
    data = [file for file in files if file.suffix != ".md"]
    if not data and not files:
        raise UserError("no data files in this directory", str(path), f"known: {KNOWN}")
    return data or files


def _missing(path: Path) -> UserError:
    parent = path.parent
    if not parent.is_dir():
        return UserError("no such file or directory", str(path), f"there is no directory {parent}")
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or file_kind(entry))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    close = close or [name for name in names if name.split(".")[0] == path.name.split(".")[0]][:1]
    hint = f"did you mean {parent / close[0]}?" if close else None
    return UserError("no such file or directory", str(path), hint)


def _builtin_parts(source: str) -> tuple[str, str]:
    """(subject, split) of the name of a built-in source."""
    subject, _, split = source[len(_PREFIX) :].partition("/")
    if split in BUILTIN.get(subject, ()):
        return subject, split
    names = [f"{_PREFIX}{subject}/{split}" for subject, splits in BUILTIN.items() for split in splits]
    close = difflib.get_close_matches(source, names, n=1, cutoff=0.0)
    known = " ".join(BUILTIN.get(subject) or BUILTIN["world"])
    hint = f"did you mean {close[0]}? known splits of {subject if subject in BUILTIN else 'world'}: {known}"
    raise UserError("no such built-in data", source, hint)


def _iter_builtin(source: str, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    subject, split = _builtin_parts(source)
    from kllm.data.builtin import generate

    used = 0
    for number, record in enumerate(generate(split, subject=subject), start=1):
        if max_bytes is not None:
            used += len(json.dumps(record, ensure_ascii=False).encode())
            if used > max_bytes:
                return
        yield f"{source}:{number}", record


def _file_hash(file: Path, known: dict[str, list[Any]]) -> str:
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    name = str(file.resolve())
    entry = known.get(name)
    if entry and entry[:3] == stamp:
        return str(entry[3])
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", name) from error
    # A file changed this very moment may change again within the clock's grain: do not remember it.
    if time.time() - status.st_mtime > _RACY_SECONDS:
        known[name] = [*stamp, digest.hexdigest()]
    return digest.hexdigest()


def _load_memo(memo: Path | None) -> dict[str, list[Any]]:
    if memo is None:
        return {}
    try:
        loaded = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _save_memo(memo: Path, known: dict[str, list[Any]]) -> None:
    aside = memo.with_name(f".{memo.name}-{os.getpid()}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known), encoding="utf-8")
        aside.replace(memo)
    except OSError:
        aside.unlink(missing_ok=True)  # only a memory aid: a full disk shows up where it matters
