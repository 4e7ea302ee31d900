"""Sources: every kind of file, constant memory, and one clear line for everything that can be wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_tools import write_jsonl

from kllm.data import hub, readers
from kllm.data.readers import CHUNK_CHARS, TextChunk
from kllm.data.sources import content_hash, expand, iter_records
from kllm.errors import KllmError, UserError

ROWS = [{"text": "one"}, {"text": "二 два"}, {"text": "three\nlines"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def values(path: Path | str, **options: Any) -> list[Any]:
    return [value for _, value in iter_records(path, **options)]


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES + b"\n\n"),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode()),
        ("a.json", LINES),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_every_json_form_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == ROWS


def test_zstd_frames_are_read_and_a_cut_one_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstd(LINES) + zstd(LINES))
    assert values(file) == ROWS * 2
    file.write_bytes(zstd(LINES * 50)[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:\d+: the compressed data is damaged or cut off"):
        values(file)


def test_a_cut_gzip_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 50)[:-30])
    with pytest.raises(UserError, match="damaged or cut off"):
        values(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(LINES)
    with pytest.raises(UserError, match=r"b\.jsonl\.gz:1: the compressed data is damaged"):
        values(tmp_path / "b.jsonl.gz")


def test_parquet_rows_with_nested_messages(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "hi", "tool_calls": None}]}, {"messages": []}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(iter_records(tmp_path / "a.parquet")) == [
        (f"{tmp_path}/a.parquet:1", rows[0]),
        (f"{tmp_path}/a.parquet:2", rows[1]),
    ]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable parquet file"):
        values(tmp_path / "b.parquet")


def test_places_are_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n')
    assert [where for where, _ in iter_records(file)] == [f"{file}:1", f"{file}:3"]
    array = tmp_path / "a.json"
    array.write_text('[\n {"text": "x"},\n\n {"text":\n "y"},\n {"text": "z"}]')
    assert [where for where, _ in iter_records(array)] == [f"{array}:2", f"{array}:4", f"{array}:6"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a" "b"}', r"broken JSON: Expecting ',' delimiter at column 14"),
        (b'{"text": "a', r"broken JSON: Unterminated string"),
        ("中文".encode("gbk"), r"not UTF-8: byte 0xd6 at column 1; if the file is GBK"),
        (b'{"text": "\xff\xff"}', r"not UTF-8: byte 0xff at column 11$"),
        (b"[" * 100_000, r"broken JSON"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {reason}"):
        values(file)
    bad: list[tuple[str, str]] = []
    assert values(file, on_bad=lambda *found: bad.append(found)) == [{"text": "x"}, {"text": "y"}]
    assert [where for where, _ in bad] == [f"{file}:2"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', r"a\.json:4: broken JSON: expected ',' or '\]', found '\{'"),
        ('[\n{"a": 1},\n{"a" 2}]', r"a\.json:3: broken JSON: Expecting ':' delimiter"),
        ('[\n{"a": 1}', r"a\.json:2: broken JSON: expected ',' or '\]', the file ends"),
        ('[{"a": 1},\n', r"a\.json:2: broken JSON: the array is not closed"),
        ('[{"a": "' + "x" * 3_000_000, r"a\.json:1: broken JSON: Unterminated string"),
    ],
)
def test_broken_json_arrays_are_named_by_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        values(tmp_path / "a.json")


def test_utf16_is_refused_with_a_cure(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_bytes('{"text": "x"}'.encode("utf-16"))
        with pytest.raises(UserError, match=r":1: the file is UTF-16, not UTF-8 \(convert it: iconv"):
            values(tmp_path / name)


def test_text_files_are_chunked_and_end_once(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {n} " + "word " * 300 + "\n" for n in range(200)]
    text = "\n".join(paragraphs)
    file = tmp_path / "book.txt"
    file.write_text(text)
    chunks: list[TextChunk] = values(file)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) == -(-len(text) // CHUNK_CHARS)
    assert all(chunk.text.startswith("\nparagraph") for chunk in chunks[1:])


def test_text_without_any_break_is_still_chunked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("字" * 300_000)
    chunks = values(tmp_path / "a.txt")
    assert "".join(chunk.text for chunk in chunks) == "字" * 300_000
    assert max(len(chunk.text) for chunk in chunks) <= 2 * CHUNK_CHARS


def test_text_files_may_hold_documents_with_separators(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n")
    assert values(tmp_path / "a.txt") == [TextChunk("one\n", True), TextChunk("two\nlines\n", True)]
    assert [where.rpartition(":")[2] for where, _ in iter_records(tmp_path / "a.txt")] == ["1", "5"]


def test_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", ".hidden.jsonl", "notes.pdf", "README.md"):
        data = LINES[: LINES.index(b"\n") + 1].replace(b"one", name.encode())
        (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert [row["text"] for row in values(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz"]
    assert [row["text"] for row in values(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(expand(f"{tmp_path}/**/*.gz")) == 1
    with pytest.raises(UserError, match="nothing matches this pattern"):
        expand(f"{tmp_path}/*.parquet")
    with pytest.raises(UserError, match="1 matches are no data files"):
        expand(f"{tmp_path}/*.pdf")
    with pytest.raises(UserError, match="unknown kind of data file"):
        expand(tmp_path / "notes.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files in this directory"):
        expand(tmp_path / "empty")


def test_a_missing_file_suggests_its_sibling(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chats.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no such file or directory \(did you mean .*chats\.jsonl\?\)"):
        values(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match=r"did you mean .*chats\.jsonl"):
        values(tmp_path / "chats.json.gz")
    with pytest.raises(UserError, match=r"there is no directory .*nowhere"):
        values(tmp_path / "nowhere" / "a.jsonl")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"a\.jsonl: the file is empty"):
        values(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert values(tmp_path) == ROWS


def test_builtin_names() -> None:
    records = iter_records("builtin:world/pretrain")
    assert next(records)[0] == "builtin:world/pretrain:1"
    with pytest.raises(UserError, match=r"did you mean builtin:world/pretrain\?"):
        values("builtin:world/pretain")


def test_max_bytes_is_shared_by_the_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n:07}"} for n in range(1000)])
    some = values(tmp_path, max_bytes=2000)
    assert {row["text"][0] for row in some} == {"a", "b"}
    assert 80 <= len(some) <= 110
    (tmp_path / "c.txt").write_text("line\n" * 1000)
    cut = values(tmp_path / "c.txt", max_bytes=500)
    assert len("".join(chunk.text for chunk in cut)) == 500
    assert not cut[-1].last, "a text that the limit cut off has not ended"
    (tmp_path / "d.json").write_text(json.dumps([{"text": "x" * 20}] * 1000))
    assert 10 < len(values(tmp_path / "d.json", max_bytes=1000)) < 50


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    row = json.dumps({"text": "some words of a text " * 20})
    count = 25_000
    with (tmp_path / name).open("w") as file:
        file.write("[" if name == "a.json" else "")
        for number in range(count):
            file.write(row + (",\n" if name == "a.json" and number < count - 1 else "\n"))
        file.write("]" if name == "a.json" else "")
    tracemalloc.start()
    total = sum(1 for _ in iter_records(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == count or name == "a.txt"
    assert (tmp_path / name).stat().st_size > 10e6
    assert peak < 6e6


def test_content_hash_follows_content_only(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert content_hash(first) == content_hash(second)
    as_text = tmp_path / "a.txt"
    as_text.write_bytes(first.read_bytes())
    assert content_hash(as_text) != content_hash(first), "the same bytes mean other records"
    before = content_hash(first)
    write_jsonl(first, [*ROWS, {"text": "more"}])
    assert content_hash(first) != before
    assert content_hash("builtin:world/sft") != content_hash("builtin:world/pretrain")


def test_content_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    file, memo = write_jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "memo.json"
    os.utime(file, (1e9, 1e9))
    first = content_hash(file, memo=memo)
    entry = json.loads(memo.read_text())
    entry[str(file)][3] = "remembered"
    memo.write_text(json.dumps(entry))
    assert content_hash(file, memo=memo) != first, "an unchanged file is not read again"
    write_jsonl(file, list(reversed(ROWS)))
    assert content_hash(file, memo=memo) == content_hash(file) != first
    fresh = {name: entry for name, entry in json.loads(memo.read_text()).items() if entry[3] != "remembered"}
    assert str(file) not in fresh, "a file changed just now may change again within the clock's grain"
    memo.write_text("{broken")
    assert content_hash(file, memo=memo) == content_hash(file)


def test_hub_ids_need_their_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = hub.importlib.import_module

    def missing(name: str) -> Any:
        if name in ("huggingface_hub", "modelscope"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"need the package huggingface_hub \(pip install 'kllm\[hub\]'"):
        expand("someone/some-data")
    with pytest.raises(UserError, match="need the package modelscope"):
        expand("ms:someone/some-data")


def test_hub_files_are_fetched_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    write_jsonl(snapshot / "train.jsonl", ROWS)
    (snapshot / "dataset_infos.json").write_text("{}")
    asked: list[Any] = []

    class Client:
        @staticmethod
        def snapshot_download(name: str, **options: Any) -> str:
            asked.append((name, options))
            return str(snapshot)

    monkeypatch.setattr(hub.importlib, "import_module", lambda name: Client)
    assert values("someone/some-data") == ROWS
    assert values("hf:someone/some-data@v2/train.jsonl") == ROWS
    assert asked[0][0] == "someone/some-data" and asked[0][1]["repo_type"] == "dataset"
    assert asked[-1][1]["revision"] == "v2" and asked[-1][1]["allow_patterns"] == ["train.jsonl"]
    with pytest.raises(UserError, match=r"has no file other\.jsonl"):
        expand("hf:someone/some-data/other.jsonl")


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(KllmError, match="could not be fetched") as caught:
        expand("kllm-tests/no-such-data")
    assert "\n" not in str(caught.value)


def test_a_local_looking_name_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="no such file or directory"):
        expand("data/missing")


def test_missing_codecs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(readers.importlib, "import_module", missing)
    for name, extra in (("a.jsonl.zst", "zstd"), ("a.parquet", "parquet")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"pip install 'kllm\[{extra}\]'"):
            values(tmp_path / name)
