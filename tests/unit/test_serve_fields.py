"""The request fields that every generating endpoint shares: types, ranges, nulls, and the engine's parameters."""

from __future__ import annotations

from typing import Any

import pytest

from kllm.engine.params import choice_seed
from kllm.serve.body import validated
from kllm.serve.errors import ApiError
from kllm.serve.fields import SamplingFields, room


def read(**fields: Any) -> SamplingFields:
    return validated(fields, SamplingFields)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        body = read(**fields)
        body.check(16)
        body.sampling(8, vocab_size=100)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.01, "1", True, [1]]),
        ("top_p", [-0.1, 1.1, "x"]),
        ("top_k", [-2, 1.5, "3", True]),
        ("min_p", [-1, 1.01]),
        ("repetition_penalty", [0, -1, "a"]),
        ("repeat_penalty", [0]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "1"]),
        ("n", [0, -1, 17, 1.5, "2"]),
        ("stop", ["", [""], 5, [5], ["a"] * 17, "x" * 257, {"a": 1}]),
        ("stop_token_ids", [[100], 7]),
        ("min_tokens", [-1, "2"]),
        ("ignore_eos", [1, "true"]),
        ("stream", ["yes", 1]),
        (
            "logit_bias",
            [{"x": 1}, {"-1": 1}, {"100": 1}, {"1.5": 1}, {"5": 101}, {"5": "1"}, {"5": True}, [1]],
        ),
        ("logit_bias", [{"٣": 1}, {" 5": 1}, {str(i): 0 for i in range(1025)}]),
        ("truncate_prompt_tokens", [0, "a"]),
        ("cache_salt", ["", 5]),
        ("stream_options", [{"include_usage": True}, 3]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        assert refusal(**{field: value}).param == field, value


def test_a_wrong_entry_of_a_list_is_named() -> None:
    assert refusal(stop_token_ids=[1, -1]).param == "stop_token_ids[1]"
    assert refusal(stream=True, stream_options={"include_usage": "x"}).param == "stream_options.include_usage"


def test_null_is_absent_everywhere() -> None:
    names = [name for name in SamplingFields.model_fields if name not in ("n",)]
    body = read(**dict.fromkeys([*names, "n", "unknown"]), nonsense={"a": [1]})
    assert body == read()
    assert read(stop=[None, "a", None], stream=True, stream_options={"include_usage": None}).stop == ["a"]


def test_defaults_come_from_the_model_then_from_openai() -> None:
    (params,) = read().sampling(8, vocab_size=100)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 8)
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": None, "bos_token_id": 1}
    (params,) = read(top_k=5).sampling(8, vocab_size=100, defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 1.0, 5)


def test_the_values_arrive() -> None:
    body = read(
        temperature=1, top_p=0.5, top_k=-1, min_p=0.1, repeat_penalty=1.2, presence_penalty=1, frequency_penalty=-2,
        logit_bias={"7": -100, "99": 2.5}, stop="a", stop_token_ids=[3, 3.0], ignore_eos=True, min_tokens=50,
        cache_salt="x",
    )  # fmt: skip
    (params,) = body.sampling(8, vocab_size=100, logprobs=2, shown=[9], banned=[7])
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 0.5, 0, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 1.0, -2.0)
    assert dict(params.logit_bias)[99] == 2.5 and dict(params.logit_bias)[7] < -1e6
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("a",), (3,), True)
    assert (params.min_tokens, params.salt, params.logprobs, params.shown_special_ids) == (8, "x", 2, (9,))


def test_top_p_zero_is_greedy() -> None:
    assert read(temperature=1.5, top_p=0).sampling(8, vocab_size=9)[0].greedy
    assert read(temperature=0).sampling(8, vocab_size=9)[0].greedy


def test_each_choice_has_its_own_seed_and_the_first_the_one_asked_for() -> None:
    seeds = [p.seed for p in read(seed=-5, n=3).sampling(8, vocab_size=9)]
    assert seeds == [-5, choice_seed(-5, 1), choice_seed(-5, 2)] and len(set(seeds)) == 3
    assert [p.seed for p in read(n=2).sampling(8, vocab_size=9)] == [None, None]


def test_the_answer_is_cut_to_the_context_and_a_full_one_is_refused() -> None:
    assert room(100, 90, None) == 10
    assert room(100, 90, 10**12) == 10
    assert room(100, 99, 5) == 1
    with pytest.raises(ApiError) as caught:
        room(100, 100, 5)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert "maximum context length is 100 tokens" in caught.value.message
    assert "resulted in 100 tokens" in caught.value.message
