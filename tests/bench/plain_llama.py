"""The baseline of the benches: a Llama as small training scripts write it (MiniMind's way of doing each part).

Separate projections, rotary halves recomputed from a table, keys and values repeated for grouped queries,
SDPA, full logits with a masked per-token cross-entropy, default AdamW, clipping. Nothing else is tuned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.model.presets import ModelShape


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Layer(nn.Module):
    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
        self.q = nn.Linear(s.hidden_size, self.heads * self.dim, bias=False)
        self.k = nn.Linear(s.hidden_size, self.kv * self.dim, bias=False)
        self.v = nn.Linear(s.hidden_size, self.kv * self.dim, bias=False)
        self.o = nn.Linear(self.heads * self.dim, s.hidden_size, bias=False)
        self.gate = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)
        self.norm1, self.norm2 = Norm(s.hidden_size, s.rms_norm_eps), Norm(s.hidden_size, s.rms_norm_eps)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.dim)
        k = self.k(x).view(b, t, self.kv, self.dim)
        v = self.v(x).view(b, t, self.kv, self.dim)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        n = self.heads // self.kv
        k = k[:, :, :, None, :].expand(b, t, self.kv, n, self.dim).reshape(b, t, self.heads, self.dim)
        v = v[:, :, :, None, :].expand(b, t, self.kv, n, self.dim).reshape(b, t, self.heads, self.dim)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    """[batch, time] ids -> [batch, time, vocabulary] logits; embeddings tied."""

    def __init__(self, s: ModelShape, positions: int = 2048) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)
        self.head = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)
        rates = 1.0 / s.rope_theta ** (torch.arange(0, s.head_dim, 2) / s.head_dim)
        angles = torch.outer(torch.arange(positions), rates).repeat(1, 2)[:, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, t = self.embed(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.head(self.norm(x))


def plain_step(model: PlainLlama, ids: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step of the usual script over [batch, time] ids and next-token labels."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    mask = (labels >= 0).float()

    def step() -> None:
        logits = model(ids)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        ((losses.view_as(mask) * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
