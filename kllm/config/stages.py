"""One section for each stage kind. `Stage` is their union, chosen by the key `stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kllm.config.align import (
    CollectSection,
    DistillSection,
    DpoOptimSection,
    DpoTrainSection,
    LoraOnSection,
    LoraOptimSection,
    LoraSection,
    PreferenceSection,
    RolloutSection,
    TeacherRef,
)
from kllm.config.base import Bytes, NotNegative, Positive, Section, StageName, StrList, as_list, without_key
from kllm.config.parts import (
    DataList,
    DatasetSection,
    DataSource,
    FreshModelSection,
    GgufType,
    LogSection,
    ModelSection,
    OptimSection,
    SftOptimSection,
    SftTrainSection,
    TokenizerRef,
    TrainSection,
)


def _builtin(split: str) -> Callable[[], list[DataSource]]:
    # model_construct: --help shows this default, and must not wait for a validator to be built
    return lambda: [DataSource.model_construct(path=f"builtin:world/{split}", weight=1.0)]


class BaseStage(Section):
    """What every stage has: its kind and a name, which is its kind unless given."""

    produces: ClassVar[tuple[str, ...]] = ()
    """What later stages can take from this one: `tokenizer`, `model`."""

    stage: str
    """Kind of the stage."""
    name: StageName
    """Name of the stage and of its folder; its kind unless given."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_kind(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("name") is None:
            return {**value, "name": cls.model_fields["stage"].default}
        return value


class TokenizerStage(BaseStage):
    """Train a byte-level BPE tokenizer."""

    produces: ClassVar[tuple[str, ...]] = ("tokenizer",)

    stage: Literal["tokenizer"] = "tokenizer"
    """Kind of the stage."""
    data: DataList = Field(default_factory=_builtin("pretrain"))
    """Text to learn from; repeat for several. Each may carry @weight."""
    vocab_size: Annotated[Positive, Field(ge=300)] = 6400
    """Size of the vocabulary, with the 256 bytes and the reserved tokens."""
    max_bytes: Bytes = 256 * 2**20
    """Read at most this much text: more changes little and costs time."""
    min_frequency: Positive = 2
    """Fewest occurrences of a pair to be merged."""
    han_cut: NotNegative = 2
    """Cut runs of Chinese characters to this length while counting, which bounds memory; 0 = never."""
    reserved: NotNegative = 16
    """Special tokens kept free for later use."""
    chat_template: str | None = None
    """Jinja file to store as the chat template instead of the default one."""


class TrainingStage(BaseStage):
    """What stages that train a model share."""

    produces: ClassVar[tuple[str, ...]] = ("model", "tokenizer")

    data: DataList
    """Training data; repeat for a mixture. Each may carry @weight."""
    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerRef = Field(default_factory=TokenizerRef)
    dataset: DatasetSection = Field(default_factory=DatasetSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    log: LogSection = Field(default_factory=LogSection)

    @property
    def data_kind(self) -> Literal["text", "chat", "preference", "rated"]:
        """What the records of `data` are."""
        return "chat"

    @property
    def row_tokens(self) -> int:
        """Most tokens in a row of the batch."""
        return self.dataset.seq_len

    @property
    def adapter(self) -> LoraSection | None:
        """The adapter that is trained instead of the weights, or None."""
        lora: LoraSection | None = getattr(self, "lora", None)
        return lora if lora is not None and lora.rank else None

    @model_validator(mode="after")
    def _batch_holds_a_row(self) -> TrainingStage:
        if self.train.batch_tokens < self.row_tokens:
            one = "pair of" if self.row_tokens > self.dataset.seq_len else "row of"
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) is less than one {one} "
                f"dataset.seq_len ({self.dataset.seq_len}) tokens"
            )
        return self


class PretrainStage(TrainingStage):
    """Train a model on plain text."""

    stage: Literal["pretrain"] = "pretrain"
    """Kind of the stage."""
    data: DataList = Field(default_factory=_builtin("pretrain"))
    """Text to train on; repeat for a mixture. Each may carry @weight."""
    model: FreshModelSection = Field(default_factory=FreshModelSection)

    @property
    def data_kind(self) -> Literal["text", "chat", "preference", "rated"]:
        return "text"


class TuningStage(TrainingStage):
    """What stages share that start from a model; `lora` trains an adapter instead of all weights."""

    data: DataList = Field(default_factory=_builtin("sft"))
    """Conversations to train on; repeat for a mixture. Each may carry @weight."""
    lora: LoraSection = Field(default_factory=LoraSection)

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> TuningStage:
        """An adapter names the model that it belongs to; that one must be left as it was trained on."""
        if self.adapter is None:
            return self
        if getattr(self, "student_from", None) is not None:
            raise ValueError(
                "an adapter (lora.rank) would belong to the pruned student, which is not kept: prune first "
                "(student_from without lora.rank), then train an adapter on that run"
            )
        if self.model.preset is not None:
            raise ValueError(
                "an adapter (lora.rank) on fresh weights would belong to no model: pretrain first, then give "
                "that run as model.path"
            )
        for name in self.model.model_dump(exclude_none=True):
            if name not in _LEAVE_THE_MODEL:
                raise ValueError(
                    f"model.{name} would make another model than the one that the adapter (lora.rank) names: "
                    "train that with all weights first, then an adapter on its run"
                )
        return self


_LEAVE_THE_MODEL = ("path", "max_position_embeddings", "router_aux_loss_coef", "router_z_loss_coef",
                    "aux_loss_type", "router_noise", "initializer_range")  # fmt: skip
"""Keys of a model section with which the same weights compute the same."""


class SftStage(TuningStage):
    """Fine-tune a model on conversations; only the assistant's words are learned."""

    stage: Literal["sft"] = "sft"
    """Kind of the stage."""
    train: SftTrainSection = Field(default_factory=SftTrainSection)
    optim: SftOptimSection = Field(default_factory=SftOptimSection)


class LoraStage(TuningStage):
    """Fine-tune an adapter on conversations; the model's weights stay as they are."""

    stage: Literal["lora"] = "lora"
    """Kind of the stage."""
    train: SftTrainSection = Field(default_factory=SftTrainSection)
    optim: LoraOptimSection = Field(default_factory=LoraOptimSection)
    lora: LoraOnSection = Field(default_factory=LoraOnSection)


class DpoStage(TuningStage):
    """Learn from preferences: pairs of a better and a worse answer, or single ratings (kto)."""

    stage: Literal["dpo"] = "dpo"
    """Kind of the stage."""
    data: DataList = Field(default_factory=_builtin("preference"))
    """Preference pairs or rated answers; repeat for a mixture. Each may carry @weight."""
    online: bool = False
    """Sample the pairs from the model itself (see rollout) instead of reading them."""
    train: DpoTrainSection = Field(default_factory=DpoTrainSection)
    optim: DpoOptimSection = Field(default_factory=DpoOptimSection)
    preference: PreferenceSection = Field(default_factory=PreferenceSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)

    @property
    def data_kind(self) -> Literal["text", "chat", "preference", "rated"]:
        return "rated" if self.preference.loss == "kto" else "preference"

    @property
    def row_tokens(self) -> int:
        """A row holds any pair: a shared beginning and two endings."""
        return self.dataset.seq_len * (1 if self.preference.loss == "kto" else 2)

    @model_validator(mode="after")
    def _online_makes_pairs(self) -> DpoStage:
        if self.online and self.preference.loss == "kto":
            raise ValueError("online sampling makes pairs, and kto learns from single ratings")
        if self.online:
            _check_room(self.rollout, self.dataset)
        return self


class DistillStage(TuningStage):
    """Teach a smaller model what a larger one knows: by its probabilities, or by its answers."""

    stage: Literal["distill"] = "distill"
    """Kind of the stage."""
    train: SftTrainSection = Field(default_factory=SftTrainSection)
    optim: SftOptimSection = Field(default_factory=SftOptimSection)
    teacher: TeacherRef = Field(default_factory=TeacherRef)
    student_from: str | None = None
    """Start the student as a smaller copy of this model: with model.num_hidden_layers, hidden_size ..."""
    from_endpoint: str | None = None
    """Learn from answers instead of probabilities: base URL of an OpenAI-compatible server, a model folder,
    hub id or `stage:NAME`."""
    prompts: StrList = Field(default_factory=list)
    """Prompts for from_endpoint; file, glob or `builtin:NAME`; repeat."""
    distill: DistillSection = Field(default_factory=DistillSection)
    collect: CollectSection = Field(default_factory=CollectSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)

    @field_validator("from_endpoint")
    @classmethod
    def _no_key_in_the_address(cls, value: str | None) -> str | None:
        return value and without_key(value, "the environment variable that collect.api_key_env names")

    @model_validator(mode="after")
    def _one_start_and_teacher(self) -> DistillStage:
        if self.student_from is not None and (self.model.path or self.model.preset):
            raise ValueError("give student_from or model.path or model.preset, not two of them")
        if self.from_endpoint is not None and self.teacher.path is not None:
            raise ValueError("give a teacher (probabilities) or from_endpoint (answers), not both")
        if self.from_endpoint is None and self.prompts:
            raise ValueError("prompts are for from_endpoint; what a teacher sees is under data")
        if self.from_endpoint is not None and not self.prompts:
            raise ValueError("from_endpoint needs prompts")
        if self.distill.on_policy and self.distill.top_k:
            raise ValueError("distill.top_k keeps what the teacher says of the data; on_policy needs it live")
        if self.distill.on_policy:
            _check_room(self.rollout, self.dataset)
        if self.distill.hidden_weight and self.distill.top_k:
            raise ValueError("distill.top_k keeps no hidden states; hidden_weight needs the teacher live")
        return self


def _check_room(rollout: RolloutSection, dataset: DatasetSection) -> None:
    if rollout.max_tokens >= dataset.seq_len:
        raise ValueError(
            f"rollout.max_tokens ({rollout.max_tokens}) leaves no room for a prompt "
            f"in dataset.seq_len ({dataset.seq_len})"
        )


class EvalStage(BaseStage):
    """Measure a model."""

    stage: Literal["eval"] = "eval"
    """Kind of the stage."""
    tasks: Annotated[StrList, Field(min_length=1)] = Field(default_factory=lambda: ["builtin:world"])
    """Tasks: `builtin:world` (exact answers), `builtin:world/facts` (without those about itself),
    `builtin:identity`, `builtin:tools` (calls, run), `preference:FILE` (pairs), `format:FILE` (thinking),
    `perplexity:FILE`; repeat."""
    model: ModelSection = Field(default_factory=ModelSection)
    limit: Positive | None = None
    """Ask at most this many questions of each task."""
    max_new_tokens: Positive = 64
    """Longest answer in tokens."""
    batch_size: Positive = 64
    """Questions answered side by side."""


class ExportStage(BaseStage):
    """Write a model for other programs: a Hugging Face folder, GGUF files; each is read back and compared."""

    # later stages and `kllm chat RUN` go on with the model itself, not with a rounded copy of it

    stage: Literal["export"] = "export"
    """Kind of the stage."""
    model: ModelSection = Field(default_factory=ModelSection)
    hf: bool = True
    """Write a Hugging Face folder, for transformers, vLLM, SGLang, LMDeploy."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers in the Hugging Face folder."""
    quant: Literal["awq", "int8", "int4"] | None = None
    """Quantise the Hugging Face folder: awq (4 bits, vLLM), int8 or int4 (compressed-tensors)."""
    calibrate: str | None = None
    """Texts that awq looks at and that perplexity is measured on; default: the built-in world."""
    gguf: Annotated[list[GgufType], BeforeValidator(as_list)] = Field(default_factory=list)
    """GGUF files for llama.cpp, by type: f32, f16, bf16, q8_0, q4_0 to q5_1, q4_k_m, q5_k_m, q6_k; repeat."""
    ollama: bool = False
    """Write a Modelfile beside each GGUF file."""
    license: str | None = None
    """Licence for the metadata, e.g. apache-2.0."""
    verify: bool = True
    """Load what was written with other programs and compare."""

    @model_validator(mode="after")
    def _writes_something(self) -> ExportStage:
        if not self.hf and not self.gguf:
            raise ValueError("an export of nothing: set hf: true or list types under gguf")
        if self.quant and not self.hf:
            raise ValueError("export.quant is of the Hugging Face folder, and hf is false")
        return self


Stage = Annotated[
    TokenizerStage | PretrainStage | SftStage | LoraStage | DpoStage | DistillStage | EvalStage | ExportStage,
    Field(discriminator="stage"),
]

STAGES: dict[str, type[BaseStage]] = {
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "sft": SftStage,
    "lora": LoraStage,
    "dpo": DpoStage,
    "distill": DistillStage,
    "eval": EvalStage,
    "export": ExportStage,
}
