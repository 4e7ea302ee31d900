"""GGUF files in real llama.cpp (as a ready wheel): it loads them, splits text alike, computes the same.

The negative controls show that each of these tests can fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import TEXT, chat_tokenizer
from model_support import BASE, MOE, SHAPES, random_model

from kllm.errors import KllmError
from kllm.export import gguf_names, gguf_tokens, gguf_write, llamacpp
from kllm.export.gguf_write import GgufInfo, write_gguf
from kllm.export.load import load_model
from kllm.export.verify_gguf import verify_gguf
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(llamacpp.available() is None, reason="no llama.cpp: pip install xllamacpp")

PROMPTS = [[5], [5, 9, 40, 77], list(range(20, 70))]
LOG_PROBABILITY = 1e-4
SHAPES_RUN = {
    **{n: s for n, s in SHAPES.items() if n not in ("qwen3-moe-raw", "smollm3")},
    "smollm3": SHAPES["smollm3"].with_(num_hidden_layers=4, no_rope_layers=(3,)),
    "llama3-bias": SHAPES["llama3"].with_(attention_bias=True),
    "llama3-shared": SHAPES["llama3"].with_(**MOE, num_shared_experts=1),
    "llama3-mixtral": SHAPES["llama3"].with_(**MOE),
    "bailingmoe": BASE.with_(**MOE, num_shared_experts=2, norm_topk_prob=False),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def differences(model: Transformer, path: Path, new_tokens: int = 24) -> tuple[float, int, int]:
    """Largest difference of a log-probability; greedy tokens that agree, and all of them."""
    answer = llamacpp.ask(path, PROMPTS, new_tokens)
    worst, equal, total = 0.0, 0, 0
    for prompt, said in zip(PROMPTS, answer.continuations, strict=True):
        row = torch.tensor(prompt + said.tokens)
        with torch.no_grad():
            hidden = model(row[:-1], torch.arange(len(row) - 1))[len(prompt) - 1 :]
            ours = model.logits(hidden).log_softmax(-1)
        equal += int((ours.argmax(-1) == row[len(prompt) :]).sum())
        total += len(said.tokens)
        for step, theirs in zip(ours, said.logprobs, strict=True):
            worst = max([worst, *(abs(float(step[i]) - value) for i, value in theirs.items())])
    assert sum(map(bool, (s for c in answer.continuations for s in c.logprobs))) > total // 3
    return worst, equal, total


@pytest.mark.parametrize("name", SHAPES_RUN)
def test_log_probabilities_and_greedy_tokens_equal(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(SHAPES_RUN[name].with_(vocab_size=330))
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo(name))
    worst, equal, total = differences(model, tmp_path / "m.gguf")
    assert worst < LOG_PROBABILITY
    assert equal == total == 3 * 24


DENSE = BASE.with_(vocab_size=330, hidden_size=256, head_dim=64, intermediate_size=512)
SHARED = DENSE.with_(**{**MOE, "moe_intermediate_size": 256}, num_shared_experts=1)


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"])
@pytest.mark.parametrize("shape", [DENSE, SHARED], ids=["dense", "moe"])
def test_quantised_files_run(shape: ModelShape, quant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(shape)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", quant, GgufInfo("m"))
    report = verify_gguf(model, tokenizer, tmp_path / "m.gguf", quant)
    assert report["reader"].startswith("llama.cpp")
    assert report["greedy_total"] > 100
    assert report["greedy_equal"] >= report["greedy_total"] * (0.9 if shape.is_moe else 1)
    assert report["texts_equal"] == 3
    assert report["kl"] < (
        1 if shape.is_moe else 0.5
    )  # random weights exaggerate; see test_real_model for a trained one


# ---- tokenisation


def lines() -> list[str]:
    """200 lines: prose of both languages, code, emoji, every kind of white space, odd characters."""
    chooser = random.Random(7)
    words = [
        "the",
        "Cat's",
        "sat",
        "on",
        "a",
        "naïve",
        "mat,",
        "it'll",
        "isn't",
        "WE'VE",
        "3.14",
        "2024",
        "<tag>",
        "http://x.y/z?a=b&c=d",
    ]
    han = "今天天气怎么样我们去北京看长城吧一二三四，。！？《》「」"
    code = [
        "def f(x):",
        "\treturn x**2  # square",
        "if (a && b) { c[0]--; }",
        "SELECT * FROM t;",
        "\\n\\t\"'",
    ]
    emoji = [
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e8\U0001f1f3",
        "\u2764\ufe0f",
    ]
    blanks = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "   \n ", "\u2003"]
    scripts = ["Привет мир", "שלום", "مرحبا ١٢٣", "हिन्दी १२", "ภาษาไทย", "한국어", "é\u0301o\u0308", "ﬁ½²"]
    found = []
    for _ in range(200):
        parts = []
        for _ in range(chooser.randint(1, 12)):
            kind = chooser.choice([words, code, emoji, blanks, scripts, None])
            parts.append("".join(chooser.choices(han, k=6)) if kind is None else chooser.choice(kind))
        found.append(chooser.choice(["", " "]).join(parts))
    return found


def mismatches(tokenizer: Tokenizer, path: Path) -> int:
    """Lines that llama.cpp splits differently."""
    given = lines()
    model = random_model(BASE.with_(vocab_size=tokenizer.vocab_size, num_hidden_layers=1))
    write_gguf(model, tokenizer, path, "f16", GgufInfo("t"))
    theirs = llamacpp.ask(path, [], 1, given).texts
    return sum(a != b for a, b in zip(tokenizer.encode_batch(given), theirs, strict=True))


def test_llama_cpp_splits_200_lines_as_we_do(tmp_path: Path) -> None:
    rich = train_tokenizer([*TEXT, *lines()] * 3, 1200, max_bytes=1_000_000, min_frequency=1)[0]
    assert mismatches(rich, tmp_path / "m.gguf") == 0


@pytest.mark.parametrize("name", ["minimind", "smollm2", "gpt2"])
def test_llama_cpp_splits_as_real_tokenizers_do(name: str, data_kit: Path, tmp_path: Path) -> None:
    assert mismatches(Tokenizer.load(data_kit / "tokenizers" / name), tmp_path / "m.gguf") == 0


def test_llama_cpp_splits_as_a_sentencepiece_tokenizer_does(data_kit: Path, tmp_path: Path) -> None:
    assert mismatches(Tokenizer.load(data_kit / "models" / "stories260K"), tmp_path / "m.gguf") == 0


# ---- negative controls


def test_a_wrong_pre_tokenizer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rich = train_tokenizer([*TEXT, *lines()] * 3, 1200, max_bytes=1_000_000, min_frequency=1)[0]
    monkeypatch.setattr(gguf_tokens, "pre_tokenizer_name", lambda spec: "gpt-2")
    assert mismatches(rich, tmp_path / "m.gguf") > 20


@pytest.mark.parametrize("name", ["llama", "qwen2-moe-shared"])
def test_rows_in_the_order_of_halves_are_noticed(
    name: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(SHAPES[name].with_(vocab_size=330))
    monkeypatch.setattr(gguf_names, "to_pairs", lambda tensor, head_dim: tensor)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    worst, _, _ = differences(model, tmp_path / "m.gguf")
    assert worst > 100 * LOG_PROBABILITY


def test_a_gateless_shared_expert_as_qwen2moe_is_noticed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that llama.cpp's own converter would make: a gate of zeros, 0/0 in its sigmoid."""
    model = random_model(SHAPES["qwen2-moe-shared"].with_(vocab_size=330))
    real: Callable[..., Any] = gguf_names.tensors

    def naive(state: dict[str, torch.Tensor], shape: ModelShape, arch: str) -> Any:
        yield from real(state, shape, arch)
        for layer in range(shape.num_hidden_layers):
            yield f"blk.{layer}.ffn_gate_inp_shexp.weight", torch.zeros(shape.hidden_size)

    monkeypatch.setattr(gguf_write, "gguf_arch", lambda shape: "qwen2moe")
    monkeypatch.setattr(gguf_write, "tensors", naive)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    try:
        answer = llamacpp.ask(tmp_path / "m.gguf", PROMPTS[1:2], 4)
    except KllmError:
        return  # some builds refuse to sample from NaN
    said = answer.continuations[0].logprobs[0]
    with torch.no_grad():
        row = torch.tensor(PROMPTS[1])
        ours = model.logits(model(row, torch.arange(len(row))))[-1].log_softmax(-1)
    assert not said or any(not abs(float(ours[i]) - v) < 1 for i, v in said.items())


def test_verifying_notices_changed_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(DENSE)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0", GgufInfo("m"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.05
    with pytest.raises(KllmError, match=r"up_proj.weight changed by \d"):
        verify_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")


def test_verifying_notices_metadata_that_lies(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are right, llama.cpp is told another theta, and our own reader is not fooled with it."""
    model = random_model(DENSE)
    honest, lying = tmp_path / "honest.gguf", tmp_path / "lying.gguf"
    write_gguf(model, tokenizer, honest, "f32", GgufInfo("m"))
    real: Callable[..., Any] = gguf_write.hyperparameters
    monkeypatch.setattr(
        gguf_write, "hyperparameters", lambda shape, arch: {**real(shape, arch), "rope.freq_base": 7.0}
    )
    write_gguf(model, tokenizer, lying, "f32", GgufInfo("m"))
    ask: Callable[..., Any] = llamacpp.ask
    monkeypatch.setattr(llamacpp, "ask", lambda path, *a, **k: ask(lying, *a, **k))
    with pytest.raises(KllmError, match="differs: log-probabilities"):
        verify_gguf(model, tokenizer, honest, "f32")


def test_llama_cpp_refuses_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_gguf(random_model(DENSE), tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(KllmError, match="llama.cpp refuses it: .*(load|corrupt|bounds)") as caught:
        llamacpp.ask(tmp_path / "cut.gguf", PROMPTS, 2)
    assert "\n" not in str(caught.value)


def test_what_comes_back_is_what_llama_cpp_ran(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Our reader and llama.cpp agree on a file of quantised weights within its 8-bit activations."""
    model = random_model(DENSE)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "q4_k_m", GgufInfo("m"))
    back, _ = load_model(tmp_path / "m.gguf")
    near, _, _ = differences(back.eval(), tmp_path / "m.gguf", 8)
    far, _, _ = differences(model.eval(), tmp_path / "m.gguf", 8)
    assert near < far
