"""lm-evaluation-harness over HTTP: the numbers of its own transformers back end, from the same directory."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_support import chat_model
from serve_client import Server

os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported: bars would fill the report

CONTEXT = 512
WORDS = ("the", "cat", "sat", "on", "mat", "and", "ate", "fish", "where", "is", "here", "你好", "世界", "猫")

MULTIPLE_CHOICE = """
task: kllm_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
GENERATE = """
task: kllm_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n\\n", "?!", "###", "Q:", "</s>"], max_gen_toks: 12, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("lm_eval") / "model", context=CONTEXT)


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Server]:
    server = Server(models=(model,))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def items(server: Server, count: int) -> list[dict[str, Any]]:
    """Questions of ragged length with four endings each, the last one what the model itself would say."""
    draw = random.Random(7)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    questions = [words(30) for _ in range(count)]
    said = server.complete(questions, max_tokens=2)["choices"]
    return [
        {
            "question": question,
            "choices": [*(f" {words(4)}" for _ in range(3)), answer["text"] or " end"],
            "answer": draw.randrange(4),
        }
        for question, answer in zip(questions, said, strict=True)
    ]


def task(folder: Path, template: str, server: Server, count: int) -> Path:
    """A task folder of `count` items, nothing in it from the hub."""
    folder.mkdir(parents=True)
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items(server, count)), encoding="utf-8")
    (folder / "task.yaml").write_text(template.format(data=data), encoding="utf-8")
    return folder


def evaluated(
    folder: Path, name: str, model: str, arguments: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """lm_eval's results with every sample."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # of the extra lm_eval[api]
    from lm_eval.tasks import TaskManager

    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )


def answers(results: dict[str, Any], name: str) -> list[list[Any]]:
    """What the model said to each item, in the items' order."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def api(server: Server, path: str, **more: Any) -> dict[str, Any]:
    url = f"{server.url}{path}"
    return {
        "model": server.get("/v1/models").json()["data"][0]["id"],
        "base_url": url,
        "num_concurrent": 16,
        **more,
    }


def same_numbers(tmp_path: Path, model: Path, running: Server, count: int, **how: Any) -> None:
    folder = task(tmp_path / "task", MULTIPLE_CHOICE, running, count)
    remote = evaluated(folder, "kllm_choice", "local-completions", api(running, "/v1/completions", **how))
    local = evaluated(
        folder, "kllm_choice", "hf", {"pretrained": str(model), "dtype": "float32"}, device="cpu"
    )
    pairs = list(zip(answers(remote, "kllm_choice"), answers(local, "kllm_choice"), strict=True))
    assert len(pairs) == count
    greedy = 0
    for ours, theirs in pairs:
        assert len(ours) == len(theirs) == 4
        for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
            assert math.isclose(a, b, abs_tol=1e-3), (a, b)
            assert a_greedy == b_greedy
            greedy += a_greedy
    assert 0 < greedy < 4 * count  # both answers of is_greedy were seen
    assert remote["results"]["kllm_choice"]["acc,none"] == local["results"]["kllm_choice"]["acc,none"]


def test_loglikelihoods_are_those_of_transformers(tmp_path: Path, model: Path, running: Server) -> None:
    same_numbers(tmp_path, model, running, 20, tokenizer_backend="huggingface", tokenizer=str(model))


@pytest.mark.slow
def test_two_hundred_items_through_the_remote_tokenizer(tmp_path: Path, model: Path, running: Server) -> None:
    same_numbers(tmp_path, model, running, 200)


def test_greedy_texts_are_those_of_transformers(tmp_path: Path, model: Path, running: Server) -> None:
    folder = task(tmp_path / "task", GENERATE, running, 12)
    remote = evaluated(folder, "kllm_say", "local-completions", api(running, "/v1/completions"))
    local = evaluated(folder, "kllm_say", "hf", {"pretrained": str(model), "dtype": "float32"}, device="cpu")
    assert answers(remote, "kllm_say") == answers(local, "kllm_say")


def test_chat_completions_run_a_generation_task(tmp_path: Path, running: Server) -> None:
    folder = task(tmp_path / "task", GENERATE, running, 12)
    arguments = api(running, "/v1/chat/completions")
    results = evaluated(folder, "kllm_say", "local-chat-completions", arguments, apply_chat_template=True)
    texts = answers(results, "kllm_say")
    assert len(texts) == 12
    assert all(isinstance(text, str) and text for (text,) in texts)
