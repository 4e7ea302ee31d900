"""The model laid out for generation: the arithmetic of `Transformer`, in far fewer and faster steps.

`prepare` copies the weights of a Transformer into fused matrices (q, k, v in one, gate and up in one), each
behind the kernel that is fastest on this machine (`decode_probe`), in the model's own numbers or in 8 or 4
bits. The forward is flat: N tokens of any number of sequences, side by side; the cache knows which belong
together.

Rotary embedding in float32 turns pairs by one complex product: the rows of q and k are stored so that a pair
lies side by side. Keys in the cache are therefore in another order than `Transformer`'s; no dot product
notices.

Adapters chosen per token (LoRA beside a shared base) are added in `decode_layers.Projection`, nowhere else;
`decode_adapters` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.errors import UserError
from kllm.model.decode_adapters import Adapters, Chosen, Site
from kllm.model.decode_layers import GatedMLP, Norm, PreparedBlock, Projection, Rotation, StepCache
from kllm.model.decode_moe import GroupedExperts, LoopExperts, PreparedMoE, Router
from kllm.model.decode_probe import Choice, choose
from kllm.model.kernels import Make, Plain, candidates
from kllm.model.moe import MoE
from kllm.model.rope import rope_table
from kllm.model.transformer import MLP, Attention, Block, RMSNorm, Transformer

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = ("auto", *FLOATS, "int8", "int4")
_TWICE_BYTES = 1 << 30  # larger models do not keep two layouts of every matrix


class Prepared(nn.Module):
    """A Transformer's weights, ready to generate with; make it with `prepare`.

    Its tensors are not parameters: it cannot be trained, moved or saved, only refreshed (`reload`). Matrices
    that need no other layout are shared with the model, so after a change of weights call `reload`.

    Attributes:
        shape, device: the model's.
        dtype: of activations, keys and values.
        weights: "fp32", "bf16", "fp16", "int8" or "int4".
        adapters: what tokens may choose beside the model itself.
    """

    def __init__(self, model: Transformer, weights: str, own: bool, kernel: str | None) -> None:
        super().__init__()
        self.shape, self.device = model.shape, model.head_weight.device
        native = model.head_weight.dtype
        if weights == "auto":
            self.dtype = native
            self.weights = next((n for n, d in FLOATS.items() if d == native), str(native).split(".")[-1])
        else:
            self.weights = weights
            # fast low-bit kernels take float32 on a CPU and 16 bits on a GPU
            low = torch.float32 if self.device.type == "cpu" else native
            self.dtype = FLOATS.get(weights, low)
        self.pairs = self.dtype == torch.float32
        self.adapters = Adapters(self.shape, self.dtype, self.device)
        options = candidates(self.weights, self.dtype)
        matrices = _matrices(model)
        if sum(m.nbytes for m in matrices) > _TWICE_BYTES and kernel is None:
            options = {n: make for n, make in options.items() if getattr(make, "copies", 1) == 1}
        self._fallback: Make = Plain if self.weights not in ("int8", "int4") else list(options.values())[-1]
        with torch.no_grad():
            self._choice: Choice = choose(options, matrices, self.dtype, kernel)
            # a rounding slip of the head reaches every answer: 4 bits are not enough for it
            head = candidates("int8", self.dtype)
            self._head_choice = choose(head, matrices, self.dtype) if weights == "int4" else self._choice
            self._rope = torch.empty(0)
            self._blocks: list[PreparedBlock] = []
            self.ensure_context(min(model.shape.max_position_embeddings, 4096))
            self._fill(model, own)

    def kernel_line(self) -> str:
        """What multiplies, and what it was measured at beside the plain product."""
        return self._choice.line(self.weights)

    def ensure_context(self, length: int) -> None:
        """Makes room for positions below `length` (the table grows by doubling)."""
        have = self._rope.shape[0 if self.pairs else 1] if self._rope.numel() else 0
        if length <= have:
            return
        s = self.shape
        room = min(max(s.max_position_embeddings, length), max(length, 2 * have))
        cos, sin = rope_table(s.head_dim, s.rope_theta, s.rope_scaling, room)
        table = torch.complex(cos, sin) if self.pairs else torch.stack((cos, sin)).to(self.dtype)
        self._rope = table.to(self.device)

    def reload(self, model: Transformer, own: bool = False) -> None:
        """Takes over the weights of `model` (same shape, device and dtype as the first), layer by layer.

        Adapters stay.

        Args:
            own: empties the model's matrices on the way, as in `prepare`.
        """
        if model.shape != self.shape:
            raise ValueError("reload needs a model of the same shape")
        with torch.no_grad():
            self._fill(model, own)
            self.adapters.refit()

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, cache: StepCache, chosen: Chosen | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [N, H].

        Args:
            tokens: int64 [N], all tokens of this step, sequences one after another.
            positions: int64 [N], below the table length (`ensure_context`).
            cache: knows which tokens belong together; `attend` is called once per layer.
            chosen: the adapters of these tokens (`adapters.choose`), None if none has one.
        """
        x = self._embed.index_select(0, tokens).to(self.dtype)
        rotation = Rotation(self._rope, positions, self.pairs)
        for block in self._blocks:
            x = block(x, rotation, cache, chosen)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [M, V] for hidden states [M, H]; for the positions that need them."""
        return self._head(hidden).float()

    # -- layout --------------------------------------------------------------------------------------

    def _fill(self, model: Transformer, own: bool) -> None:
        self.adapters.clear_sites()
        self._norm = self._norm_of(model.model.norm)
        self._embed = model.model.embed_tokens.weight.detach()  # for look-up: always as loaded
        for i, block in enumerate(model.model.layers):
            assert isinstance(block, Block)
            self._blocks[i : i + 1] = [self._block(block, own)]
        tied = self.shape.tie_word_embeddings
        head = model.head_weight
        self._head = self._projection([head], None, own and not tied, choice=self._head_choice)

    def _block(self, block: Block, own: bool) -> PreparedBlock:
        s, attention = self.shape, block.self_attn
        at = f"model.layers.{attention.layer}."
        feed = block.mlp
        return PreparedBlock(
            attention.layer,
            (s.num_attention_heads, s.num_key_value_heads, s.head_dim),
            (
                self._norm_of(block.input_layernorm),
                self._qkv(attention, own, f"{at}self_attn."),
                self._qk_norm(attention),
                self._projection([attention.o_proj.weight], None, own, names=[f"{at}self_attn.o_proj"]),
                self._norm_of(block.post_attention_layernorm),
                (self._moe if isinstance(feed, MoE) else self._mlp)(feed, own, f"{at}mlp."),
            ),
            attention.rope,
        )

    def _norm_of(self, norm: RMSNorm) -> Norm:
        return Norm(norm.weight.detach(), norm.eps, self.dtype)

    def _order(self) -> Tensor:
        """Where each of a head's D numbers is taken from: pairs (i, i + D/2) side by side, or as they are."""
        D = self.shape.head_dim
        index = torch.arange(D, device=self.device)
        return index.view(2, D // 2).t().flatten() if self.pairs else index

    def _qkv(self, attention: Attention, own: bool, at: str) -> Projection:
        s, order = self.shape, self._order()
        turned = s.num_attention_heads + s.num_key_value_heads
        rows = torch.arange(s.q_size + 2 * s.kv_size, device=self.device).view(-1, s.head_dim)
        rows = torch.cat((rows[:turned, order], rows[turned:])).flatten()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([p.bias.detach() for p in parts])[rows] if s.attention_bias else None
        names = [f"{at}{letter}_proj" for letter in "qkv"]
        return self._projection([p.weight for p in parts], bias, own, rows, names=names)

    def _qk_norm(self, attention: Attention) -> Norm | None:
        if attention.q_norm is None or attention.k_norm is None:
            return None
        s, order = self.shape, self._order()
        q, k = (n.weight.detach()[order] for n in (attention.q_norm, attention.k_norm))
        weight = torch.cat((q.expand(s.num_attention_heads, -1), k.expand(s.num_key_value_heads, -1)))
        return Norm(weight, attention.q_norm.eps, self.dtype)

    def _mlp(self, mlp: nn.Module, own: bool, at: str) -> GatedMLP:
        assert isinstance(mlp, MLP)
        wide = [mlp.gate_proj.weight, mlp.up_proj.weight]
        return GatedMLP(
            self._projection(wide, None, own, names=[f"{at}gate_proj", f"{at}up_proj"]),
            self._projection([mlp.down_proj.weight], None, own, names=[f"{at}down_proj"]),
        )

    def _moe(self, moe: nn.Module, own: bool, at: str) -> PreparedMoE:
        assert isinstance(moe, MoE)
        shared = (
            None if moe.shared_expert is None else self._mlp(moe.shared_expert, own, f"{at}shared_expert.")
        )
        gate = moe.shared_expert_gate
        gate_weight = None if gate is None else gate.weight.detach().to(self.dtype)
        router = Router(moe.gate.weight.detach().to(self.dtype), self.shape)
        experts = moe.experts
        if self.device.type != "cpu" and self.weights not in ("int8", "int4"):
            return PreparedMoE(router, GroupedExperts(experts, self.dtype), shared, gate_weight)
        feeds: list[Callable[[Tensor], Tensor]] = [
            GatedMLP(self._projection([g, u], None, False), self._projection([d], None, False))
            for g, u, d in zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
        ]
        if own:
            _empty((experts.gate_proj, experts.up_proj, experts.down_proj))
        return PreparedMoE(router, LoopExperts(feeds), shared, gate_weight)

    def _projection(
        self,
        weights: list[Tensor],
        bias: Tensor | None,
        own: bool,
        rows: Tensor | None = None,
        choice: Choice | None = None,
        names: Sequence[str] = (),
    ) -> Projection:
        """The matrices one under another (their rows in the order `rows`) behind the chosen kernel.

        `names` are the modules' where adapters may change them.
        """
        sizes = tuple(len(w) for w in weights)
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        weight = (weight if rows is None else weight[rows]).to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        if own:
            _empty(weights)
        try:
            kernel = (choice or self._choice).make(weight, bias)
        except (RuntimeError, NotImplementedError):  # a size that this kernel does not take
            kernel = self._fallback(weight, bias)
        if not names:
            return Projection(kernel)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        site = Site(tuple(names), sizes, weight.shape[1], rows, kernel, bias, squares)
        return Projection(kernel, self.adapters.place(site))


def _empty(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)


def _matrices(model: Transformer) -> list[Tensor]:
    """The matrices that make up most of a step, in the order in which it reads them."""
    found: list[Tensor] = []
    for block in model.model.layers:
        assert isinstance(block, Block)
        feed = block.mlp
        if isinstance(feed, MoE):
            found += [e.detach() for e in (*feed.experts.gate_proj, *feed.experts.up_proj)]
        else:
            assert isinstance(feed, MLP)
            found += [p.weight.detach() for p in (feed.gate_proj, feed.up_proj, feed.down_proj)]
    return found


def prepare(
    model: Transformer, *, weights: str = "auto", own: bool = False, kernel: str | None = None
) -> Prepared:
    """Lays a model out for generation.

    Args:
        model: on its final device; eval mode and dropout do not matter, there is none.
        weights: "auto" keeps the model's numbers; "fp32", "bf16", "fp16" convert them; "int8" (one scale per
            row of a matrix) and "int4" (groups of 32, the head in 8 bits) round the
            matrices. The embedding and the router are never rounded; a tied head is.
        own: the model will not be used again: its matrices are emptied as they are converted, so that the
            peak is one model and one layer.
        kernel: pins a kernel by name (`kernels.candidates`) instead of racing them.

    Raises:
        UserError: unknown `weights`.
    """
    if weights not in WEIGHTS:
        raise UserError(
            f"{weights!r} is not a weight format", where="weights", hint=f"one of {', '.join(WEIGHTS)}"
        )
    return Prepared(model, weights, own, kernel)


class ScratchCache:
    """Attention of exactly one sequence over itself, nothing stored: for embeddings."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D], one causal sequence from its start -> [T, heads * D]."""
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1).flatten(1)
