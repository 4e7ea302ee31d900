"""The house rules as a test: arrows point one way, heavy packages stay in their rooms, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "kllm"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = [
    {"errors"},
    {"files", "http_client"},
    {"config"},
    {"observe", "tokenizer", "model", "optim", "tools"},
    {"data", "engine", "export"},
    {"train"},
    {"objectives", "rl"},
    {"eval", "serve", "chat"},
    {"run"},
    {"cli"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}

CONFINED = {
    "transformers": ("export/verify.py", "run/bench_peers.py"),
    "lm_eval": ("eval/harness.py",),
    "gguf": ("export/gguf", "export/verify_gguf.py"),
    "llama_cpp": ("export/llamacpp.py", "run/bench_llamacpp.py"),
    "xllamacpp": ("export/llamacpp.py", "run/bench_llamacpp.py"),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/",),
    "starlette": ("serve/",),
    "llguidance": ("engine/grammar",),
    "typer": ("cli/",),
    "rich": ("cli/", "observe/console.py", "chat/"),
    "click": (),
    "pickle": (),
    "datasets": (),
}
NO_TORCH = (
    "config/",
    "tokenizer/",
    "data/builtin/",
    "observe/",
    "cli/",
    "errors.py",
    "files.py",
    "model/presets.py",
    "tools/",
)
MAX_FILE, MAX_FUNCTION = 400, 60


def imports(tree: ast.AST, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Names of imported modules with their lines (not those under TYPE_CHECKING)."""
    nodes = tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            if node.module == "kllm":
                yield from ((f"kllm.{alias.name}", node.lineno) for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_there_is_a_house() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    wrong = []
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "kllm" or len(parts) < 2 or parts[1] == room or parts[1].startswith("__"):
            continue
        if LEVEL[parts[1]] >= LEVEL[room]:
            wrong.append(f"{path.relative_to(REPO)}:{line}: {room} -> {parts[1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, line in imports(tree):
        top = name.split(".")[0]
        if top in CONFINED:
            assert where.startswith(CONFINED[top]) and CONFINED[top], f"{where}:{line} imports {top}"
    if where.startswith(NO_TORCH):
        for name, line in imports(tree, top_level_only=True):
            assert name.split(".")[0] != "torch", f"{where}:{line} imports torch at its top"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    where = path.relative_to(REPO)
    lines = source.count("\n")
    assert lines <= MAX_FILE, f"{where} has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{where}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_dangerous(path: Path) -> None:
    """No eval or exec, no pickle loading, no unsafe yaml, no remote code; prints only where people look."""
    where = str(path.relative_to(PACKAGE))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        # what a model wrote is run in one place, behind the sandbox's lock
        assert name not in ("eval", "exec") or where == "tools/sandbox/worker.py", f"{where}:{node.lineno}"
        assert name not in ("yaml.load", "yaml.unsafe_load"), f"{where}:{node.lineno} {name}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{where}:{node.lineno} torch.load"
        assert keywords.get("trust_remote_code") != "True", f"{where}:{node.lineno}"
        if name == "print":
            allowed = ("cli/", "observe/", "chat/", "__main__.py")
            assert where.startswith(allowed), f"{where}:{node.lineno} print"


def test_the_top_level_holds_nothing_else() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout
    tops = {line.split("/")[0] for line in tracked.splitlines()}
    if not tops:
        pytest.skip("not a git checkout")
    allowed = {"kllm", "recipes", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {t for t in tops if not t.startswith(".")} <= allowed


def test_every_module_says_what_it_is() -> None:
    silent = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if source.strip() and not ast.get_docstring(ast.parse(source)):
            silent.append(str(path.relative_to(REPO)))
    assert not silent, silent


def test_dependencies_are_declared() -> None:
    """What the code imports is in pyproject.toml; nothing there is unused."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    declared = {m.lower() for m in re.findall(r'"([A-Za-z0-9_.-]+?)[<>=~!\[]', text)}
    names = {"yaml": "pyyaml", "markdown_it": "markdown-it-py"}
    standard = __import__("sys").stdlib_module_names
    used = set()
    for path in FILES:
        for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = name.split(".")[0]
            if top not in standard and top != "kllm":
                used.add(names.get(top, top).lower())
    # llama.cpp's bindings are asked for their opinion where they are installed
    optional = {"modelscope", "pydantic_core", "llama_cpp"}
    assert used <= declared | optional, used - declared - optional
