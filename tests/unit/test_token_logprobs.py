"""Log-probabilities of labels straight from hidden states, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kllm.data.batch import IGNORE
from kllm.model.head import token_logprobs


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator, dtype=dtype)
    head = torch.randn(50, 16, generator=generator, dtype=dtype)
    labels = torch.randint(0, 50, (20,), generator=generator)
    labels[::4] = IGNORE
    return hidden, head, labels, torch.randn(20, generator=generator)


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logprobs = (hidden @ head.T).log_softmax(-1).gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(labels == IGNORE, 0.0, logprobs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_values_and_gradients_equal_autograd(chunk: int, frozen: bool) -> None:
    hidden, head, labels, above = example()
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(not frozen)
    out = token_logprobs(h, w, labels, chunk)
    (out * above).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), head.double().requires_grad_()
    want = plain(h64, w64, labels)
    (want * above).sum().backward()
    assert out.dtype == torch.float32 and (out[labels == IGNORE] == 0).all()
    assert (out - want).abs().max() < 1e-5
    assert h.grad is not None and h64.grad is not None and w64.grad is not None
    assert (h.grad - h64.grad).abs().max() < 1e-5
    if frozen:
        assert w.grad is None
    else:
        assert w.grad is not None and (w.grad - w64.grad).abs().max() < 1e-5


def test_a_head_alone_may_learn() -> None:
    hidden, head, labels, above = example()
    w, w64 = head.clone().requires_grad_(), head.double().requires_grad_()
    (token_logprobs(hidden, w, labels, 7) * above).sum().backward()
    (plain(hidden.double(), w64, labels) * above).sum().backward()
    assert w.grad is not None and w64.grad is not None
    assert (w.grad - w64.grad).abs().max() < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_computes_in_its_precision_and_answers_in_float32(frozen: bool) -> None:
    hidden, head, labels, above = example()
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logprobs(h, w, labels, 8)
    (out * above).sum().backward()
    h16, w16 = (t.bfloat16().float().requires_grad_() for t in (hidden, head))
    want = plain(h16, w16, labels)
    (want * above).sum().backward()
    assert out.dtype == torch.float32 and h.grad is not None and h.grad.dtype == torch.float32
    assert (out - want).abs().max() < 0.1
    assert (out - plain(hidden, head, labels)).abs().max() > 1e-3  # it was not float32 after all
    assert h16.grad is not None and (h.grad - h16.grad).abs().max() < 0.1


def test_no_labels_at_all() -> None:
    hidden, head, labels, _ = example()
    h = hidden.requires_grad_()
    out = token_logprobs(h, head, torch.full_like(labels, IGNORE))
    out.sum().backward()
    assert (out == 0).all() and h.grad is not None and (h.grad == 0).all()


def test_logits_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = torch.Tensor.float

    def spy(self: Tensor) -> Tensor:
        sizes.append(self.numel())
        return original(self)

    monkeypatch.setattr(torch.Tensor, "float", spy)
    hidden, head = torch.randn(2048, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    token_logprobs(hidden, head, torch.randint(0, 5000, (2048,)), chunk=64).sum().backward()
    assert max(sizes) == 64 * 5000 and len(sizes) == 64  # once forward, once backward
    sizes.clear()
    token_logprobs(hidden, head.detach(), torch.randint(0, 5000, (2048,)), chunk=64).sum().backward()
    assert len(sizes) == 32  # a frozen head is not computed again
