"""config.json and generation_config.json, both transformers dialects, to and from ModelShape.

transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 and vLLM `rope_parameters`;
a file with only one is misread in silence by the other, so both are written, by hand.
"""

from __future__ import annotations

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


def config_to_shape(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape of a Hugging Face config; UserError for architectures kllm does not run."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {model_type!r} is not supported",
            where=where,
            hint=f"known: {', '.join(ARCHITECTURES)}",
        )
    if config.get("use_sliding_window"):
        raise UserError("sliding-window attention is not supported", where=where)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported", where=where)
    if config.get("mlp_bias"):
        raise UserError("mlp_bias is not supported", where=where)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        theta, scaling = _rope_of(config)
        shape = ModelShape(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            attention_bias=_has_bias(config, model_type),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )
    except KeyError as e:
        raise UserError(f"field {e.args[0]!r} is missing", where=where) from None
    if model_type == "mistral" and (window := config.get("sliding_window")):
        # up to the window's length its attention is full attention
        shape = shape.with_(max_position_embeddings=min(shape.max_position_embeddings, int(window)))
    if model_type == "smollm3" and config.get("no_rope_layers"):
        off = tuple(i for i, uses in enumerate(config["no_rope_layers"]) if not uses)
        shape = shape.with_(no_rope_layers=off)
    return _with_experts(shape, config, model_type)


def _rope_of(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    parameters = dict(config.get("rope_parameters") or {})
    theta = config.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    scaling = dict(config.get("rope_scaling") or parameters)
    scaling.pop("rope_theta", None)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    return float(theta), None if scaling["rope_type"] == "default" else scaling


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
        raise UserError("MoE with dense layers between is not supported", where="config.json")
    mixtral = model_type == "mixtral"
    extra = dict(config.get("kllm") or {})
    shared = int(extra.pop("num_shared_experts", 0))
    experts = config.get("num_experts", config.get("num_local_experts"))  # transformers 5 renamed it
    if experts is None:
        raise UserError("field 'num_experts' is missing", where="config.json")
    return shape.with_(
        num_experts=int(experts),
        num_experts_per_tok=int(config["num_experts_per_tok"]),
        moe_intermediate_size=int(config["intermediate_size" if mixtral else "moe_intermediate_size"]),
        norm_topk_prob=True if mixtral else bool(config.get("norm_topk_prob", False)),
        num_shared_experts=shared,
        shared_expert_intermediate_size=0
        if shared
        else int(config.get("shared_expert_intermediate_size", 0)),
        **{k: v for k, v in extra.items() if k in _TRAINING_FIELDS},
    )
