"""The model: a pre-norm decoder that is Llama, Qwen2, Qwen3, Mixtral, Qwen2-MoE or Qwen3-MoE by flags.

Parameters carry Hugging Face's names, so a checkpoint is a rename-free copy but for experts.
`forward` returns hidden states; losses and samplers take `head_weight` and make the logits they
need, in chunks. Shapes: T tokens of a packed row, B x S tokens beside a KV cache, H hidden, D head_dim.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kllm.model.attention import PackedLayout, cached_attention, packed_attention
from kllm.model.moe import MoE, RouterLog
from kllm.model.presets import ModelShape
from kllm.model.rope import apply_rope, rope_table


class KVCache(Protocol):
    """What attention needs of a cache; `kllm.engine.cache` has the real one."""

    mask: Tensor | None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, kv_heads, S, D] and returns all of them, [B, kv_heads, S_total, D]."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional per-head norms on q and k."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        H, bias = shape.hidden_size, shape.attention_bias
        self.layer, self.head_dim = layer, shape.head_dim
        self.rope = layer not in shape.no_rope_layers
        self.attend = packed_attention  # replaceable: compilation must step around it
        self.q_proj = nn.Linear(H, shape.q_size, bias=bias)
        self.k_proj = nn.Linear(H, shape.kv_size, bias=bias)
        self.v_proj = nn.Linear(H, shape.kv_size, bias=bias)
        self.o_proj = nn.Linear(shape.q_size, H, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout | None, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is None:
            assert layout is not None
            return self.o_proj(self.attend(q, k, v, layout))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, S, D]
        k, v = cache.update(self.layer, k, v)
        return self.o_proj(cached_attention(q, k, v, cache.mask))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MoE(shape) if shape.is_moe else MLP(shape.hidden_size, shape.intermediate_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout | None,
        cache: KVCache | None,
        router: RouterLog | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, cache)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, router) if isinstance(self.mlp, MoE) else self.mlp(normed))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part that Hugging Face calls `model`."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        # unset: `init_weights` or a checkpoint fills it (torch's own normal_ takes 2 s on a meta device)
        empty = torch.empty(shape.vocab_size, shape.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder-only language model of a given shape.

    Args:
        shape: the architecture.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = False
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._grow_rope(min(shape.max_position_embeddings, 4096))

    def _grow_rope(self, length: int, device: torch.device | None = None) -> None:
        shape = self.shape
        with torch.device("cpu"):  # tables are constants: real numbers even under a meta device
            cos, sin = rope_table(shape.head_dim, shape.rope_theta, shape.rope_scaling, length)
        self.register_buffer("cos", cos.to(device) if device else cos, persistent=False)
        self.register_buffer("sin", sin.to(device) if device else sin, persistent=False)

    def ensure_context(self, length: int) -> None:
        """Makes room for positions below `length` (tables grow by doubling)."""
        if length > self.cos.shape[0]:
            limit = max(self.shape.max_position_embeddings, length)
            self._grow_rope(min(limit, max(length, 2 * self.cos.shape[0])), self.cos.device)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] for hidden states [..., H]; for a few positions, not for a batch."""
        return self.lm_head(hidden).float()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: PackedLayout | None = None,
        cache: KVCache | None = None,
        router: RouterLog | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 [T] packed row (with `layout`, or one document without), or [B, S] with `cache`.
            positions: int64, like tokens; below the table length (`ensure_context`).
            layout: document borders of the packed row.
            cache: KV cache; then tokens is [B, S].
            router: collects what the routers did (MoE).

        Returns:
            [T, H] or [B, S, H].
        """
        if cache is None and layout is None:
            layout = PackedLayout(torch.tensor([0, tokens.shape[0]]), tokens.device)
        cos, sin = self.cos[positions][..., None, :], self.sin[positions][..., None, :]
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, cos, sin, layout, None, router, use_reentrant=False)
            else:
                x = block(x, cos, sin, layout, cache, router)
        return self.model.norm(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, initializer_range); projections into the residual stream over sqrt(2 L).

        The same numbers on every device and for every world size: drawn on the CPU from one
        generator (GPT-2's depth scaling, Radford et al. 2019, section 2.3).
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.shape.initializer_range
        residual = std / math.sqrt(2 * self.shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                scale = residual if name.rsplit(".weight", 1)[0].endswith(("o_proj", "down_proj")) else std
                value = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(value.normal_(0.0, scale, generator=generator))

    def num_parameters(self) -> int:
        """Distinct parameters (a tied head once)."""
        return sum(p.numel() for p in self.parameters())
