"""One section for each stage kind. `Stage` is their union, chosen by the key `stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kllm.config.base import Bytes, NotNegative, Positive, Section, StageName, StrList
from kllm.config.parts import (
    DataList,
    DatasetSection,
    DataSource,
    FreshModelSection,
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


Stage = Annotated[
    TokenizerStage | PretrainStage | SftStage | EvalStage,
    Field(discriminator="stage"),
]

STAGES: dict[str, type[BaseStage]] = {
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "sft": SftStage,
    "eval": EvalStage,
}
