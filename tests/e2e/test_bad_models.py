"""Models, adapters and flags that are wrong: each one line with the file and what to do, and nothing left behind.

A representative part goes through the command line in a subprocess, the rest through the functions under it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from chat_support import chat_model
from model_support import SHAPES, random_model
from safetensors.torch import load_file, save_file
from support import kllm
from torch import Tensor

from kllm.cli.app import main
from kllm.errors import KllmError
from kllm.export.adapter import write_peft
from kllm.export.gguf_write import GgufInfo, write_gguf
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.export.pth import write_pth
from kllm.run.convert import Conversion, HfOptions, convert
from kllm.run.gguf import GgufExport, export_gguf
from kllm.run.info import find_shape

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj.weight"
GONE: Any = object()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models in every form: m (a folder), m.pth, m.gguf, shards, moe; an adapter that fits none."""
    lab = tmp_path_factory.mktemp("lab")
    source = chat_model(lab / "m", context=256)
    model, tokenizer = load_model(source)
    assert tokenizer is not None
    write_pth(model, lab / "m.pth")
    write_gguf(model, tokenizer, lab / "m.gguf", "f32", GgufInfo("m"))
    convert(Conversion(str(source), lab / "shards", options=HfOptions(max_shard_bytes=40_000, verify=False)))
    save_model(random_model(SHAPES["qwen3-moe"]), None, lab / "moe")
    pair = {"model.layers.0.self_attn.q_proj": (torch.ones(4, 64), torch.ones(64, 4))}
    write_peft(pair, lab / "adapter", alpha=8.0, rank=4, base="another")
    return lab


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in: whatever a failing command leaves shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    return tmp_path


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(call: Callable[[], Any], *words: str, code: int = 2) -> str:
    """The one line of an error that has all `words`; nothing appeared in the working folder."""
    before = contents(Path())
    with pytest.raises(KllmError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert caught.value.exit_code == code, line
    assert contents(Path()) == before
    return line


def says(*args: str | Path, words: tuple[str, ...], code: int = 2, process: bool = False) -> None:
    """The same through the command line, in a process of its own or (quicker) in this one."""
    before = contents(Path())
    if process:
        done = kllm(*args, cwd=Path.cwd(), check=False)
        stderr, status = done.stderr, done.returncode
    else:
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as left:
            main([str(a) for a in args])
        stderr, status = err.getvalue(), left.value.code
    lines = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert status == code, stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert contents(Path()) == before


def folder(
    source: Path,
    config: dict[str, Any] | None = None,
    change: Callable[[Tensors], Any] | None = None,
    file: Callable[[Path], Any] | None = None,
) -> Path:
    """A copy named `bad`: config.json with other fields, tensors changed in place, files changed."""
    bad = Path("bad")
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(source, bad)
    if config:
        fields = json.loads((bad / "config.json").read_text()) | config
        kept = {key: value for key, value in fields.items() if value is not GONE}
        (bad / "config.json").write_text(json.dumps(kept))
    if change:
        tensors = load_file(bad / "model.safetensors")
        change(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    if file:
        file(bad)
    return bad


def put(name: str, make: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: make(tensors)})


# ---- config.json

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another architecture": ({"model_type": "gpt2"}, ("'gpt2' is not supported", "llama")),
    "no architecture": ({"model_type": GONE}, ("model_type None is not supported",)),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("'longrope'", "yarn")),
    "rope no factor": ({"rope_scaling": {"rope_type": "linear"}}, ("'factor' is missing",)),
    "rope factor": ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, ("factor is 'two'",)),
    "rope text": ({"rope_scaling": "linear"}, ("rope_scaling is 'linear'",)),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": GONE},
        ("rope_parameters", "layers"),
    ),
    "partial rope": ({"partial_rotary_factor": 0.5}, ("partial rotary",)),
    "window": ({"model_type": "qwen2", "use_sliding_window": True}, ("sliding-window",)),
    "window layers": ({"layer_types": ["full_attention", "sliding_attention"]}, ("sliding-window",)),
    "mlp bias": ({"mlp_bias": True}, ("mlp_bias",)),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act 'gelu'",)),
    "no width": ({"hidden_size": GONE}, ("'hidden_size' is missing",)),
    "width text": ({"hidden_size": "big"}, ("hidden_size is 'big'",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers is '0'",)),
    "theta": ({"rope_theta": -1}, ("rope_theta is '-1'",)),
    "key heads": ({"num_key_value_heads": 3}, ("num_attention_heads 4", "3")),
    "odd heads": ({"head_dim": 7}, ("head_dim 7 is odd",)),
    "no experts": ({"model_type": "mixtral"}, ("'num_experts' is missing",)),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ("gptq", "awq")),
    "quantised text": ({"quantization_config": "awq"}, ("quantization_config",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, lab: Path, here: Path) -> None:
    fields, words = CONFIGS[name]
    bad = folder(lab / "m", fields)
    where = "bad" if name == "quantised" else "bad/config.json"
    refused(lambda: load_model(bad), where, *words)
    refused(lambda: convert(Conversion("bad", Path("out"))), where, *words)
    if "quantised" not in name:
        refused(lambda: find_shape(str(bad.resolve())), *words)


@pytest.mark.parametrize("text", ["", '{"model_type": ', "[1]", "7", "\udcff"])
def test_broken_configs(text: str, lab: Path, here: Path) -> None:
    bad = folder(lab / "m", file=lambda d: (d / "config.json").write_text(text, errors="surrogateescape"))
    refused(lambda: load_model(bad), "bad/config.json", "JSON")
    refused(lambda: find_shape(str(bad.resolve())), "bad/config.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok 9 of 4",)),
        ({"num_experts_per_tok": GONE}, ("'num_experts_per_tok' is missing",)),
        ({"decoder_sparse_step": 2}, ("dense layers between",)),
        ({"kllm": "x"}, ("kllm is 'x'",)),
    ],
)
def test_configs_of_experts(fields: dict[str, Any], words: tuple[str, ...], lab: Path, here: Path) -> None:
    bad = folder(lab / "moe", fields)
    refused(lambda: load_model(bad), "bad/config.json", *words)


# ---- weights in a folder

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...], int]] = {
    "missing": ("m", lambda t: t.pop(UP), (f"tensor {UP} is missing", "whole"), 2),
    "embedding": ("m", lambda t: t.pop("model.embed_tokens.weight"), ("embed_tokens", "missing"), 2),
    "extra": ("m", put("model.layers.0.mlp.act.weight", lambda t: torch.ones(2)), ("unknown tensor",), 2),
    "shape": ("m", put(UP, lambda t: t[UP][:-1]), ("(63, 32)", "(64, 32)", "config"), 2),
    "integers": ("m", put(UP, lambda t: t[UP].int()), ("int32",), 2),
    "nan": ("m", put(UP, lambda t: t[UP] * float("nan")), (f"tensor {UP} holds NaN",), 1),
    "inf": ("m", put(UP, lambda t: t[UP] / 0), (f"tensor {UP} holds infinite values",), 1),
    "bias": (
        "m",
        put("model.layers.1.self_attn.o_proj.bias", lambda t: torch.ones(32)),
        ("model.layers.1.self_attn.o_proj.bias", "not zero"),
        2,
    ),
    "half a bias": (
        "m",
        put("model.layers.0.self_attn.q_proj.bias", lambda t: torch.ones(32)),
        ("k_proj.bias is missing",),
        2,
    ),
    "no expert": ("moe", lambda t: t.pop(EXPERT), ("experts.up_proj", "(3, 48, 64)"), 2),
    "expert": ("moe", put(EXPERT, lambda t: t[EXPERT][:-1]), ("up_proj", "(47, 64)", "(48, 64)"), 2),
    "fused": ("m", put("model.layers.0.mlp.experts.gate_up_proj", lambda t: torch.ones(2)), ("gate_up",), 2),
    "one": ("m", lambda t: [t.pop(n) for n in list(t) if n != UP], ("2 layers, but 1 tensors",), 2),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str, lab: Path, here: Path) -> None:
    source, change, words, code = TENSORS[name]
    bad = folder(lab / source, change=change)
    refused(lambda: load_model(bad), "bad", *words, code=code)


def truncated(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


FILES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...], int]] = {
    "half": ("m", lambda d: truncated(d / "model.safetensors"), ("model.safetensors", "copy"), 1),
    "last byte": ("m", lambda d: truncated(d / "model.safetensors", 0.9999), ("model.safetensors", "copy"), 1),
    "empty": ("m", lambda d: (d / "model.safetensors").write_bytes(b""), ("model.safetensors", "copy"), 1),
    "garbage": (
        "m",
        lambda d: (d / "model.safetensors").write_bytes(b"<html>404</html>" * 9),
        ("model.safetensors", "damaged", "copy"),
        1,
    ),
    "no weights": ("m", lambda d: (d / "model.safetensors").unlink(), ("no model.safetensors", "bin"), 2),
    "no config": ("m", lambda d: (d / "config.json").unlink(), ("no model in it", "give"), 2),
    "shard": ("shards", lambda d: next(d.glob("model-*2-of*")).unlink(), ("00002-of", "missing", "copy"), 2),
    "shard, no index": (
        "shards",
        lambda d: (next(d.glob("model-*2-of*")).unlink(), (d / "model.safetensors.index.json").unlink()),
        ("missing", "copy"),
        2,
    ),
    "half a shard": ("shards", lambda d: truncated(next(d.glob("model-*2-of*"))), ("00002-of", "copy"), 1),
    "tokenizer": ("m", lambda d: (d / "tokenizer.json").write_text("{"), ("tokenizer.json:1", "copy"), 2),
    "generation": ("m", lambda d: (d / "generation_config.json").write_text("[]"), ("generation_config",), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, lab: Path, here: Path) -> None:
    source, change, words, code = FILES[name]
    bad = folder(lab / source, file=change)
    refused(lambda: load_model(bad), "bad", *words, code=code)
    refused(lambda: convert(Conversion("bad", Path("out"))), *words, code=code)


def test_weights_that_lie_beside_the_model_are_not_read(lab: Path, here: Path) -> None:
    """Copies in another type, shards without an index, an index nobody can read: the model is what it was."""
    good = load_model(lab / "m")[0].head_weight
    zeros = {name: torch.zeros_like(t) for name, t in load_file(lab / "m" / "model.safetensors").items()}

    def beside(d: Path) -> None:
        save_file(zeros, d / "model.z.safetensors", metadata={"format": "pt"})
        save_file(zeros, d / "model-00001-of-00001.safetensors", metadata={"format": "pt"})

    assert torch.equal(load_model(folder(lab / "m", file=beside))[0].head_weight, good)
    for change in (Path.unlink, lambda index: index.write_text("{")):
        bad = folder(lab / "shards", file=lambda d, f=change: f(d / "model.safetensors.index.json"))
        assert torch.equal(load_model(bad)[0].head_weight, good)


# ---- pickles


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {Path('exploded').resolve()}",)


def test_code_in_pickles_is_refused_and_not_run(lab: Path, here: Path) -> None:
    tensors = load_file(lab / "m" / "model.safetensors")
    bad = folder(lab / "m", file=lambda d: (d / "model.safetensors").unlink())
    torch.save({**tensors, "extra": Bomb()}, bad / "pytorch_model.bin")
    torch.save({"model": tensors, "extra": Bomb()}, "bad.pth")
    words = ("contains code (posix.system)", "none of it was run", "state_dict()")
    for source, where in (("bad", "bad/pytorch_model.bin"), ("bad.pth", "bad.pth")):
        refused(lambda s=source: load_model(s), where, *words)
        refused(lambda s=source: convert(Conversion(s, Path("out"))), where, *words)
        refused(lambda s=source: export_gguf(GgufExport(s, Path("out"))), where, *words)
    refused(lambda: convert(Conversion("bad.pth", Path("out"), to="peft")), "bad.pth", *words)
    adapter = Conversion(str(lab / "m"), Path("out"), adapters=("bad.pth",))
    refused(lambda: convert(adapter), "bad.pth", *words)
    says("chat", "bad", "-p", "hi", words=("bad/pytorch_model.bin", *words), process=True)
    says("convert", "bad.pth", "out", words=("bad.pth", *words))
    assert not Path("exploded").exists()


def test_pth_files(lab: Path, here: Path) -> None:
    state = torch.load(lab / "m.pth", weights_only=True)
    for value, word in ((float("nan"), "NaN"), (float("inf"), "Inf")):
        state[UP][0, 0] = value
        torch.save(state, "bad.pth")
        refused(lambda: load_model("bad.pth"), "bad.pth", UP, word)
    shutil.copy(lab / "m.pth", "bad.pth")
    truncated(Path("bad.pth"))
    refused(lambda: convert(Conversion("bad.pth", Path("out"))), "bad.pth", "damaged", "copy", code=1)
    unknown = Conversion(str(lab / "m.pth"), Path("out"), assume={"colour": 1})
    refused(lambda: convert(unknown), "'colour'", "num_attention_heads")
    says(
        "convert",
        lab / "m.pth",
        "out",
        "--assume",
        "colour=1",
        words=("flag --assume", "colour", "rope_theta"),
    )
    given = Conversion(str(lab / "m"), Path("out"), assume={"rope_theta": 1e4})
    refused(lambda: convert(given), str(lab / "m"), "rope_theta", "--assume")


# ---- GGUF


def rewritten(
    source: Path, keys: dict[str, Any] | None = None, change: Callable[[str, Any], Any] = lambda n, d: d
) -> str:
    """A copy named bad.gguf with other keys and tensors; None leaves one out."""
    reader = gguf.GGUFReader(source)
    found = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    found |= keys or {}
    writer = gguf.GGUFWriter("bad.gguf", found.pop("general.architecture"))
    for name, value in found.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds |= {str: writer.add_string, list: writer.add_array}
        if value is not None:
            kinds[type(value)](name, value)
    for tensor in reader.tensors:
        if (data := change(tensor.name, np.array(tensor.data))) is not None:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "bad.gguf"


def in_tensor(wanted: str, make: Callable[[np.ndarray], Any]) -> Callable[[str, np.ndarray], Any]:
    return lambda name, data: make(data) if name == wanted else data


GGUF: dict[str, tuple[dict[str, Any], Any, tuple[str, ...], int]] = {
    "architecture": ({"general.architecture": "gemma"}, None, ("'gemma' is not supported", "llama"), 2),
    "layers": ({"llama.block_count": 3}, None, ("layers.2", "missing"), 2),
    "many layers": ({"llama.block_count": 10**6}, None, ("1000000 layers",), 2),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, None, ("head_count is [4, 4]",), 2),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, None, ("rms_epsilon is missing",), 2),
    "theta": ({"llama.rope.freq_base": 0.0}, None, ("freq_base is 0.0",), 2),
    "rope": ({"llama.rope.scaling.type": "longrope"}, None, ("'longrope'",), 2),
    "scale": ({"llama.logit_scale": 2.0}, None, ("logit_scale",), 2),
    "key heads": ({"llama.attention.head_count_kv": 3}, None, ("3 key heads",), 2),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "weird"}, None, ("'weird'", "--tokenizer DIR"), 2),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, None, ("'bert'", "--tokenizer DIR"), 2),
    "token types": ({"tokenizer.ggml.token_type": [1]}, None, ("do not fit", "--tokenizer DIR"), 2),
    "merges": ({"tokenizer.ggml.merges": ["zz qq"]}, None, ("tokenizer", "--tokenizer DIR"), 2),
    "tensor": ({}, in_tensor("blk.0.attn_q.weight", lambda d: None), ("q_proj", "missing"), 2),
    "shape": ({}, in_tensor("blk.0.attn_q.weight", lambda d: d[:-1]), ("q_proj", "(31, 32)"), 2),
    "integers": ({}, in_tensor("blk.0.ffn_up.weight", lambda d: d.astype(np.int32)), ("ffn_up", "I32"), 2),
    "no embedding": ({}, in_tensor("token_embd.weight", lambda d: None), ("no token_embd",), 2),
    "nan": ({}, in_tensor("output_norm.weight", lambda d: d * np.nan), ("model.norm.weight", "NaN"), 1),
    "inf": ({}, in_tensor("output_norm.weight", lambda d: d * np.inf), ("model.norm.weight", "infinite"), 1),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(name: str, lab: Path, here: Path) -> None:
    keys, change, words, code = GGUF[name]
    bad = rewritten(lab / "m.gguf", keys, change or (lambda n, d: d))
    refused(lambda: load_model(bad), bad, *words, code=code)
    refused(lambda: convert(Conversion(bad, Path("out"))), bad, *words, code=code)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_truncated_gguf_files(share: float, lab: Path, here: Path) -> None:
    shutil.copy(lab / "m.gguf", "bad.gguf")
    truncated(Path("bad.gguf"), share)
    refused(lambda: convert(Conversion("bad.gguf", Path("out"))), "bad.gguf", "cut off", "copy", code=1)


def test_another_tokenizer_is_the_cure_that_the_hint_promises(lab: Path, here: Path) -> None:
    bad = rewritten(lab / "m.gguf", {"tokenizer.ggml.pre": "weird"})
    notes: list[str] = []
    options = HfOptions(verify=False)
    convert(Conversion(bad, Path("out"), tokenizer=str(lab / "m"), options=options), notes.append)
    assert any("weird" in note for note in notes)
    assert torch.equal(load_model("out")[0].head_weight, load_model(lab / "m")[0].head_weight)
    convert(Conversion(bad, Path("out.pth"), to="torch", options=options))  # has no place for one


# ---- tokenizers that are missing or too large


def test_no_tokenizer(lab: Path, here: Path) -> None:
    bad = folder(lab / "m", file=lambda d: [path.unlink() for path in d.glob("tokenizer*")])
    refused(lambda: export_gguf(GgufExport("bad", Path("out"))), "bad", "tokenizer", "--tokenizer DIR")
    for quant in ("awq", "int8"):
        job = Conversion("bad", Path("out"), options=HfOptions(quant=quant))
        refused(lambda j=job: convert(j), "bad", "tokenizer", "--tokenizer DIR")
    says("chat", bad, "-p", "hi", words=("bad", "no tokenizer"))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(lab: Path, here: Path) -> None:
    heads = ("model.embed_tokens.weight", "lm_head.weight")
    bad = folder(lab / "m", {"vocab_size": 300}, lambda t: t.update({n: t[n][:300] for n in heads}))
    words = ("bad", "320 tokens", "300 rows")
    refused(lambda: convert(Conversion("bad", Path("out"))), *words, "--tokenizer")
    refused(lambda: convert(Conversion("bad", Path("out"), options=HfOptions(quant="int8"))), *words)
    refused(lambda: export_gguf(GgufExport("bad", Path("out"))), *words)
    refused(lambda: export_gguf(GgufExport("bad", Path("out"), tokenizer=str(lab / "m"))), *words)
    says("chat", bad, "-p", "hi", words=words)
    convert(Conversion("bad", Path("out"), tokenizer="bad", options=HfOptions(verify=False)))  # the hint
    assert load_model("out")[0].shape.vocab_size == 320


# ---- where to


def test_places_that_cannot_be_written(lab: Path, here: Path) -> None:
    source = str(lab / "m")
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        refused(
            lambda o=overwrite: convert(Conversion(source, Path("full"), overwrite=o)), "full", "new folder"
        )
    refused(lambda: convert(Conversion(source, Path("file"))), "file", "new folder")
    refused(lambda: export_gguf(GgufExport(source, Path("file"))), "file", "new folder")
    refused(lambda: convert(Conversion(source, Path("full"), to="torch")), "full", ".pth")
    Path("x.gguf").mkdir()
    refused(lambda: export_gguf(GgufExport(source, Path("x.gguf"), overwrite=True)), "x.gguf", "new file")
    below = (Conversion(source, Path("file/x")), Conversion(source, Path("file/x.pth"), to="torch"))
    for job in below:
        refused(lambda j=job: convert(j), "file/x", "give another", code=1)
    for out in ("file/x", "file/x.gguf"):
        refused(lambda o=out: export_gguf(GgufExport(source, Path(o))), "file/x", "give another", code=1)
    says("convert", source, "file", words=("file", "new folder"))
    says("export-gguf", source, "file", words=("file", "new folder"))
    assert Path("file").read_text() == "mine"


def test_read_only_places(lab: Path, here: Path) -> None:
    locked = Path("/sys/kllm-out")  # not even root may write there
    if os.geteuid():
        Path("locked").mkdir(mode=0o555)
        locked = Path("locked/out").resolve()
    source = str(lab / "m")
    refused(lambda: convert(Conversion(source, locked)), str(locked), "give another", code=1)
    pth = Conversion(source, locked.with_suffix(".pth"), to="torch")
    refused(lambda: convert(pth), str(locked), "give another", code=1)
    says("export-gguf", source, locked, "-q", "f32", words=(str(locked), "give another"), code=1)


def test_source_and_result_the_same(lab: Path, here: Path) -> None:
    shutil.copytree(lab / "m", "m")
    for name in ("m.pth", "m.gguf"):
        shutil.copy(lab / name, name)
    Path("only").mkdir()
    shutil.copy(lab / "m.gguf", "only/only-f32.gguf")
    shutil.copy(lab / "m.gguf", "m/inside.gguf")
    same = "source and result are the same"
    refused(lambda: convert(Conversion("m", Path("m"), overwrite=True)), "m", same, "another OUT")
    inside = Conversion("m/inside.gguf", Path("m"), overwrite=True)
    refused(lambda: convert(inside), "m", "lies in it", "another OUT")
    pth = Conversion("m.pth", Path("m.pth"), to="torch", overwrite=True)
    refused(lambda: convert(pth), "m.pth", same, "another OUT")
    for source, out in (("m.gguf", "m.gguf"), ("only", "only"), ("only", "only/only-f32.gguf")):
        job = GgufExport(source, Path(out), quants=("f32",), overwrite=True)
        refused(lambda j=job: export_gguf(j), same, "another OUT")
    says("export-gguf", "m.gguf", "m.gguf", "--overwrite", words=("m.gguf", same))


def test_a_readme_and_a_modelfile_of_somebody_else_stay(lab: Path, here: Path) -> None:
    Path("project").mkdir()
    for name in ("README.md", "Modelfile"):
        Path("project", name).write_text("mine")
    job = {"source": str(lab / "m"), "out": Path("project"), "quants": ("f32",), "verify": False}
    refused(lambda: export_gguf(GgufExport(**job, ollama=True)), "project/Modelfile", "--overwrite")
    notes: list[str] = []
    export_gguf(GgufExport(**job), notes.append)
    assert Path("project/README.md").read_text() == "mine" and "README.md" in notes[-1]
    Path("project/README.md").unlink()
    for name in ("one", "two"):  # our own card is replaced
        export_gguf(GgufExport(**job, overwrite=True, name=name))
        assert f"# {name}" in Path("project/README.md").read_text()


# ---- adapters and flags


def test_adapters(lab: Path, here: Path) -> None:
    source = str(lab / "m")
    kinds = "PEFT folder"
    cases = {
        "nowhere": ("nowhere", "no such adapter", kinds),
        source: (source, "no adapter in it", kinds),
        str(lab / "m.pth"): ("m.pth", "no LoRA matrices"),
        str(lab / "m.gguf"): ("m.gguf", "not an adapter", kinds),
        str(lab / "adapter"): ("adapter", "q_proj is (32, 32)", "(64, 64)", "another base"),
    }
    for adapter, words in cases.items():
        for keep in (False, True):
            job = Conversion(source, Path("out"), adapters=(adapter,), keep_adapter=keep)
            refused(lambda j=job: convert(j), *words)
        refused(lambda a=adapter: export_gguf(GgufExport(source, Path("out"), adapter=a)), *words)
        if adapter != str(lab / "adapter"):  # as a source to turn into a PEFT folder
            refused(lambda a=adapter: convert(Conversion(a, Path("out"), to="peft")), *words)
    says("convert", source, "out", "--adapter", lab / "adapter", words=cases[str(lab / "adapter")])
    says("convert", source, "out", "--to", "peft", words=cases[source])


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (lambda d: truncated(d / "adapter_model.safetensors"), ("adapter_model.safetensors", "copy"), 1),
        (lambda d: (d / "adapter_model.safetensors").unlink(), ("adapter_model.safetensors", "copy"), 2),
        (lambda d: (d / "adapter_config.json").write_text("{"), ("adapter_config.json", "JSON", "copy"), 2),
        (lambda d: (d / "adapter_config.json").write_text("[]"), ("adapter_config.json",), 2),
    ],
)
def test_broken_adapters(
    change: Callable[[Path], Any], words: tuple[str, ...], code: int, lab: Path, here: Path
) -> None:
    folder(lab / "adapter", file=change)
    refused(lambda: convert(Conversion(str(lab / "m"), Path("out"), adapters=("bad",))), *words, code=code)
    refused(lambda: convert(Conversion("bad", Path("out"), to="peft")), *words, code=code)


def test_flags(lab: Path, here: Path) -> None:
    source = str(lab / "m")
    says("convert", source, "out", "--quant", "q9", words=("'--quant'", "awq", "int8"))
    says("export-gguf", source, "out", "-q", "q8_0,q9", words=("flag --quant", "'q9'", "q4_k_m"))
    refused(
        lambda: export_gguf(GgufExport(source, Path("x.gguf"), quants=("f32", "f16"))), "x.gguf", "folder"
    )
    torch_quant = Conversion(source, Path("x.pth"), to="torch", options=HfOptions(quant="awq"))
    refused(lambda: convert(torch_quant), "flag --quant", "--to torch")
    for size in (77, 128):
        options = HfOptions(quant="awq", group_size=size)
        refused(lambda o=options: convert(Conversion(source, Path("out"), options=o)), f"{size}", "32")


def test_numbers_that_the_type_cannot_hold(lab: Path, here: Path) -> None:
    """Also where nothing is verified afterwards."""
    bad = folder(lab / "m", change=lambda t: t[UP].mul_(1e6))
    options = HfOptions(dtype="float16", verify=False)
    refused(lambda: convert(Conversion("bad", Path("out"), options=options)), "out", UP, "bfloat16", code=1)
    pth = Conversion(str(bad), Path("out.pth"), to="torch", options=options)
    refused(lambda: convert(pth), "out.pth", UP, "bfloat16", code=1)
    for quant in ("f16", "q8_0", "q4_1"):
        job = GgufExport("bad", Path("out"), quants=(quant,), verify=False)
        refused(lambda j=job: export_gguf(j), "out/bad-", "ffn_up", "bf16", code=1)


# ---- full disks

WRITERS: dict[str, Callable[[str, Path], Any]] = {
    "convert": lambda source, out: convert(Conversion(source, out)),
    "int8": lambda source, out: convert(Conversion(source, out, options=HfOptions(quant="int8"))),
    "torch": lambda source, out: convert(Conversion(source, out.with_suffix(".pth"), to="torch")),
    "gguf": lambda source, out: export_gguf(GgufExport(source, out, quants=("f32",), verify=False)),
}
FULL = "no space left on the device"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(writer: str, lab: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system says so when what was written is to reach the disk."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: WRITERS[writer](str(lab / "m"), Path("out")), "out", FULL, "free some space", code=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_really_full_disks(lab: Path, here: Path) -> None:
    """Every writer, stopped early and late: safetensors, torch and numpy each hide the reason in their way."""
    small = Path("small").resolve()
    small.mkdir()
    for size in ("4k", "64k"):
        for name, write in WRITERS.items():
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
            if subprocess.run(mount, capture_output=True).returncode:
                pytest.skip("mounting is not allowed here")
            try:
                with pytest.raises(KllmError) as caught:
                    write(str(lab / "m"), small / "out")
                line = str(caught.value)
                assert caught.value.exit_code == 1 and FULL in line, f"{name} in {size}: {line}"
                assert re.search(r"small/out\b", line), line
                assert contents(small) == set(), f"{name} in {size}"
            finally:
                subprocess.run(["umount", "-l", str(small)], check=True)


# ---- the same through the command line


@pytest.mark.parametrize(
    ("command", "words", "code"),
    [
        (("convert", "half", "out"), ("half/model.safetensors", "damaged", "copy"), 1),
        (("export-gguf", "nan", "out"), ("nan", UP, "NaN"), 1),
        (("chat", "gpt2", "-p", "hi"), ("gpt2/config.json", "'gpt2' is not supported", "llama"), 2),
        (("info", "broken"), ("broken/config.json",), 2),
    ],
)
def test_commands(command: tuple[str, ...], words: tuple[str, ...], code: int, lab: Path, here: Path) -> None:
    change, fields, file = None, None, None
    if command[1] == "half":
        file = lambda d: truncated(d / "model.safetensors")  # noqa: E731
    elif command[1] == "broken":
        file = lambda d: (d / "config.json").write_text("{")  # noqa: E731
    elif command[1] == "nan":
        change = put(UP, lambda t: t[UP] * float("nan"))
    else:
        fields = {"model_type": "gpt2"}
    folder(lab / "m", fields, change, file).rename(command[1])
    says(*command, words=words, code=code, process=True)
