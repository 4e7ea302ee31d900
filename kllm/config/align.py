"""The sections of fine-tuning with adapters, of preferences and of distillation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kllm.config.base import (
    Float,
    Fraction,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    StrList,
    as_list,
    without_key,
)
from kllm.config.parts import DataSource, OptimSection, TrainSection

JUDGE_KEY = "OPENAI_API_KEY"
"""Environment variable with the key of a judge at an URL."""


class LoraSection(Section):
    """Train small low-rank matrices beside frozen weights; rank 0 = off, all weights are trained."""

    rank: NotNegative = 0
    """Rank of the matrices; 0 = no adapter."""
    alpha: PositiveFloat | None = None
    """The change of a weight is alpha / rank times the product; empty = twice the rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs dropped in training."""
    targets: Annotated[StrList, Field(min_length=1)] = Field(default_factory=lambda: ["all"])
    """Which matrices: all, attention, mlp, experts, router, names such as q_proj, or a regex; repeat."""
    use_rslora: bool = False
    """Divide alpha by the square root of the rank (rsLoRA): large ranks learn as fast as small ones."""
    use_dora: bool = False
    """Train the lengths of the rows apart from their directions (DoRA)."""
    init: Literal["default", "pissa"] = "default"
    """Start from no change, or from the largest singular vectors of each weight (PiSSA)."""
    base: Literal["none", "int8", "int4"] = "none"
    """Keep the frozen weights rounded to 8 or 4 bits (QLoRA); the adapter is trained on what that gives."""
    lr_ratio: PositiveFloat = 1.0
    """Learning rate of the second matrices as a multiple of the first's (LoRA+: 16)."""

    @model_validator(mode="after")
    def _settings_need_rank(self) -> LoraSection:
        if self.rank:
            return self
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.get_default(call_default_factory=True):
                raise ValueError(f"lora.{name} is of an adapter, and there is none: set lora.rank as well")
        return self


class LoraOnSection(LoraSection):
    """Train small low-rank matrices beside frozen weights."""

    rank: Positive = 16
    """Rank of the matrices."""


class LoraOptimSection(OptimSection):
    """The optimiser and its learning-rate schedule."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate (of the adamw part)."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""


class PreferenceSection(Section):
    """What is learned from pairs (or, with kto, from single ratings)."""

    loss: Literal["dpo", "ipo", "hinge", "cdpo", "robust", "simpo", "orpo", "kto"] = "dpo"
    """Loss: dpo, ipo, hinge, cdpo and robust (wrong labels expected), simpo and orpo (no reference), kto."""
    beta: PositiveFloat | None = None
    """Strength of the pull towards the reference, for simpo the scale of the margin; empty = 0.1, simpo 2."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0
    """cdpo, robust: the share of pairs whose label is thought to be wrong."""
    gamma: NotNegativeFloat = 0.5
    """simpo: the margin wanted, as a share of beta."""
    length_normalised: bool = False
    """Compare log-probabilities per token instead of sums (simpo, orpo and ipo always do)."""
    rpo_alpha: NotNegativeFloat = 0.0
    """Weight of the plain loss on the chosen answers, which keeps their likelihood up (RPO)."""
    desirable_weight: PositiveFloat = 1.0
    """kto: weight of good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """kto: weight of bad answers."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> PreferenceSection:
        if self.loss in ("cdpo", "robust") and not self.label_smoothing:
            raise ValueError(f"{self.loss} needs preference.label_smoothing above 0, e.g. 0.1")
        if self.label_smoothing and self.loss not in ("cdpo", "robust"):
            raise ValueError(f"preference.label_smoothing is of cdpo and robust, not of {self.loss}")
        return self


class RolloutSection(Section):
    """How answers are sampled from the model in training, and how they are judged."""

    prompts: Annotated[list[DataSource], BeforeValidator(as_list)] = Field(default_factory=list)
    """Questions to answer; empty = those of the data."""
    samples: Annotated[Positive, Field(ge=2)] = 4
    """Answers to each question; the best and the worst of them make a pair."""
    reward: str = "match"
    """Who is better: match (the known answer), brief, `module:function`, or the URL of a judge."""
    judge_model: str | None = None
    """Name of the judge's model at its URL."""
    prompts_per_step: Positive = 16
    """Prompts whose answers make one step."""
    refresh_every: Positive = 8
    """Steps trained on one harvest of answers before new ones are sampled."""
    max_tokens: Positive = 128
    """Longest answer in tokens."""
    temperature: PositiveFloat = 1.0
    """Temperature of the answers."""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens that together reach this probability."""

    @field_validator("reward")
    @classmethod
    def _no_key_in_the_address(cls, value: str) -> str:
        return without_key(value, f"the environment variable {JUDGE_KEY}")


class DpoTrainSection(TrainSection):
    """How long and in what portions. Give one of steps, tokens, epochs; none = one epoch."""

    default_epochs: ClassVar[float] = 1.0


class DpoOptimSection(OptimSection):
    """The optimiser and its learning-rate schedule."""

    lr: PositiveFloat = 5e-6
    """Peak learning rate (of the adamw part)."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""
    warmup: NotNegativeFloat = 0.1
    """Warm-up: a fraction of all steps if below 1, else a number of steps."""


class TeacherRef(Section):
    """The teacher. Written as a path or a mapping."""

    path: str | None = None
    """Run, stage or checkpoint folder, Hugging Face folder or hub id, `stage:NAME`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DistillSection(Section):
    """What the student learns from the teacher's probabilities."""

    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "uld"] = "forward"
    """Distance: KL of the teacher to the student, the reverse, Jensen-Shannon (GKD), skewed KL (DistiLLM), or
    uld, which compares models of different tokenizers."""
    temperature: PositiveFloat = 1.0
    """Flattens both distributions; the loss is multiplied by its square."""
    alpha: Fraction | None = None
    """Share of the plain loss on the labels, the rest is the distance to the teacher; empty = 0.5, with
    on_policy 0 (the student's own answers are no labels)."""
    beta: Fraction = 0.5
    """jsd: 0 = forward KL, 1 = reverse KL."""
    skew: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    """skew_forward, skew_reverse: share of the other distribution in the mixture."""
    top_k: NotNegative = 0
    """Compute the teacher once and keep this many of its tokens on disk; 0 = the teacher runs every step."""
    hidden_weight: NotNegativeFloat = 0.0
    """Weight of the distance between the last hidden states, through a trained projection."""
    on_policy: Fraction = 0.0
    """Share of steps on the student's own answers instead of the data (GKD)."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """Distance of hidden states."""
    prune: Literal["spaced", "importance"] = "spaced"
    """With student_from: which layers stay, evenly spaced ones or the important ones."""


class CollectSection(Section):
    """Black-box distillation: how answers of an endpoint become training data."""

    model: str | None = None
    """Name of the model at the endpoint; empty = the only one there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    enable_thinking: bool | None = None
    """Ask the endpoint's model to think, or not to, where its chat template knows the switch."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    parallel: Positive = 8
    """Requests at once."""
    keep_system: bool = False
    """Keep that system message in the training data; else the student learns to do without."""
    samples: Positive = 1
    """Most answers to ask for to each prompt."""
    keep: Positive = 1
    """Most answers to keep of each prompt."""
    best: Literal["first", "shortest", "longest", "majority"] = "first"
    """Which answers are kept when several are good."""
    limit: Positive | None = None
    """Ask at most this many prompts."""
    max_tokens: Positive = 1024
    """Longest answer in tokens."""
    temperature: NotNegativeFloat = 0.7
    """Temperature of the answers."""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 0.95
    """Keep the likeliest tokens that together reach this probability."""
    min_chars: NotNegative = 1
    """Drop shorter answers."""
    max_chars: Positive | None = None
    """Drop longer answers."""
    require: StrList = Field(default_factory=list)
    """Texts that an answer must contain, e.g. `</think>`; repeat."""
    check_answer: bool = False
    """Keep only answers that agree with the prompt's known answer."""
    language: Literal["match", "any", "zh", "en", "ja", "ko", "ru"] = "match"
    """Language of an answer: that of its question, any, or one of these."""
    refusals: bool = True
    """Drop refusals."""
    max_repetition: Fraction = 0.5
    """Drop an answer that repeats itself in more than this share of its text."""
    duplicates: Fraction = 0.9
    """Drop what shares more than this of its pieces of text with a kept conversation; 1 = equal ones only."""
    plain_ratio: Fraction = 0.0
    """Mix in so many answers without their reasoning, as an empty think block: teaches enable_thinking."""
