"""The engine's promises: independence of neighbours, limits, cancellation, text that is always whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_support import EOS, GREEDY, ByteTokenizer, Scripted, tiny_model

from kllm.engine import Engine, Event, SamplingParams
from kllm.errors import KllmError, UserError


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompts(count, longest=40):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def is_greedy(model, prompt, output):
    """Whether a pass without a cache over prompt and answer would choose each of the answer's tokens."""
    ids = torch.tensor([*prompt, *output])
    with torch.inference_mode():
        hidden = model(ids, torch.arange(len(ids)))[len(prompt) - 1 : -1]
        return model.logits(hidden).argmax(-1).tolist() == list(output)


def test_greedy_equals_the_model_without_a_cache(model):
    asked = [*prompts(9), [5]]
    done = Engine(model, None, max_batch=4).generate(asked, GREEDY)
    for prompt, completion in zip(asked, done, strict=True):
        assert is_greedy(model, prompt, completion.token_ids) and len(completion.token_ids) == 12
        assert (completion.prompt_tokens, completion.finish_reason) == (len(prompt), "length")


def test_same_answer_alone_and_among_31_others(model):
    asked = prompts(32)
    each = [
        SamplingParams(
            max_tokens=5 + i,
            seed=i % 5,
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_k=(0, 7)[i % 2],
            top_p=(1.0, 0.9, 0.5)[i % 3],
            min_p=(0.0, 0.02)[i % 2],
            repetition_penalty=(1.0, 1.2)[i % 2],
            ignore_eos=True,
        )
        for i in range(32)
    ]
    together = Engine(model, None).generate(asked, each)
    crowded = Engine(model, None, max_batch=5).generate(asked, each)
    alone = [Engine(model, None).generate([p], s)[0] for p, s in zip(asked, each, strict=True)]
    answers = [[c.token_ids for c in done] for done in (together, crowded, alone)]
    assert answers[0] == answers[1] == answers[2]


def test_seeds_repeat_and_differ_and_none_is_fresh(model):
    engine = Engine(model, None)
    base = SamplingParams(max_tokens=20, temperature=1.5, top_p=1.0, ignore_eos=True)

    def answer(seed):
        return tuple(engine.generate([[1, 2, 3]], replace(base, seed=seed))[0].token_ids)

    assert answer(3) == answer(3) == answer(3 + 2**64)
    assert len({answer(s) for s in (0, 1, 2, -1, None, None)}) == 6


def test_requests_join_and_leave_a_running_batch(model):
    engine = Engine(model, None, max_batch=3)
    first = engine.submit([1, 2, 3], replace(GREEDY, max_tokens=30))
    for _ in range(4):
        engine.step()
    later = [engine.submit(p, GREEDY) for p in ([9], [8, 7], [6, 5, 4])]
    text: dict[int, list[int]] = {n: [] for n in (first, *later)}
    order = []
    while engine.has_work:
        for event in engine.step():
            text[event.request_id] += event.token_ids
            if event.finish_reason:
                order.append(event.request_id)
    assert order[-1] == first, "short answers must not wait for a long one"
    assert is_greedy(model, [6, 5, 4], text[later[2]]) and len(text[later[2]]) == 12
    assert len(text[first]) == 26


def test_the_cache_grows_while_answers_are_under_way(model):
    engine = Engine(model, None)
    asked = [[1] * 3, [2] * 250]
    done = engine.generate(asked, replace(GREEDY, max_tokens=300))
    assert max(engine.scheduler.rows.pools) == 640
    for prompt, completion in zip(asked, done, strict=True):
        assert is_greedy(model, prompt, completion.token_ids) and len(completion.token_ids) == 300


# -- limits ------------------------------------------------------------------------------------------


def test_the_context_limit_ends_an_answer(model):
    engine = Engine(model, None, max_context=20)
    long, full = engine.generate([[3] * 15, [3] * 20], GREEDY)
    assert (len(long.token_ids), long.finish_reason) == (5, "length")
    assert is_greedy(model, [3] * 15, long.token_ids)
    assert (full.token_ids, full.finish_reason) == ([], "length")


def test_a_prompt_beyond_the_models_positions_is_a_user_error(model):
    with pytest.raises(UserError, match="641 tokens, the model's context is 640"):
        Engine(model, None, max_context=10_000).generate([[1], [1] * 641], GREEDY)


@pytest.mark.parametrize("prompt", [[], [257], [-1]])
def test_impossible_prompts_are_user_errors(model, prompt):
    engine = Engine(model, None)
    with pytest.raises(UserError):
        engine.generate([[1], prompt], GREEDY)
    assert not engine.has_work, "nothing may stay behind"


def test_max_tokens_zero_and_one(model):
    none, one = Engine(model, None).generate(
        [[1], [1]], [replace(GREEDY, max_tokens=0), replace(GREEDY, max_tokens=1)]
    )
    assert (none.token_ids, none.finish_reason, len(one.token_ids)) == ([], "length", 1)


# -- ending ------------------------------------------------------------------------------------------


def test_stop_tokens_end_the_answer_and_stay_out_of_the_text(model):
    reference = Engine(model, ByteTokenizer()).generate([[1, 2]], GREEDY)[0].token_ids
    stop = reference[4]
    at = reference.index(stop)
    done = Engine(model, ByteTokenizer()).generate([[1, 2]], replace(GREEDY, stop_token_ids=(stop,)))[0]
    assert (done.token_ids, done.finish_reason) == (reference[: at + 1], "stop")


def test_end_of_text_unless_ignored():
    engine = Engine(Scripted(b"hello"), ByteTokenizer())
    done = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=9))[0]
    assert (done.text, done.finish_reason, done.token_ids) == ("hello", "stop", [*b"hello", EOS])
    done = engine.generate([[1, 2, 3]], GREEDY)[0]
    assert (done.text, done.finish_reason, len(done.token_ids)) == ("hello", "length", 12)


def events_of(text, **params):
    engine = Engine(Scripted(text), ByteTokenizer())
    options = SamplingParams(**{"temperature": 0, "max_tokens": 99, **params})
    return list(engine.stream([1, 2, 3], options))


def test_a_stop_string_across_tokens_never_shows():
    events = events_of(b"so far END more", stop=("END", "far x"))
    assert "".join(e.text for e in events) == "so far "
    assert events[-1].finish_reason == "stop"
    assert all("E" not in e.text for e in events)


def test_what_only_looked_like_a_stop_is_given_out():
    assert "".join(e.text for e in events_of(b"EN", stop=("END",))) == "EN"
    assert "".join(e.text for e in events_of(b"one E", stop=("END",), max_tokens=5)) == "one E"


def test_streamed_text_is_whole_characters():
    text = "囍🤖龘𠮷é한 ok"
    events = events_of(text.encode())
    assert "".join(e.text for e in events) == text
    assert all("�" not in e.text for e in events)
    # cut inside a character: the tail becomes one replacement character, as decoding the whole would
    assert "".join(e.text for e in events_of("a囍".encode(), max_tokens=3)) == "a�"


# -- leaving early -----------------------------------------------------------------------------------


def test_cancelled_requests_report_once_and_disturb_nobody(model):
    engine = Engine(model, ByteTokenizer(), max_batch=3)
    numbers = [engine.submit([i, i + 1], GREEDY) for i in range(5)]
    tokens = {n: [] for n in numbers}
    reasons: dict[int, list[str]] = {n: [] for n in numbers}
    for turn in range(100):
        if turn == 3:
            engine.cancel(numbers[0])  # running
            engine.cancel(numbers[4])  # waiting
            engine.cancel(numbers[4])
            engine.cancel(999)
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish_reason:
                reasons[event.request_id].append(event.finish_reason)
        if not engine.has_work:
            break
    assert list(reasons.values()) == [["cancelled"], ["length"], ["length"], ["length"], ["cancelled"]]
    for i in (1, 2, 3):
        assert is_greedy(model, [i, i + 1], tokens[numbers[i]]) and len(tokens[numbers[i]]) == 12
    assert len(tokens[numbers[0]]) == 3 and tokens[numbers[4]] == []


def test_closing_a_stream_frees_its_row(model):
    engine = Engine(model, None)
    stream = engine.stream([1, 2], replace(GREEDY, max_tokens=500))
    next(stream)
    stream.close()
    assert not engine.has_work


def test_cancelling_inside_a_stream_ends_it_with_a_reason(model):
    engine = Engine(model, None)
    seen = []
    for event in engine.stream([1, 2], replace(GREEDY, max_tokens=500)):
        seen.append(event)
        if len(seen) == 3:
            engine.cancel(event.request_id)
    assert [e.finish_reason for e in seen] == [None, None, None, "cancelled"]


def test_streams_submitted_requests_and_generate_share_an_engine(model):
    engine = Engine(model, None, max_batch=4)
    own = engine.submit([4], GREEDY)
    a, b = engine.stream([1], GREEDY), engine.stream([2], GREEDY)
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for ea, eb in zip(a, b, strict=True):
        tokens["a"] += ea.token_ids
        tokens["b"] += eb.token_ids
    c = engine.generate([[3]], GREEDY)[0].token_ids
    mine = [t for e in iter_steps(engine) if e.request_id == own for t in e.token_ids]
    for prompt, answer in zip((1, 2, 3, 4), (tokens["a"], tokens["b"], c, mine), strict=True):
        assert is_greedy(model, [prompt], answer) and len(answer) == 12


def iter_steps(engine):
    while engine.has_work:
        yield from engine.step()


def test_generate_reports_events_by_prompt_index(model):
    engine = Engine(model, ByteTokenizer(), max_batch=2)
    events: list[Event] = []
    done = engine.generate(prompts(4), GREEDY, on_event=events.append)
    for i, completion in enumerate(done):
        assert [t for e in events if e.request_id == i for t in e.token_ids] == completion.token_ids
        assert "".join(e.text for e in events if e.request_id == i) == completion.text


def test_an_interrupt_in_the_middle_leaves_nothing_behind(model):
    engine = Engine(model, None)

    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(3), GREEDY, on_event=interrupt)
    assert not engine.has_work
    assert is_greedy(model, [1], engine.generate([[1]], GREEDY)[0].token_ids)


def test_a_model_in_training_is_sampled_as_it_is_and_left_alone():
    model = tiny_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_noise=True)
    calm = Engine(model, None).generate(prompts(3), GREEDY)
    model.train()  # noise in the router from here on, but not for the engine
    assert Engine(model, None).generate(prompts(3), GREEDY) == calm
    assert model.training


def test_damaged_weights_are_one_clear_error():
    model = tiny_model(1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(KllmError, match="not finite"):
        Engine(model, None).generate([[1]], replace(GREEDY, logprobs=1))


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(UserError, match="tokenizer"):
        Engine(model, None).submit([1], SamplingParams(stop=("x",)))
