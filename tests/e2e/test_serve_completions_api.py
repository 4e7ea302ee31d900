"""Completions: prompts of every kind, echo, log-probabilities, what lm_eval asks for."""

from __future__ import annotations

import re

import pytest
from serve_client import completion_body, refused, server, texts_of
from serve_model import CONTEXT, added_tokens, decode, encode, token_id, tokenizer

PATH = "/v1/completions"
EOS = added_tokens()["<|im_end|>"]
VOCAB = tokenizer().get_vocab_size()


def post(prompt="the cat", **fields):
    return server().post(PATH, completion_body(prompt, **fields))


def logprobs_of(answer, index=0):
    return answer["choices"][index]["logprobs"]


def raw_bytes(token: str) -> bytes:
    """The bytes of a token's name: its text, or `bytes:\\x..` where that is no whole text."""
    if token.startswith("bytes:\\x"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_answer_has_every_field():
    answer = server().complete()
    assert {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"} <= set(answer)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert {"text", "index", "logprobs", "finish_reason"} <= set(choice)
    assert choice["logprobs"] is None and choice["finish_reason"] == "length" and choice["text"]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(encode("the cat")) and usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_default_length_is_16():
    assert server().complete(max_tokens=None)["usage"]["completion_tokens"] == 16


def test_prompt_kinds_are_the_same():
    ids = encode("the cat sat")
    texts = [texts_of(server().complete(prompt)) for prompt in ("the cat sat", ["the cat sat"], ids, [ids])]
    assert all(text == texts[0] for text in texts)


def test_several_prompts_keep_their_order():
    prompts = ["the cat", "a dog", "你好", "x"]
    alone = [texts_of(server().complete(prompt))[0] for prompt in prompts]
    assert texts_of(server().complete(prompts)) == alone
    assert texts_of(server().complete([encode(prompt) for prompt in prompts])) == alone


def test_index_is_prompt_times_n_plus_k():
    answer = server().complete(["the cat", "a dog"], n=2, temperature=1, seed=3, max_tokens=12)
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2, 3]
    for at, prompt in ((0, "the cat"), (2, "a dog")):
        alone = texts_of(server().complete(prompt, n=2, temperature=1, seed=3, max_tokens=12))
        assert texts_of(answer)[at : at + 2] == alone
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(encode("the cat")) + len(encode("a dog"))
    assert usage["completion_tokens"] == 48


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        True,
        {},
        [],
        [[]],
        [1.5],
        [True],
        [[True]],
        [[1.5]],
        [VOCAB],
        [-1],
        [10**12],
        [2**70],
        [[5], [VOCAB]],
        [1, "a"],
        ["a", 1],
        ["a", [1]],
        [["a"]],
        [None],
        [[[1]]],
    ],
    ids=str,
)
def test_bad_prompts(prompt):
    assert refused(post(prompt))["param"].startswith("prompt")


def test_prompt_missing():
    refused(server().post(PATH, {"max_tokens": 1}), param="prompt")


def test_empty_prompt_is_no_crash():
    for prompt in ("", [""]):
        response = post(prompt)
        if response.status_code != 200:
            refused(response)
    assert server().complete()


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"best_of": 2, "n": 3},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": "x"},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"echo": "perhaps"},
        {"temperature": 2.5},
        {"n": 17},
        {"stop": 5},
        {"stop": [""]},
        {"stream_options": {"include_usage": True}},
        {"logit_bias": {str(VOCAB): 1}},
        {"structured_outputs": {"regex": "("}},
    ],
    ids=str,
)
def test_bad_fields(fields):
    assert refused(post(**fields))["param"].split(".")[0] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"suffix": None, "best_of": None, "logprobs": None, "echo": None, "stop": None, "user": None},
        {"suffix": ""},
        {"logprobs": 0},
        {"logprobs": 20},
        {"stop": ["a", "b", "c", "d", "e", "f"]},
        {"add_special_tokens": False},
        {"made_up": 1},
        {"max_completion_tokens": 3},
    ],
    ids=str,
)
def test_good_fields(fields):
    response = post(**fields)
    assert response.status_code == 200, response.text


def test_prompt_longer_than_the_context():
    for prompt in ("cat " * 3 * CONTEXT, [5] * CONTEXT, [[5], [5] * (CONTEXT + 1)]):
        error = refused(post(prompt), code="context_length_exceeded")
        assert "maximum context length is " + str(CONTEXT) in error["message"]


def test_answer_is_clamped_to_the_context():
    answer = server().complete([5] * (CONTEXT - 3), max_tokens=100)
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"


def test_identical_prompts_are_cached():
    ids = list(range(100, 300))
    server().complete(ids)
    details = server().complete(ids)["usage"]["prompt_tokens_details"]
    assert 0 < details["cached_tokens"] < 200


# ------------------------------------------------------------------------------------------------- echo


@pytest.mark.parametrize("prompt", ["the cat", "囍🤖 é", " leading", "<|im_start|>user\nhi", "line\n"])
def test_echo_puts_the_prompt_in_front(prompt):
    plain = texts_of(server().complete(prompt))[0]
    assert texts_of(server().complete(prompt, echo=True)) == [prompt + plain]


def test_echo_of_ids_is_decoded():
    ids = encode("the cat sat 囍")
    assert texts_of(server().complete(ids, echo=True))[0].startswith("the cat sat 囍")


def test_echo_without_new_tokens():
    answer = server().complete("the cat", echo=True, max_tokens=0)
    assert texts_of(answer) == ["the cat"]
    assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["finish_reason"]


def test_echo_in_a_stream_is_the_first_chunk():
    stream = server().stream_complete("the cat sat", echo=True)
    assert stream.of(0)[0]["text"].startswith("the cat sat")
    assert stream.text() == texts_of(server().complete("the cat sat", echo=True))[0]


# ---------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_have_one_entry_per_token(k, echo):
    ids = encode("the cat sat 囍")
    answer = server().complete(ids, logprobs=k, echo=echo, max_tokens=6)
    logprobs = logprobs_of(answer)
    count = 6 + (len(ids) if echo else 0)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert len(logprobs[name]) == count, name
    for at, top in enumerate(logprobs["top_logprobs"]):
        if at == 0 and echo:
            assert top is None and logprobs["token_logprobs"][0] is None
            continue
        assert k <= len(top) <= k + 1
        assert top[logprobs["tokens"][at]] == logprobs["token_logprobs"][at]
        assert all(-9999 <= value <= 0 for value in top.values())


def test_token_names_add_up_to_the_text():
    answer = server().complete("囍🤖", logprobs=5, echo=True, max_tokens=40, temperature=1.5, seed=6)
    data = b"".join(map(raw_bytes, logprobs_of(answer)["tokens"]))
    assert data.decode("utf-8", "replace") == texts_of(answer)[0]


def test_incomplete_tokens_are_named_by_their_bytes():
    names = logprobs_of(server().complete(encode("囍🤖"), logprobs=0, echo=True, max_tokens=0))["tokens"]
    assert any(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", name) for name in names) and "\ufffd" not in "".join(
        names
    )


def test_top_keys_never_collide():
    answer = server().complete("囍", logprobs=20, max_tokens=30, temperature=2, seed=4)
    for top in logprobs_of(answer)["top_logprobs"]:
        assert len(top) in (20, 21) and "\ufffd" not in top


def test_token_ids_as_names():
    ids = encode("the cat")
    answer = server().complete(ids, logprobs=2, echo=True, max_tokens=2, return_tokens_as_token_ids=True)
    names = logprobs_of(answer)["tokens"]
    assert names[: len(ids)] == [f"token_id:{i}" for i in ids]
    assert all(
        name.startswith("token_id:") for top in logprobs_of(answer)["top_logprobs"][1:] for name in top
    )


@pytest.mark.parametrize("prompt", ["the cat sat", "囍 é x"])
def test_text_offsets_count_characters(prompt):
    answer = server().complete(prompt, logprobs=0, echo=True, max_tokens=12)
    text, logprobs = texts_of(answer)[0], logprobs_of(answer)
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(text)
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token


def test_scores_agree_with_generation():
    """The score of an answer as a prompt is the score it had when it was generated."""
    ids = encode("the cat")
    made = server().complete(ids, logprobs=1, max_tokens=8, return_tokens_as_token_ids=True)
    new = [int(name.removeprefix("token_id:")) for name in logprobs_of(made)["tokens"]]
    scored = server().complete(ids + new, logprobs=1, echo=True, max_tokens=0)
    assert logprobs_of(scored)["token_logprobs"][len(ids) :] == pytest.approx(
        logprobs_of(made)["token_logprobs"], abs=1e-4
    )


def test_scores_do_not_depend_on_cache_or_company():
    ids = encode("the cat sat on the mat")
    alone = logprobs_of(server().complete(ids, logprobs=1, echo=True, max_tokens=1))
    again = logprobs_of(server().complete(ids, logprobs=1, echo=True, max_tokens=1))
    batch = server().complete([[5, 6, 7] * 20, ids, [9]], logprobs=1, echo=True, max_tokens=1)
    for other in (again, logprobs_of(batch, 1)):
        assert other["token_logprobs"][1:] == pytest.approx(alone["token_logprobs"][1:], abs=1e-4)


# ----------------------------------------------------------------------------------------------- lm_eval

SCORE = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}


def test_lm_eval_loglikelihood():
    prompts = [encode("the cat sat on the mat"), encode("你好，世界"), [5], encode("a") * 40]
    answer = server().complete(prompts, **SCORE)
    assert [choice["index"] for choice in sorted(answer["choices"], key=lambda c: c["index"])] == [0, 1, 2, 3]
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(ids) + 1
        assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])


def test_lm_eval_counts_the_end_token_too():
    ids = encode("the cat")
    answer = server().complete([ids], **SCORE, logit_bias={str(EOS): 100})
    logprobs = logprobs_of(answer)
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(ids) + 1
    assert answer["choices"][0]["finish_reason"] == "stop" and texts_of(answer) == ["the cat"]


def test_lm_eval_is_greedy_is_exact():
    """The likeliest token scored as a continuation equals the best entry bit for bit; another does not."""
    ids = encode("the cat sat")
    made = server().complete(ids, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)
    best = int(logprobs_of(made)["tokens"][0].removeprefix("token_id:"))
    other = (best + 1) % VOCAB
    for token, equal in ((best, True), (other, False)):
        logprobs = logprobs_of(server().complete([[*ids, token]], **SCORE))
        score, top = logprobs["token_logprobs"][len(ids)], logprobs["top_logprobs"][len(ids)]
        assert (score == max(top.values())) is equal


def test_lm_eval_generate_until():
    until = ["\n\n", "Question:", "</s>", "<|im_end|>", "Q:", "###"]
    answer = server().complete(["the cat", "a dog"], max_tokens=20, temperature=0, stop=until, seed=1234)
    assert len(answer["choices"]) == 2


def test_lm_eval_remote_tokenizer():
    assert server().get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"
    ids = server().answer("/tokenize", {"prompt": "the cat", "add_special_tokens": False})["tokens"]
    assert server().answer("/detokenize", {"tokens": ids})["prompt"] == "the cat"


def test_end_text_in_a_prompt_is_one_token():
    assert server().complete("<|im_end|>", max_tokens=1)["usage"]["prompt_tokens"] == 1


# ---------------------------------------------------------------------------------------------- streaming

CASES = {
    "greedy": {},
    "seeded": {"temperature": 1, "seed": 5, "max_tokens": 40},
    "n": {"temperature": 1, "seed": 5, "n": 3},
    "echo": {"echo": True},
    "stop": {"temperature": 1, "seed": 5, "max_tokens": 40, "stop": ["e", "\n"]},
    "one token": {"max_tokens": 1},
    "end": {"logit_bias": {str(EOS): 100}},
    "the": {"logit_bias": {str(token_id("the")): 100}},
}


@pytest.mark.parametrize("case", CASES)
def test_stream_equals_whole(case):
    fields = {"prompt": ["the cat", "囍"], **CASES[case]}
    whole, stream = server().complete(**fields), server().stream_complete(**fields)
    for choice in whole["choices"]:
        assert stream.text(choice["index"]) == choice["text"]
        assert stream.of(choice["index"])[-1]["finish_reason"] == choice["finish_reason"]


def test_stream_has_the_usage_last():
    stream = server().stream_complete(stream_options={"include_usage": True})
    assert stream.chunks[-1]["choices"] == []
    assert stream.usage["total_tokens"] == server().complete()["usage"]["total_tokens"]


@pytest.mark.parametrize("echo", [False, True])
def test_stream_logprobs_add_up(echo):
    fields = {"logprobs": 2, "max_tokens": 12, "echo": echo}
    whole = logprobs_of(server().complete(**fields))
    parts = [
        choice["logprobs"] for choice in server().stream_complete(**fields).of(0) if choice.get("logprobs")
    ]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in parts for value in part[name]]
        if name == "token_logprobs":
            assert joined[1:] == pytest.approx(whole[name][1:], abs=1e-4)
        else:
            assert joined == whole[name]


def test_decoding_of_the_prompt_is_as_sent():
    ids = list(range(270, 310))
    assert texts_of(server().complete(ids, echo=True, max_tokens=0)) == [decode(ids)]
