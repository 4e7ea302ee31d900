"""Shapes of models: the one dataclass that describes an architecture, the presets, and counting.

Field names are Hugging Face's. No torch here: `kllm info` and `--dry-run` answer from arithmetic.
Counts: seed catalogue 1.5 (MiniMind2, MiniMind-3); layouts that every engine runs: 64-wide heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kllm.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides a model's tensors and arithmetic (H hidden, D head_dim, E experts)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
    """Biases on q, k, v (never on o)."""
    num_experts: int = 0
    """Routed experts per layer; 0 is a dense model."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    """Always-on experts, each `moe_intermediate_size` wide unless the next field says otherwise."""
    shared_expert_intermediate_size: int = 0
    """Width of all shared experts together (they are one wider MLP)."""
    shared_expert_gate: bool = False
    """A sigmoid gate on the shared expert (real Qwen2-MoE only)."""
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    aux_loss_type: str = "switch"
    router_noise: bool = False
    no_rope_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (SmolLM3)."""
    initializer_range: float = 0.02

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_size(self) -> int:
        """Width of the shared expert MLP, 0 without one."""
        return self.shared_expert_intermediate_size or self.num_shared_experts * self.moe_intermediate_size

    def with_(self, **changes: Any) -> ModelShape:
        """A copy with `changes`; unknown names are the caller's bug."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _llama(h: int, layers: int, heads: int, kv: int, inter: int, **more: Any) -> ModelShape:
    head_dim = more.pop("head_dim", h // heads)
    return ModelShape(
        vocab_size=more.pop("vocab_size", 6400),
        hidden_size=h,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        **more,
    )


_MM2: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_MM2_MOE: dict[str, Any] = {
    **_MM2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1728,
    "num_shared_experts": 1,
    "router_aux_loss_coef": 0.01,
    "aux_loss_type": "sequence",
}
_MM3: dict[str, Any] = {"qk_norm": True, "max_position_embeddings": 32768}
_MM3_MOE: dict[str, Any] = {
    **_MM3,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 2432,
    "router_aux_loss_coef": 5e-4,
}

PRESETS: dict[str, ModelShape] = {
    "k-tiny": _llama(256, 4, 4, 2, 640, vocab_size=2048, max_position_embeddings=2048),
    "k-small": _llama(512, 8, 8, 2, 1408, rms_norm_eps=1e-5),
    "k-base": _llama(768, 16, 12, 3, 2048, rms_norm_eps=1e-5),
    "k-moe": _llama(640, 8, 8, 2, 1728, **{**_MM2_MOE, "max_position_embeddings": 8192}),
    "k3-dense": _llama(768, 8, 8, 4, 2432, qk_norm=True),
    "k3-moe": _llama(768, 8, 8, 4, 2432, **{**_MM3_MOE, "max_position_embeddings": 8192}),
    "mini-171m": _llama(1024, 12, 16, 8, 2752, vocab_size=32000, rope_theta=1e4),
    "minimind2-small": _llama(512, 8, 8, 2, 1408, **_MM2),
    "minimind2": _llama(768, 16, 8, 2, 2048, **_MM2),
    "minimind2-moe": _llama(640, 8, 8, 2, 1728, **_MM2_MOE),
    "minimind3": _llama(768, 8, 8, 4, 2432, **_MM3),
    "minimind3-moe": _llama(768, 8, 8, 4, 2432, **_MM3_MOE),
}

PRESET_NOTES: dict[str, str] = {
    "k-tiny": "about 3M, learns the built-in world on two CPU cores in minutes",
    "k-small": "26M, Llama style, MiniMind2-Small's shape",
    "k-base": "104M, Llama style, 64-wide heads",
    "k-moe": "145M, 1 shared + 4 routed experts, top-2",
    "k3-dense": "64M, Qwen3 style (QK-norm), MiniMind-3's shape",
    "k3-moe": "198M (64M active), Qwen3-MoE style, 4 experts, top-1",
    "mini-171m": "172M, a gated model of mini-llm's size",
    "minimind2-small": "upstream layout, for imports",
    "minimind2": "upstream layout, for imports",
    "minimind2-moe": "upstream layout, for imports",
    "minimind3": "upstream layout, for imports",
    "minimind3-moe": "upstream layout, for imports",
}

SHAPE_FIELDS = tuple(f.name for f in fields(ModelShape))


def get_preset(name: str) -> ModelShape:
    """The preset called `name`, or a UserError that names the nearest."""
    if name in PRESETS:
        return PRESETS[name]
    import difflib

    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
    raise UserError(f"unknown preset {name!r}", hint=hint)


def parameters_by_part(shape: ModelShape) -> dict[str, int]:
    """Exact parameter counts of every part, all layers together; their sum is the total."""
    H, L, D = shape.hidden_size, shape.num_hidden_layers, shape.head_dim
    attention = H * (shape.q_size + 2 * shape.kv_size) + shape.q_size * H
    if shape.attention_bias:
        attention += shape.q_size + 2 * shape.kv_size
    parts = {"embedding": shape.vocab_size * H, "attention": L * attention}
    if shape.is_moe:
        parts["router"] = L * shape.num_experts * H
        parts["experts"] = L * shape.num_experts * 3 * H * shape.moe_intermediate_size
        if shape.shared_size:
            gate = H if shape.shared_expert_gate else 0
            parts["shared experts"] = L * (3 * H * shape.shared_size + gate)
    else:
        parts["mlp"] = L * 3 * H * shape.intermediate_size
    parts["norms"] = L * (2 * H + (2 * D if shape.qk_norm else 0)) + H
    if not shape.tie_word_embeddings:
        parts["head"] = shape.vocab_size * H
    return parts


def count_parameters(shape: ModelShape) -> int:
    """Total number of parameters (a tied head counts once)."""
    return sum(parameters_by_part(shape).values())


def active_parameters(shape: ModelShape) -> int:
    """Parameters that work on one token: all but the experts that are not chosen."""
    parts = parameters_by_part(shape)
    if not shape.is_moe:
        return sum(parts.values())
    idle = parts["experts"] * (shape.num_experts - shape.num_experts_per_tok) // shape.num_experts
    return sum(parts.values()) - idle


def flops_per_token(
    shape: ModelShape, seq_len: int = 0, training: bool = True, adapter: int | None = None
) -> float:
    """Floating-point operations per token: 2 per weight touched and per attention product.

    Matrix products only (the embedding look-up costs none, the head does); causal attention at
    context `seq_len` averages seq_len / 2 keys. Training is 3x the forward (PaLM, appendix B);
    of frozen weights 2x, for they get no gradient.

    Args:
        adapter: parameters of the adapter that work on one token, where it alone is trained.
    """
    weights = active_parameters(shape) - parameters_by_part(shape)["norms"]
    if not shape.tie_word_embeddings:
        weights -= shape.vocab_size * shape.hidden_size
    attention = 2 * shape.num_hidden_layers * shape.q_size * seq_len / 2
    if training and adapter is not None:
        return 2 * (2 * weights + 3 * (attention + adapter))
    return (3 if training else 1) * 2 * (weights + attention)


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: int = 4) -> int:
    """Bytes of KV cache for one token of context."""
    return 2 * shape.num_hidden_layers * shape.kv_size * bytes_per_value


def hf_model_type(shape: ModelShape) -> str:
    """The Hugging Face `model_type` that runs this shape exactly, or UserError with the reason.

    Decision table: every kllm checkpoint must load in transformers and vLLM with no custom code.
    """
    dim_differs = shape.head_dim * shape.num_attention_heads != shape.hidden_size
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise UserError("num_attention_heads must be a multiple of num_key_value_heads", where="model")
    if shape.head_dim % 2:
        raise UserError(f"head_dim {shape.head_dim} is odd; RoPE needs pairs", where="model.head_dim")
    if not shape.is_moe:
        return _dense_type(shape)
    if not 0 < shape.num_experts_per_tok <= shape.num_experts:
        raise UserError("num_experts_per_tok must be between 1 and num_experts", where="model")
    if shape.no_rope_layers:
        raise UserError("no_rope_layers with experts has no exact Hugging Face target", where="model")
    if shape.shared_size:
        if shape.qk_norm:
            raise UserError("shared experts with qk_norm: no architecture has both", where="model.qk_norm")
        if dim_differs:
            raise UserError(
                "shared experts need head_dim = hidden_size / num_attention_heads",
                where="model.head_dim",
                hint="vLLM and SGLang compute it so and ignore the field",
            )
        return "qwen2_moe"
    if shape.attention_bias:
        raise UserError("attention_bias needs shared experts in a MoE", where="model.attention_bias")
    if shape.qk_norm:
        return "qwen3_moe"
    if not shape.norm_topk_prob:
        raise UserError(
            "routed experts without qk_norm need norm_topk_prob: true (Mixtral always renormalises)",
            where="model.norm_topk_prob",
        )
    if dim_differs:
        raise UserError("Mixtral needs head_dim = hidden_size / num_attention_heads", where="model.head_dim")
    return "mixtral"


def _dense_type(shape: ModelShape) -> str:
    if shape.qk_norm:
        if shape.attention_bias:
            raise UserError(
                "qk_norm with attention_bias has no exact target",
                where="model.attention_bias",
                hint="Qwen3 in transformers would add a bias to o_proj too",
            )
        if shape.no_rope_layers:
            raise UserError("no_rope_layers with qk_norm has no exact target", where="model")
        return "qwen3"
    if shape.no_rope_layers:
        return "smollm3"
    if shape.hidden_size % shape.num_attention_heads:
        raise UserError(
            "hidden_size must be divisible by num_attention_heads without qk_norm",
            where="model.num_attention_heads",
            hint="transformers 5 refuses such a Llama config",
        )
    return "llama"


def gguf_arch(shape: ModelShape) -> str:
    """The llama.cpp architecture that computes this shape exactly, or UserError with the reason."""
    arch = _gguf_moe(shape) if shape.is_moe else _gguf_dense(shape)
    if is_llama3(shape) and arch not in ("llama", "granitemoe"):
        raise UserError(f"llama.cpp's {arch} knows no llama3 RoPE scaling", where="GGUF")
    return arch


def is_llama3(shape: ModelShape) -> bool:
    """RoPE is scaled as Llama 3.1 does."""
    return (shape.rope_scaling or {}).get("rope_type") == "llama3"


def _gguf_moe(shape: ModelShape) -> str:
    if shape.shared_size and shape.shared_expert_gate:
        if shape.norm_topk_prob:
            raise UserError("llama.cpp never renormalises a gated Qwen2-MoE", where="GGUF")
        return "qwen2moe"
    if shape.shared_size:
        # not qwen2moe: its sigmoid of a zero gate is 0/0 there
        if shape.norm_topk_prob:
            return "granitemoe"
        if shape.shared_size % shape.moe_intermediate_size:
            raise UserError("the shared expert's width must be a multiple of an expert's", where="GGUF")
        return "bailingmoe"
    if shape.qk_norm:
        if not shape.norm_topk_prob:
            raise UserError("llama.cpp always renormalises the top-k of a Qwen3-MoE", where="GGUF")
        return "qwen3moe"
    return "llama"


def _gguf_dense(shape: ModelShape) -> str:
    if shape.no_rope_layers:
        fourth = tuple(i for i in range(shape.num_hidden_layers) if i % 4 == 3)
        if shape.no_rope_layers != fourth:
            raise UserError("llama.cpp knows layers without RoPE only as every fourth one", where="GGUF")
        return "smollm3"
    if shape.qk_norm:
        return "qwen3"
    if shape.attention_bias and shape.q_size == shape.hidden_size and not is_llama3(shape):
        return "qwen2"
    return "llama"
