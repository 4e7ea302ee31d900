"""Flags and schema are one: every option has one flag, every flag sets what `--set` would set."""

from __future__ import annotations

import inspect as python_inspect
import typing

import pytest

from kllm.cli import options
from kllm.cli.app import COMMANDS, STAGE_COMMANDS, load_command
from kllm.config.load import load_recipe, make_recipe
from kllm.config.overrides import Override
from kllm.config.parts import DataSource
from kllm.config.recipe import Recipe
from kllm.config.schema import choices, leaves
from kllm.config.stages import STAGES
from kllm.errors import UserError

TARGETS = {path: target for path, target, _, _ in COMMANDS}
GENERAL = {
    "--recipe",
    "--stage",
    "--out",
    "--set",
    "--dry-run",
    "--fresh",
    "--json",
    "--quiet",
    "--help",
    "-h",
    "-q",
}
DAILY = """--recipe --data --model --preset --tokenizer --out --steps --tokens --epochs --lr --batch-tokens
--seq-len --save-every --device --seed --nproc --json --quiet --dry-run --fresh --set"""


def names_of(path):
    """Every option string of a real command."""
    command = load_command(TARGETS[path], path.split()[-1], "")
    return [name for param in command.params if param.param_type_name == "option" for name in param.opts]


@pytest.mark.parametrize(("path", "kind"), STAGE_COMMANDS.items())
def test_schema_and_flags_are_a_bijection(path, kind):
    keys = {leaf.key for leaf in leaves(STAGES[kind])} - set(options.NOT_FLAGS)
    keys |= {leaf.key for leaf in leaves(Recipe) if leaf.key in ("device", "seed", "nproc")}
    flags = options.stage_flags(kind)
    assert sorted(flag.key for flag in flags) == sorted(keys)
    assert len({flag.name for flag in flags}) == len(flags)
    assert len({flag.parameter for flag in flags}) == len(flags)
    assert sorted(set(names_of(path)) - GENERAL) == sorted(flag.name for flag in flags)


@pytest.mark.parametrize("path", ["pretrain", "sft"])
def test_daily_flags_are_there(path):
    assert set(DAILY.split()) <= set(names_of(path))


def test_long_flags_are_the_keys_of_the_recipe():
    for flag in options.stage_flags("pretrain"):
        assert flag.name in (f"--{flag.key}", options.SHORT.get(flag.key), "--" + flag.key.replace("_", "-"))


def test_help_comes_from_the_schema():
    for kind in STAGES:
        for flag in options.stage_flags(kind):
            assert len(flag.leaf.help) > 10, flag.key
            assert flag.leaf.help.rstrip().endswith((".", "...")), flag.key


def is_sources(leaf):
    return DataSource in typing.get_args(leaf.type)


def sample_value(leaf):
    """(what Typer hands over, the value that it must become in the recipe), unlike the default."""
    kind = leaf.type
    if kind is bool:
        return not leaf.default, not leaf.default
    if choices(kind):
        word = next(word for word in choices(kind) if word != leaf.default)
        return word, word
    if typing.get_origin(kind) is dict:
        return ["</think>=3"], {"</think>": 3}
    if typing.get_origin(kind) is tuple:
        return "0.5,0.6", (0.5, 0.6)
    if is_sources(leaf):
        return ["x.jsonl@0.5"], [{"path": "x.jsonl", "weight": 0.5}]
    if typing.get_origin(kind) is list:
        word = {"sinks": "wandb", "gguf": "q4_k_m"}.get(leaf.path[-1], "builtin:world")
        return [word], [word]
    if kind is str:
        return "word", "word"
    if kind is float:
        return "0.125", 0.125
    return "4k" if leaf.path[-1] not in ("seq_len",) else "64", 4000 if leaf.path[-1] != "seq_len" else 64


SEEN = {(flag.key, flag.leaf.section) for flag in options.stage_flags("sft")}
ALL = [
    (kind, flag)
    for kind in STAGES
    for flag in options.stage_flags(kind)
    # the sections that fine-tuning stages share are tried once
    if kind not in ("lora", "dpo", "distill") or (flag.key, flag.leaf.section) not in SEEN
]


NEEDED = {
    "lora": {"lora.rank": "4"},
    "preference.label_smoothing": {"preference.loss": "robust"},
    "from_endpoint": {"prompts": "questions.jsonl"},
    "prompts": {"from_endpoint": "http://127.0.0.1:8000/v1"},
}
"""Options that mean something only beside another one."""


@pytest.mark.parametrize(("kind", "flag"), ALL, ids=[f"{kind}{flag.name}" for kind, flag in ALL])
def test_every_flag_reaches_its_option_as_set_does(kind, flag):
    given, expected = sample_value(flag.leaf)
    (override,) = options.overrides_of([flag], {flag.parameter: given})
    assert override.origin == f"flag {flag.name}"
    base = [] if kind in ("tokenizer",) else [Override("model.path", "m")]
    if kind in ("pretrain", "sft", "lora", "dpo", "distill"):
        base.append(Override("tokenizer.path", "t"))
    if kind == "distill":
        base.append(Override("teacher.path", "big"))
    needed = NEEDED.get(flag.key) or (NEEDED["lora"] if flag.key.startswith("lora.") else {})
    base += [Override(key, value) for key, value in needed.items() if key != flag.key]
    if flag.key in ("from_endpoint", "prompts"):
        base = [item for item in base if item.key != "teacher.path"]
    if flag.key in ("model.path", "model.preset", "tokenizer.path", "teacher.path", "student_from"):
        start = "model" if flag.key == "student_from" else flag.key.split(".")[0]
        base = [item for item in base if item.key.split(".")[0] != start]
    if flag.key == "model.preset" and kind in ("eval", "export"):
        pytest.skip("there is no fresh model to measure or write")
    if flag.key == "hf":
        base.append(Override("gguf", "q8_0"))  # an export must write something
    loaded = make_recipe(kind, [*base, override])
    value = loaded.recipe if flag.key in ("device", "seed", "nproc") else loaded.recipe.stage(kind)
    for part in flag.key.split("."):
        value = getattr(value, part)
    plain = [item.model_dump() for item in value] if is_sources(flag.leaf) else value
    assert plain == expected
    dotted = flag.key if flag.key in ("device", "seed", "nproc") else f"{kind}.{flag.key}"
    assert loaded.origins[dotted] == f"flag {flag.name}"
    text = ",".join(map(str, given)) if isinstance(given, list) and "=" not in given[0] else given
    if isinstance(text, str):
        twin = make_recipe(kind, [*base, Override(flag.key, text)])
        assert twin.recipe == loaded.recipe


def test_absent_flags_change_nothing():
    for kind in STAGES:
        flags = options.stage_flags(kind)
        assert options.overrides_of(flags, {flag.parameter: None for flag in flags}) == []
        assert options.overrides_of(flags, {flag.parameter: [] for flag in flags}) == []


def test_flags_override_a_recipe_and_drop_its_other_length():
    flags = options.stage_flags("pretrain")
    given = options.overrides_of(flags, {"steps": "7", "lr": "1e-2", "seed": "3"})
    loaded = load_recipe("quickstart", given, kind="pretrain")
    stage = loaded.recipe.stage("pretrain")
    assert (stage.train.steps, stage.train.tokens, stage.optim.lr, loaded.recipe.seed) == (7, None, 1e-2, 3)
    assert loaded.recipe.stage("sft") == load_recipe("quickstart").recipe.stage("sft")


def test_other_spellings_are_understood():
    given = ["--train.steps", "5", "--batch_tokens=3", "--optim.weight-decay", "1"]
    assert options.spelling_of("pretrain", given) == [
        "--steps",
        "5",
        "--batch-tokens=3",
        "--optim.weight_decay",
        "1",
    ]
    assert options.spelling_of("pretrain", ["--no-model.qk-norm", "--", "--train.steps"]) == [
        "--no-model.qk_norm",
        "--",
        "--train.steps",
    ]
    assert options.spelling_of("pretrain", ["--unknown=a=b", "-q"]) == ["--unknown=a=b", "-q"]


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--learning_rate", "kllm calls it --lr"),
        ("--learning-rate", "kllm calls it --lr"),
        ("--cutoff_len", "--seq-len"),
        ("--gradient_accumulation_steps", "--batch-tokens"),
        ("--weight_decay", "did you mean --optim.weight_decay?"),
        ("--packing", "--dataset.packing"),
    ],
)
def test_suggestions(option, answer):
    assert answer in (options.suggestion("pretrain", option) or "")


def test_no_suggestion_is_invented():
    assert options.suggestion("pretrain", "--zzz") is None


def test_bad_pairs():
    (flag,) = [flag for flag in options.stage_flags("sft") if flag.key == "train.token_weights"]
    with pytest.raises(UserError, match="KEY=VALUE"):
        options.overrides_of([flag], {flag.parameter: ["think"]})


def test_no_click_is_imported():
    """Typer >= 0.26 carries its own; click's types would not be the same ones."""
    for module in ("app", "options", "help", "stages"):
        source = python_inspect.getsource(__import__(f"kllm.cli.{module}", fromlist=["x"]))
        assert "import click" not in source
        assert "from click" not in source
