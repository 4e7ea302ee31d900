"""The sections that stages are made of. The text under a field is its help, its docs and its JSON schema."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kllm.config.base import (
    Bytes,
    Float,
    Fraction,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    StrList,
    as_list,
)


class DataSource(Section):
    """One stream of training data. Written as `path`, `path@weight` or a mapping."""

    path: Annotated[str, Field(min_length=1)]
    """File, folder, glob, `builtin:NAME` or hub id."""
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture, relative to the other sources."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, sign, weight = value.rpartition("@")
        # A hub id may carry a revision (`user/name@main`): only a number after the sign is a weight.
        try:
            return {"path": path, "weight": float(weight)} if sign else {"path": value}
        except ValueError:
            return {"path": value}


GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"
]  # fmt: skip
"""Types of GGUF files that kllm writes."""

DataList = Annotated[list[DataSource], BeforeValidator(as_list), Field(min_length=1)]


class ModelSection(Section):
    """Which model: a preset to start from scratch, or a path to start from its weights."""

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("preset", "path"),)

    preset: str | None = None
    """Named shape with fresh weights: k-tiny, k-small, k-base, k-moe, k3-dense, k3-moe ..."""
    path: str | None = None
    """Weights to start from: run, stage or checkpoint folder, Hugging Face folder or hub id, `stage:NAME`."""
    hidden_size: Positive | None = None
    """Width of the residual stream. This and the fields below override the preset."""
    intermediate_size: Positive | None = None
    """Width of the gated MLP."""
    num_hidden_layers: Positive | None = None
    """Number of blocks."""
    num_attention_heads: Positive | None = None
    """Query heads."""
    num_key_value_heads: Positive | None = None
    """Key/value heads (GQA); divides the query heads."""
    head_dim: Positive | None = None
    """Width of one head; need not be hidden_size / heads."""
    rms_norm_eps: PositiveFloat | None = None
    """Epsilon of RMSNorm."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN settings: {rope_type: yarn, factor: 4, original_max_position_embeddings: 2048}."""
    max_position_embeddings: Positive | None = None
    """Longest sequence in positions."""
    tie_word_embeddings: bool | None = None
    """Share the embedding with the output head."""
    qk_norm: bool | None = None
    """RMSNorm on queries and keys (Qwen3 style)."""
    attention_bias: bool | None = None
    """Bias on the q, k, v projections (Qwen2 style)."""
    num_experts: NotNegative | None = None
    """Routed experts of a mixture-of-experts block; 0 = dense."""
    num_experts_per_tok: Positive | None = None
    """Experts that each token visits."""
    moe_intermediate_size: Positive | None = None
    """MLP width of one expert."""
    num_shared_experts: NotNegative | None = None
    """Experts that every token visits."""
    norm_topk_prob: bool | None = None
    """Make the chosen experts' probabilities sum to 1."""
    router_aux_loss_coef: NotNegativeFloat | None = None
    """Weight of the load-balancing loss."""
    router_z_loss_coef: NotNegativeFloat | None = None
    """Weight of the router z-loss."""
    aux_loss_type: Literal["switch", "sequence", "kl_uniform"] | None = None
    """Balance over the batch, over each sequence, or KL to uniform."""
    router_noise: bool | None = None
    """Noisy top-k routing during training."""
    initializer_range: PositiveFloat | None = None
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.preset is not None and self.path is not None:
            raise ValueError("give model.preset (fresh weights) or model.path (existing ones), not both")
        return self


class FreshModelSection(ModelSection):
    """Which model: a preset to start from scratch (default k-small), or a path to start from its weights."""

    default_preset: ClassVar[str] = "k-small"

    @model_validator(mode="before")
    @classmethod
    def _default_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") is None and value.get("path") is None:
            return {**value, "preset": cls.default_preset}
        return value


class TokenizerRef(Section):
    """Which tokenizer. Written as a path or a mapping; empty = from the stages before, or with the model."""

    path: str | None = None
    """Folder with tokenizer.json, hub id, or `stage:NAME`."""
    chat_template: str | None = None
    """Jinja file used instead of the tokenizer's own chat template."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DatasetSection(Section):
    """How records become rows of tokens."""

    seq_len: Positive = 1024
    """Tokens in a row."""
    packing: bool = True
    """Fill rows with whole documents; attention never crosses a document's border."""
    val_fraction: Annotated[Float, Field(ge=0, lt=1)] = 0.005
    """Share of records held out for validation, chosen by content."""
    val_data: Annotated[list[DataSource], BeforeValidator(as_list)] = Field(default_factory=list)
    """Separate validation files, used instead of val_fraction."""
    max_bad_rows: NotNegative = 0
    """Bad rows to tolerate before the run fails; each is reported with file:line."""
    system_prompt_ratio: Fraction = 0.0
    """Chance that a conversation without a system turn gets a random one."""
    keep_empty_think: Fraction = 1.0
    """Chance that an empty <think></think> block is kept."""
    unify_reasoning: bool = False
    """Bring every dialect of thinking (tags, answer tags, half of a pair) to the template's own form."""
    add_empty_think: Fraction = 0.0
    """Share of the answers without reasoning put behind an empty think block that is context, not learned:
    teaches enable_thinking off."""
    drop_reasoning: Fraction = 0.0
    """Share of the conversations with reasoning that are learned without it, behind such a block."""
    cache_dir: str | None = None
    """Where token shards are kept between runs; default: a shared cache folder."""
    max_bytes: Bytes | None = None
    """Read at most this much text from each source."""
    min_chars: NotNegative = 1
    """Skip texts shorter than this."""


class TrainSection(Section):
    """How long and in what portions. Give one of steps, tokens, epochs; none = one epoch."""

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("steps", "tokens", "epochs"),)
    default_epochs: ClassVar[float] = 1.0

    steps: Positive | None = None
    """Optimiser steps to take."""
    tokens: Positive | None = None
    """Tokens to train on, e.g. 20M."""
    epochs: PositiveFloat | None = None
    """Passes over the data."""
    batch_tokens: Positive = 32768
    """Tokens in one optimiser step, over all devices; accumulation follows from it."""
    micro_batch_tokens: Positive = 8192
    """Tokens in one forward pass on one device: lower it when memory runs out; the result is the same."""
    save_every: NotNegative = 200
    """Steps between checkpoints; 0 = only at the end."""
    eval_every: NotNegative = 100
    """Steps between validations; 0 = only at the end."""
    eval_tokens: Positive = 65536
    """Validation tokens each time."""
    sample_every: NotNegative = 0
    """Steps between sample texts; 0 = none."""
    sample_prompts: StrList = Field(default_factory=list)
    """Prompts of the sample texts."""
    log_every: Positive = 10
    """Steps between lines of the log."""
    keep_last: Positive = 2
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest validation loss."""
    max_grad_norm: NotNegativeFloat = 1.0
    """Clip the gradient norm to this; 0 = never."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto = bfloat16 on GPUs that have it, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto = when the planned steps pay for the warm-up."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    token_weights: dict[str, NotNegativeFloat] = Field(default_factory=dict)
    """Loss weight of single tokens, e.g. {"</think>": 10}."""
    loss_chunk: Positive = 1024
    """Tokens whose logits exist at a time."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, value: Any) -> Any:
        if isinstance(value, dict) and all(value.get(key) is None for key in ("steps", "tokens", "epochs")):
            return {**value, "epochs": cls.default_epochs}
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        given = [key for key in ("steps", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) > 1:
            names = " and ".join(given)
            raise ValueError(f"give one of train.steps, train.tokens, train.epochs, not {names}")
        return self


class SftTrainSection(TrainSection):
    """How long and in what portions. Give one of steps, tokens, epochs; none = two epochs."""

    default_epochs: ClassVar[float] = 2.0


class OptimSection(Section):
    """The optimiser and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices with adamw for the rest."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate (of the adamw part)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's averaging of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NotNegativeFloat = 0.1
    """Decoupled weight decay; never on norms, biases and embeddings."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; wsd = stable, then decay."""
    warmup: NotNegativeFloat = 0.02
    """Warm-up: a fraction of all steps if below 1, else a number of steps."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a share of the peak."""
    decay: Fraction = 0.2
    """wsd: share of the steps spent in the final decay."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of the muon part."""
    muon_momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """Momentum of the muon part."""

    @field_validator("betas", mode="before")
    @classmethod
    def _split_text(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class SftOptimSection(OptimSection):
    """The optimiser and its learning-rate schedule."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate (of the adamw part)."""


class LogSection(Section):
    """Where metrics go besides metrics.jsonl; changes no result."""

    sinks: Annotated[list[Literal["tensorboard", "wandb", "swanlab"]], BeforeValidator(as_list)] = Field(
        default_factory=list
    )
    """Extra sinks, each from its own optional package."""
    project: str = "kllm"
    """Project name for wandb and swanlab."""


class SamplingSection(Section):
    """How text is sampled."""

    max_tokens: Positive = 256
    """Longest answer in tokens."""
    temperature: NotNegativeFloat = 0.7
    """0 = always the likeliest token."""
    top_k: NotNegative = 0
    """Keep the k likeliest tokens; 0 = all."""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 0.95
    """Keep the likeliest tokens that together reach this probability."""
    min_p: Fraction = 0.0
    """Drop tokens below this share of the likeliest one."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1: tokens already seen become less likely."""
    seed: NotNegative | None = None
    """Same seed, same text; empty = a fresh one."""
