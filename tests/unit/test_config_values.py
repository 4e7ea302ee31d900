"""Numbers as people write them, and sections that refuse what they do not know."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from kllm.config.base import Bytes, Count, Duration, Float, Fraction, Positive
from kllm.config.parts import (
    DataSource,
    ModelSection,
    OptimSection,
    SftOptimSection,
    TokenizerRef,
    TrainSection,
)
from kllm.config.stages import (
    DistillStage,
    DpoStage,
    EvalStage,
    LoraStage,
    PretrainStage,
    SftStage,
    TokenizerStage,
    TuningStage,
)


def parse(kind, value):
    return TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20M", 20_000_000),
        ("32k", 32_000),
        ("1_000", 1000),
        ("1.5k", 1500),
        ("1e3", 1000),
        (1e6, 1_000_000),
        ("32Ki", 32_768),
        ("2B", 2 * 10**9),
        ("0", 0),
        (7, 7),
        ("-3", -3),
        (" 5 k", 5000),
        ("12345678901234567890", 12345678901234567890),
        ("1.2M", 1_200_000),
        ("0.1k", 100),
    ],
)
def test_counts(text, value):
    assert parse(Count, text) == value
    assert isinstance(parse(Count, text), int)


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", 1.5, "12x", "abc", True, False, None, "1e400", [1], "1..2", "nan"]
)
def test_not_counts(text):
    with pytest.raises(ValidationError):
        parse(Count, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4GiB", 4 << 30),
        ("256MB", 256_000_000),
        ("256M", 256_000_000),
        ("1.5KiB", 1536),
        ("10b", 10),
        (99, 99),
    ],
)
def test_bytes(text, value):
    assert parse(Bytes, text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30m", 1800),
        ("1h30m", 5400),
        ("90", 90),
        ("250ms", 0.25),
        ("2d", 172_800),
        (12.5, 12.5),
        ("1.5h", 5400),
    ],
)
def test_durations(text, value):
    assert parse(Duration, text) == value


@pytest.mark.parametrize("text", ["m", "10y", True, "-5", "1h30"])
def test_not_durations(text):
    with pytest.raises(ValidationError):
        parse(Duration, text)


@pytest.mark.parametrize(("text", "value"), [("2e-5", 2e-5), ("1E3", 1000.0), (3, 3.0), (".5", 0.5)])
def test_floats(text, value):
    assert parse(Float, text) == value


@pytest.mark.parametrize("text", [True, "true", "x", "nan", float("inf"), "inf", None])
def test_not_floats(text):
    with pytest.raises(ValidationError):
        parse(Float, text)


def test_bounds_apply_after_parsing():
    assert parse(Positive, "1k") == 1000
    for bad in ("0", -1):
        with pytest.raises(ValidationError):
            parse(Positive, bad)
    with pytest.raises(ValidationError):
        parse(Fraction, 1.1)


@pytest.mark.parametrize(
    ("written", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl@0.3", "a.jsonl", 0.3),
        ("user/name@main", "user/name@main", 1.0),
        ("builtin:world/sft@2", "builtin:world/sft", 2.0),
        ({"path": "x", "weight": "0.5"}, "x", 0.5),
    ],
)
def test_data_source(written, path, weight):
    source = DataSource.model_validate(written)
    assert (source.path, source.weight) == (path, weight)


@pytest.mark.parametrize("written", ["", "@0.3", "a@0", "a@-1", {"weight": 1}, {"path": "a", "weigth": 1}])
def test_bad_data_source(written):
    with pytest.raises(ValidationError):
        DataSource.model_validate(written)


def test_length_is_one_choice():
    assert TrainSection().epochs == 1
    assert TrainSection(steps=5).epochs is None
    assert SftStage().train.epochs == 2
    assert SftStage(train={"tokens": "1M"}).train.epochs is None
    with pytest.raises(ValidationError, match=r"train\.steps"):
        TrainSection(steps=5, tokens="1M")


def test_sft_keeps_its_own_defaults_when_partly_given():
    assert SftStage(optim={"warmup": 0.1}).optim.lr == SftOptimSection().lr == 1e-4
    assert SftStage(train={"save_every": 5}).train.epochs == 2
    assert PretrainStage(optim={"warmup": 0.1}).optim.lr == OptimSection().lr == 5e-4


def test_model_is_preset_or_path():
    assert PretrainStage().model.preset == "k-small"
    assert PretrainStage(model={"path": "x"}).model.preset is None
    assert PretrainStage(model={"hidden_size": 64}).model.preset == "k-small"
    assert SftStage().model == ModelSection()
    with pytest.raises(ValidationError, match="not both"):
        ModelSection(preset="k-tiny", path="x")


def test_shorthands():
    assert TokenizerRef.model_validate("dir").path == "dir"
    assert TokenizerStage(data="a.jsonl").data[0].path == "a.jsonl"
    assert EvalStage(tasks="builtin:world").tasks == ["builtin:world"]
    assert OptimSection(betas="0.8, 0.9").betas == (0.8, 0.9)


def test_defaults_of_the_stages():
    assert TokenizerStage().data[0].path == PretrainStage().data[0].path == "builtin:world/pretrain"
    assert SftStage().data[0].path == "builtin:world/sft"
    assert TokenizerStage().max_bytes == 256 << 20
    assert TokenizerStage().name == "tokenizer"
    assert PretrainStage(name="again").name == "again"


def test_sections_are_frozen_and_closed():
    with pytest.raises(ValidationError):
        OptimSection(learning_rate=1)
    with pytest.raises(ValidationError):
        OptimSection().lr = 1.0  # type: ignore[misc]


def test_a_batch_holds_a_row():
    with pytest.raises(ValidationError, match=r"train\.batch_tokens \(512\)"):
        PretrainStage(train={"batch_tokens": 512}, dataset={"seq_len": 1024})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (OptimSection, {"lr": 0}),
        (OptimSection, {"lr": True}),
        (OptimSection, {"name": "sgd"}),
        (OptimSection, {"min_lr_ratio": 1.5}),
        (OptimSection, {"betas": [0.9]}),
        (TrainSection, {"save_every": -1}),
        (TrainSection, {"compile": True}),
        (TrainSection, {"token_weights": {"a": -1}}),
    ],
)
def test_bad_values(section, values):
    with pytest.raises(ValidationError):
        section(**values)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (SftStage, {"lora": {"targets": ["q_proj"]}}, "lora.targets is of an adapter"),
        (DpoStage, {"lora": {"alpha": 4}}, "lora.alpha is of an adapter, and there is none: set lora.rank"),
        (DistillStage, {"lora": {"lr_ratio": 16}}, "lora.lr_ratio"),
        (LoraStage, {"model": {"preset": "k-tiny"}}, "pretrain first"),
        (LoraStage, {"model": {"path": "m", "rope_theta": 5e5}}, "model.rope_theta would make another model"),
        (
            SftStage,
            {"lora": {"rank": 4}, "model": {"path": "m", "norm_topk_prob": False}},
            "model.norm_topk_prob",
        ),
        (
            DistillStage,
            {"lora": {"rank": 4}, "student_from": "t", "model": {"hidden_size": 8}},
            "prune first",
        ),
    ],
)
def test_an_adapter_belongs_to_the_model_it_names(
    kind: type[TuningStage], values: dict[str, object], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        kind.model_validate(values)


def test_settings_that_leave_the_model_of_an_adapter() -> None:
    model = {"path": "m", "max_position_embeddings": 4096, "router_aux_loss_coef": 0.1}
    assert LoraStage.model_validate({"model": model}).adapter is not None
    SftStage.model_validate({"model": {"path": "m", "rope_theta": 5e5}})  # all weights learn the change
    defaults = SftStage().lora.model_dump()
    assert not SftStage.model_validate({"lora": defaults}).adapter
