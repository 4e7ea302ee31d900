"""AWQ: 4-bit weights, most exact where activations are large (Lin et al. 2023, arXiv 2306.00978).

Rounding w s and dividing the input by s is the same layer with another error: s = mean|x|^alpha per input
channel spends precision on the channels that carry the signal (section 3.2, equations 4 and 5). The
division goes into whatever makes the input: a norm, the up projection, or the value projection, so the
float model stays what it was. Then each group's range shrinks as far as its output error falls (clipping).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.errors import UserError
from kllm.export.mapping import state_to_hf
from kllm.export.quantized import (
    QuantizedExport,
    choose_group,
    input_widths,
    is_quantised,
    pack_nibbles,
    rest_of,
    round_asymmetric,
    rounded,
)
from kllm.model.attention import PackedLayout
from kllm.model.moe import MoE
from kllm.model.rope import rope_table
from kllm.model.transformer import MLP, Attention, Block, Transformer

ALPHAS = tuple(i / 20 for i in range(21))
CLIP_RATIOS = tuple(1 - i / 20 for i in range(11))
"""Ranges tried for each group, as shares of its full range."""
SAMPLE_TOKENS = 2048
"""Tokens that judge a candidate scale (statistics are over all); evenly spread over the batches."""
FEW_ROWS = 32
"""An expert that saw fewer tokens is judged by the error of its weights, not of its output."""


@torch.no_grad()
def quantize_awq(
    model: Transformer,
    batches: Sequence[Tensor],
    group_size: int | None = None,
    *,
    report: Callable[[int, int], None] | None = None,
) -> QuantizedExport:
    """The model with 4-bit weights in AutoAWQ's "gemm" layout, for vLLM, SGLang and LMDeploy.

    Layers are done in order, each on what the quantised ones before it give. Memory: the model in float32
    and a few hidden states for each calibration token; no logits.

    Args:
        model: any float dtype and device; not changed.
        batches: calibration text, int64 [T] each, one document (or part of one) each.
        group_size: 128, 64 or 32 weights to a scale; None takes the largest that fits every width.
        report: called with (layers done, layers) after each layer.

    Raises:
        UserError: no calibration tokens, tokens outside the vocabulary, widths that do not fit the layout,
            or a tensor that overflows float16.
    """
    shape = model.shape
    source = state_to_hf(model.state_dict(), shape)
    group = choose_group(input_widths(source), group_size)
    outputs = sorted({t.shape[0] for name, t in source.items() if is_quantised(name)})
    if odd := [width for width in outputs if width % 8]:
        raise UserError(f"AWQ packs outputs by eight; width {odd[0]} is not a multiple of 8")
    calibration = _Calibration(model, batches, group)
    state = dict(model.state_dict())
    for i, layer in enumerate(model.model.layers):
        block: Block = copy.deepcopy(layer).float().eval()  # type: ignore[assignment]
        calibration.attention(block)
        calibration.mlp(block)
        state.update({f"model.layers.{i}.{name}": t for name, t in block.state_dict().items()})
        if report is not None:
            report(i + 1, shape.num_hidden_layers)
    tensors = _pack(state_to_hf(state, shape), group)
    untouched = ["lm_head"] + (["shared_expert_gate"] if shape.shared_size else [])
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": untouched,
    }
    notes = [*calibration.notes(), *_engine_notes(input_widths(source), outputs, group)]
    return QuantizedExport(tensors, config, "float16", "awq", group, notes)


def _pack(source: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    names = [name for name in source if is_quantised(name)]
    tensors = rest_of(source, names, torch.float16)
    for name in names:
        codes, zeros, scales = (t.cpu().t() for t in round_asymmetric(source[name], group))
        if not scales.isfinite().all():
            raise UserError(f"tensor {name} has values beyond float16")
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = pack_nibbles(codes)
        tensors[f"{module}.qzeros"] = pack_nibbles(zeros)
        tensors[f"{module}.scales"] = scales.contiguous()
    return tensors


def _engine_notes(inputs: list[int], outputs: list[int], group: int) -> list[str]:
    notes = []
    if group != 128:
        notes.append(f"group size {group}: LMDeploy's TurboMind takes 128 only; the other engines run it")
    narrow = [str(w) for w in inputs if w % 128] + [str(w) for w in outputs if w % 64]
    if narrow:
        notes.append(
            "vLLM's fast Marlin kernels want inputs in multiples of 128 and outputs of 64; "
            f"not so: {', '.join(dict.fromkeys(narrow))}"
        )
    return notes


class _Stats:
    """What the search needs of a linear's inputs: mean |x|, a sample of rows, x x^T inside each group."""

    def __init__(self, rows: Iterable[Tensor], total: int, group: int) -> None:
        self.rows, self.group = total, group
        self._sum: Tensor | float = 0.0
        self._gram: Tensor | float = 0.0
        self._sample = []
        stride, at = max(1, math.ceil(total / SAMPLE_TOKENS)), 0
        for x in rows:
            self._sum = self._sum + x.abs().sum(dim=0)
            grouped = x.view(len(x), x.shape[1] // group, group).transpose(0, 1)
            self._gram = self._gram + grouped.transpose(1, 2) @ grouped
            self._sample.append(x[at::stride].clone())
            at = (at - len(x)) % stride

    @property
    def enough(self) -> bool:
        return self.rows >= FEW_ROWS

    def mean(self) -> Tensor:
        """mean |x|, [in]."""
        assert isinstance(self._sum, Tensor)
        return self._sum / self.rows

    def sample(self) -> Tensor:
        """[about SAMPLE_TOKENS at most, in], evenly spread."""
        return torch.cat(self._sample)

    def gram(self, scale: Tensor | None = None) -> Tensor | None:
        """Sum of x x^T, [in / group, group, group], of inputs divided by `scale`; None: too few to say."""
        if not self.enough or not isinstance(self._gram, Tensor):
            return None
        if scale is None:
            return self._gram
        inverse = 1 / scale.view(-1, self.group)
        return self._gram * inverse[:, :, None] * inverse[:, None, :]


class _Calibration:
    """The hidden states of all calibration tokens, moved through the blocks as they are quantised.

    `attention` and `mlp` change that half of a float32 block in place: scales folded, weights clipped, so
    that rounding is all that is left; and they leave in `hidden` what the rounded half computes.
    """

    def __init__(self, model: Transformer, batches: Sequence[Tensor], group: int) -> None:
        shape, device = model.shape, model.head_weight.device
        batches = [row.to(device) for row in batches if row.numel()]
        if not batches:
            raise UserError("no calibration tokens")
        ids = torch.cat(batches)
        if int(ids.max()) >= shape.vocab_size or int(ids.min()) < 0:
            raise UserError(f"calibration tokens reach {int(ids.max())}, the vocabulary {shape.vocab_size:,}")
        self.group, self.tokens = group, len(ids)
        self.hidden = [model.model.embed_tokens(row).float() for row in batches]
        cos, sin = rope_table(
            shape.head_dim, shape.rope_theta, shape.rope_scaling, max(len(row) for row in batches)
        )
        self.cos, self.sin = cos.to(device)[:, None], sin.to(device)[:, None]  # [T, 1, D / 2]
        wanted = math.ceil(len(batches) * min(1.0, SAMPLE_TOKENS / self.tokens))
        self.judges = [i * len(batches) // wanted for i in range(wanted)]
        self.gains: list[float] = []  # of each search: error with the best scales / with none
        self.experts = self.starved = 0

    def attention(self, block: Block) -> None:
        """norm -> q, k, v and, where every query head has its own value head, v -> o."""
        attn, norm = block.self_attn, block.input_layernorm
        qkv = [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
        inputs = [norm(x) for x in self.hidden]
        judges = [inputs[i][:SAMPLE_TOKENS] for i in self.judges]
        wanted = torch.cat([self._attend(attn, x) for x in judges])

        def error(scale: Tensor) -> float:
            with _swapped([(w, rounded(w * scale, self.group) / scale) for w in qkv]):
                got = torch.cat([self._attend(attn, x) for x in judges])
            return float((got - wanted).square_().sum())

        stats = self._stats(inputs)
        scale = self._search(stats.mean(), error)
        norm.weight.div_(scale)
        for weight in qkv:
            weight.mul_(scale)
            clip_(weight, stats.gram(scale), self.group)
        heads: list[Tensor] = []
        hook = attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        with hook, _swapped([(w, rounded(w, self.group)) for w in qkv]):
            for x in self.hidden:
                self._attend(attn, norm(x))
        out, stats = attn.o_proj.weight, self._stats(heads)
        scale = torch.ones_like(out[0])
        if attn.q_proj.out_features == attn.v_proj.out_features:
            scale = self._search_linear(out, stats)
            attn.v_proj.weight.div_(scale[:, None])
            if attn.v_proj.bias is not None:
                attn.v_proj.bias.div_(scale)
            out.mul_(scale)
        clip_(out, stats.gram(scale), self.group)
        effective = rounded(out, self.group) / scale
        self.hidden = [x + F.linear(h, effective) for x, h in zip(self.hidden, heads, strict=True)]

    def mlp(self, block: Block) -> None:
        """norm -> gate and up of all experts (routers are multiplied back), then up -> down."""
        mlp, norm = block.mlp, block.post_attention_layernorm
        assert isinstance(mlp, MLP | MoE)
        readers, exact, downs = _roles(mlp)
        inputs = [norm(x) for x in self.hidden]
        stats = self._stats(inputs)
        sample = stats.sample()
        wanted = mlp(sample)

        def error(scale: Tensor) -> float:
            with _swapped([(w, rounded(w * scale, self.group) / scale) for w in readers]):
                return float((mlp(sample) - wanted).square_().sum())

        scale = self._search(stats.mean(), error)
        norm.weight.div_(scale)
        for weight in (*readers, *exact):
            weight.mul_(scale)
        inputs = [norm(x) for x in self.hidden]
        for gate, up, down, seen in _gated(mlp, inputs):
            self._inside(gate, up, down, seen)
        with _swapped([(w, rounded(w, self.group)) for w in (*readers, *downs)]):
            self.hidden = [x + mlp(y) for x, y in zip(self.hidden, inputs, strict=True)]

    def _inside(self, gate: Tensor, up: Tensor, down: Tensor, inputs: list[Tensor]) -> None:
        """Clips gate and up, moves scales from up's rows to down's columns, clips down."""
        stats = self._stats(inputs)
        self.experts += 1
        self.starved += not stats.enough
        for weight in (gate, up):
            clip_(weight, stats.gram(), self.group)
        g, u = rounded(gate, self.group), rounded(up, self.group)
        inner = (F.silu(F.linear(x, g)) * F.linear(x, u) for x in inputs)
        stats = _Stats(inner, stats.rows, self.group)
        scale = self._search_linear(down, stats)
        up.div_(scale[:, None])
        down.mul_(scale)
        clip_(down, stats.gram(scale), self.group)

    def _attend(self, attn: Attention, x: Tensor) -> Tensor:
        layout = PackedLayout(torch.tensor([0, len(x)]), x.device)
        return attn(x, self.cos[: len(x)], self.sin[: len(x)], layout)

    def _stats(self, rows: list[Tensor]) -> _Stats:
        return _Stats(rows, sum(len(x) for x in rows), self.group)

    def _search_linear(self, weight: Tensor, stats: _Stats) -> Tensor:
        """The best scale of one linear's input, judged by its own output; ones when it saw too little."""
        if not stats.enough:
            return torch.ones_like(weight[0])
        sample = stats.sample()

        def error(scale: Tensor) -> float:
            wrong = rounded(weight * scale, self.group).div_(scale).sub_(weight)
            return float(F.linear(sample, wrong).square_().sum())

        return self._search(stats.mean(), error)

    def _search(self, mean: Tensor, error: Callable[[Tensor], float]) -> Tensor:
        """mean^alpha, centred on 1, of the alpha with the least error; alpha 0 is plain rounding."""
        mean = mean.clamp_min(float(mean.max()) * 1e-4)  # a silent channel must not be scaled away
        best = torch.ones_like(mean)
        if not mean.min() > 0:
            return best
        plain = least = error(best)
        for alpha in ALPHAS[1:]:
            scale = mean**alpha
            scale = scale / (scale.max() * scale.min()).sqrt()
            if (found := error(scale)) < least:
                best, least = scale, found
        if plain > 0:
            self.gains.append(least / plain)
        return best

    def notes(self) -> list[str]:
        """What to tell the user about the calibration."""
        lines = [f"calibrated on {self.tokens:,} tokens"]
        if self.gains:
            left = math.exp(sum(math.log(max(g, 1e-9)) for g in self.gains) / len(self.gains))
            lines[0] += f": scales leave {left:.0%} of plain rounding's squared output error"
        if self.starved:
            lines.append(
                f"{self.starved} of {self.experts} MLPs saw fewer than {FEW_ROWS} calibration tokens "
                "and were rounded by weight error alone"
            )
        return lines


def clip_(weight: Tensor, gram: Tensor | None, group: int) -> None:
    """Narrows each group of `weight` [out, in] in place to the range whose rounding costs least.

    The cost is d G d of the group's rounding error d, G the inputs' x x^T from `_Stats.gram` (the output
    error, groups taken one by one), or d d without it.
    """
    rows = weight.view(len(weight), -1, group)
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    least = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for ratio in CLIP_RATIOS:
        d = rounded(rows.clamp(low * ratio, high * ratio), group) - rows
        weighted = d if gram is None else (d.transpose(0, 1) @ gram).transpose(0, 1)
        cost = (weighted * d).sum(-1, keepdim=True)
        best = torch.where(cost < least, ratio, best)
        least = torch.minimum(least, cost)
    weight.copy_(rows.clamp(low * best, high * best).view_as(weight))


@contextlib.contextmanager
def _swapped(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The parameters hold other values inside."""
    kept = [parameter.data for parameter, _ in pairs]
    for parameter, value in pairs:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), value in zip(pairs, kept, strict=True):
            parameter.data = value


def _roles(mlp: MLP | MoE) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights that read the norm and are rounded, that read it and are not, and the down projections."""
    if isinstance(mlp, MLP):
        return [mlp.gate_proj.weight, mlp.up_proj.weight], [], [mlp.down_proj.weight]
    readers: list[Tensor] = [mlp.experts.gate_proj, mlp.experts.up_proj]
    exact: list[Tensor] = [mlp.gate.weight]
    downs: list[Tensor] = [mlp.experts.down_proj]
    if isinstance(mlp.shared_expert, MLP):
        more, _, down = _roles(mlp.shared_expert)
        readers, downs = readers + more, downs + down
    if mlp.shared_expert_gate is not None:
        exact.append(mlp.shared_expert_gate.weight)
    return readers, exact, downs


def _gated(mlp: MLP | MoE, inputs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """Each gated MLP inside: gate, up and down weights (views), and the rows of `inputs` that reach it."""
    if isinstance(mlp, MLP):
        yield mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, inputs
        return
    if isinstance(mlp.shared_expert, MLP):
        yield from _gated(mlp.shared_expert, inputs)
    chosen = [mlp.route(x, None)[1] for x in inputs]
    e: Any = mlp.experts
    for i in range(mlp.shape.num_experts):
        rows = [x[(c == i).any(dim=-1)] for x, c in zip(inputs, chosen, strict=True)]
        yield e.gate_proj[i], e.up_proj[i], e.down_proj[i], rows
