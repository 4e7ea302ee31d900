"""Scheduling: shared prefixes, chunks, preemption, guesses; in any order of events nothing is lost or leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_support import EOS, GREEDY, ByteTokenizer, Scripted, ids, small, tiny_model, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kllm.engine import Engine, SamplingParams, choice_seed
from kllm.errors import UserError

DRAWN = SamplingParams(temperature=1.2, top_p=0.9, max_tokens=20, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# -- shared prefixes -----------------------------------------------------------------------------------


def test_a_group_computes_its_prompt_once(model):
    engine = Engine(model, None)
    prompt = ids(100)
    each = [replace(DRAWN, seed=choice_seed(7, k), max_tokens=4) for k in range(16)]
    done = engine.generate([prompt] * 16, each)
    # the prompt once, its last token again for each of the others, and the tokens drawn but the last ones
    assert engine.stats().computed_tokens == 100 + 15 + 16 * 3
    assert [c.cached_tokens for c in done] == [0] + [99] * 15
    alone = [Engine(model, None, prefix_cache=False).generate([prompt], p)[0] for p in each]
    assert tokens_of(done) == tokens_of(alone)
    assert len({tuple(c.token_ids) for c in done}) > 10


def test_a_shared_beginning_is_computed_once_and_changes_nothing(model):
    engine = Engine(model, None)
    system = ids(150)
    prompts = [[*system, *ids(20, seed)] for seed in range(1, 6)]
    done = engine.generate(prompts, GREEDY)
    assert [c.cached_tokens for c in done[1:]] == [144] * 4
    assert tokens_of(done) == tokens_of(Engine(model, None, prefix_cache=False).generate(prompts, GREEDY))
    again = engine.generate([[*prompts[0], *done[0].token_ids, *ids(9, 8)]], GREEDY)[0]
    assert again.cached_tokens == (170 + 11) // 16 * 16, "an answer is known to the next turn"


def test_a_tenants_prefix_is_not_anothers(model):
    engine = Engine(model, None)
    prompt = ids(64)
    first, same, other = (engine.generate([prompt], replace(GREEDY, salt=s))[0] for s in ("a", "a", "b"))
    assert (first.cached_tokens, same.cached_tokens, other.cached_tokens) == (0, 63, 0)


# -- chunks and fairness -------------------------------------------------------------------------------


def test_a_long_prompt_stalls_nobody(model):
    engine = Engine(model, None, prefill_chunk=16)
    running = engine.submit([1, 2], replace(GREEDY, max_tokens=60))
    engine.step()
    long = engine.submit(ids(400), GREEDY)
    short = engine.submit([3] * 8, GREEDY)
    order, gaps = [], 0
    while engine.has_work:
        before = engine.stats().computed_tokens
        events = engine.step()
        assert engine.stats().computed_tokens - before <= 1 + 16 + 2 or not engine.scheduler.running
        if running not in order:
            gaps += all(e.request_id != running for e in events)
        order += [e.request_id for e in events if e.finish_reason]
    assert gaps == 0, "an answer under way gets a token in every step"
    assert order.index(short) < order.index(long), "a short prompt behind a long one is not held up"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_change_nothing(model, chunk):
    prompts = [ids(n, n) for n in (1, 2, 50, 129, 300)]
    whole = Engine(model, None, prefill_chunk=1000, prefix_cache=False).generate(prompts, GREEDY)
    assert tokens_of(Engine(model, None, prefill_chunk=chunk).generate(prompts, GREEDY)) == tokens_of(whole)


# -- memory --------------------------------------------------------------------------------------------


def test_preempted_answers_are_the_same(model):
    prompts = [ids(40, i) for i in range(6)]
    each = [replace(DRAWN, seed=i, max_tokens=70) for i in range(6)]
    engine = small(model, 512)
    done = engine.generate(prompts, each)
    assert engine.stats().preemptions > 0
    assert tokens_of(done) == tokens_of(Engine(model, None).generate(prompts, each))
    stats = engine.stats()
    assert stats.kv_pages_free == stats.kv_pages_total == 512 // 16


def test_the_context_is_what_memory_holds(model):
    engine = small(model, 200)
    assert engine.max_context == 128
    done = engine.generate([ids(120)], replace(GREEDY, max_tokens=99))[0]
    assert (len(done.token_ids), done.finish_reason) == (8, "length")
    with pytest.raises(UserError, match="context is 128"):
        engine.submit(ids(129), GREEDY)
    with pytest.raises(UserError, match="kv-memory"):
        small(model, 10)


# -- guesses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [GREEDY, DRAWN, replace(DRAWN, temperature=0.3)], ids=["greedy", "1.2", "0.3"]
)
def test_guessing_changes_no_token(model, params):
    prompts = [[1, 2, 3] * 5, ids(30), [9]]
    each = [replace(params, max_tokens=60, logprobs=1)] * 3
    plain = Engine(model, None).generate(prompts, each)
    lookup = Engine(model, None, speculate=4)
    itself = Engine(model, None, speculate=3, draft=model)
    other = Engine(model, None, speculate=3, draft=tiny_model(9, num_hidden_layers=1))
    for engine in (lookup, itself, other):
        done = engine.generate(prompts, each)
        assert tokens_of(done) == tokens_of(plain)
        for a, b in zip(done, plain, strict=True):
            assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
        assert engine.stats().kv_pages_free == engine.stats().kv_pages_total
    assert not itself._stepper.proposer._rows.lengths, "the draft's rows are given back"


def steps_of(engine, prompt, params):
    number, steps = engine.submit(prompt, params), 0
    while engine.has_work:
        steps += 1
        engine.step()
    return number, steps


def test_right_guesses_save_steps(model):
    greedy = replace(GREEDY, max_tokens=61)
    prompt = ids(20)
    assert steps_of(Engine(model, None), prompt, greedy)[1] == 61
    assert steps_of(Engine(model, None, speculate=5, draft=model), prompt, greedy)[1] == 1 + 60 / 6
    echo = Engine(Scripted(b"abcdef" * 12), ByteTokenizer(), speculate=4)
    assert steps_of(echo, [1, 2, 3], replace(GREEDY, max_tokens=72))[1] < 25


def test_a_guess_past_the_end_is_dropped(model):
    engine = Engine(Scripted(b"abcabcabc"), ByteTokenizer(), speculate=8)
    done = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=50))[0]
    assert (done.text, done.token_ids[-1], len(done.token_ids)) == ("abcabcabc", EOS, 10)
    stop = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=50, stop=("cab",)))[0]
    assert (stop.text, bytes(stop.token_ids)) == ("ab", b"abcab")


def test_a_draft_of_another_vocabulary_is_refused(model):
    with pytest.raises(UserError, match="draft"):
        Engine(model, None, draft=tiny_model(vocab_size=100))


# -- log-probabilities ---------------------------------------------------------------------------------


def test_log_probabilities_of_prompt_and_answer(model):
    prompts = [ids(n, n) for n in (1, 5, 70)]
    params = replace(GREEDY, max_tokens=4, logprobs=3, prompt_logprobs=2, repetition_penalty=1.3)
    engine = Engine(model, None, prefill_chunk=16)
    for _ in range(2):  # the second time the prefix is known, and must be computed all the same
        for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
            whole = torch.tensor([*prompt, *done.token_ids])
            with torch.inference_mode():
                logs = model.logits(model(whole, torch.arange(len(whole)))).log_softmax(-1)
            assert done.prompt_logprobs[0] is None and len(done.prompt_logprobs) == len(prompt)
            rows = [*done.prompt_logprobs[1:], *done.logprobs]
            assert len(rows) == len(whole) - 1
            for at, row in enumerate(rows):
                assert row.token_id == whole[at + 1]
                assert row.logprob == pytest.approx(float(logs[at, row.token_id]), abs=1e-4)
                best = logs[at].topk(len(row.top))
                assert [lp for _, lp in row.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [len(r.top) for r in rows] == [2] * (len(prompt) - 1) + [3] * 4


def test_a_prompt_can_be_scored_without_an_answer(model):
    done = Engine(model, None).generate([[1, 2, 3]], replace(GREEDY, max_tokens=0, prompt_logprobs=0))[0]
    assert (done.token_ids, done.finish_reason, len(done.prompt_logprobs)) == ([], "length", 3)
    full = Engine(model, None).generate([ids(640)], replace(GREEDY, prompt_logprobs=0))[0]
    assert (full.token_ids, len(full.prompt_logprobs)) == ([], 640)


# -- ending --------------------------------------------------------------------------------------------


def answer(text, **params):
    options = SamplingParams(**{"temperature": 0, "max_tokens": 99, **params})
    return Engine(Scripted(text), ByteTokenizer()).generate([[1, 2, 3]], options)[0]


def test_a_control_token_as_a_stop_string():
    assert answer(b"hello", ignore_eos=True, stop=("<end>",)).token_ids == [*b"hello", EOS]


def test_min_tokens_puts_off_the_end():
    assert len(answer(b"ab", min_tokens=6).token_ids) == 7 or answer(b"ab", min_tokens=6).token_ids[:2] == [
        97,
        98,
    ]
    assert EOS not in answer(b"ab", min_tokens=6).token_ids[:6]
    late = answer(b"x END y END z", stop=("END",), min_tokens=7)
    assert late.text == "x END y "


# -- in any order --------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 90), st.integers(0, 3), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("fail")),
    ),
    min_size=5,
    max_size=40,
)
WEIGHTS = tiny_model()
EXPECTED: dict[tuple[tuple[int, ...], int], list[int]] = {}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(ACTIONS, st.sampled_from([0, 3]), st.sampled_from([256, 1024, 10_000]))
def test_no_order_of_events_loses_mixes_up_or_leaks_anything(actions, speculate, memory):
    engine = small(WEIGHTS, memory, max_batch=4, prefill_chunk=32, speculate=speculate)
    asked: dict[int, tuple[tuple[int, ...], int]] = {}
    got: dict[int, list[int]] = {}
    ended: dict[int, str] = {}

    def take(events):
        for event in events:
            assert event.request_id not in ended, "nothing comes after the end"
            got[event.request_id] += event.token_ids
            if event.finish_reason:
                ended[event.request_id] = event.finish_reason

    for action in actions:
        if action[0] == "submit":
            prompt = tuple(ids(action[1], action[2]))
            number = engine.submit(prompt, replace(GREEDY, max_tokens=action[3]))
            asked[number], got[number] = (prompt, action[3]), []
        elif action[0] == "step":
            for _ in range(action[1]):
                take(engine.step())
        elif action[0] == "cancel":
            engine.cancel(action[1])
        else:
            take(engine.fail_all("broken"))
        stats = engine.stats()
        assert stats.running <= 4 and 0 <= stats.kv_pages_free <= stats.kv_pages_total
        rows = engine.scheduler.rows
        assert rows.held_bytes + engine.scheduler.prefix.nbytes <= rows.budget
        assert len(rows.lengths) == stats.running
    while engine.has_work:
        take(engine.step())
    assert ended.keys() == asked.keys()
    for number, (prompt, count) in asked.items():
        key = (prompt, count)
        if key not in EXPECTED:
            EXPECTED[key] = (
                Engine(WEIGHTS, None).generate([prompt], replace(GREEDY, max_tokens=count))[0].token_ids
            )
        whole = EXPECTED[key]
        assert got[number] == whole[: len(got[number])]
        assert ended[number] != "length" or len(got[number]) == count
    assert engine.stats().kv_pages_free == engine.stats().kv_pages_total


def test_first_come_first_served(model):
    engine = Engine(model, None, max_batch=2, prefill_chunk=16)
    numbers = [engine.submit(ids(30, i), GREEDY) for i in range(6)]
    started: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if event.request_id not in started:
                started.append(event.request_id)
    assert started == numbers
