"""The README's commands, read from it: run with small sizes, or at least understood."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from scripted_server import serving
from support import TINY, kllm

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted(
    {line.strip() for block in BLOCKS for line in block.splitlines() if line.startswith("kllm ")}
)


def test_there_are_commands_and_both_set_ups() -> None:
    assert len(COMMANDS) >= 5
    for marker in ("run", "test"):
        assert re.search(rf"<!-- newcomer:{marker} -->\n```bash\npip install .*\n```", README)


def test_both_languages_give_the_same_set_up() -> None:
    assert README.count("kllm run --recipe recipes/quickstart.yaml") == 2
    assert README.count("python -m pytest -n auto") == 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lab = tmp_path_factory.mktemp("readme")
    texts = [
        f"the story number {i}: a fox met {i * 7} birds and they sang. 从前有{i}只鸟。" for i in range(400)
    ]
    (lab / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:200]))
    with gzip.open(lab / "b.txt.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(texts[200:]))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how many birds in {i}?"},
                {"role": "assistant", "content": f"{i * 7}"},
            ]
        }
        for i in range(200)
    ]
    (lab / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return lab


@pytest.fixture(scope="module")
def trained(lab: Path) -> Path:
    """The block of the section on own data has run, in order, with a small model and few tokens."""
    block = next(b for b in BLOCKS if "data inspect" in b)
    small = {"6400": "600", "k-small": "k-tiny", "20M": "8k"}
    for line in block.splitlines():
        words = [small.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] in ("pretrain", "sft"):
            words += ["--seq-len", "128", "--batch-tokens", "1024", "-q"]
        if words[0] == "pretrain":
            words += TINY
        if words[0] == "sft":
            words += ["--set", "train.steps=3"]
            words = [w for i, w in enumerate(words) if w != "--epochs" and words[i - 1] != "--epochs"]
        if words[0] == "chat":
            words += ["--prompt", "how many birds in 3?"]
        kllm(*words, cwd=lab)
    return lab


def test_own_data_from_file_to_answer(trained: Path) -> None:
    assert (trained / "runs" / "chat" / "01-sft" / "final" / "model.safetensors").exists()


def test_the_trained_model_goes_everywhere(trained: Path) -> None:
    """The block of exports, word for word but for ollama, on the model of the block before."""
    lab = trained
    block = next(b for b in BLOCKS if "export-gguf" in b)
    for line in block.splitlines():
        if line.startswith("kllm "):
            kllm(*shlex.split(line, comments=True)[1:], cwd=lab)
    for made in ("my-model", "my-awq", "my-int8"):
        assert (lab / made / "model.safetensors").is_file()
    assert (lab / "model.pth").is_file()
    modelfile = re.search(r"ollama create \S+ -f (\S+)", block)
    assert modelfile is not None and (lab / modelfile[1]).is_file()


def test_adapters_preferences_and_distillation(trained: Path) -> None:
    """Their block in order on the model of the first block; a model stands in for the server."""
    lab = trained
    write = lambda name, rows: (lab / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("pairs.jsonl", [{"prompt": f"{i} birds?", "chosen": f"{i}", "rejected": "no"} for i in range(40)])
    write(
        "rated.jsonl",
        [{"prompt": f"{i} birds?", "completion": f"{i}", "label": i % 2 == 0} for i in range(40)],
    )
    write(
        "questions.jsonl", [{"question": f"how many birds in {i}?", "answer": f"{i * 7}"} for i in range(8)]
    )
    block = next(b for b in BLOCKS if "kllm dpo" in b)
    few = {"--rollout.max_tokens": "4", "--rollout.samples": "2", "--rollout.prompts_per_step": "2"}
    for line in block.splitlines():
        words = shlex.split(line.replace("http://127.0.0.1:8000/v1", "runs/chat"), comments=True)[1:]
        if words[0] == "serve":
            continue  # test_serve_adapters
        if words[0] == "chat":
            words += ["--prompt", "how many birds in 3?", "--max-tokens", "4"]
        if words[0] in ("lora", "dpo", "distill"):
            words += [
                "--steps",
                "2",
                "--seq-len",
                "128",
                "--batch-tokens",
                "512",
                "--train.compile",
                "off",
                "-q",
            ]
            if "--online" in words or "--distill.on_policy" in words:
                words += [word for pair in few.items() for word in pair]
        kllm(*words, cwd=lab)
    for run in ("adapter", "qlora", "kto"):
        assert list((lab / "runs" / run).glob("01-*/adapter/adapter_model.safetensors")), run
    for run in ("aligned", "online", "small", "gkd", "blackbox"):
        assert list((lab / "runs" / run).glob("01-*/final/model.safetensors")), run
    assert (lab / "merged" / "model.safetensors").is_file()


def test_talk_tools_and_code(trained: Path) -> None:
    """Their block, line by line, with the model of the first block; a scripted server stands at the address."""
    lab = trained
    block = next(b for b in BLOCKS if "--codeact" in b)
    own = re.search(r"```python\n# (\S+)\n(.*?)```", README, flags=re.DOTALL)
    assert own is not None
    (lab / own[1]).write_text(own[2], encoding="utf-8")
    with serving(lambda body: ["hello"]) as server:
        for written in block.splitlines():
            line = written.partition("  #")[0].replace("http://127.0.0.1:8000", server.url)
            before, _, command = line.rpartition("kllm ")
            words = shlex.split(command)
            if words[0] == "serve":
                continue  # test_serve_tool_flags
            piped = shlex.split(before)[1] if before else ""
            asked = [] if piped or "-p" in words else ["-p", "hi"]
            few = ["--max-tokens", "8", "--seed", "7"]  # without a seed one in a hundred is empty
            done = kllm(*words, *asked, *few, cwd=lab, stdin=piped)
            assert done.stdout.strip(), line


@pytest.mark.parametrize("line", [c for c in COMMANDS if "chat" not in c.split()[1]], ids=lambda c: c[:40])
def test_every_command_is_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    command = words[:2] if words[0] in ("tokenizer", "data", "recipe", "runs") else words[:1]
    shown = kllm(*command, "--help", cwd=Path.cwd()).stdout
    for flag in (w for w in words if w.startswith("--")):
        assert flag in shown, f"{flag} of {line}"


def test_the_recipe_of_the_readme_is_sound(tmp_path: Path) -> None:
    recipe = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert recipe is not None
    (tmp_path / "mine.yaml").write_text(recipe.group(1), encoding="utf-8")
    kllm("recipe", "check", "mine.yaml", cwd=tmp_path)


def test_help_of_the_table_exists() -> None:
    for name in ("run", "pretrain", "sft", "eval", "chat", "info"):
        assert f"`kllm {name}" in README
        assert "Usage" in kllm(name, "--help", cwd=Path.cwd()).stdout
