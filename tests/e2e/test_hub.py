"""Models straight from a hub: what is fetched, what is not, and one clear line when it cannot be."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from chat_support import chat_model
from safetensors.torch import load_file
from support import environment, kllm

from kllm.export.gguf_write import GgufInfo, write_gguf
from kllm.export.load import load_model
from kllm.run.convert import Conversion, HfOptions, convert

pytest.importorskip("huggingface_hub")

TOKEN = "hf_good"
NOISE = {
    "README.md": b"# a model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "pytorch_model.bin": b"the same weights again",
    "consolidated.safetensors": b"and again",
    "model.fp16.safetensors": b"and again",
    "tf_model.h5": b"and again",
    "m-q8_0.gguf": b"and again",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"and again",
    "original/params.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"",
}
"""What other programs want of a repository."""


@dataclass
class Repo:
    """One repository: branches and tags, each with its files."""

    main: dict[str, bytes]
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a branch, a tag or a commit."""
        for name, files in {"main": self.main, **self.tags}.items():
            commit = hashlib.sha1((name + repr(sorted(files))).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


class FakeHub(ThreadingHTTPServer):
    """The answers of a Hugging Face endpoint that its client's downloads need; `fetched` says what was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.fetched: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route(body=False)

    def do_GET(self) -> None:
        self._route(body=True)

    def _route(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner_name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        repo = self.server.repos.get(owner_name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found", body)
        if repo.private and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, None, "Invalid username or password.", body)
        if repo.gated:
            return self._refuse(403, "GatedRepo", "Access to model is restricted", body)
        revision = rest[1] if len(rest) > 1 else "main"
        found = repo.at(revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", body)
        commit, files = found
        if not api:
            return self._file(owner_name, commit, files, "/".join(rest[2:]), body)
        listing = [
            {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for p, d in files.items()
        ]
        info = {"_id": "1", "id": owner_name, "modelId": owner_name, "sha": commit, "private": repo.private}
        info |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in files]}
        answer = listing if rest[:1] == ["tree"] else info
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, repo: str, commit: str, files: dict[str, bytes], path: str, body: bool) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", body, {"X-Repo-Commit": commit})
        if body:
            self.server.fetched.append(f"{repo}:{path}")
        etag = hashlib.sha256(files[path]).hexdigest()
        return self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)

    def _refuse(
        self, status: int, code: str | None, message: str, body: bool, more: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json", **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("hub") / "m", context=512)


@pytest.fixture(scope="module")
def served(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A hub with a few repositories of the same weights."""
    lab = tmp_path_factory.mktemp("repos")
    model, tokenizer = load_model(source)
    assert tokenizer is not None
    write_gguf(model, tokenizer, lab / "m-f32.gguf", "f32", GgufInfo("m"))
    convert(Conversion(str(source), lab / "shards", options=HfOptions(max_shard_bytes=40_000, verify=False)))
    old = shutil.copytree(source, lab / "old")
    (old / "model.safetensors").unlink()
    torch.save(load_file(source / "model.safetensors"), old / "pytorch_model.bin")
    ours = files_of(source)
    longer = ours | {"config.json": ours["config.json"].replace(b": 512", b": 1024")}
    assert longer != ours
    hub = FakeHub()
    hub.repos = {
        "me/tiny": Repo(NOISE | ours, {"v2": longer}),
        "me/shards": Repo(files_of(lab / "shards")),
        "me/old": Repo(files_of(old) | {"flax_model.msgpack": b"and again"}),
        "me/secret": Repo(ours, private=True),
        "me/gated": Repo(ours, gated=True),
        "me/gguf": Repo({"README.md": b"", "quants/m-f32.gguf": (lab / "m-f32.gguf").read_bytes()}),
        "me/empty": Repo({"README.md": b""}),
        "me/bare": Repo({name: data for name, data in ours.items() if name != "model.safetensors"}),
        "me/weights": Repo({name: ours[name] for name in ("config.json", "model.safetensors")}),
    }
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, an empty cache, no token."""
    served.fetched.clear()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return served


def equal(left: Path, right: Path) -> bool:
    a, b = (load_model(path)[0].state_dict() for path in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fails(*args: str, cwd: Path, code: int = 2) -> str:
    """The one line of a failing command."""
    done = kllm(*args, cwd=cwd, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert not (cwd / "out").exists()
    return errors[0]


_ASK = """
import json, sys
from kllm.errors import KllmError
from kllm.export.resolve import resolve, resolve_tokenizer
for ask in sys.argv[1:]:
    what, _, name = ask.partition(":")
    try:
        place = resolve_tokenizer(name) if what == "tokenizer" else resolve(name, weights=what == "model")
        answer = [sorted(p.name for p in place.iterdir()) if place.is_dir() else place.name, 0]
    except KllmError as error:
        answer = [str(error), error.exit_code]
    print(json.dumps(answer))
"""


def asked(*asks: str) -> list[tuple[str, int]]:
    """What a fresh process (the hub's client reads its variables once) makes of `model:NAME`, ...: the files
    or the error, and the exit code."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *asks], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_convert_fetches_what_it_needs_and_no_more(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    done = kllm("convert", "me/tiny", "out", "--no-verify", cwd=tmp_path)
    assert "out:" in done.stdout and done.stderr == ""
    assert equal(source, tmp_path / "out")
    wanted = set(files_of(source)) - {"README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= wanted
    assert sorted(hub.fetched) == sorted(f"me/tiny:{name}" for name in wanted)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# out" in card and "`tiny`" in card


def test_info_fetches_the_config_alone(hub: FakeHub, tmp_path: Path) -> None:
    found = json.loads(kllm("info", "me/tiny", "--json", cwd=tmp_path).stdout)
    assert found["shape"]["max_position_embeddings"] == 512
    assert hub.fetched == ["me/tiny:config.json"]
    found = json.loads(kllm("info", "me/tiny@v2", "--json", cwd=tmp_path).stdout)
    assert found["shape"]["max_position_embeddings"] == 1024


def test_chat_with_text_on_stdin(hub: FakeHub, tmp_path: Path) -> None:
    done = kllm("chat", "me/tiny", "--max-tokens", "4", "--temperature", "0", cwd=tmp_path, stdin="hi\n")
    assert done.stdout.strip()


def test_one_gguf_file_of_a_repository(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    kllm("export-gguf", "me/gguf/quants/m-f32.gguf", "out", "-q", "f32", "--no-verify", cwd=tmp_path)
    assert hub.fetched == ["me/gguf:quants/m-f32.gguf"]
    assert equal(source, tmp_path / "out" / "m-f32-f32.gguf")


def test_other_forms_of_weights_and_revisions(hub: FakeHub, tmp_path: Path) -> None:
    old, shards, tokenizer, tagged = asked(
        "model:me/old", "model:me/shards", "tokenizer:me/shards", "config:me/tiny@v2"
    )
    assert "pytorch_model.bin" in old[0]
    assert "me/old:flax_model.msgpack" not in hub.fetched
    assert sum(name.endswith(".safetensors") for name in shards[0]) > 2
    assert "model.safetensors.index.json" in shards[0] and tokenizer[0] == shards[0]
    assert tagged == (["config.json"], 0)


def test_a_bin_and_shards_load(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    kllm("convert", "me/old", "old", "--no-verify", cwd=tmp_path)
    kllm("convert", "me/shards@main", "shards", "--no-verify", "--json", cwd=tmp_path)
    assert equal(source, tmp_path / "old") and equal(source, tmp_path / "shards")


def test_a_tokenizer_needs_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    done = kllm("tokenizer", "inspect", "me/tiny", "--json", "--max-bytes", "10k", cwd=tmp_path)
    assert json.loads(done.stdout)[0]["vocab_size"] == 320
    assert done.stderr == ""
    assert "me/tiny:tokenizer.json" in hub.fetched
    assert not {"me/tiny:model.safetensors", "me/tiny:config.json", "me/tiny:vocab.json"} & set(hub.fetched)


def test_a_private_repository_wants_a_token(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fails("convert", "me/secret", "out", "--no-verify", cwd=tmp_path)
    assert "me/secret" in line and "HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    [(said, code)] = asked("model:me/secret")
    assert code == 2 and "HF_TOKEN" in said and "\n" not in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    kllm("convert", "me/secret", "out", "--no-verify", cwd=tmp_path)
    assert equal(source, tmp_path / "out")


def test_what_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    line = fails("convert", "me/nothing", "out", cwd=tmp_path)
    assert "me/nothing: no such directory, and no such model on the hub" in line and "check the name" in line
    cases = {
        "model:me/tiny@v9": ("no such revision", "branch"),
        "model:me/gguf/quants/m-q4.gguf": ("no file quants/m-q4.gguf", "check"),
        "model:me/nothing/x.gguf": ("no such file, and no such model", "check"),
        "model:me/gguf": ("no config.json", "name one of its files: me/gguf/quants/m-f32.gguf"),
        "model:me/gated": ("gated", "accept its terms", "HF_TOKEN"),
        "model:me/empty": ("me/empty", "no config.json"),
        "model:me/bare": ("me/bare", "no weights"),
        "tokenizer:me/weights": ("me/weights", "no tokenizer.json"),
        "model:nowhere": ("no such file or directory", "OWNER/NAME"),
        "model:a--b/..c": ("no such file or directory",),
        "model:me/tiny.pth": ("no such file", "check the path"),
    }
    for (ask, words), (said, code) in zip(cases.items(), asked(*cases), strict=True):
        assert code == 2 and "\n" not in said, said
        assert ask.partition(":")[2] in said and all(word in said for word in words), said


def test_offline(hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache works; what is not, or only half, is told to be offline."""
    asked("model:me/tiny", "model:me/old", "model:me/gguf/quants/m-f32.gguf", "tokenizer:me/shards")
    hub.fetched.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kllm("convert", "me/tiny", "copy", "--no-verify", cwd=tmp_path)
    assert equal(source, tmp_path / "copy")
    line = fails("export-gguf", "me/secret", "out", cwd=tmp_path)
    assert "me/secret" in line and "HF_HUB_OFFLINE" in line and "local path" in line
    names = ("model:me/old", "model:me/gguf/quants/m-f32.gguf", "tokenizer:me/shards", "config:me/tiny")
    assert all(code == 0 for _, code in asked(*names))
    for said, code in asked("model:me/shards", "model:me/gguf/other.gguf", "model:me/tiny@v2"):
        assert code == 2 and "HF_HUB_OFFLINE" in said and "\n" not in said
    assert hub.fetched == []


def test_no_hub_in_reach(hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("model:me/tiny")
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        line = fails("convert", "me/old", "out", cwd=tmp_path, code=1)
        assert "me/old" in line and "refused" in line and "HF_ENDPOINT" in line
        [(files, code)] = asked("model:me/tiny")  # from the cache
        assert code == 0 and "model.safetensors" in files


def test_a_cache_that_cannot_be_written(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    [(said, code)] = asked("model:me/tiny")
    assert code == 1 and "HF_HOME" in said and "\n" not in said, said
