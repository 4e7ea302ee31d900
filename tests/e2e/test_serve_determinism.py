"""The same request gives the same text: again, in company, from the cache, streamed or whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_client import content_of, eventually, server, texts_of

SEEDED = [{"temperature": 1, "seed": seed, "max_tokens": 30 + seed} for seed in (1, 2, 3)]


def run(fields):
    return content_of(server().chat(**fields))


@pytest.mark.parametrize(
    "fields", [{}, *SEEDED, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 11}], ids=str
)
def test_twice_is_the_same(fields):
    fields = {"max_tokens": 40, **fields}
    assert run(fields) == run(fields)


def test_seeded_among_random_neighbours():
    alone = [run(fields) for fields in SEEDED]
    neighbours = [{"content": f"number {i}", "temperature": 1.3, "max_tokens": 10 + 4 * i} for i in range(13)]
    with ThreadPoolExecutor(16) as pool:
        together = [pool.submit(run, fields) for fields in [*neighbours[:6], *SEEDED, *neighbours[6:]]]
        assert [future.result() for future in together[6:9]] == alone


def test_ragged_greedy():
    requests = [{"content": "word " * (1 + 7 * i), "max_tokens": 8 + 5 * i} for i in range(10)]
    alone = [run(fields) for fields in requests]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(run, requests)) == alone


def test_cached_prefix_changes_nothing():
    text = "a long and quite unique beginning " * 10
    first = [server().chat(text, max_tokens=30, temperature=t, seed=5) for t in (0, 1)]
    again = [server().chat(text, max_tokens=30, temperature=t, seed=5) for t in (0, 1)]
    assert again[0]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert [content_of(a) for a in first] == [content_of(a) for a in again]
    longer = server().chat(text + "and more", max_tokens=20)
    salted = server().chat(text + "and more", max_tokens=20, cache_salt="fresh")
    assert content_of(longer) == content_of(salted)


def test_n_choices_are_those_of_the_seed():
    fields = {"temperature": 1, "seed": 21, "max_tokens": 20}
    one, two, three = (texts_of(server().chat(n=n, **fields)) for n in (1, 2, 3))
    assert one == two[:1] and two == three[:2] and len(set(three)) == 3


def test_n_in_company():
    fields = {"temperature": 1, "seed": 22, "max_tokens": 25, "n": 4}
    alone = texts_of(server().chat(**fields))
    with ThreadPoolExecutor(6) as pool:
        noise = [pool.submit(run, {"temperature": 1, "max_tokens": 40}) for _ in range(5)]
        assert texts_of(server().chat(**fields)) == alone
        assert all(future.result() is not None for future in noise)


def test_unseeded_neighbours_do_not_repeat():
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(run, [{"temperature": 1, "max_tokens": 16}] * 6))
    assert len(set(texts)) == 6


def test_seed_means_the_same_in_a_stream():
    for fields in SEEDED:
        assert server().stream_chat(**fields).message()["content"] == run(fields)


def test_different_seeds_differ():
    assert len({run({"temperature": 1, "seed": seed, "max_tokens": 16}) for seed in range(6)}) == 6


def test_everything_is_given_back():
    assert eventually(server().idle)
