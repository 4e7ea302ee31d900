"""Recipes: layers, overrides, origins, references, and every mistake in one pass with its line."""

from __future__ import annotations

import pytest

from kllm.config.dump import dump_yaml
from kllm.config.load import load_recipe, make_recipe, recipe_leaves
from kllm.config.overrides import Override, as_overrides
from kllm.errors import UserError, UserErrors

GOOD = """\
name: demo
seed: 7
stages:
  - stage: tokenizer
    vocab_size: 1k
  - stage: pretrain
    model: {preset: k-tiny}
    data: [{path: a.jsonl, weight: 0.7}, b.txt.gz@0.3]
    train: {tokens: 20M}
    optim: {lr: 1e-3}
  - {stage: sft, data: chats.jsonl}
  - stage: sft
    name: sft-again
    train:
      token_weights: {</think>: 10}
  - {stage: eval}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text, name="r.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return _write


def lines_of(path, overrides=(), **more):
    with pytest.raises(UserErrors) as caught:
        load_recipe(path, overrides, **more)
    return str(caught.value).splitlines()


def test_a_good_recipe(write):
    loaded = load_recipe(write(GOOD))
    recipe = loaded.recipe
    assert (recipe.name, recipe.seed, recipe.device, recipe.nproc) == ("demo", 7, "auto", 1)
    assert [stage.name for stage in recipe.stages] == ["tokenizer", "pretrain", "sft", "sft-again", "eval"]
    pretrain = recipe.stage("pretrain")
    assert [(source.path, source.weight) for source in pretrain.data] == [("a.jsonl", 0.7), ("b.txt.gz", 0.3)]
    assert (pretrain.train.tokens, pretrain.train.epochs, pretrain.optim.lr) == (20_000_000, None, 1e-3)
    assert recipe.stage("sft").train.epochs == 2
    assert recipe.dirname("sft-again") == "04-sft-again"
    assert loaded.text == GOOD
    with pytest.raises(KeyError):
        recipe.stage("none")


def test_origins(write):
    origins = load_recipe(write(GOOD), ["pretrain.optim.lr=2e-3", "seed=9"]).origins
    assert origins["name"] == "r.yaml:1"
    assert origins["seed"] == "flag --set"
    assert origins["device"] == "default"
    assert origins["tokenizer.vocab_size"] == "r.yaml:5"
    assert origins["pretrain.data"] == "r.yaml:8"
    assert origins["pretrain.train.tokens"] == "r.yaml:9"
    assert origins["pretrain.train.epochs"] == "default"
    assert origins["pretrain.optim.lr"] == "flag --set"
    assert origins["sft.data"] == "r.yaml:11"
    assert origins["sft-again.train.token_weights"] == "r.yaml:15"
    loaded = load_recipe(write(GOOD))
    assert set(loaded.origins) == {key for key, _ in recipe_leaves(loaded.recipe)}


def test_inputs_of_stages(write):
    recipe = load_recipe(write(GOOD)).recipe
    assert recipe.inputs("tokenizer") == {}
    assert recipe.inputs("pretrain") == {"tokenizer": "stage:tokenizer"}
    assert recipe.inputs("sft") == {"model": "stage:pretrain", "tokenizer": "stage:pretrain"}
    assert recipe.inputs("sft-again")["model"] == "stage:sft"
    assert recipe.inputs("eval") == {"model": "stage:sft-again"}


def test_inputs_that_are_named(write):
    recipe = load_recipe(
        write(
            "stages:\n- stage: tokenizer\n- {stage: pretrain, tokenizer: tok}\n"
            "- {stage: sft, model: {path: user/m}}\n"
            "- {stage: sft, name: b, model: {path: user/m}, tokenizer: stage:tokenizer}\n"
            "- {stage: sft, name: c, model: {preset: k-tiny}}\n"
            "- {stage: eval, model: {path: stage:pretrain}}\n"
        )
    ).recipe
    assert recipe.name == "r"
    assert recipe.inputs("pretrain") == {"tokenizer": "tok"}
    assert recipe.inputs("sft") == {"model": "user/m", "tokenizer": "user/m"}
    assert recipe.inputs("b") == {"model": "user/m", "tokenizer": "stage:tokenizer"}
    assert recipe.inputs("c") == {"tokenizer": "stage:b"}
    assert recipe.inputs("eval") == {"model": "stage:pretrain"}


BAD = """\
name: small
sed: 3
stages:
  - stage: tokenizer
    lr: 3
  - stage: pretrain
    data: [{path: corpus.jsonl, wieght: 3}]
    train: {steps: 4, save_steps: 3, tokens: 1M}
    optim: {name: adamm, lerning_rate: 5e-4, lr: -1, eps: true}
    vocab_size: 3
    learning_rate: 1e-4
    model: stage:tokenizer
  - stage: sft
    cutoff_len: 4
    model: {path: stage:later}
    tokenizer: stage:eval
  - {stage: evall, tasks: x}
  - stage: sft
    optim:
      warmup: no
      warmup: yes
  - stage: eval
    limit: lots
  - just text
"""


def test_every_mistake_in_one_pass_in_the_order_of_lines(write):
    assert lines_of(write(BAD)) == [
        "r.yaml:2: sed: unknown key, did you mean seed?",
        "r.yaml:5: tokenizer.lr: unknown key: it belongs to a pretrain, sft, lora, dpo or distill stage, not tokenizer",
        "r.yaml:7: pretrain.data[0].wieght: unknown key, did you mean weight?",
        "r.yaml:8: pretrain.train.save_steps: unknown key, kllm calls it train.save_every",
        "r.yaml:9: pretrain.optim.name: must be one of adamw, muon, got 'adamm'; did you mean adamw?",
        "r.yaml:9: pretrain.optim.lr: must be greater than 0, got -1",
        "r.yaml:9: pretrain.optim.eps: expected a number, got true",
        "r.yaml:9: pretrain.optim.lerning_rate: unknown key, did you mean optim.lr?",
        "r.yaml:10: pretrain.vocab_size: unknown key: it belongs to a tokenizer stage, not pretrain",
        "r.yaml:11: pretrain.learning_rate: unknown key, kllm calls it optim.lr",
        "r.yaml:12: pretrain.model: expected a mapping (key: value), got 'stage:tokenizer'",
        "r.yaml:14: sft.cutoff_len: unknown key, kllm calls it dataset.seq_len",
        "r.yaml:15: sft.model.path: there is no stage 'later'; stages before it that make a model: pretrain",
        "r.yaml:16: sft.tokenizer.path: stage 'eval' does not come before this one; stages before it that "
        "make a tokenizer: tokenizer, pretrain",
        "r.yaml:17: evall.stage: unknown kind of stage 'evall', did you mean eval?",
        "r.yaml:18: sft.name: two stages are called 'sft' (give one of them another name: name: NAME)",
        "r.yaml:20: sft.optim.warmup: expected a number, got 'no'",
        "r.yaml:21: key 'warmup' is given twice, first on line 20",
        "r.yaml:23: eval.limit: expected a whole number, got 'lots'",
        "r.yaml:24: stages[6]: expected a mapping (key: value), got 'just text'",
    ]


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("per_device_train_batch_size: 8", "train.micro_batch_tokens"),
        ("gradient_accumulation_steps: 4", "batch_tokens"),
        ("model_name_or_path: x", "model.path"),
        ("num_train_epochs: 3", "train.epochs"),
        ("bf16: true", "train.dtype"),
        ("lora_r: 8", "lora.rank"),
        ("output_dir: x", "--out"),
        ("resume_from_checkpoint: x", "again continues"),
        ("seq_len: 8", "dataset.seq_len"),
        ("lr: 1", "optim.lr"),
        ("Optim: {}", "did you mean optim?"),
        ("dataset: {packed: true}", "dataset.packing"),
        ("dataset: {seqlen: 1}", "did you mean seq_len?"),
        ("train: {lr: 1}", "did you mean optim.lr?"),
        ("model: {n_layer: 3}", "model.num_hidden_layers"),
        ("zzzzqq: 1", "known here: stage, name, data, model"),
        ("report_to: wandb", "log.sinks"),
        ("tasks: [x]", "belongs to an eval stage"),
    ],
)
def test_hints_for_other_names(write, key, answer):
    (line,) = lines_of(write(f"stages:\n- stage: tokenizer\n- stage: pretrain\n  {key}\n"))
    assert line.startswith("r.yaml:4: pretrain.")
    assert answer in line


def test_another_tools_whole_file(write):
    lines = lines_of(write("stage: sft\nlearning_rate: 1e-4\nlora_r: 8\nmodel_name_or_path: x\n"))
    assert len(lines) == 5
    assert any("put the stage into a list" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only\n", "is empty"),
        ("- a\n", "mapping with name: and stages:"),
        ("hello\n", "mapping"),
    ],
)
def test_not_a_recipe(write, text, words):
    with pytest.raises(UserError, match=words):
        load_recipe(write(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\n", "stages: is missing"),
        ("stages: []\n", "at least one stage"),
        ("stages: {a: 1}\n", "expected a list"),
        ("name: a/b\nstages: [{stage: tokenizer}]\n", "folder name"),
        ("name: 5\nstages: [{stage: tokenizer}]\n", "expected text, got 5 (put it in quotes)"),
        ("stages: [{stage: tokenizer, name: a.b}]\n", "'_' and '-' only"),
        ("stages: [{stage: pretrain}]\n", "has no tokenizer"),
        ("stages: [{stage: sft}]\n", "has no model"),
        ("stages: [{stage: tokenizer}, {stage: eval}]\n", "has no model"),
        ("stages: [{stage: tokenizer}, {stage: eval, model: {preset: k-tiny}}]\n", "has no model"),
        ("stages: [{stage: tokenizer, data: []}]\n", "must not be empty"),
        ("stages: [{stage: tokenizer, vocab_size: null}]\n", "got nothing"),
        ("stages: [{stage: ppo}]\n", "did you mean dpo?"),
        ("stages: [{stage: tokenizer, data: [{weight: 1}]}]\n", "data[0].path: is missing"),
        ("stages: [{stage: tokenizer}, {stage: sft, model: {preset: a, path: b}}]\n", "not both"),
        ("stages: [{stage: tokenizer}, {stage: pretrain, optim: {betas: [1]}}]\n", "betas[1]: is missing"),
        ("stages: [{stage: tokenizer}, {stage: pretrain, log: {sinks: [wandbb]}}]\n", "did you mean wandb?"),
    ],
)
def test_single_mistakes(write, text, words):
    lines = lines_of(write(text))
    assert any(words in line for line in lines), lines
    assert all(line.startswith("r.yaml:") for line in lines)


def test_set_goes_the_typed_road(write):
    path = write(GOOD)
    recipe = load_recipe(
        path,
        {
            "pretrain.train.steps": "1k",
            "pretrain.dataset.packing": "no",
            "sft.data": "[x.jsonl, y@0.5]",
            "sft.log.sinks": "wandb",
            "pretrain.model.rope_scaling": "{rope_type: yarn, factor: 4}",
            "sft-again.train.token_weights.<think>": "3",
            "eval.limit": "null",
            "pretrain.tokenizer": "tok",
            "tokenizer.data": "a=b.jsonl",
            "name": "010",
            "pretrain.model.rope_scaling.factor": "8",
        },
    ).recipe
    pretrain = recipe.stage("pretrain")
    assert (pretrain.train.steps, pretrain.train.tokens) == (1000, None)
    assert pretrain.dataset.packing is False
    assert pretrain.model.rope_scaling == {"rope_type": "yarn", "factor": 8}
    assert pretrain.tokenizer.path == "tok"
    assert [source.path for source in recipe.stage("sft").data] == ["x.jsonl", "y"]
    assert recipe.stage("sft").log.sinks == ["wandb"]
    assert recipe.stage("sft-again").train.token_weights == {"</think>": 10, "<think>": 3}
    assert recipe.stage("tokenizer").data[0].path == "a=b.jsonl"
    assert recipe.name == "010"


def test_set_of_a_shorthand_keeps_it(write):
    path = write("stages: [{stage: pretrain, tokenizer: dir}]\n")
    loaded = load_recipe(path, ["pretrain.tokenizer.chat_template=t.jinja"])
    assert loaded.recipe.stage("pretrain").tokenizer.path == "dir"
    assert loaded.origins["pretrain.tokenizer.path"] == "r.yaml:1"
    assert loaded.origins["pretrain.tokenizer.chat_template"] == "flag --set"


def test_bad_set(write):
    path = write(GOOD)
    assert lines_of(path, ["pretrain.optim.lr=abc", "optim.lr=1", "pretrain.optim.lrr=1", "zzz.a=1"]) == [
        "flag --set: optim.lr: no stage is called 'optim' (write pretrain.optim.lr or sft.optim.lr)",
        "flag --set: zzz.a: no stage is called 'zzz' (write tokenizer.zzz.a or pretrain.zzz.a or sft.zzz.a)",
        "flag --set: pretrain.optim.lr: expected a number, got 'abc'",
        "flag --set: pretrain.optim.lrr: unknown key, did you mean lr?",
    ]
    with pytest.raises(UserError, match="KEY=VALUE"):
        load_recipe(path, ["pretrain.optim.lr"])


def test_two_flags_of_one_choice_contradict(write):
    (line,) = lines_of(write(GOOD), ["pretrain.train.steps=5", "pretrain.train.tokens=1M"])
    assert "give one of train.steps" in line
    assert load_recipe("r.yaml", ["pretrain.model.path=x"]).recipe.stage("pretrain").model.preset is None


def test_relative_keys_of_a_single_command(write):
    path = write(GOOD)
    loaded = load_recipe(
        path, ["optim.lr=5", "vocab_size=900", "tokenizer.vocab_size=900"][:1], kind="pretrain"
    )
    assert loaded.stage == "pretrain"
    assert loaded.recipe.stage("pretrain").optim.lr == 5
    loaded = load_recipe(path, ["tokenizer.vocab_size=900", "sft.optim.lr=3"], kind="pretrain")
    assert loaded.recipe.stage("tokenizer").vocab_size == 900
    assert loaded.recipe.stage("sft").optim.lr == 3
    assert load_recipe(path, ["optim.lr=4"], stage="sft-again").recipe.stage("sft-again").optim.lr == 4


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"kind": "sft"}, r"2 sft stages .*--stage sft\|sft-again"),
        ({"stage": "x"}, "no stage 'x'"),
        ({"stage": "sft", "kind": "eval"}, "is an sft stage, not eval"),
    ],
)
def test_which_stage(write, choice, words):
    with pytest.raises(UserError, match=words):
        load_recipe(write(GOOD), **choice)
    with pytest.raises(UserError, match="has no pretrain stage"):
        load_recipe(write("stages: [{stage: tokenizer}]\n"), kind="pretrain")


def test_extends_merges_by_name(write):
    write(GOOD, "base.yaml")
    path = write(
        "extends: base.yaml\nname: child\nstages:\n"
        "- {stage: pretrain, train: {steps: 5}, optim: {schedule: wsd}}\n"
        "- {stage: sft, name: sft-again, data: [z]}\n- {stage: eval, name: second}\n"
    )
    loaded = load_recipe(path)
    pretrain = loaded.recipe.stage("pretrain")
    assert (loaded.recipe.name, loaded.recipe.seed) == ("child", 7)
    assert (pretrain.train.steps, pretrain.train.tokens) == (5, None)
    assert (pretrain.optim.lr, pretrain.optim.schedule, pretrain.model.preset) == (1e-3, "wsd", "k-tiny")
    assert [stage.name for stage in loaded.recipe.stages][-2:] == ["eval", "second"]
    assert loaded.origins["pretrain.optim.lr"] == "base.yaml:10"
    assert loaded.origins["pretrain.optim.schedule"] == "r.yaml:4"
    assert loaded.origins["seed"] == "base.yaml:2"


def test_extends_is_one_level_and_errors_say_which_file(write):
    write("extends: other.yaml\nstages: []\n", "base.yaml")
    (line, *_) = lines_of(write("extends: base.yaml\nstages: [{stage: tokenizer}]\n"))
    assert line == "r.yaml:1: extends: base.yaml extends another recipe itself; one level is allowed"
    write("stages:\n- {stage: tokenizer, vocab_siz: 3}\n", "base.yaml")
    assert lines_of(write("extends: base.yaml\nseed: x\n")) == [
        "base.yaml:2: tokenizer.vocab_siz: unknown key, did you mean vocab_size?",
        "r.yaml:2: seed: expected a whole number, got 'x'",
    ]
    (line, *_) = lines_of(write("extends: none.yaml\nstages: [{stage: tokenizer}]\n"))
    assert line.startswith("r.yaml:1: extends: no such recipe 'none.yaml'")


def test_dump_reads_back_equal(write):
    loaded = load_recipe(write(GOOD))
    write(dump_yaml(loaded.recipe, loaded.origins), "again.yaml")
    again = load_recipe("again.yaml")
    assert again.recipe == loaded.recipe
    assert "lr: 0.001" in again.text
    assert "# r.yaml:10" in again.text
    assert dump_yaml(again.recipe) == dump_yaml(loaded.recipe)


def test_recipe_of_a_single_command():
    given = [Override("data", ["a.jsonl@0.3", "b"], "flag --data"), Override("optim.lr", "3e-5", "flag --lr")]
    loaded = make_recipe("pretrain", given, name="mine", tokenizer_first=True)
    assert [stage.name for stage in loaded.recipe.stages] == ["tokenizer", "pretrain"]
    assert loaded.recipe.stage("tokenizer").data == loaded.recipe.stage("pretrain").data
    assert loaded.stage == "pretrain"
    assert loaded.origins["pretrain.optim.lr"] == "flag --lr"
    assert loaded.origins["tokenizer.data"] == "flag --data"
    with pytest.raises(UserErrors, match=r"flag --lr: sft\.optim\.lr: expected a number, got 'x'"):
        make_recipe("sft", [Override("model.path", "m"), Override("optim.lr", "x", "flag --lr")])


def test_overrides_split_at_the_first_sign_only():
    assert as_overrides(["a.b=c=d"])[0].value == "c=d"
    assert as_overrides({"a": 1})[0].value == 1
    assert as_overrides(None) == []


def test_names_of_shipped_recipes(write):
    assert load_recipe("quickstart").recipe.name == "quickstart"
    assert load_recipe("recipes/quickstart.yaml").recipe.name == "quickstart"
    with pytest.raises(UserError, match="did you mean quickstart"):
        load_recipe("quikstart")
