"""`.pth` files of MiniMind and its kin against small models of our own, written from their description.

Each class below has a family's tensor names and arithmetic (seed catalogue 1.1, 1.2, 1.4, 1.7) and shares
no code with kllm. Its random weights go through torch.save and `read_pth`; the logits must be the same.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.errors import UserError
from kllm.export import pth, pth_names
from kllm.export.adapter import merge_adapter, read_adapter, write_peft
from kllm.export.hf import save_model
from kllm.export.pth import MINIMIND_YARN, PthModel, minimind_config, read_pth, write_pth
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

V, H, I, E, T = 61, 64, 96, 4, 40  # noqa: E741


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def linear(wide: int, narrow: int) -> nn.Linear:
    return nn.Linear(wide, narrow, bias=False)


def turn_pairs(x: Tensor, theta: float) -> Tensor:
    """Neighbours (2i, 2i + 1) as complex numbers; x [T, heads, D]."""
    dim = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(len(x)).float(), frequency)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
        torch.ones_like(angle), angle
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(2)


def turn_halves(x: Tensor, theta: float, yarn: dict[str, Any] | None = None) -> Tensor:
    """Halves (i, i + D/2), with MiniMind's YaRN (seed catalogue 1.3)."""
    dim = x.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2).float() / dim)
    scale = 1.0
    if yarn is not None:
        length, scale = yarn["original_max_position_embeddings"], yarn["attention_factor"]

        def at(turns: float) -> float:
            return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low = max(math.floor(at(yarn["beta_fast"])), 0)
        high = min(math.ceil(at(yarn["beta_slow"])), dim // 2 - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp + ramp / yarn["factor"])
    angle = torch.outer(torch.arange(len(x)).float(), frequency)
    cos, sin = (torch.cat([f(angle)] * 2, -1).unsqueeze(1) * scale for f in (torch.cos, torch.sin))
    left, right = x[..., : dim // 2], x[..., dim // 2 :]
    return x * cos + torch.cat([-right, left], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention, [T, heads, D] with fewer k and v heads -> [T, heads * D]."""
    groups = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // groups].T / math.sqrt(q.shape[-1])
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // groups])
    return torch.cat(out, -1)


def mix(x: Tensor, gate: Tensor, experts: nn.ModuleList, top: int, normed: bool) -> Tensor:
    """Softmax router, token by token."""
    rows = []
    for token in x:
        weights, chosen = (gate @ token).softmax(-1).topk(top)
        if normed:
            weights = weights / weights.sum()
        rows.append(sum(w * experts[int(e)](token) for w, e in zip(weights, chosen, strict=True)))
    return torch.stack(rows)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, H))


# --- MiniMind-1 and its clones: Llama's own names, complex rotation


class Ffn1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = linear(H, I), linear(I, H), linear(H, I)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Moe1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate, self.shared_experts = nn.ModuleList(Ffn1() for _ in range(E)), Gate(), Ffn1()

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, self.gate.weight, self.experts, 2, True) + self.shared_experts(x)


class Attention1(nn.Module):
    def __init__(self, heads: int, kv: int, mask: bool) -> None:
        super().__init__()
        self.dim = H // heads
        self.wq, self.wo = linear(H, H), linear(H, H)
        self.wk, self.wv = linear(H, kv * self.dim), linear(H, kv * self.dim)
        if mask:
            self.register_buffer("mask", torch.full((1, 1, 96, 96), -torch.inf).triu(1))


class Block1(nn.Module):
    def __init__(self, heads: int, kv: int, moe: bool, mask: bool) -> None:
        super().__init__()
        self.attention = Attention1(heads, kv, mask)
        self.feed_forward = Moe1() if moe else Ffn1()
        self.attention_norm, self.ffn_norm = Norm(H, 1e-5), Norm(H, 1e-5)


class MiniMind1(nn.Module):
    def __init__(
        self, heads: int = 8, kv: int = 2, moe: bool = False, theta: float = 1e6, mask: bool = False
    ) -> None:
        super().__init__()
        self.theta = theta
        self.tok_embeddings = nn.Embedding(V, H)
        self.layers = nn.ModuleList(Block1(heads, kv, moe, mask) for _ in range(2))
        self.norm = Norm(H, 1e-5)
        self.output = linear(H, V)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            a, y = block.attention, block.attention_norm(x)
            q, k, v = (w(y).unflatten(-1, (-1, a.dim)) for w in (a.wq, a.wk, a.wv))
            x = x + a.wo(attend(turn_pairs(q, self.theta), turn_pairs(k, self.theta), v))
            x = x + block.feed_forward(block.ffn_norm(x))
        return self.output(self.norm(x))


# --- MiniMind2 and MiniMind-3: Hugging Face's names, rotation by halves


class Ffn2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(H, width), linear(H, width), linear(width, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe2(nn.Module):
    def __init__(self, shared: int, top: int, normed: bool, width: int) -> None:
        super().__init__()
        self.top, self.normed = top, normed
        self.experts, self.gate = nn.ModuleList(Ffn2(width) for _ in range(E)), Gate()
        if shared:
            self.shared_experts = nn.ModuleList(Ffn2(width) for _ in range(shared))

    def forward(self, x: Tensor) -> Tensor:
        y = mix(x, self.gate.weight, self.experts, self.top, self.normed)
        return sum((s(x) for s in getattr(self, "shared_experts", ())), y)


class Attention2(nn.Module):
    def __init__(self, heads: int, kv: int, dim: int, eps: float, norms: bool) -> None:
        super().__init__()
        self.dim = dim
        self.q_proj, self.o_proj = linear(H, heads * dim), linear(heads * dim, H)
        self.k_proj, self.v_proj = linear(H, kv * dim), linear(H, kv * dim)
        if norms:
            self.q_norm, self.k_norm = Norm(dim, eps), Norm(dim, eps)


class Block2(nn.Module):
    def __init__(self, attention: Attention2, mlp: nn.Module, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = Norm(H, eps), Norm(H, eps)


class MiniMind23(nn.Module):
    """MiniMind2, and with `norms` MiniMind-3."""

    def __init__(
        self,
        norms: bool = False,
        heads: int = 8,
        kv: int = 2,
        dim: int = 8,
        moe: bool = False,
        shared: int = 0,
        top: int = 2,
        yarn: dict[str, Any] | None = None,
        theta: float = 1e6,
        eps: float | None = None,
        normed: bool = True,
        width: int = I,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.theta, self.yarn = theta, yarn
        eps = eps or (1e-6 if norms else 1e-5)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, H)
        self.model.layers = nn.ModuleList(
            Block2(
                Attention2(heads, kv, dim, eps, norms),
                Moe2(shared, top, normed, width) if moe else Ffn2(width),
                eps,
            )
            for _ in range(layers)
        )
        self.model.norm = Norm(H, eps)
        self.lm_head = linear(H, V)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            a, y = block.self_attn, block.input_layernorm(x)
            q, k, v = (w(y).unflatten(-1, (-1, a.dim)) for w in (a.q_proj, a.k_proj, a.v_proj))
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            q, k = (turn_halves(t, self.theta, self.yarn) for t in (q, k))
            x = x + a.o_proj(attend(q, k, v))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x))


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that a wrong formula shows, on the half-precision grid."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1 + 0.2 * noise if parameter.dim() == 1 else 0.12 * noise).half().float())
    return model.eval()


def ours(found: PthModel) -> Transformer:
    model = Transformer(found.shape).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in found.state.items()}, strict=True)
    return model


TOKENS = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model: nn.Module, found: PthModel) -> float:
    theirs, mine = model(TOKENS), ours(found)
    logits = mine.logits(mine(TOKENS, torch.arange(T)))
    assert theirs.abs().max() > 1
    return float((logits - theirs).abs().max())


def save(path: Path, model: nn.Module, half: bool = False) -> Path:
    state = model.state_dict()
    torch.save({k: v.half() for k, v in state.items()} if half else state, path)
    return path


V1 = {"num_attention_heads": 16, "rope_theta": 1e4}
CASES: dict[str, tuple[nn.Module, str, dict[str, Any]]] = {
    "1": (MiniMind1(), "minimind-1", {}),
    "1-moe": (MiniMind1(moe=True), "minimind-1", {}),
    "1-v1": (MiniMind1(16, 8, theta=1e4), "minimind-v1", V1),
    "1-v1-told-by-the-ratio": (MiniMind1(16, 8, theta=1e4), "minimind-v1", {}),
    "1-v1-told-by-the-mask": (MiniMind1(16, 4, theta=1e4, mask=True), "minimind-v1", {}),
    "1-v1-moe": (MiniMind1(16, 8, moe=True, theta=1e4), "minimind-v1", {}),
    "1-four-key-heads": (MiniMind1(8, 4), "minimind-1", {"num_attention_heads": 8}),
    "2": (MiniMind23(), "minimind2", {}),
    "2-moe": (MiniMind23(moe=True, shared=1), "minimind2", {}),
    "2-moe-two-shared": (MiniMind23(moe=True, shared=2), "minimind2", {}),
    "2-moe-no-shared": (MiniMind23(moe=True), "minimind2", {}),
    "2-moe-lone": (
        MiniMind23(moe=True, shared=1, top=1, normed=False),
        "minimind2",
        {"num_experts_per_tok": 1},
    ),
    "2-yarn": (
        MiniMind23(heads=2, kv=1, dim=16, yarn=MINIMIND_YARN),
        "minimind2",
        {"num_attention_heads": 2},
    ),
    "2-other-heads": (
        MiniMind23(heads=4, kv=1, dim=16, theta=1e4, eps=1e-3),
        "minimind2",
        {"num_attention_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-3},
    ),
    "3": (MiniMind23(True, kv=4), "minimind-3", {}),
    "3-wide-heads": (MiniMind23(True, heads=3, kv=1, dim=16), "minimind-3", {}),
    "3-moe": (MiniMind23(True, kv=4, moe=True, top=1), "minimind-3", {}),
    "3-moe-raw": (MiniMind23(True, moe=True, top=1, normed=False), "minimind-3", {"norm_topk_prob": False}),
    "3-moe-top-3": (MiniMind23(True, moe=True, top=3), "minimind-3", {"num_experts_per_tok": 3}),
    "3-yarn": (MiniMind23(True, dim=16, yarn=MINIMIND_YARN), "minimind-3", {}),
}
for _name, _case in CASES.items():
    if "yarn" in _name:  # as MiniMind's config spells it
        _yarn = {("type" if k == "rope_type" else k): v for k, v in MINIMIND_YARN.items()}
        CASES[_name] = (_case[0], _case[1], {**_case[2], "rope_scaling": _yarn})


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_familys(name: str, half: bool, tmp_path: Path) -> None:
    model, generation, assume = CASES[name]
    found = read_pth(save(tmp_path / "m.pth", scramble(model), half), assume)
    assert found.generation == generation
    assert found.shape.tie_word_embeddings
    assert found.state["model.norm.weight"].dtype == (torch.float16 if half else torch.float32)
    assert difference(model, found) < 1e-5
    assert pth.peek_shape(tmp_path / "m.pth", assume) == found.shape


@pytest.mark.parametrize("name", ["1", "1-moe", "1-v1"])
def test_without_the_reordered_rows_they_differ(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, assume = CASES[name]
    file = save(tmp_path / "m.pth", scramble(model))
    monkeypatch.setattr(pth, "half_rows", lambda weight, dim: weight)
    assert difference(model, read_pth(file, assume)) > 0.1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("1", {"rope_theta": 1e4}),
        ("2", {"num_attention_heads": 4}),
        ("2", {"rms_norm_eps": 1e-2}),
        ("2-moe", {"num_experts_per_tok": 3}),
        ("3-moe", {"norm_topk_prob": False}),
        ("3-yarn", {"rope_scaling": None}),
        ("3-yarn", {"rope_scaling": {**MINIMIND_YARN, "attention_factor": 1.277}}),
    ],
)
def test_a_wrong_assumption_shows(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The negative controls: each thing that no tensor tells does change the logits."""
    model, _, assume = CASES[name]
    file = save(tmp_path / "m.pth", scramble(model))
    assert difference(model, read_pth(file, {**assume, **changes})) > 1e-3


def test_qichat(tmp_path: Path) -> None:
    """Its own names over MiniMind2's arithmetic: heads of 64, theta 1e4, eps 1e-6."""
    model = scramble(MiniMind23(heads=2, kv=1, dim=64, theta=1e4, eps=1e-6))
    names = {
        "model.embed_tokens": "model.word_emb.word_embeddings",
        "model.norm": "model.final_layer_norm",
        "lm_head": "lm_head.dense",
        ".layers.": ".blocks.",
        ".self_attn.": ".self_attention.",
        ".input_layernorm": ".input_layer_norm",
        ".post_attention_layernorm": ".output_layer_norm",
        ".mlp.": ".ffn.",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for ours_, theirs in names.items():
            name = name.replace(ours_, theirs)
        state[name] = tensor
    torch.save(
        {"model": "QiChatForCausalLM", "type": "PreTraining", "state": {"weights": state}}, tmp_path / "q.pth"
    )
    found = read_pth(tmp_path / "q.pth")
    assert (found.generation, found.shape.head_dim, found.shape.num_key_value_heads) == ("qichat", 64, 1)
    assert difference(model, found) < 1e-5


def test_minillm_shares_layers(tmp_path: Path) -> None:
    model = scramble(MiniMind1())
    blocks = nn.ModuleList(model.layers[0] for _ in range(3))
    model.layers = blocks
    state = model.state_dict()
    state |= {
        k.replace("layers.0", "layers_unique.0"): v for k, v in state.items() if k.startswith("layers.0")
    }
    torch.save(state, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    assert found.shape.num_hidden_layers == 3
    assert difference(model, found) < 1e-5


@pytest.mark.parametrize("name", ["1", "2-moe-two-shared", "3-moe", "3-yarn", "1-moe"])
def test_an_import_loads_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, _, assume = CASES[name]
    found = read_pth(save(tmp_path / "m.pth", scramble(model)), assume)
    save_model(ours(found), None, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    with torch.no_grad():
        assert (theirs(TOKENS[None]).logits[0] - model(TOKENS)).abs().max() < 1e-4


def random_transformer(shape: ModelShape) -> Transformer:
    return scramble(Transformer(shape))  # type: ignore[return-value]


BASE = ModelShape(V, H, I, 2, 8, 2, 8, max_position_embeddings=128)
ROUTED = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    "shape",
    [
        BASE,
        BASE.with_(**ROUTED, num_shared_experts=1),
        BASE.with_(**ROUTED, num_shared_experts=3),
        BASE.with_(**{**ROUTED, "num_experts_per_tok": 1}, num_shared_experts=1, norm_topk_prob=False),
        BASE.with_(**ROUTED),
        BASE.with_(qk_norm=True, head_dim=16, rope_theta=1e5),
        BASE.with_(qk_norm=True, **ROUTED),
        BASE.with_(qk_norm=True, head_dim=16, rope_scaling=MINIMIND_YARN),
        BASE.with_(head_dim=16, num_attention_heads=4, num_key_value_heads=1, rms_norm_eps=1e-3),
    ],
    ids=lambda s: f"{s.qk_norm}-{s.num_experts}-{s.num_shared_experts}-{s.head_dim}",
)
def test_minimind_runs_what_is_written(shape: ModelShape, tmp_path: Path) -> None:
    """Strict loading into the family's own names, built from the config that `minimind_config` gives."""
    model = random_transformer(shape)
    write_pth(model, tmp_path / "m.pth")
    generation, config = minimind_config(shape)
    theirs = MiniMind23(
        norms=generation == "minimind-3",
        heads=config["num_attention_heads"],
        kv=config["num_key_value_heads"],
        dim=config.get("head_dim", H // config["num_attention_heads"]),
        moe=config["use_moe"],
        shared=config.get("n_shared_experts", 0),
        top=config.get("num_experts_per_tok", 0),
        yarn=MINIMIND_YARN if config["inference_rope_scaling"] else None,
        theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        normed=config.get("norm_topk_prob", False),
        width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
    )
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = model.logits(model(TOKENS, torch.arange(T)))
        assert (theirs(TOKENS) - logits).abs().max() < 1e-5


def test_released_sizes_give_the_presets() -> None:
    """The shape of a whole released file, from its names and sizes alone."""
    from kllm.export.pth_shape import infer_shape
    from kllm.model.presets import PRESETS

    for name, family in (
        ("minimind2-small", pth_names.MINIMIND2),
        ("minimind2", pth_names.MINIMIND2),
        ("minimind2-moe", pth_names.MINIMIND2),
        ("minimind3", pth_names.MINIMIND3),
        ("minimind3-moe", pth_names.MINIMIND3),
    ):
        shape = PRESETS[name]
        widths = [shape.moe_intermediate_size] * shape.num_shared_experts
        sizes = pth_names.file_tensors(shape, widths)
        tensors = {key: torch.empty(size, device="meta") for key, size in sizes.items()}
        del tensors["lm_head.weight"]
        inferred = infer_shape(tensors, family, {}, None, "x")
        assert inferred.shape == shape
        assert inferred.shared_widths == widths
        assert family == replace(family) and len(inferred.assumed) == 1 + (not shape.qk_norm) + shape.is_moe


def test_every_architecture_comes_back_exactly(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from model_support import SHAPES

    for name, shape in SHAPES.items():
        model = random_transformer(shape)
        write_pth(model, tmp_path / f"{name}.pth")
        found = read_pth(tmp_path / f"{name}.pth")
        assert (found.shape, found.assumed, found.generation) == (shape, [], "kllm")
        state = model.state_dict()
        assert found.state.keys() == state.keys()
        assert all(torch.equal(found.state[k], state[k]) for k in state), name


# --- LoRA


class Lora(nn.Module):
    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.A, self.B = linear(size, rank), linear(rank, size)


def add_lora(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """MiniMind's way: a branch beside every square linear; returns the file's content."""
    found: dict[str, Tensor] = {}
    for number, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            lora = scramble(Lora(module.in_features, rank), number)
            found |= {f"{name}.lora.{k}": v for k, v in lora.state_dict().items()}
            plain = module.forward
            module.forward = lambda x, plain=plain, lora=lora: plain(x) + lora.B(lora.A(x))  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("name", ["1", "2-moe", "3"])
@torch.no_grad()
def test_minimind_lora_merges(name: str, tmp_path: Path) -> None:
    family: dict[str, nn.Module] = {
        "1": MiniMind1(),
        "2-moe": MiniMind23(moe=True, shared=1),
        "3": MiniMind23(True, kv=4),
    }
    model = scramble(family[name])
    found = read_pth(save(tmp_path / "m.pth", model))
    lora = add_lora(model, 3)
    torch.save({f"module.{k}": v for k, v in lora.items()}, tmp_path / "lora.pth")
    mine = ours(found)
    before = mine.logits(mine(TOKENS, torch.arange(T)))
    assert merge_adapter(mine, tmp_path / "lora.pth") == {"modules": 4, "rank": 3, "scale": 1.0}
    logits = mine.logits(mine(TOKENS, torch.arange(T)))
    assert (logits - before).abs().max() > 0.1
    assert (logits - model(TOKENS)).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["2", "2-moe-two-shared", "3-moe"])
@torch.no_grad()
def test_a_peft_directory_loads_in_peft(name: str, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model, _, assume = CASES[name]
    base = ours(read_pth(save(tmp_path / "m.pth", scramble(model)), assume))
    save_model(base, None, tmp_path / "hf")
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for module_name, module in base.named_modules():
        if isinstance(module, nn.Linear) and module_name.endswith("_proj"):
            a = torch.randn(4, module.in_features, generator=generator) * 0.1
            pairs[module_name] = (a, torch.randn(module.out_features, 4, generator=generator) * 0.1)
    write_peft(pairs, tmp_path / "lora", alpha=8, rank=4, base=str(tmp_path / "hf"))
    merged = copy.deepcopy(base)
    for module_name, (a, b) in pairs.items():
        merged.get_submodule(module_name).weight.add_(2 * b @ a)
    wanted = merged.logits(merged(TOKENS, torch.arange(T)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora").eval()
    assert (theirs(TOKENS[None]).logits[0] - wanted).abs().max() < 1e-4
    with theirs.disable_adapter():
        assert (theirs(TOKENS[None]).logits[0] - wanted).abs().max() > 0.1
    again = read_adapter(tmp_path / "lora")
    assert (again.rank, again.alpha, again.scale, again.source) == (4, 8.0, 2.0, "peft")
    assert merge_adapter(base, tmp_path / "lora") == {"modules": len(pairs), "rank": 4, "scale": 2.0}
    assert (base.logits(base(TOKENS, torch.arange(T))) - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_patterns_mean_what_they_mean_in_peft(tmp_path: Path) -> None:
    """Ranks and alphas per module, and rank-stabilised scaling, as peft itself writes and merges them."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = ours(read_pth(save(tmp_path / "m.pth", scramble(CASES["2"][0]))))
    save_model(model, None, tmp_path / "hf")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "v_proj"],
        rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 3},
        alpha_pattern={"down_proj": 5, "layers.0.self_attn.q_proj": 9},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "lora")
    merge_adapter(model, tmp_path / "lora")
    wanted = theirs.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "where", "part"),
    [
        ("experts.2.up_proj", "experts.up_proj", (2, slice(None), slice(None))),
        ("shared_experts.1.up_proj", "shared_expert.up_proj.weight", (slice(48, 96), slice(None))),
        ("shared_experts.1.down_proj", "shared_expert.down_proj.weight", (slice(None), slice(48, 96))),
        ("shared_expert.down_proj", "shared_expert.down_proj.weight", (slice(None), slice(None))),
    ],
)
@torch.no_grad()
def test_adapters_of_experts_merge(name: str, where: str, part: tuple[Any, ...], tmp_path: Path) -> None:
    """Each lands on its own expert, whole: weights in memory are not doubled as those on disk are."""
    model = random_transformer(BASE.with_(**ROUTED, num_shared_experts=2))
    weight = model.get_parameter(f"model.layers.1.mlp.{where}")
    before = weight.clone()
    out, wide = weight[part].shape
    stem = f"model.layers.1.mlp.{name}.lora"
    torch.save(
        {f"{stem}.A.weight": torch.ones(1, wide), f"{stem}.B.weight": torch.ones(out, 1)}, tmp_path / "l.pth"
    )
    merge_adapter(model, tmp_path / "l.pth")
    change = weight - before
    assert change[part].allclose(torch.ones(out, wide))
    change[part] = 0
    assert not change.any()


def test_adapters_of_experts_are_not_written(tmp_path: Path) -> None:
    for name in ("experts.2.up_proj", "shared_experts.0.up_proj"):
        pair = (torch.ones(1, H), torch.ones(48, 1))
        with pytest.raises(UserError, match=name):
            write_peft({f"model.layers.1.mlp.{name}": pair}, tmp_path / "lora", alpha=1, rank=1, base="x")
        assert not (tmp_path / "lora").exists()
