"""Folders as real families ship them, made by transformers' own classes: our logits are theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kllm.errors import UserError
from kllm.export.load import load_model
from kllm.run.info import find_shape

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN | {"attention_factor": 1.1}}),
    "smollm3": ("SmolLM3", {"rope_parameters": {"rope_theta": 5e6}}),
    "smollm3-layers": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": False}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen2-moe-norm": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 96, "norm_topk_prob": True, "qkv_bias": True},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    "qwen3-moe-raw": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 40}),
}
WINDOW = 40
TOKENS = torch.randint(0, 97, (96,), generator=torch.Generator().manual_seed(1))


@dataclass
class Family:
    """A folder that transformers wrote, what it says to `tokens`, and the model's own state dict."""

    folder: Path
    tokens: Tensor
    logits: Tensor
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Family]:
    """Makes each family once a dtype."""
    made: dict[tuple[str, str], Family] = {}

    def make(name: str, dtype: str = "float32") -> Family:
        if (name, dtype) not in made:
            made[name, dtype] = _made(name, getattr(torch, dtype), tmp_path_factory.mktemp("family") / "m")
        return made[name, dtype]

    return make


def _made(name: str, dtype: torch.dtype, folder: Path) -> Family:
    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.endswith("o_proj.bias"):  # ours has none there; real ones are zero
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.08))
    model.to(dtype).save_pretrained(folder)
    tokens = TOKENS[: WINDOW if more.get("sliding_window") else None]
    return Family(folder, tokens, theirs(folder, tokens), model.state_dict())


@torch.no_grad()
def theirs(folder: Path, tokens: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens[None]).logits[0]


@torch.no_grad()
def check(folder: Path, family: Family) -> None:
    model, tokenizer = load_model(folder)
    assert tokenizer is None and model.head_weight.dtype == torch.float32
    ours = model.eval().logits(model(family.tokens, torch.arange(len(family.tokens))))
    assert family.logits.abs().max() > 1
    assert (ours - family.logits).abs().max() < 1e-4
    assert (ours.argmax(-1) == family.logits.argmax(-1)).all()


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# ---- the forms in which weights and configs come


def older_dialect(config: dict[str, Any]) -> None:
    """What transformers 4 wrote: theta and scaling as fields of their own."""
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    name = "type" if kind == "yarn" else "rope_type"  # both spellings are about
    config["rope_scaling"] = None if kind == "default" else {name: kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")


def shards(folder: Path, tensors: dict[str, Tensor], suffix: str, save: Callable[..., Any]) -> None:
    """Three files and their index."""
    stem = {".bin": "pytorch_model", ".safetensors": "model"}[suffix]
    where = {name: f"{stem}-{i % 3 + 1:05d}-of-00003{suffix}" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def rewrite(form: str, source: Family, folder: Path) -> None:
    """The same model in another form of file."""
    shutil.copytree(source.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    if form == "older config":
        edit(folder, older_dialect)
        return
    (folder / "model.safetensors").unlink()
    if form == "no prefix":
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "shards":
        shards(folder, tensors, ".safetensors", save_file)
    elif form == "bin":  # an old one: position tables, and a head that is the embedding
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "bin shards":
        shards(folder, tensors, ".bin", torch.save)
    else:  # names as they are in memory: transformers 5 stacks experts
        assert form == "state dict"
        torch.save(source.state, folder / "pytorch_model.bin")


FORMS = ("older config", "no prefix", "shards", "bin", "bin shards", "state dict")


@pytest.mark.parametrize("name", FAMILIES)
def test_as_transformers_writes_it(name: str, family: Callable[..., Family]) -> None:
    check(family(name).folder, family(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: str, family: Callable[..., Family]) -> None:
    made = family(name, dtype)
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == dtype
    check(made.folder, made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_forms(name: str, form: str, family: Callable[..., Family], tmp_path: Path) -> None:
    rewrite(form, family(name), tmp_path / "m")
    check(tmp_path / "m", family(name))


@pytest.mark.parametrize("name", ["llama3", "qwen3-moe"])
def test_shards_of_transformers_own(name: str, family: Callable[..., Family], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(family(name).folder)
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 3
    check(tmp_path / "m", family(name))


# ---- what their configs say, and leave out


def test_saved_by_transformers_5_has_rope_parameters_alone(family: Callable[..., Family]) -> None:
    config = json.loads((family("llama3").folder / "config.json").read_text())
    assert "rope_theta" not in config and "rope_scaling" not in config
    shape = find_shape(str(family("llama3").folder))
    assert shape.rope_theta == 5e5 and shape.rope_scaling is not None
    assert shape.rope_scaling["rope_type"] == "llama3"


@pytest.mark.parametrize("name", ["mistral-window", "mixtral-window"])
def test_positions_end_at_the_window(name: str, family: Callable[..., Family]) -> None:
    """Up to the window attention is full attention; beyond it theirs no longer is."""
    made = family(name)
    assert find_shape(str(made.folder)).max_position_embeddings == WINDOW
    model = load_model(made.folder)[0].eval()
    assert model.shape.max_position_embeddings == WINDOW
    model.ensure_context(len(TOKENS))
    with torch.no_grad():
        longer = model.logits(model(TOKENS, torch.arange(len(TOKENS)))) - theirs(made.folder, TOKENS)
    assert longer[:WINDOW].abs().max() < 1e-4 < longer[WINDOW:].abs().max()
    assert find_shape(str(family_without_window(made))).max_position_embeddings == 128


def family_without_window(made: Family) -> Path:
    folder = made.folder.parent / "open"
    shutil.copytree(made.folder, folder, dirs_exist_ok=True)
    edit(folder, lambda config: config.update(sliding_window=None))
    return folder


def test_layers_without_positions(family: Callable[..., Family], tmp_path: Path) -> None:
    """A list of flags (1: the layer has positions), or every fourth layer without a list."""
    assert load_model(family("smollm3-layers").folder)[0].shape.no_rope_layers == (1,)
    made = family("smollm3")
    shutil.copytree(made.folder, tmp_path / "m")
    edit(tmp_path / "m", lambda config: config.pop("no_rope_layers"))
    assert load_model(tmp_path / "m")[0].shape.no_rope_layers == (3,)
    check(tmp_path / "m", made)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama3", ("head_dim", "rms_norm_eps", "initializer_range", "hidden_act", "mlp_bias")),
        ("qwen2-tied", ("use_sliding_window", "sliding_window", "layer_types", "max_window_layers")),
        ("smollm3", ("tie_word_embeddings", "layer_types", "no_rope_layer_interval")),
        ("mixtral", ("head_dim", "sliding_window")),
        ("qwen3-moe-raw", ("head_dim", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step")),
    ],
)
def test_defaults_are_theirs(
    name: str, left_out: tuple[str, ...], family: Callable[..., Family], tmp_path: Path
) -> None:
    shutil.copytree(family(name).folder, tmp_path / "m")
    edit(tmp_path / "m", lambda config: [config.pop(key, None) for key in left_out])
    made = family(name)
    assert (theirs(tmp_path / "m", made.tokens) - made.logits).abs().max() < 1e-4
    check(tmp_path / "m", made)


def test_a_scaling_without_its_original_length_takes_the_models(
    family: Callable[..., Family], tmp_path: Path
) -> None:
    made = family("qwen2-yarn")
    shutil.copytree(made.folder, tmp_path / "m")
    edit(tmp_path / "m", lambda config: config["rope_parameters"].pop("original_max_position_embeddings"))
    folder = tmp_path / "m"
    check(folder, Family(folder, made.tokens, theirs(folder, made.tokens), {}))


def test_a_bias_on_o_proj_is_refused(family: Callable[..., Family], tmp_path: Path) -> None:
    shutil.copytree(family("llama-bias").folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert "model.layers.3.self_attn.o_proj.bias" in tensors
    tensors["model.layers.3.self_attn.o_proj.bias"][5] = 0.1
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.3\.self_attn\.o_proj\.bias is not zero"):
        load_model(tmp_path / "m")
