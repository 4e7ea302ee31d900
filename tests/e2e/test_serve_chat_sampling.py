"""Chat completions: sampling, the template, thinking, log-probabilities."""

from __future__ import annotations

import pytest
from serve_client import (
    CHAT,
    THINK,
    chat_body,
    close_thinking,
    content_of,
    forced,
    locked_server,
    messages_of,
    post,
    refused,
    server,
    texts_of,
    whole_message,
)
from serve_model import added_tokens, decode, end_of_turn, token_id, tokenizer

# --------------------------------------------------------------------------------------------- sampling


def test_zero_top_p_and_top_k_one_are_greedy():
    greedy = content_of(server().chat())
    for fields in ({"top_p": 0}, {"top_k": 1}, {"temperature": 1e-9, "top_k": 1}):
        assert content_of(server().chat(**{"temperature": 1, "seed": 3, **fields})) == greedy


def test_top_k_off_values_are_the_same():
    texts = {content_of(server().chat(temperature=1, seed=5, top_k=k)) for k in (-1, 0, None)}
    assert len(texts) == 1


def test_min_p_one_is_greedy():
    assert content_of(server().chat(temperature=1.5, min_p=1, seed=4)) == content_of(server().chat())


def test_seed_decides_the_text():
    texts = [content_of(server().chat(temperature=1, seed=seed, max_tokens=16)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_no_seed_is_random():
    assert len({content_of(server().chat(temperature=1.5, max_tokens=16)) for _ in range(3)}) > 1


def test_n_choices():
    answer = server().chat(n=3, temperature=1, seed=9, max_tokens=12)
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2]
    assert len(set(texts_of(answer))) == 3
    assert texts_of(answer)[0] == content_of(server().chat(temperature=1, seed=9, max_tokens=12))
    assert texts_of(server().chat(n=3)) == [content_of(server().chat())] * 3


def test_max_n_is_a_setting():
    body = chat_body(n=4)
    refused(locked_server().post(CHAT, body), param="n")


def test_logit_bias_forces_and_bans():
    the = str(token_id("the"))
    assert content_of(server().chat(logit_bias={the: 100}, max_tokens=3)) == "thethethe"
    first = server().complete("the cat", max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)
    chosen = first["choices"][0]["logprobs"]["tokens"][0].removeprefix("token_id:")
    banned = server().complete("the cat", max_tokens=1, logit_bias={chosen: -100})
    assert texts_of(banned) != texts_of(first)


def test_logit_bias_takes_1024():
    bias = {str(i): -1 for i in range(min(1024, tokenizer().get_vocab_size()))}
    server().chat(logit_bias=bias)


@pytest.mark.parametrize(
    "fields", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.9}], ids=str
)
def test_penalties_move_away_from_what_was_said(fields):
    letters = {str(token_id(letter)): 100 for letter in "abcdefgh"}
    plain = content_of(server().chat(logit_bias=letters, max_tokens=24))
    varied = content_of(server().chat(logit_bias=letters, max_tokens=24, **fields))
    assert set(plain + varied) <= set("abcdefgh") and plain != varied
    if "frequency_penalty" in fields:
        assert len(set(varied)) > len(set(plain)) or max(map(varied.count, "abcdefgh")) <= 12


def test_repetition_penalty_aliases():
    one = content_of(server().chat(repetition_penalty=1.8, max_tokens=24))
    two = content_of(server().chat(repeat_penalty=1.8, max_tokens=24))
    assert one == two


def test_min_tokens_holds_the_end_back():
    answer = server().chat(logit_bias={end_of_turn(): 100}, min_tokens=4, max_tokens=20)
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "stop"


def test_ignore_eos():
    answer = server().chat(logit_bias={end_of_turn(): 100}, ignore_eos=True, max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"
    assert "<|im_end|>" not in content_of(answer)


def test_stop_token_ids():
    cat = token_id("the")
    answer = server().chat(logit_bias={str(cat): 100}, stop_token_ids=[cat])
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1
    held = server().chat(logit_bias={str(cat): 100}, stop_token_ids=[cat], min_tokens=3, max_tokens=9)
    assert held["usage"]["completion_tokens"] == 4


# ---------------------------------------------------------------------------------------------- template


def test_template_arguments_cannot_override():
    for name, value in {
        "messages": [],
        "tools": [],
        "tokenize": True,
        "add_generation_prompt": False,
    }.items():
        response = post(chat_template_kwargs={name: value})
        if response.status_code == 200:
            assert response.json()["usage"]["prompt_tokens"] == server().chat()["usage"]["prompt_tokens"]
        else:
            refused(response)


def test_template_per_request_is_refused():
    refused(post(chat_template="{% for i in range(10**9) %}x{% endfor %}"), param="chat_template")


def test_continue_final_message():
    messages = messages_of(("user", "hi"), ("assistant", "The answer is"))
    body = chat_body(messages=messages, add_generation_prompt=False, continue_final_message=True)
    ids = server().prompt_ids(messages, add_generation_prompt=False, continue_final_message=True)
    assert decode(ids).endswith("The answer is")
    answer = server().answer(CHAT, body)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_continue_and_generation_prompt_exclude_each_other():
    messages = messages_of(("user", "hi"), ("assistant", "The"))
    refused(post(messages=messages, add_generation_prompt=True, continue_final_message=True))


# ---------------------------------------------------------------------------------------------- thinking


@pytest.mark.parametrize(
    "fields",
    [
        THINK,
        {"reasoning_effort": "high"},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"open_thinking": True}},
    ],
    ids=str,
)
def test_thinking_cut_by_length_is_all_reasoning(fields):
    answer = server().chat(max_tokens=6, **fields)
    message = whole_message(answer)
    assert message["content"] == "" and message["reasoning"] and message["finish"] == "length"
    assert content_of(answer) == ""
    assert answer["choices"][0]["message"]["reasoning_content"] == message["reasoning"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6


@pytest.mark.parametrize(
    "fields",
    [{}, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}],
    ids=str,
)
def test_no_thinking_is_all_content(fields):
    message = whole_message(server().chat(**fields))
    assert message["content"] and not message["reasoning"]


def test_closing_marker_without_opener_closes():
    answer = server().chat(**THINK, **close_thinking(), max_tokens=1)
    message = whole_message(answer)
    assert message["reasoning"] == "" and message["content"] == ""
    assert "</think>" not in str(answer["choices"])


def test_answer_after_thinking_obeys_the_grammar():
    answer = server().chat(**THINK, **close_thinking(), **forced("blue"))
    message = whole_message(answer)
    assert (message["reasoning"], message["content"], message["finish"]) == ("", "blue", "stop")


@pytest.mark.parametrize(
    ("rule", "reasoning", "content"),
    [
        ("{open} 'deep' {shut} 'answer'", "deep", "answer"),
        ("{open} '\\ndeep\\n' {shut} '\\n\\nanswer\\n'", "deep", "answer\n"),
        ("'<think>deep</think>answer'", "", "<think>deep</think>answer"),
    ],
)
def test_markers_are_tokens_and_newlines_around_them_go(rule, reasoning, content):
    marks = {
        name: f"<[{added_tokens()[text]}]>" for name, text in (("open", "<think>"), ("shut", "</think>"))
    }
    grammar = "start: " + rule.replace("'", '"').format(**marks)
    fields = {"structured_outputs": {"grammar": grammar}, "max_tokens": 60}
    for message in (whole_message(server().chat(**fields)), server().stream_chat(**fields).message()):
        assert (message["reasoning"], message["content"]) == (reasoning, content)


def test_thinking_has_logprobs_for_all_tokens():
    answer = server().chat(**THINK, logprobs=True, max_tokens=6)
    assert len(answer["choices"][0]["logprobs"]["content"]) == 6


def test_thinking_obeys_stop_strings():
    text = whole_message(server().chat(**THINK, max_tokens=24))["reasoning"]
    stop = text[6:9]
    message = whole_message(server().chat(**THINK, max_tokens=24, stop=stop))
    assert message["reasoning"] == text[: text.index(stop)] and message["finish"] == "stop"


def test_reasoning_field_is_a_setting():
    message = locked_server().chat(**THINK, max_tokens=4)["choices"][0]["message"]
    assert message["reasoning"] and "reasoning_content" not in message


# ---------------------------------------------------------------------------------------------- logprobs


def test_logprobs_align_with_the_text():
    answer = server().chat(logprobs=True, top_logprobs=5, max_tokens=24)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 24
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode("utf-8", "replace") == content_of(answer)


def test_logprobs_entries():
    entries = server().chat(logprobs=True, top_logprobs=5)["choices"][0]["logprobs"]["content"]
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert values[0] == entry["logprob"], "greedy: the chosen token is the best"
        assert all(-9999 <= value <= 0 for value in values)


@pytest.mark.parametrize("top", [0, 1, 20])
def test_top_logprobs_count(top):
    entries = server().chat(logprobs=True, top_logprobs=top)["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in entries} == {top}


def test_logprobs_without_top():
    entries = server().chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_logprobs_are_of_the_raw_distribution():
    plain = server().chat(logprobs=True, top_logprobs=3, max_tokens=1)["choices"][0]["logprobs"]["content"][0]
    fields = {"temperature": 1.7, "top_p": 0.3, "presence_penalty": 1, "seed": 1}
    cat = {str(token_id("the")): 100}
    shaped = server().chat(logprobs=True, top_logprobs=3, max_tokens=1, logit_bias=cat, **fields)
    entry = shaped["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == "the" and entry["logprob"] < -2
    assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
        [t["logprob"] for t in plain["top_logprobs"]], abs=1e-4
    )


def test_logprobs_of_a_banned_token_are_finite():
    answer = server().answer(CHAT, chat_body(logprobs=True, top_logprobs=20, **forced("blue")))
    for entry in answer["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] >= -9999
