"""`kllm export-gguf` and the export stage through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_support import chat_model
from support import kllm

from kllm.export.load import load_model

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("gguf") / "toy", context=512)


def test_several_types_in_one_call(source: Path, tmp_path: Path) -> None:
    done = kllm("export-gguf", source, "out", "--quant", "f32,q8_0", "-q", "q4_k_m", "--ollama", cwd=tmp_path)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    files = {f"toy-{quant}.gguf" for quant in ("f32", "q8_0", "q4_k_m")}
    assert names == files | {f"{Path(f).stem}.Modelfile" for f in files} | {"README.md"}
    assert done.stdout.count("checked with") == 3
    assert "ollama create toy -f" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in files)
    one, other = (load_model(p)[0].state_dict() for p in (source, tmp_path / "out" / "toy-f32.gguf"))
    assert all((one[name] == other[name]).all() for name in one)


def test_one_file_as_json_and_everything_takes_it(source: Path, tmp_path: Path) -> None:
    said = kllm(
        "export-gguf",
        source,
        "m.gguf",
        "-q",
        "f16",
        "--json",
        "--license",
        "mit",
        "--name",
        "Toy",
        cwd=tmp_path,
    )
    report = json.loads(said.stdout)
    assert report["name"] == "Toy" and report["arch"] == "llama"
    (file,) = report["files"]
    assert file["path"] == "m.gguf" and file["quant"] == "f16"
    assert file["verified"]["texts_equal"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    answer = kllm("chat", "m.gguf", "-p", "where is the cat?", "--max-tokens", "4", cwd=tmp_path)
    assert answer.stdout.strip()
    assert '"total"' in kllm("info", "m.gguf", "--json", cwd=tmp_path).stdout
    assert "320" in kllm("tokenizer", "inspect", "m.gguf", "--text", "the cat", cwd=tmp_path).stdout
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "the cat sat on the mat"}\n' * 3)
    kllm("eval", "m.gguf", "--tasks", "perplexity:t.jsonl", cwd=tmp_path)
    trained = kllm(
        "pretrain", "--model", "m.gguf", "--data", "t.jsonl", "--steps", "1", "--seq-len", "32",
        "--batch-tokens", "64", "--dataset.val_fraction", "0", "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    assert "done" in trained.stdout
    assert (tmp_path / "run" / "01-pretrain" / "final" / "model.safetensors").is_file()
    again = kllm("convert", "m.gguf", "hf", cwd=tmp_path)
    assert "checked with transformers" in again.stdout
    assert "license: mit" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")  # it travels on


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["SRC", "out", "-q", "q3_k"], "flag --quant: unknown type 'q3_k'"),
        (["SRC", "one.gguf", "-q", "f16,q8_0"], "one file cannot hold several types"),
        (["nowhere", "out"], "nowhere: no such file or directory"),
        (["SRC", "out", "--assume", "heads=4"], "flag --assume"),
        (["SRC", "out", "--assume", "num_attention_heads=x"], "'x' is no value of num_attention_heads"),
        (["SRC", "out", "--assume", "num_attention_heads=4"], "is in the model's own files"),
        (["SRC", "there.gguf"], "there.gguf: is there already"),
        (["SRC", "file"], "file: is a file"),
    ],
)
def test_bad_input_is_one_line(source: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "there.gguf").write_text("years of work")
    (tmp_path / "file").write_text("")
    given = [str(source) if a == "SRC" else a for a in arguments]
    done = kllm("export-gguf", *given, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "years of work"


def test_an_export_stage_writes_one_checked_folder(source: Path, tmp_path: Path) -> None:
    command = [
        "export",
        source,
        "--gguf",
        "q8_0",
        "--gguf",
        "f16",
        "--ollama",
        "--license",
        "mit",
        "--out",
        "run",
    ]
    done = kllm(*command, cwd=tmp_path)
    final = tmp_path / "run" / "01-export" / "final"
    assert {"model.safetensors", "config.json", "run-q8_0.gguf", "run-f16.gguf"} <= {
        p.name for p in final.iterdir()
    }
    assert "run-q8_0.Modelfile" in {p.name for p in final.iterdir()}
    assert done.stdout.count("transformers") >= 1 and "q8_0" in done.stdout
    card = (final / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: mit\n" in card.partition("\n---\n")[0] + "\n"
    assert "llama-cli -m run-q8_0.gguf" in card and "ollama create run" in card
    assert "nothing" not in done.stdout
    again = kllm(*command, cwd=tmp_path)  # done and unchanged
    assert "finished already" in again.stdout + again.stderr
    assert not [p for p in (tmp_path / "run" / "01-export").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--no-hf"], "an export of nothing"),
        (["--gguf", "q9"], "must be one of"),
        (["--no-hf", "--gguf", "q8_0", "--quant", "awq"], "is of the Hugging Face folder"),
    ],
)
def test_a_wrong_export_is_refused_before_it_begins(
    flags: list[str], says: str, source: Path, tmp_path: Path
) -> None:
    done = kllm("export", source, *flags, "--out", "run", cwd=tmp_path, check=False)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
