"""What once hung, leaked, poisoned its neighbours or was forgotten: each has its test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_support import GREEDY, ids, small, tiny_model, tokens_of

from kllm.engine import Engine
from kllm.errors import UserError


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def run(engine):
    events = []
    for _ in range(3000):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError("it never ends")


def test_a_scored_prompt_that_fills_the_memory_blocks_nobody(model):
    engine = small(model, 200)
    scored = engine.submit(ids(128), replace(GREEDY, max_tokens=0, prompt_logprobs=0))
    other = engine.submit([1, 2], GREEDY)
    assert {e.request_id for e in run(engine) if e.finish_reason} == {scored, other}


def test_a_prompt_preempted_while_it_is_scored_is_scored_once(model):
    engine = small(model, 256, prefill_chunk=8, prefix_cache=False)
    engine.submit(ids(60, 1), replace(GREEDY, max_tokens=60))
    for _ in range(5):
        engine.step()
    engine.submit(ids(100, 2), replace(GREEDY, max_tokens=3, prompt_logprobs=1))
    scored = [e.prompt_logprobs for e in run(engine) if e.prompt_logprobs]
    assert engine.stats().preemptions > 0 and [len(s) for s in scored] == [100]
    assert [x.token_id for x in scored[0][1:]] == ids(100, 2)[1:]


def test_the_youngest_gives_way(model):
    engine = small(model, 512, prefix_cache=False)
    numbers = [engine.submit(ids(40, i), replace(GREEDY, max_tokens=70)) for i in range(6)]
    ended = [e.request_id for e in run(engine) if e.finish_reason]
    assert engine.stats().preemptions > 0 and ended[:4] == numbers[:4]


def test_a_draft_without_room_guesses_nothing(model):
    small_draft = tiny_model(9, num_hidden_layers=1, max_position_embeddings=64)
    engine = Engine(model, None, speculate=3, draft=small_draft)
    asked = replace(GREEDY, max_tokens=100)
    assert tokens_of(engine.generate([ids(30)], asked)) == tokens_of(
        Engine(model, None).generate([ids(30)], asked)
    )


def test_a_draft_reads_a_long_prompt_in_parts(model):
    engine = Engine(model, None, speculate=3, draft=model, prefill_chunk=64)
    read = []
    proposer = engine._stepper.proposer
    proposer.model = lambda tokens, positions, cache, real=proposer.model: (
        read.append(len(tokens)),
        real(tokens, positions, cache),
    )[1]
    proposer.model.ensure_context, proposer.model.logits = (
        engine.prepared.ensure_context,
        engine.prepared.logits,
    )
    done = engine.generate([ids(500), ids(90, 1)], GREEDY)
    assert max(read) <= 256 and sum(read) > 590
    assert tokens_of(done) == tokens_of(Engine(model, None).generate([ids(500), ids(90, 1)], GREEDY))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_a_broken_request_breaks_no_other(kv_dtype):
    broken = tiny_model(2, tie_word_embeddings=False)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    engine = Engine(broken, None, kv_dtype=kv_dtype)
    engine.submit([*range(10, 50), 7, 8, 9], GREEDY)
    assert [e.finish_reason for e in run(engine)] == ["error"]
    innocent = [[1, 2, 3], [t for t in ids(30, 5) if t != 7], list(range(10, 50))]
    greedy = replace(GREEDY, logit_bias=((7, -1e9),))
    done = engine.generate(innocent, greedy)
    assert tokens_of(done) == tokens_of(Engine(broken, None, kv_dtype=kv_dtype).generate(innocent, greedy))


def test_streams_keep_their_events_whoever_steps(model):
    engine = Engine(model, None, max_batch=4)
    want = Engine(model, None).generate([[1], [2]], GREEDY)
    a, b = engine.stream([1], GREEDY), engine.stream([2], GREEDY)
    engine.generate([[5]], GREEDY)
    next(a)
    assert [t for e in b for t in e.token_ids] == want[1].token_ids
    never = engine.stream([3], GREEDY)
    never.close()
    assert [t for e in a for t in e.token_ids] == want[0].token_ids[1:]
    assert not engine.has_work


def test_new_weights_reach_running_answers_and_forget_the_old_keys(model):
    engine = Engine(model, None)
    prompt = ids(70)
    engine.generate([prompt], GREEDY)
    engine.submit(prompt, replace(GREEDY, max_tokens=30))
    for _ in range(5):
        engine.step()
    other = tiny_model(5)
    engine.reload(other)
    run(engine)
    done = engine.generate([prompt, ids(90)], GREEDY)
    assert tokens_of(done) == tokens_of(Engine(other, None).generate([prompt, ids(90)], GREEDY))


def test_after_a_failure_nothing_is_known(model):
    engine = Engine(model, None)
    engine.generate([ids(64)], GREEDY)
    engine.submit(ids(30), GREEDY)
    engine.step()
    assert [e.finish_reason for e in engine.fail_all("x")] == ["error"]
    assert engine.generate([ids(64)], GREEDY)[0].cached_tokens == 0
    assert not engine.scheduler.rows.lengths


def test_many_openings_are_all_remembered(model):
    engine = Engine(model, None)
    prompts = [[0, *ids(40, i)] for i in range(100)]
    one = replace(GREEDY, max_tokens=1)
    engine.generate(prompts, one)
    pages = engine.stats().kv_pages_cached
    assert [c.cached_tokens for c in engine.generate(prompts, one)] == [40] * 100
    assert engine.stats().kv_pages_cached == pages


def test_the_cache_lives_on_after_a_burst(model):
    engine = small(model, 4096, max_batch=64)
    engine.generate([ids(40, i) for i in range(64)], GREEDY)
    first, again = (engine.generate([ids(200, 99)], GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 199)


def test_a_shared_opening_of_a_long_prompt_stalls_nobody(model):
    engine = Engine(model, None, prefill_chunk=16)
    system = ids(20)
    long = engine.submit([*system, *ids(500, 1)], GREEDY)
    short = [engine.submit([*system, *ids(5, i)], GREEDY) for i in (2, 3)]
    stranger = engine.submit(ids(9, 7), GREEDY)
    started = []
    for event in run(engine):
        if event.request_id not in started:
            started.append(event.request_id)
    assert started[-1] == long and set(started[:3]) == {*short, stranger}


@pytest.mark.parametrize(
    "extra",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"min_tokens": 30, "stop_token_ids": tuple(range(0, 256, 3))},
        {"logit_bias": ((65, 9.0), (66, 8.5))},
    ],
    ids=str,
)
def test_guesses_beside_what_depends_on_the_text(model, extra):
    prompts = [[1, 2, 3] * 5, ids(30), [9], [65, 66] * 9]
    each = [replace(GREEDY, max_tokens=50, **(extra if i % 2 else {})) for i in range(4)]
    plain = Engine(model, None).generate(prompts, each)
    for options in ({"speculate": 4}, {"speculate": 3, "draft": model}):
        assert tokens_of(Engine(model, None, **options).generate(prompts, each)) == tokens_of(plain)


def test_vectors_of_texts(model):
    engine = Engine(model, None)
    whole = torch.tensor(ids(33))
    with torch.inference_mode():
        hidden = model(whole, torch.arange(33))
    assert torch.allclose(engine.embed(whole.tolist(), "last"), hidden[-1], atol=1e-4)
    assert torch.allclose(engine.embed(whole.tolist()), hidden.mean(0), atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_context": -3}, {"prefill_chunk": -5}, {"speculate": -1}], ids=str
)
def test_impossible_options_are_user_errors(model, options):
    with pytest.raises(UserError, match=next(iter(options))):
        Engine(model, None, **options)
