"""/v1/completions against a bigram table: prompts, echo, log-probabilities, streams, refusals, usage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serve_bigrams import CONTEXT, Bigrams, Client, refusal, sentencepiece, tokenizer

from kllm.engine.params import Event, choice_seed
from kllm.serve.completions import Choice
from kllm.serve.logprobs import token_name

PATH = "/v1/completions"
PROMPT = "the cat"


def ids_of(text: str) -> list[int]:
    return tokenizer().encode_raw(text)


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def folded(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            one = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert one["finish_reason"] is None, "nothing may come after the end"
            one["text"] += part["text"]
            one["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                if one["logprobs"] is None:
                    one["logprobs"] = {key: [] for key in part["logprobs"]}
                for key, values in part["logprobs"].items():
                    one["logprobs"][key] += values
    return choices


# ---- the plain answer


def test_a_greedy_answer_and_its_frame() -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, model="tiny", prompt=PROMPT, max_tokens=5, temperature=0).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "text": text_of(engine.greedy(ids_of(PROMPT), 5)),
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)
    assert answer["system_fingerprint"] == "kllm-test"
    n = len(ids_of(PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": n,
        "completion_tokens": 5,
        "total_tokens": n + 5,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_sixteen_tokens_are_the_default_and_null_is_absent() -> None:
    body = dict.fromkeys(
        ("max_tokens", "n", "stop", "logprobs", "echo", "suffix", "best_of", "model", "seed")
    )
    answer = Client(Bigrams()).post(PATH, prompt=PROMPT, temperature=0, **body).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["model"] == "tiny"


@pytest.mark.parametrize(
    "prompt",
    ["the cat", ["the cat", "on the mat"], [5, 6, 7], [[5, 6, 7], [9]]],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_every_form_of_prompt(prompt: Any) -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, prompt=prompt, max_tokens=4, temperature=0).json()
    each = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    each = [ids_of(p) if isinstance(p, str) else p for p in each]
    wanted = [text_of(engine.greedy(ids, 4)) for ids in each]
    assert [c["text"] for c in answer["choices"]] == wanted
    assert [c["index"] for c in answer["choices"]] == list(range(len(each)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, each))
    assert answer["usage"]["completion_tokens"] == 4 * len(each)


def test_choices_are_prompt_times_n_plus_k_and_seeded_each() -> None:
    engine = Bigrams()
    client = Client(engine)
    body = {"prompt": [[5], [6, 7]], "max_tokens": 6, "seed": 11, "temperature": 1}
    answer = client.post(PATH, n=3, **body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    alone = client.post(PATH, **body).json()["choices"]
    assert answer["choices"][0]["text"] == alone[0]["text"]
    assert answer["choices"][3]["text"] == alone[1]["text"]
    second = client.post(PATH, **{**body, "seed": choice_seed(11, 1)}).json()["choices"]
    assert answer["choices"][4]["text"] == second[1]["text"]
    assert len({c["text"] for c in answer["choices"]}) > 2
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6  # of each prompt's first choice


def test_control_tokens_in_the_prompt_are_read_and_the_context_cuts_the_answer() -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, prompt="<|im_start|>the", max_tokens=10**9, temperature=0).json()
    assert answer["usage"]["prompt_tokens"] == len(ids_of("<|im_start|>the"))
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_strings_of_any_number_with_nulls_and_the_end_token() -> None:
    engine = Bigrams()
    text = text_of(engine.greedy(ids_of(PROMPT), 12))
    stop = [None, *(f"never {i}" for i in range(40)), text[3:5], "<|im_end|>"]
    answer = Client(engine).post(PATH, prompt=PROMPT, max_tokens=12, temperature=0, stop=stop).json()
    choice = answer["choices"][0]
    assert choice["text"] == text[: text.index(text[3:5])]
    assert choice["finish_reason"] == "stop"
    assert Client(engine).post(PATH, prompt=PROMPT, stop=[]).status_code == 200


# ---- echo and log-probabilities


def check_logprobs(engine: Bigrams, prompt: list[int], generated: list[int], found: Any, best: int) -> None:
    """`found` must be the table's numbers to the bit."""
    ids = prompt + generated
    assert found["tokens"] == [token_name(tokenizer(), i) for i in ids]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for before, token, value, top in zip(
        ids, ids[1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False
    ):
        row = engine.table[before]
        assert value == float(row[token])
        names = {token_name(tokenizer(), int(i)): float(row[i]) for i in row.topk(best).indices}
        assert top == {token_name(tokenizer(), token): value, **names}
        assert best <= len(top) <= best + 1


def test_what_lm_eval_asks_for() -> None:
    engine = Bigrams()
    prompts = [ids_of("the cat sat on the mat"), ids_of("你好，世界"), [7]]
    answer = (
        Client(engine)
        .post(
            PATH, model="tiny", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
        )
        .json()
    )
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        new = engine.greedy(prompt, 1)
        assert choice["text"] == tokenizer().decode(prompt + new)
        assert all(len(values) == len(prompt) + 1 for values in choice["logprobs"].values())
        check_logprobs(engine, prompt, new, choice["logprobs"], 1)
        last = choice["logprobs"]
        assert last["token_logprobs"][-1] == max(last["top_logprobs"][-1].values())


def test_an_end_token_keeps_its_place_in_the_lists() -> None:
    prompt = ids_of(PROMPT)
    engine = Bigrams(follows={prompt[-1]: tokenizer().eos_token_id})
    answer = (
        Client(engine).post(PATH, prompt=[prompt], max_tokens=1, logprobs=1, echo=True, temperature=0).json()
    )
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
    assert choice["logprobs"]["tokens"][-1] == tokenizer().role_tokens["eos_token"]
    assert answer["usage"]["completion_tokens"] == 1
    check_logprobs(engine, prompt, [tokenizer().eos_token_id], choice["logprobs"], 1)


@pytest.mark.parametrize("best", [0, 3, 20])
def test_logprobs_without_echo(best: int) -> None:
    engine = Bigrams()
    prompt = ids_of(PROMPT)
    answer = Client(engine).post(PATH, prompt=PROMPT, max_tokens=6, logprobs=best, temperature=0).json()
    found = answer["choices"][0]["logprobs"]
    new = engine.greedy(prompt, 6)
    assert len(found["tokens"]) == 6
    whole = {key: [None, *values] for key, values in found.items()} | {"tokens": ["x", *found["tokens"]]}
    whole["tokens"][0] = token_name(tokenizer(), prompt[-1])
    check_logprobs(engine, prompt[-1:], new, whole, best)
    assert found["text_offset"][0] == 0


def test_echo_of_text_is_that_text_and_of_ids_what_they_stand_for() -> None:
    engine = Bigrams()
    client = Client(engine)
    text = "<|im_start|>user\nthe cat"
    for prompt in (text, ids_of(text)):
        answer = client.post(PATH, prompt=prompt, max_tokens=3, echo=True, temperature=0).json()
        choice = answer["choices"][0]
        assert choice["text"] == text + text_of(engine.greedy(ids_of(text), 3))
        assert choice["logprobs"] is None


def test_offsets_point_into_the_text_that_was_sent() -> None:
    engine = Bigrams()
    answer = (
        Client(engine)
        .post(PATH, prompt="你好 cat", max_tokens=8, echo=True, logprobs=1, temperature=0)
        .json()
    )
    choice = answer["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    for at, token in zip(offsets, tokens, strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][at:].startswith(token)


def test_no_new_tokens_with_echo() -> None:
    engine = Bigrams()
    client = Client(engine)
    prompt = ids_of(PROMPT)
    answer = client.post(PATH, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2, temperature=0).json()
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    check_logprobs(engine, prompt, [], choice["logprobs"], 2)
    assert answer["usage"]["completion_tokens"] == 0
    full = [5] * CONTEXT  # leaves no room for a token, and needs none
    assert client.post(PATH, prompt=full, max_tokens=0, echo=True).status_code == 200
    events = client.stream(PATH, prompt=PROMPT, max_tokens=0, echo=True)
    assert folded(events)[0]["text"] == PROMPT


def test_tokens_named_by_their_ids() -> None:
    engine = Bigrams()
    prompt = ids_of(PROMPT)
    answer = (
        Client(engine)
        .post(PATH, prompt=PROMPT, max_tokens=2, echo=True, logprobs=1, temperature=0, return_tokens_as_token_ids=True)
        .json()
    )  # fmt: skip
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{i}" for i in prompt + engine.greedy(prompt, 2)]
    assert all(key.startswith("token_id:") for top in found["top_logprobs"][1:] for key in top)


# ---- streams


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_adds_up_to_the_whole_answer(echo: bool, logprobs: int | None) -> None:
    client = Client(Bigrams())
    body = {
        "prompt": ["the 你", "猫 sat"], "n": 2, "max_tokens": 9, "seed": 3, "temperature": 1.0,
        "echo": echo, "logprobs": logprobs,
    }  # fmt: skip
    whole = client.post(PATH, **body).json()["choices"]
    streamed = folded(client.stream(PATH, **body))
    assert [{"index": i, **streamed[i]} for i in range(4)] == whole


def test_the_frame_of_a_stream() -> None:
    client = Client(Bigrams())
    events = client.stream(PATH, prompt=PROMPT, max_tokens=6, echo=True, temperature=0)
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert events[0]["object"] == "text_completion"
    assert events[0]["choices"][0]["text"] == PROMPT
    assert all("usage" not in e for e in events)
    assert all(e["choices"][0]["text"] for e in events[1:-1])
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_usage_comes_last_and_only_when_asked_for() -> None:
    client = Client(Bigrams())
    body = {"prompt": PROMPT, "max_tokens": 6, "n": 2, "temperature": 0}
    events = client.stream(PATH, **body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == client.post(PATH, **body).json()["usage"]
    assert all(e["usage"] is None for e in events[:-1])


# ---- refusals


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[5], []]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [5, True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [5.0]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5, 300]]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [None]}, "prompt"),
        ({"prompt": ["a"] * 3000}, "prompt"),
        ({"suffix": " end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"echo": "yes"}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
    ],
    ids=str,
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    error = refusal(Client(Bigrams()).post(PATH, **{"prompt": "the", **change}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


def test_best_of_equal_to_n_and_an_empty_suffix_are_no_wishes() -> None:
    client = Client(Bigrams())
    assert client.post(PATH, prompt="the", n=2, best_of=2, suffix="", temperature=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[5] * CONTEXT, "the cat " * CONTEXT, "x" * (17 * CONTEXT)], ids=len)
def test_a_prompt_that_does_not_fit_is_refused_before_the_stream(prompt: Any, stream: bool) -> None:
    error = refusal(Client(Bigrams()).post(PATH, prompt=prompt, stream=stream))
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 64 tokens" in error["message"]


def test_only_the_end_of_a_prompt_can_be_kept() -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, prompt=list(range(3, 90)), truncate_prompt_tokens=4, max_tokens=2,
                                 temperature=0, echo=True).json()  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 4
    kept = list(range(86, 90))
    assert answer["choices"][0]["text"] == tokenizer().decode(kept + engine.greedy(kept, 2))


def test_an_unknown_model_is_404() -> None:
    assert (
        refusal(Client(Bigrams()).post(PATH, prompt="the", model="gpt-4"), 404)["code"] == "model_not_found"
    )


def test_defaults_of_the_model_hold_where_the_request_says_nothing() -> None:
    engine = Bigrams()
    client = Client(engine, generation={"temperature": 0.0})
    answer = client.post(PATH, prompt=PROMPT, max_tokens=5).json()
    assert answer["choices"][0]["text"] == text_of(engine.greedy(ids_of(PROMPT), 5))


def test_requests_of_many_clients_get_their_own_answers() -> None:
    engine = Bigrams()
    prompts = [[i] for i in range(3, 43)]

    async def talk(client: Any) -> Any:
        bodies = [{"prompt": p, "max_tokens": 7, "temperature": 0} for p in prompts]
        return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

    for prompt, answer in zip(prompts, Client(engine).run(talk), strict=True):
        assert answer.json()["choices"][0]["text"] == text_of(engine.greedy(prompt, 7))


def test_a_continuation_keeps_the_space_that_sentencepiece_drops_at_the_start_of_a_text() -> None:
    words = sentencepiece()
    for prompt, text in (([5], " A"), ([1], "A")):  # after "A", after the start token alone
        choice = Choice(0, words, "", prompt, None, False)
        parts = choice.take([Event(1, (7,), "A"), Event(1, (5,), "A", "length")])
        assert [part["text"] for part in parts] == [text + "A"]
