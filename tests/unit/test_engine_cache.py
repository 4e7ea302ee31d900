"""Rows, pages and formats: what is stored comes back, memory stays inside its budget and is given back."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kllm.engine.cache import KVCache, Segment, in_order
from kllm.engine.kvformat import hadamard, kv_format
from kllm.engine.prefix import PrefixCache
from kllm.engine.rows import PAGE, Rows
from kllm.errors import UserError

CPU = torch.device("cpu")
LAYERS, KV, DIM, HEADS = 2, 2, 64, 4


@pytest.fixture(autouse=True)
def as_in_a_step():
    with torch.inference_mode():
        yield


def make_rows(budget=2**22, max_length=512, name="auto"):
    fmt = kv_format(name, DIM, torch.float32)
    return Rows(LAYERS, KV, fmt, max_length=max_length, budget=budget, device=CPU), fmt


# -- formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bound", "cosine"), [("int8", 0.02, 0.999), ("int4", 0.12, 0.99)])
def test_a_rounded_vector_is_near_and_small(name, bound, cosine):
    x = torch.randn(500, KV, DIM, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] *= 10  # keys have channels like this
    fmt = kv_format(name, DIM, torch.float32)
    parts = fmt.encode(x)
    back = fmt.decode(parts)
    assert [(p.shape[-1], p.dtype) for p in parts] == list(zip(fmt.widths, fmt.dtypes, strict=True))
    assert F.cosine_similarity(x.flatten(1), back.flatten(1)).min() > cosine
    assert float((x - back).norm() / x.norm()) < bound
    plain, small = make_rows()[0].token_bytes, make_rows(name=name)[0].token_bytes
    assert small < plain / {"int8": 3.7, "int4": 6}[name]


@pytest.mark.parametrize("size", [2, 16, 64, 96, 80])
def test_the_rotation_is_its_own_inverse_and_tames_large_channels(size):
    turn = hadamard(size)
    assert torch.allclose(turn @ turn, torch.eye(size), atol=1e-6) and torch.equal(turn, turn.T)
    x = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 12
    fmt = kv_format("int4", size, torch.float32)

    def error(y):
        return float((fmt.decode(fmt.encode(y)) - y).norm())

    assert size < 16 or error(x @ turn) < 0.75 * error(x)


def test_zero_and_constant_vectors_survive():
    for name in ("int8", "int4"):
        fmt = kv_format(name, DIM, torch.float32)
        for value in (0.0, 1.0, -3.0):
            x = torch.full((1, DIM), value)
            assert torch.allclose(fmt.decode(fmt.encode(x)), x, atol=1e-2)


def test_an_unknown_format_is_a_user_error():
    with pytest.raises(UserError, match="kv-dtype"):
        kv_format("fp8", DIM, torch.float32)


# -- attention over rows -------------------------------------------------------------------------------


def reference(q, k, v):
    """Plain causal attention of one whole sequence, [T, ...] each; the last len(q) positions ask."""
    T, S = len(k), len(q)
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / DIM**0.5
    mask = torch.arange(T)[None, :] <= torch.arange(T - S, T)[:, None]
    return torch.einsum("hst,thd->shd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(1)


@pytest.mark.parametrize("seed", range(6))
def test_ragged_steps_of_chunks_and_single_tokens_equal_plain_attention(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, fmt = make_rows()
    cache = KVCache(fmt)
    lengths = [rng.randint(1, 200) for _ in range(7)]
    whole = [[torch.randn(n, h, DIM, generator=generator) for h in (HEADS, KV, KV)] for n in lengths]
    held = [rows.allocate(n, 0)[0] for n in lengths]
    done = [0] * 7
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        chosen = [i for i in range(7) if done[i] < lengths[i] and rng.random() < 0.7]
        counts = {i: 1 if rng.random() < 0.5 else rng.randint(1, lengths[i] - done[i]) for i in chosen}
        placed = sorted(
            ((Segment(held[i], done[i], counts[i]), i) for i in chosen), key=lambda pair: in_order(pair[0])
        )
        if not placed:
            continue
        cache.begin([s for s, _ in placed])
        parts = [[whole[i][j][s.start : s.start + s.count] for s, i in placed] for j in range(3)]
        q, k, v = (torch.cat(p) for p in parts)
        for layer in range(LAYERS):
            out = cache.attend(layer, q, k * (layer + 1), v)
        at = 0
        for s, i in placed:
            stop = s.start + s.count
            want = reference(whole[i][0][s.start : stop], whole[i][1][:stop] * LAYERS, whole[i][2][:stop])
            assert torch.allclose(out[at : at + s.count], want, atol=1e-5)
            at += s.count
            done[i] = stop
            rows.lengths[held[i]] = stop
        if rng.random() < 0.3:  # a neighbour leaves: rows move
            i = rng.randrange(7)
            rows.free(held[i])
            held[i], done[i] = rows.allocate(lengths[i], 0)[0], 0


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_attention_over_rounded_rows_sees_what_was_stored(name):
    rows, fmt = make_rows(name=name)
    cache = KVCache(fmt)
    row = rows.allocate(40, 0)[0]
    q, k, v = (torch.randn(40, h, DIM, generator=torch.Generator().manual_seed(2)) for h in (HEADS, KV, KV))
    turn = torch.eye(DIM) if fmt.rotation is None else fmt.rotation
    near_k, near_v = (fmt.decode(fmt.encode(t @ turn)) @ turn for t in (k, v))
    cache.begin([Segment(row, 0, 39)])
    cache.attend(0, q[:39], k[:39], v[:39])
    cache.begin([Segment(row, 39, 1)])
    out = cache.attend(0, q[39:], k[39:], v[39:])
    assert torch.allclose(out, reference(q[39:], near_k, near_v), atol=1e-5)


def test_attending_before_a_step_is_announced_is_a_bug():
    with pytest.raises(RuntimeError, match="begin"):
        KVCache(kv_format("auto", DIM, torch.float32)).attend(0, *[torch.zeros(1, 2, DIM)] * 3)


# -- memory --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["take", "free", "grow"]), st.integers(1, 300)), max_size=60))
def test_rows_keep_their_contents_and_the_budget(actions):
    rows, _ = make_rows(budget=3_000_000, max_length=300)
    held: dict[object, tuple[object, int, float]] = {}
    number = 0.0
    for action, n in actions:
        if action == "take":
            row, short = rows.allocate(n, 0)
            assert short == 0
            if row is not None:
                number += 1
                for part in row.parts(0, n):
                    part.fill_(number)
                rows.lengths[row] = n
                held[row] = (row, n, number)
        elif held:
            row, size, value = list(held.values())[n % len(held)]
            if action == "free":
                rows.free(row)
                del held[row]
            else:
                larger, _ = rows.allocate(300, 0)
                if larger is not None:
                    rows.copy(row, larger)
                    rows.free(row)
                    del held[row]
                    held[larger] = (larger, size, value)
        assert rows.held_bytes <= rows.budget
        assert len(rows.lengths) == len(held) == sum(len(p.rows) for p in rows.pools.values())
        for row, size, value in held.values():
            assert all(bool((part == value).all()) for part in row.parts(0, size))
    for row, _, _ in list(held.values()):
        rows.free(row)
    assert rows.live_pages == 0


def test_a_row_that_could_never_be_had():
    rows, _ = make_rows(budget=100 * 2048, max_length=512)
    assert rows.token_bytes == 2048 and rows.longest == 64
    assert rows.allocate(65, 0) == (None, 0)


# -- prefixes ------------------------------------------------------------------------------------------


def filled(rows, ids):
    """A row whose token at position i holds the sum of ids up to i: like keys, a function of the prefix."""
    row = rows.allocate(len(ids) + 1, 0)[0]
    sums = torch.tensor(ids, dtype=torch.float32).cumsum(0)
    for part in row.parts(0, len(ids)):
        part.copy_(sums[None, None, None, :, None].expand_as(part))
    rows.lengths[row] = len(ids)
    return row


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=70), min_size=1, max_size=12), st.integers(0, 9)
)
@example([[0], [0, 0], [0, 0]], 0)
def test_the_longest_known_prefix_and_nothing_else(sequences, evicted):
    rows, _ = make_rows(budget=2**24)
    prefix = PrefixCache()
    known: list[list[int]] = []
    for ids in sequences:
        limit = len(ids) - 1
        length, pages = prefix.match("", ids, limit)
        best = max((common(ids[:limit], other) for other in known), default=0)
        wanted = limit if best >= limit else best // PAGE * PAGE
        assert length <= wanted if evicted else length == wanted
        row = rows.allocate(len(ids), 0)[0]
        prefix.load(row, length, pages)
        want = torch.tensor(ids, dtype=torch.float32).cumsum(0)[:length]
        for part in row.parts(0, length):
            assert torch.equal(part, want[None, None, None, :, None].expand_as(part))
        rows.free(row)
        full = filled(rows, ids)
        prefix.store("", ids, full, 2**24)
        rows.free(full)
        known.append(ids)
        prefix.evict(evicted * 40_000)
        assert prefix.nbytes == sum(page.nbytes for page in prefix._used)
    assert prefix.match("other tenant", sequences[0], 99) == (0, [])
    prefix.evict(2**30)
    assert (prefix.pages, prefix.nbytes) == (0, 0) and not prefix._roots


def common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_pages_longest_unused_go_first():
    rows, _ = make_rows(budget=2**24)
    prefix = PrefixCache()
    for start in range(4):
        ids = [start] * 32
        prefix.store("", ids, filled(rows, ids), 2**24)
    prefix.match("", [0] * 32, 31)
    prefix.evict(prefix.nbytes // 2)
    assert [prefix.match("", [start] * 32, 32)[0] for start in range(4)] == [32, 0, 0, 32]


def test_no_more_is_kept_than_there_is_room_for():
    rows, _ = make_rows(budget=2**24)
    prefix = PrefixCache()
    ids = list(range(100))
    prefix.store("", ids, filled(rows, ids), 3 * PAGE * rows.token_bytes)
    assert (prefix.pages, prefix.match("", ids, 99)[0]) == (3, 48)
    off = PrefixCache(enabled=False)
    off.store("", ids, filled(rows, ids), 2**24)
    assert off.match("", ids, 99) == (0, [])
