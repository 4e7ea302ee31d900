"""Greedy answers of the engine equal transformers' `generate`, token for token, through files on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kllm.engine import Engine, SamplingParams
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

LLAMA = ModelShape(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=192,
    initializer_range=0.15,
)
SHAPES = {
    "llama": LLAMA,
    "llama-untied-mha": LLAMA.with_(tie_word_embeddings=False, num_key_value_heads=4),
    "qwen3": LLAMA.with_(qk_norm=True, head_dim=32),
    "qwen3-moe": LLAMA.with_(qk_norm=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("model") / "m"
    model = Transformer(SHAPES[request.param])
    model.init_weights(3)
    save_model(model, None, path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).float().eval()
    return load_model(path)[0], theirs


def reference(theirs, prompt, count, **options):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **{"eos_token_id": None, **options},
        )
    return out[0, len(prompt) :].tolist()


def ragged(count):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(1, 211, (n,), generator=generator).tolist() for n in (1, 2, 3, 17, 64, 65, 120)[:count]
    ]


def test_greedy_in_a_ragged_batch(pair):
    ours, theirs = pair
    done = Engine(ours, None, max_batch=4).generate(ragged(7), SamplingParams(temperature=0, max_tokens=40))
    for prompt, completion in zip(ragged(7), done, strict=True):
        assert completion.token_ids == reference(theirs, prompt, 40)


@pytest.mark.parametrize("options", [{}, {"speculate": 4}, {"prefill_chunk": 16}], ids=str)
def test_greedy_up_to_the_context_limit(pair, options):
    """Prompts that leave one token, a few, or none: 192 positions in all."""
    ours, theirs = pair
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(1, 211, (n,), generator=generator).tolist() for n in (191, 185, 192, 1)]
    done = Engine(ours, None, **options).generate(prompts, SamplingParams(temperature=0, max_tokens=1000))
    assert [len(c.token_ids) for c in done] == [1, 7, 0, 191]
    assert {c.finish_reason for c in done} == {"length"}
    for prompt, completion in zip(prompts, done, strict=True):
        count = len(completion.token_ids)
        assert count == 0 or completion.token_ids == reference(theirs, prompt, count)


def test_repetition_penalty_and_end_token(pair):
    ours, theirs = pair
    params = SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.3)
    free = Engine(ours, None).generate(ragged(4), params)
    for prompt, completion in zip(ragged(4), free, strict=True):
        assert completion.token_ids == reference(theirs, prompt, 40, repetition_penalty=1.3)
    end = free[3].token_ids[10]
    stopping = SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.3, stop_token_ids=(end,))
    done = Engine(ours, None).generate(ragged(4), stopping)
    assert done[3].finish_reason == "stop"
    for prompt, completion in zip(ragged(4), done, strict=True):
        wanted = reference(theirs, prompt, 40, repetition_penalty=1.3, eos_token_id=end)
        assert completion.token_ids == wanted


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_what_may_be_drawn_is_what_transformers_would_draw(pair, options):
    ours, theirs = pair
    prompt = ragged(4)[3]
    with torch.no_grad():
        scores = theirs(torch.tensor([prompt])).logits[0, -1:].float() / 0.7
    warpers = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}
    for name, value in options.items():
        scores = getattr(transformers, warpers[name])(value)(None, scores)
    allowed = (scores[0] > -torch.inf).nonzero().flatten().tolist()
    many = [
        SamplingParams(**{"top_p": 1.0, **options}, temperature=0.7, max_tokens=1, seed=s)
        for s in range(1000)
    ]
    drawn = [c.token_ids[0] for c in Engine(ours, None, max_batch=64).generate([prompt] * 1000, many)]
    assert set(drawn) <= set(allowed)
    counts = torch.bincount(torch.tensor(drawn), minlength=211).double() / 1000
    assert 0.5 * (counts - scores[0].double().softmax(0)).abs().sum() < 0.15, "total variation distance"


def test_a_real_model_tells_its_story(data_kit):
    home = data_kit / "models" / "stories260K"
    reference = json.loads((home / "greedy_reference.json").read_text(encoding="utf-8"))
    model, tokenizer = load_model(home)
    wanted = reference["greedy_token_ids"]
    story = SamplingParams(temperature=0, max_tokens=len(wanted) - 1, ignore_eos=True)
    neighbours = [[1, *range(5, n)] for n in (6, 30, 99)]
    done = Engine(model, tokenizer).generate([wanted[:1], *neighbours, wanted[:40]], story)
    assert done[0].token_ids == wanted[1:]
    assert done[0].text == reference["greedy_text"]
    assert done[-1].token_ids[: len(wanted) - 40] == wanted[40:]
