"""Readers of single data files: one record at a time, constant memory, every complaint with file:line.

JSON Lines, JSON (arrays and concatenated values), plain text and parquet; the first three also
compressed (.gz, .zst, .bz2, .xz). `sources.py` decides which files a source means; this module only
knows how the bytes of one file become Python objects.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kllm.errors import UserError

OnBad = Callable[[str, str], None]  # called with (where, reason) instead of raising

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
KNOWN = ".jsonl .json .txt .md (each also .gz .zst .bz2 .xz) .parquet"
MAX_RECORD = 256 * 1024 * 1024  # a longer line or value is taken for a broken file
CHUNK_CHARS = 64 * 1024  # plain text comes in chunks of about this size
_CHUNK_HARD = CHUNK_CHARS + CHUNK_CHARS // 2
_BLOCK = 1 << 20
_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class TextChunk:
    """A part of a plain text file; `last` is true where the document really ends."""

    text: str
    last: bool


def file_kind(path: Path) -> tuple[str, str] | None:
    """(kind, compression) from the file name, e.g. ("jsonl", ".gz"); None if it is no data file."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    compression = ""
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def read_file(
    path: Path, budget: int | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields (where, object) for each record of one file.

    Args:
        budget: stop after about this many uncompressed bytes.
        on_bad: called for a line that cannot be read; without it such a line raises UserError.
    """
    kind = file_kind(path)
    if kind is None:
        raise UserError(f"unknown kind of data file: {path.name}", str(path), f"known: {KNOWN}")
    reader = {"jsonl": _read_jsonl, "json": _read_json, "text": _read_text, "parquet": _read_parquet}[kind[0]]
    yield from reader(path, budget, on_bad)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The uncompressed bytes of `path`."""
    compression = (file_kind(path) or ("", ""))[1]
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot open the file: {error.strerror}", str(path)) from error
    with raw:
        if compression == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)  # type: ignore[arg-type, misc]
        elif compression == ".bz2":
            yield io.BufferedReader(bz2.BZ2File(raw), _BLOCK)  # type: ignore[arg-type, misc]
        elif compression == ".xz":
            yield io.BufferedReader(lzma.LZMAFile(raw), _BLOCK)  # type: ignore[arg-type, misc] # noqa: SIM115
        elif compression == ".zst":
            yield io.BufferedReader(_ZstdReader(raw, path), _BLOCK)  # type: ignore[misc]
        else:
            yield raw


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as a raw stream that notices when the last frame is cut off."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self._raw = raw
        self._pending = b""
        try:
            self._zstd = importlib.import_module("zstandard")
        except ImportError:
            message = "reading .zst files needs the package zstandard"
            raise UserError(message, str(path), "pip install 'kllm[zstd]'") from None
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if not self._more():
                return 0
        taken = self._pending[: len(buffer)]
        buffer[: len(taken)] = taken
        self._pending = self._pending[len(taken) :]
        return len(taken)

    def _more(self) -> bool:
        block = self._raw.read(_BLOCK // 8)
        if not block:
            if self._frame is not None:
                raise EOFError("the zstd stream is cut off")
            return False
        out = []
        while block:
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
            try:
                out.append(self._frame.decompress(block))
            except self._zstd.ZstdError as error:
                raise OSError(str(error)) from error
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        self._pending = b"".join(out)
        return True


def read_lines(path: Path, budget: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end) of a possibly compressed file."""
    used = number = 0
    with open_bytes(path) as handle:
        while budget is None or used < budget:
            try:
                line = handle.readline(MAX_RECORD + 1)
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                where = f"{path}:{number + 1}"
                raise UserError(f"the compressed data is damaged or cut off: {error}", where) from error
            if not line:
                return
            number += 1
            if len(line) > MAX_RECORD:
                raise UserError(f"a line is longer than {MAX_RECORD >> 20} MiB", f"{path}:{number}")
            used += len(line)
            yield number, _without_bom(line, path) if number == 1 else line


def _without_bom(line: bytes, path: Path) -> bytes:
    if line.startswith(codecs.BOM_UTF8):
        return line[len(codecs.BOM_UTF8) :]
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
        raise UserError("the file is UTF-16, not UTF-8", f"{path}:1", hint)
    return line


def encoding_problem(line: bytes, error: UnicodeDecodeError) -> str:
    """One sentence on why `line` is not UTF-8, with a guess at what it is."""
    text = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return text
    return f"{text}; if the file is GBK, convert it with iconv -f GB18030 -t UTF-8"


def _report(on_bad: OnBad | None, where: str, reason: str) -> None:
    if on_bad is None:
        raise UserError(reason, where)
    on_bad(where, reason)


def _read_jsonl(path: Path, budget: int | None, on_bad: OnBad | None) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, budget):
        if line.isspace():
            continue
        try:
            value = json.loads(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            _report(on_bad, f"{path}:{number}", encoding_problem(line, error))
        except json.JSONDecodeError as error:
            _report(on_bad, f"{path}:{number}", _json_problem(error))
        except (ValueError, RecursionError) as error:
            _report(on_bad, f"{path}:{number}", f"broken JSON: {error}")
        else:
            yield f"{path}:{number}", value


def _json_problem(error: json.JSONDecodeError) -> str:
    return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def _read_json(path: Path, budget: int | None, on_bad: OnBad | None) -> Iterator[tuple[str, Any]]:
    # Many ".json" data sets are JSON Lines under another name: then lines are the safer unit.
    for _number, line in read_lines(path):
        if line.isspace():
            continue
        if line.lstrip().startswith(b"{"):
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                break
            yield from _read_jsonl(path, budget, on_bad)
            return
        break
    yield from _JsonStream(path, budget).records()


class _JsonStream:
    """Values of one JSON array, or of concatenated JSON values, read block by block."""

    def __init__(self, path: Path, budget: int | None) -> None:
        self.path, self.budget = path, budget
        self.text, self.at, self.line, self.read = "", 0, 1, 0
        self.ended = False
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.parse = json.JSONDecoder().raw_decode

    def records(self) -> Iterator[tuple[str, Any]]:
        with open_bytes(self.path) as self.handle:
            inside = self._next() == "["
            if inside:
                self.at += 1
            while (char := self._next()) and char != "]":
                if self.budget is not None and self.read - len(self.text) + self.at >= self.budget:
                    return
                where = f"{self.path}:{self.line}"
                yield where, self._value(where)
                separator = self._next()
                if inside and separator == ",":
                    self.at += 1
                elif inside and separator != "]":
                    what = f"found {separator!r}" if separator else "the file ends"
                    raise UserError(f"broken JSON: expected ',' or ']', {what}", f"{self.path}:{self.line}")
            if inside and not char:
                raise UserError("broken JSON: the array is not closed", f"{self.path}:{self.line}")

    def _next(self) -> str:
        """Skips white space; the character there, or "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                char = self.text[self.at]
                if not char.isspace():
                    return char
                self.line += char == "\n"
                self.at += 1
            if not self._fill():
                return ""

    def _fill(self) -> bool:
        """Reads on, at least as much again as is waiting, so that large values cost linear time."""
        self.text, self.at = self.text[self.at :], 0
        try:
            block = self.handle.read(max(_BLOCK, len(self.text)))
            fresh = self.utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            reason = encoding_problem(error.object, error).split(" at column")[0]
            raise UserError(reason, f"{self.path}:{self.line}") from error
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            where = f"{self.path}:{self.line}"
            raise UserError(f"the compressed data is damaged or cut off: {error}", where) from error
        if self.read == 0:
            head = _without_bom(block[:4], self.path)
            fresh = fresh.removeprefix("\ufeff") if len(head) < len(block[:4]) else fresh
        self.read += len(fresh)
        self.text += fresh
        self.ended = not block
        return bool(block)

    def _value(self, where: str) -> Any:
        while True:
            try:
                value, end = self.parse(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self.line += self.text.count("\n", self.at, end)
                    self.at = end
                    return value
            except RecursionError:
                raise UserError("broken JSON: nested too deeply", where) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 12
                if self.ended or not cut:
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise UserError(
                        f"broken JSON: {error.msg.removesuffix(' at')}", f"{self.path}:{line}"
                    ) from error
            if len(self.text) - self.at > MAX_RECORD:
                reason = f"a value is longer than {MAX_RECORD >> 20} MiB, or a quote is missing"
                raise UserError(reason, where)
            self._fill()


def _read_text(path: Path, budget: int | None, on_bad: OnBad | None) -> Iterator[tuple[str, TextChunk]]:
    """One document per file, or several parted by lines of <|endoftext|>, in chunks cut at paragraphs."""
    parts: list[str] = []
    size, start = 0, 1
    ready: tuple[str, str] | None = None  # a full chunk that waits to know whether it is the last
    used = 0
    for number, line in read_lines(path, budget):
        used += len(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            _report(on_bad, f"{path}:{number}", encoding_problem(line, error))
            continue
        if text.strip() == _SEPARATOR:
            yield from _close(ready, f"{path}:{start}", "".join(parts), last=True)
            parts, size, start, ready = [], 0, number + 1, None
            continue
        for piece in _pieces(text):
            pause = piece.isspace() or len(piece) >= CHUNK_CHARS // 2
            if size >= _CHUNK_HARD or (size >= CHUNK_CHARS and pause):
                if ready:
                    yield ready[0], TextChunk(ready[1], last=False)
                ready = (f"{path}:{start}", "".join(parts))
                parts, size, start = [], 0, number
            parts.append(piece)
            size += len(piece)
    yield from _close(ready, f"{path}:{start}", "".join(parts), last=budget is None or used < budget)


def _pieces(line: str) -> Iterator[str]:
    """A line as it is, or, if it is very long, in pieces that end at a space where there is one."""
    at = 0
    while len(line) - at > CHUNK_CHARS:
        cut = line.rfind(" ", at + CHUNK_CHARS // 2, at + CHUNK_CHARS)
        cut = cut if cut > 0 else at + CHUNK_CHARS
        yield line[at:cut]
        at = cut
    yield line[at:]


def _close(
    ready: tuple[str, str] | None, where: str, rest: str, *, last: bool
) -> Iterator[tuple[str, TextChunk]]:
    """The final chunks of a document; a blank rest is joined to what came before."""
    if ready:
        blank = not rest.strip()
        yield ready[0], TextChunk(ready[1], last=last and blank)
        if blank:
            return
    if rest.strip():
        yield where, TextChunk(rest, last=last)


def _read_parquet(path: Path, budget: int | None, on_bad: OnBad | None) -> Iterator[tuple[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        message = "reading .parquet files needs the package pyarrow"
        raise UserError(message, str(path), "pip install 'kllm[parquet]'") from None
    row = used = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", value
                used += batch.nbytes
                if budget is not None and used >= budget:
                    return
    except (arrow_error, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"not a readable parquet file: {reason}", f"{path}:{row + 1}") from error
