"""Losses of logits in chunks equal the same loss on all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kllm.model.head_chunks import chunked_loss

ROWS, VOCAB, WIDTH = 23, 40, 8


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss with no label in it: of the whole distribution."""
    return -(targets * logits.log_softmax(-1)).sum(-1) + 0.1 * logits.square().mean(-1)


@pytest.fixture
def parts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(ROWS, WIDTH, generator=generator),
        "head": torch.randn(VOCAB, WIDTH, generator=generator),
        "targets": torch.rand(ROWS, VOCAB, generator=generator),
        "rows": torch.arange(ROWS)[torch.rand(ROWS, generator=generator) < 0.6],
    }


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_values_and_gradients(parts: dict[str, Tensor], chunk: int, needs: tuple[bool, bool]) -> None:
    hidden, head = parts["hidden"].clone(), parts["head"].clone()
    hidden.requires_grad_(needs[0])
    head.requires_grad_(needs[1])
    targets = parts["targets"][parts["rows"]]

    def fn(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        each = entropy(logits, targets[part])
        return each.sum(), torch.stack((each.sum(), each.square().sum())).detach()

    total, figures = chunked_loss(hidden, head, parts["rows"], fn, chunk, 2)
    wanted = [t for t in (hidden, head) if t.requires_grad]
    got = torch.autograd.grad(total * 0.3, wanted)
    each = entropy(hidden[parts["rows"]] @ head.T, targets)
    assert torch.allclose(total, each.sum(), rtol=1e-5)
    assert torch.allclose(figures, torch.stack((each.sum(), each.square().sum())), rtol=1e-5)
    assert not figures.requires_grad
    for a, b in zip(got, torch.autograd.grad(each.sum() * 0.3, wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_all_rows_no_rows_and_chunks_without_gradient(parts: dict[str, Tensor]) -> None:
    hidden, head = parts["hidden"].clone().requires_grad_(), parts["head"].clone().requires_grad_()

    def fn(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        # the first chunk says nothing about the logits
        return (logits.sum() if part.start else logits.new_zeros(())), logits.new_ones(1)

    total, figures = chunked_loss(hidden, head, torch.arange(ROWS), fn, 10, 1)
    total.backward()
    assert figures.tolist() == [3.0]
    assert torch.equal(hidden.grad[:10], torch.zeros(10, WIDTH)) and hidden.grad[10:].abs().min() > 0
    nothing, figures = chunked_loss(hidden, head, torch.empty(0, dtype=torch.int64), fn, 10, 1)
    assert nothing.item() == 0 and figures.tolist() == [0.0]
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(nothing, (hidden, head)))


def test_without_gradients_nothing_is_recorded(parts: dict[str, Tensor]) -> None:
    with torch.no_grad():
        total, _ = chunked_loss(
            parts["hidden"], parts["head"].requires_grad_(), parts["rows"],
            lambda logits, part: (logits.sum(), logits.new_zeros(0)),
        )  # fmt: skip
    assert not total.requires_grad
    assert torch.allclose(total, (parts["hidden"][parts["rows"]] @ parts["head"].T).sum(), rtol=1e-4)


def test_only_a_chunk_of_logits_lives(parts: dict[str, Tensor]) -> None:
    seen: list[tuple[int, ...]] = []

    def fn(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        seen.append(tuple(logits.shape))
        return logits.sum(), logits.new_zeros(0)

    chunked_loss(parts["hidden"].requires_grad_(), parts["head"], torch.arange(ROWS), fn, 5)
    assert seen == [(5, VOCAB)] * 4 + [(3, VOCAB)]


def test_in_16_bit_it_stays_near(parts: dict[str, Tensor]) -> None:
    hidden, head = parts["hidden"].clone().requires_grad_(), parts["head"].clone().requires_grad_()
    targets = parts["targets"] / parts["targets"].sum(-1, keepdim=True)

    def fn(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        assert logits.dtype == torch.float32
        return entropy(logits, targets[part]).sum(), logits.new_zeros(0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = chunked_loss(hidden, head, torch.arange(ROWS), fn, 6)
    total.backward()
    exact = entropy(parts["hidden"] @ parts["head"].T, targets).sum()
    assert total.dtype == torch.float32 and abs(float(total.detach() / exact) - 1) < 0.02
    assert hidden.grad.dtype == head.grad.dtype == torch.float32
