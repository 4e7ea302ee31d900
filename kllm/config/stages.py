"""One section for each stage kind. `Stage` is their union, chosen by the key `stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from kllm.config.base import Bytes, NotNegative, Positive, Section, StageName, StrList, as_list
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

    @model_validator(mode="after")
    def _batch_holds_a_row(self) -> TrainingStage:
        if self.train.batch_tokens < self.dataset.seq_len:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) is less than one row of "
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


class SftStage(TrainingStage):
    """Fine-tune a model on conversations; only the assistant's words are learned."""

    stage: Literal["sft"] = "sft"
    """Kind of the stage."""
    data: DataList = Field(default_factory=_builtin("sft"))
    """Conversations to train on; repeat for a mixture. Each may carry @weight."""
    train: SftTrainSection = Field(default_factory=SftTrainSection)
    optim: SftOptimSection = Field(default_factory=SftOptimSection)


class EvalStage(BaseStage):
    """Measure a model."""

    stage: Literal["eval"] = "eval"
    """Kind of the stage."""
    tasks: Annotated[StrList, Field(min_length=1)] = Field(default_factory=lambda: ["builtin:world"])
    """Tasks: `builtin:world` (exact answers), `perplexity:FILE` (loss, bits per byte); repeat for several."""
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
    TokenizerStage | PretrainStage | SftStage | EvalStage | ExportStage,
    Field(discriminator="stage"),
]

STAGES: dict[str, type[BaseStage]] = {
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "sft": SftStage,
    "eval": EvalStage,
    "export": ExportStage,
}
