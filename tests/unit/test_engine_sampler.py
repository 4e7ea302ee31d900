"""The sampler against a plain one-row reference, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kllm.engine.adjust import adjust, logprobs_of
from kllm.engine.params import SamplingParams
from kllm.engine.request import Request
from kllm.engine.sampler import RowSettings, exponentials, sample, streams
from kllm.errors import UserError

CPU = torch.device("cpu")


def draw(logits, params, seeds):
    settings = RowSettings.build(params, CPU, logits.shape[1])
    return sample(logits, settings, streams(seeds, [0] * len(seeds))).tolist()


def adjusted(logits, *rows):
    """`rows`: (params, prompt, answer) of one request each."""
    requests = []
    for params, prompt, answer in rows:
        request = Request(len(requests), prompt, params, None, 99, logits.shape[1])
        request.accept(answer, [])
        requests.append(request)
    return adjust(logits, requests)


def kept_by_reference(logits, p):
    """Ids that transformers' warpers keep, in their order: temperature, top-k, top-p, min-p."""
    scores = logits.double() / p.temperature
    if p.top_k:
        scores[scores < scores.topk(min(p.top_k, len(scores))).values[-1]] = -torch.inf
    if p.top_p < 1:
        ordered, order = scores.sort()
        drop = ordered.softmax(0).cumsum(0) <= 1 - p.top_p
        drop[-1] = False
        scores[order[drop]] = -torch.inf
    if p.min_p:
        probs = scores.softmax(0)
        scores[probs < p.min_p * probs.max()] = -torch.inf
    return set((scores > -torch.inf).nonzero().flatten().tolist()), scores.softmax(0)


PARAMS = [
    SamplingParams(temperature=1.0, top_p=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=1.0, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.5, top_k=20),
    SamplingParams(temperature=1.0, top_p=1.0, min_p=0.1),
    SamplingParams(temperature=2.0, top_p=0.8, top_k=50, min_p=0.05),
    SamplingParams(temperature=5.0, top_p=0.99),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab", [40, 3000])
def test_kept_set_and_draws_match_the_reference(params, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator) * 3
    kept, probs = kept_by_reference(logits.clone(), params)
    drawn = draw(logits.expand(2000, -1), [params] * 2000, range(2000))
    assert set(drawn) <= kept
    states = streams(range(2000), [0] * 2000)
    noise = exponentials(states[:, None], torch.arange(vocab))
    assert drawn == (probs / noise.double()).argmax(-1).tolist()


def test_a_flat_distribution_needs_more_than_the_head_and_gets_it():
    logits = torch.linspace(0, 0.01, 4000)[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]
    params = SamplingParams(temperature=1.0, top_p=0.5)
    drawn = draw(logits.expand(1500, -1), [params] * 1500, range(1500))
    kept, _ = kept_by_reference(logits.clone(), params)
    assert set(drawn) <= kept and len(set(drawn)) > 450


def test_mixed_rows_each_follow_their_own_parameters():
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(2)) * 2
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, top_p=1.0),
        SamplingParams(temperature=0.5, top_k=3, top_p=1.0),
        SamplingParams(temperature=9.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.3, min_p=0.2, repetition_penalty=1.3),
        SamplingParams(temperature=0, repetition_penalty=2.0),
    ]
    noise = [1, 9, 5, 99, 3, 7]
    before = list(range(250))
    full = adjusted(logits, *((p, before, [1]) for p in rows))
    together = draw(full, rows, noise)
    alone = [
        draw(adjusted(logits[i : i + 1], (p, before, [1])), [p], noise[i : i + 1])[0]
        for i, p in enumerate(rows)
    ]
    assert together == alone
    assert together[0] == int(logits[0].argmax()) and together[3] == int(logits[3].argmax())


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([[4.0, 3.0, -1.0, -1.5]])
    assert adjusted(logits, (params, [0], [2])).tolist() == [[2.0, 3.0, -2.0, -1.5]]
    assert logits.tolist() == [[4.0, 3.0, -1.0, -1.5]], "the model's own logits stay for log-probabilities"


def test_presence_and_frequency_penalties_count_the_answer_only():
    logits = torch.zeros(2, 4)
    both = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    out = adjusted(logits, (both, [3, 3], [0, 0, 1]), (SamplingParams(), [0], [0]))
    assert out.tolist() == [[-1.0, -0.75, 0.0, 0.0], [0.0] * 4]


def test_bias_and_the_tokens_that_end_before_min_tokens():
    logits = torch.zeros(1, 5)
    params = SamplingParams(logit_bias=((2, 7.5), (4, -100.0)), min_tokens=2, stop_token_ids=(1,))
    assert adjusted(logits, (params, [0], [0])).tolist() == [[0.0, -np.inf, 7.5, 0.0, -100.0]]
    assert adjusted(logits, (params, [0], [0, 0])).tolist() == [[0.0, 0.0, 7.5, 0.0, -100.0]]


def test_log_probabilities_are_those_of_a_plain_softmax():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    reference = logits.double().softmax(-1).log()
    rows = logprobs_of(logits, [4, int(logits[1].argmax()), 0], [2, 1, 0])
    for i, row in enumerate(rows):
        assert row.logprob == pytest.approx(float(reference[i, row.token_id]), abs=1e-6)
    assert [t for t, _ in rows[0].top] == logits[0].topk(2).indices.tolist() and rows[2].top == ()
    assert rows[1].top[0] == (rows[1].token_id, rows[1].logprob), "bit for bit: lm_eval compares them"


def test_noise_is_exponential_independent_and_fixed_for_ever():
    n = 20000
    by_number = exponentials(streams([7] * n, range(n)), torch.zeros(n, dtype=torch.int64)).double()
    by_token = exponentials(streams([7] * n, [3] * n), torch.arange(n)).double()
    by_seed = exponentials(streams(range(n), [3] * n), torch.zeros(n, dtype=torch.int64)).double()
    for noise in (by_number, by_token, by_seed):
        u = (-noise).exp().numpy()
        assert abs(np.histogram(u, 20, (0, 1))[0] - 1000).max() < 150
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(by_number, by_token)[0, 1]) < 0.03
    # a seed is a promise to users: these numbers must never change
    fixed = exponentials(streams([0, 42, -1, 2**64 - 1], [0, 3, 2, 2]), torch.tensor([0, 5, 6399, 6399]))
    assert fixed.tolist() == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [4.869636535644531, 0.39280569553375244, 3.305781602859497, 3.305781602859497]


def test_one_more_digit_of_rounding_turns_hardly_any_draw():
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)).expand(3000, -1)
    params = [SamplingParams(temperature=1.0, top_p=1.0)] * 3000
    near = logits * (1 + 1e-6 * torch.randn(3000, 3000, generator=torch.Generator().manual_seed(1)))
    turned = sum(
        a != b
        for a, b in zip(draw(logits, params, range(3000)), draw(near, params, range(3000)), strict=True)
    )
    assert turned <= 1, "an inverse CDF turns about one in a thousand"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_broken_logits_are_reported_for_their_row_only(value, temperature):
    logits = torch.zeros(3, 9)
    logits[1, 4] = value
    logits[0, 2] = logits[2, 3] = 50
    assert draw(logits, [SamplingParams(temperature=temperature)] * 3, [1, 2, 3]) == [2, -1, 3]


@pytest.mark.parametrize("penalty", [5e-324, 1e300])
def test_an_absurd_penalty_stays_finite(penalty):
    logits = torch.tensor([[0.0, 4.0, -1.0]])
    assert adjusted(logits, (SamplingParams(repetition_penalty=penalty), [0, 1, 2], [0])).isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.2},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": -1},
        {"stop": "END"},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_parameters_out_of_range_name_the_field(bad):
    with pytest.raises(UserError) as caught:
        SamplingParams(**bad)
    assert caught.value.where == next(iter(bad))
