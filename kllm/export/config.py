"""config.json and generation_config.json, both transformers dialects, to and from ModelShape.

transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 and vLLM `rope_parameters`;
a file with only one is misread in silence by the other, so both are written, by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kllm.errors import UserError
from kllm.model.presets import ModelShape, hf_model_type

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mistral": "MistralForCausalLM",
}

ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Scalings that the model computes, with the numbers that each cannot do without."""

# fields that only training reads and no Hugging Face config has; kept under one extra key
_TRAINING_FIELDS = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_type", "router_noise")


def shape_to_config(
    shape: ModelShape,
    *,
    model_type: str | None = None,
    dtype: str = "float32",
    eos_token_id: int | None = 2,
    pad_token_id: int | None = 0,
    bos_token_id: int | None = None,
) -> dict[str, Any]:
    """The content of config.json; UserError when no architecture runs the shape exactly.

    Args:
        model_type: another one than `hf_model_type` gives, that runs the shape too (qwen2).
    """
    model_type = model_type or hf_model_type(shape)
    rope = dict(shape.rope_scaling or {})
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("rope_theta", None)
    if rope_type == "yarn" and rope.get("attention_factor") is not None:
        # SGLang reads only this, and multiplies its own factor by it
        rope["attn_factor"] = rope["attention_factor"] / (1 + 0.1 * math.log(rope["factor"]))
    scaling = None if rope_type == "default" else {"rope_type": rope_type, **rope}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.moe_intermediate_size if shape.is_moe else shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        # several engines never look at the field in their MoE classes, so MoE is written untied
        "tie_word_embeddings": shape.tie_word_embeddings and not shape.is_moe,
        "attention_dropout": 0.0,
        "initializer_range": shape.initializer_range,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": rope_type, **rope, "rope_theta": shape.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "transformers_version": "4.57.1",
    }
    config.update(_architecture_fields(shape, model_type))
    if shape.is_moe:
        config["kllm"] = {name: getattr(shape, name) for name in _TRAINING_FIELDS}
        config["kllm"]["num_shared_experts"] = shape.num_shared_experts
    return config


def _architecture_fields(shape: ModelShape, model_type: str) -> dict[str, Any]:
    sliding = {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.num_hidden_layers,
    }
    experts = {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "norm_topk_prob": shape.norm_topk_prob,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "output_router_logits": False,
    }
    if model_type == "llama":
        return {"attention_bias": shape.attention_bias, "mlp_bias": False, "pretraining_tp": 1}
    if model_type == "qwen2":
        return sliding
    if model_type == "qwen3":
        return {**sliding, "attention_bias": False}
    if model_type == "qwen3_moe":
        return {**sliding, "attention_bias": False, **experts}
    if model_type == "qwen2_moe":
        return {
            **sliding,
            **experts,
            "shared_expert_intermediate_size": shape.shared_size,
            "qkv_bias": True,
        }
    if model_type == "mixtral":
        return {
            "sliding_window": None,
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_experts_per_tok,
            "router_aux_loss_coef": shape.router_aux_loss_coef,
            "output_router_logits": False,
            "router_jitter_noise": 0.0,
        }
    flags = [0 if i in shape.no_rope_layers else 1 for i in range(shape.num_hidden_layers)]
    return {
        "no_rope_layers": flags,  # 1 = the layer does use RoPE (sic)
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "attention_bias": False,
        "mlp_bias": False,
    }


def generation_config(
    eos_token_ids: list[int], pad_token_id: int | None, bos_token_id: int | None = None
) -> dict[str, Any]:
    """Sampling defaults that servers and `generate` read; stop tokens always written."""
    return {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_ids,
        "pad_token_id": pad_token_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def config_to_shape(config: Any, where: str = "config.json") -> ModelShape:
    """The shape of a Hugging Face config; UserError for what kllm does not run or what makes no sense."""
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {model_type!r} is not supported",
            where=where,
            hint=f"known: {', '.join(ARCHITECTURES)}",
        )
    try:
        _refuse(config)
        shape = _with_experts(_dense(config, model_type), config, model_type)
        _check_heads(shape)
    except KeyError as e:
        raise UserError(f"field {e.args[0]!r} is missing", where=where) from None
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UserError(str(e), where=where) from None
    return shape


def _refuse(config: dict[str, Any]) -> None:
    """What would be computed differently is refused, not ignored."""
    kinds = _typed(config, "layer_types", list)
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in kinds):
        raise ValueError("sliding-window attention is not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported")
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias is not supported")
    for holder in (config, _typed(config, "rope_parameters", dict)):
        if holder.get("partial_rotary_factor") not in (None, 1):
            raise ValueError("partial rotary embedding is not supported")


def _dense(config: dict[str, Any], model_type: str) -> ModelShape:
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    theta, scaling = _rope_of(config, model_type)
    shape = ModelShape(
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_hidden_layers=_count(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_count(config, "num_key_value_heads", heads),
        head_dim=_count(config, "head_dim", 128 if model_type == "qwen3" else hidden // heads),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_count(config, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", model_type == "smollm3")),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        attention_bias=_has_bias(config, model_type),
        initializer_range=float(config.get("initializer_range") or 0.02),
    )
    if model_type in ("mistral", "mixtral") and config.get("sliding_window"):
        # up to the window's length its attention is full attention
        window = _count(config, "sliding_window")
        shape = shape.with_(max_position_embeddings=min(shape.max_position_embeddings, window))
    if model_type == "smollm3":
        every = _count(config, "no_rope_layer_interval", 4)
        usual = [(i + 1) % every for i in range(shape.num_hidden_layers)]
        flags = _typed(config, "no_rope_layers", list) or usual
        shape = shape.with_(no_rope_layers=tuple(i for i, uses in enumerate(flags[: len(usual)]) if not uses))
    return shape


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; KeyError without one, ValueError for what is none."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise KeyError(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a positive number")
    return float(value)


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _number(config, name, default)
    if value != int(value):
        raise ValueError(f"{name} is {value}, not a whole number")
    return int(value)


def _typed(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """A copy of a list or an object, an empty one without it; ValueError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a {kind.__name__}")
    return kind(value or ())


def _check_heads(shape: ModelShape) -> None:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % groups:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if shape.head_dim % 2:
        raise ValueError(f"head_dim {shape.head_dim} is odd; RoPE needs pairs")
    if shape.num_experts_per_tok > shape.num_experts:
        raise ValueError(f"num_experts_per_tok {shape.num_experts_per_tok} of {shape.num_experts} experts")


def _rope_of(config: dict[str, Any], model_type: str) -> tuple[float, dict[str, Any] | None]:
    parameters = _typed(config, "rope_parameters", dict)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError("rope_parameters that differ between kinds of layers are not supported")
    usual = {"smollm3": 2e6, "mixtral": 1e6}.get(model_type, 1e4)
    theta = _number(parameters if config.get("rope_theta") is None else config, "rope_theta", usual)
    scaling = _typed(config, "rope_scaling", dict) or parameters
    scaling.pop("rope_theta", None)
    if scaling.get("attention_factor") is not None:
        scaling.pop("attn_factor", None)
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind == "default":
        return theta, None
    if kind not in ROPE_NEEDS:
        raise ValueError(f"rope_type {kind!r} is not supported (known: default, {', '.join(ROPE_NEEDS)})")
    if "original_max_position_embeddings" in ROPE_NEEDS[kind]:  # transformers' default
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    for name in ROPE_NEEDS[kind]:
        _number(scaling, name)
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        _number(scaling, name, 1.0)
    return theta, scaling


def _has_bias(config: dict[str, Any], model_type: str) -> bool:
    if model_type == "qwen2":
        return True
    if model_type == "qwen2_moe":
        return bool(config.get("qkv_bias", True))
    return bool(config.get("attention_bias", False))


def _with_experts(shape: ModelShape, config: dict[str, Any], model_type: str) -> ModelShape:
    if model_type not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return shape
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("MoE with dense layers between is not supported")
    mixtral = model_type == "mixtral"
    extra = _typed(config, "kllm", dict)
    shared = int(extra.pop("num_shared_experts", 0))
    local = "num_local_experts" in config and "num_experts" not in config  # Mixtral's name
    experts = _count(config, "num_local_experts" if local else "num_experts")
    return shape.with_(
        num_experts=experts,
        num_experts_per_tok=_count(config, "num_experts_per_tok"),
        moe_intermediate_size=_count(config, "intermediate_size" if mixtral else "moe_intermediate_size"),
        norm_topk_prob=True if mixtral else bool(config.get("norm_topk_prob", False)),
        num_shared_experts=shared,
        shared_expert_intermediate_size=0
        if shared
        else int(config.get("shared_expert_intermediate_size", 0)),
        **{k: v for k, v in extra.items() if k in _TRAINING_FIELDS},
    )
