"""`kllm convert`: what is written equals what was meant, in another reader's eyes; and refuses in one line."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from chat_support import TEXT, chat_model
from model_support import BASE, MOE, random_model
from safetensors.torch import load_file, save_file
from support import kllm

from kllm.errors import KllmError
from kllm.export.adapter import write_peft
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.model.presets import ModelShape
from kllm.run.convert import Conversion, HfOptions, convert
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("convert") / "m", context=512)


def same(left: Path, right: Path) -> bool:
    a, b = (load_model(path)[0].state_dict() for path in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_writes_a_checked_copy(source: Path, tmp_path: Path) -> None:
    done = kllm("convert", source, "copy", cwd=tmp_path)
    assert "checked with transformers" in done.stdout
    assert "greedy tokens equal" in done.stdout
    assert same(source, tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert "logits differ by at most" in card
    again = kllm("convert", source, "copy", "--json", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: copy: is there already")
    report = json.loads(kllm("convert", source, "copy", "--overwrite", "--json", cwd=tmp_path).stdout)
    assert report["verified"]["greedy_equal"] == report["verified"]["greedy_total"] > 200
    assert report["verified"]["texts_equal"] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_shards(source: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "half"
    convert(Conversion(str(source), out, options=HfOptions(dtype=dtype, max_shard_bytes=20_000)))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole = load_model(source)[0].state_dict()
    for name, tensor in load_model(out)[0].state_dict().items():
        assert torch.equal(tensor, whole[name].to(getattr(torch, dtype)).float())


def test_positions_are_stretched_as_transformers_stretches_them(source: Path, tmp_path: Path) -> None:
    job = Conversion(str(source), tmp_path / "long", rope_scaling="yarn", factor=4.0)
    assert convert(job)["verified"]["max_abs_diff"] < 1e-4 * 20
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert config["rope_scaling"]["original_max_position_embeddings"] == 512


def test_another_tokenizer_keeps_shared_rows_and_averages_the_rest(source: Path, tmp_path: Path) -> None:
    new, _ = train_tokenizer([*TEXT, "a new zebra zooms"] * 5, 330, max_bytes=1_000_000, min_frequency=1)
    new.save(tmp_path / "tok")
    report = convert(Conversion(str(source), tmp_path / "out", tokenizer=str(tmp_path / "tok")))
    change = report["vocabulary"]
    model, tokenizer = load_model(tmp_path / "out")
    before, old = load_model(source)
    assert isinstance(tokenizer, Tokenizer) and isinstance(old, Tokenizer)
    assert model.shape.vocab_size == change["rows"] == new.vocab_size
    assert change["kept"] + change["from_pieces"] + change["from_mean"] == change["rows"]
    assert 256 <= change["kept"] < change["rows"]
    rows, was = model.model.embed_tokens.weight, before.model.embed_tokens.weight
    spelled = in_bytes = 0
    for i in range(new.vocab_size):
        token = new.id_to_token(i)
        assert token is not None
        known = old.token_to_id(token)
        if known is not None:
            assert torch.equal(rows[i], was[known])
        elif token not in new.added_tokens:
            try:
                new.bytes_of(i).decode()
                pieces = old.encode(new.decode([i]))
            except UnicodeDecodeError:  # a part of a character is spelled in bytes; a test of its own
                in_bytes += 1
                continue
            assert len(pieces) > 1
            torch.testing.assert_close(rows[i], was[pieces].mean(0))
            spelled += 1
    assert spelled > 0 and spelled + in_bytes == change["from_pieces"]


def test_a_peft_adapter_is_merged_as_peft_merges_it(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        for layer in range(2):
            out_size, in_size = dict(model.named_modules())[
                f"model.layers.{layer}.self_attn.{name}"
            ].weight.shape
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, in_size, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out_size, 4, generator=generator)
    adapter = tmp_path / "a"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(source)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = convert(Conversion(str(source), tmp_path / "merged", adapters=(str(adapter),)))
    facts = {"modules": 4, "rank": 4, "scale": 2.0}
    assert report["merged"] == [{"adapter": "a", "weight": 1.0, **facts}]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(merged[name], model.state_dict()[name] + delta)
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    torch.testing.assert_close(theirs.state_dict()[name], merged[name], atol=1e-5, rtol=1e-5)


def test_verifying_notices_other_weights(source: Path, tmp_path: Path) -> None:
    """The negative control: one number changed after writing."""
    from kllm.export.verify import verify_hf

    model, tokenizer = load_model(source)
    save_model(model, tokenizer, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(KllmError, match="model.norm.weight is not what was exported"):
        verify_hf(model, tokenizer, tmp_path / "m")


def test_verifying_notices_a_config_that_lies(source: Path, tmp_path: Path, monkeypatch) -> None:
    """The weights are right, but the other reader is told another theta."""
    from kllm.export import verify

    model, tokenizer = load_model(source)
    save_model(model, tokenizer, tmp_path / "m")
    lying = tmp_path / "lying"
    save_model(model, tokenizer, lying)
    config = json.loads((lying / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 7.0
    (lying / "config.json").write_text(json.dumps(config))
    theirs = verify._load_theirs(lying)
    monkeypatch.setattr(verify, "_load_theirs", lambda directory: theirs)
    with pytest.raises(KllmError, match="differs: logits by"):
        verify.verify_hf(model, tokenizer, tmp_path / "m")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "out"], "nowhere: no such file or directory"),
        (["SRC", "out", "--rope-scaling", "yarn"], "--rope-scaling and --factor belong together"),
        (["SRC", "out", "--rope-scaling", "yarn", "--factor", "0.5"], "flag --factor: must be above 1"),
        (["SRC", "out", "--max-shard-size", "big"], "flag --max-shard-size"),
        (["SRC", "SRC"], "source and result are the same"),
        (["SRC", "full"], "full: is there and holds no model"),
        (["SRC", "file"], "file: is a file"),
        (["SRC", "out", "--adapter", "nowhere"], "nowhere: no such adapter"),
        (["SRC", "out", "--tokenizer", "nowhere"], "nowhere"),
        (
            ["SRC", "m.pth", "--to", "torch", "--adapter", "a", "--keep-adapter"],
            "flag --keep-adapter: does nothing",
        ),
        (["SRC", "out", "--group-size", "32"], "flag --group-size: does nothing"),
        (["SRC", "out", "--quant", "awq", "--dtype", "bfloat16"], "flag --dtype: awq is kept in float16"),
        (["SRC", "out", "--push", "nope"], "flag --push: 'nope' is no hub id"),
    ],
)
def test_bad_input_is_one_line(source: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    given = [str(source) if a == "SRC" else a for a in arguments]
    done = kllm("convert", *given, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


class _Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that an upload needs; everything is small enough for the commit itself."""

    files: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[list[str]] = []
    deleted: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.append(self.headers.get("authorization", ""))
        root = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{root}/me/tiny"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    self.deleted.append(line["value"]["path"])
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{root}/me/tiny/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({})

    def do_GET(self) -> None:
        if "/tree/" in self.path:  # what an earlier upload left
            there = ("model-00001-of-00002.safetensors", "pytorch_model.bin", "notes.md")
            self._answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in there])
            return
        self._answer({"siblings": [], "sha": "0" * 40, "id": "me/tiny"})

    def _answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


def test_push_uploads_every_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    try:
        done = kllm("convert", source, "out", "--push", "me/tiny", cwd=tmp_path)
    finally:
        server.shutdown()
    assert "pushed to" in done.stdout
    assert set(_Hub.files) == {file.name for file in (tmp_path / "out").iterdir()}
    assert _Hub.files["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
    assert "Bearer hf_test" in _Hub.tokens
    # weights of the last upload would be read before ours
    assert sorted(_Hub.deleted) == ["model-00001-of-00002.safetensors", "pytorch_model.bin"]


WIDE = BASE.with_(vocab_size=330, intermediate_size=128)
SHARED = WIDE.with_(**{**MOE, "moe_intermediate_size": 64}, num_shared_experts=1)


@pytest.mark.parametrize(
    ("quant", "shape"),
    [("awq", WIDE), ("int8", WIDE), ("int4", WIDE), ("int8", SHARED), ("awq", SHARED)],
    ids=["awq", "int8", "int4", "int8-moe", "awq-moe"],
)
def test_quantised_folders_say_what_they_cost(tmp_path: Path, quant: str, shape: ModelShape) -> None:
    wide = random_model(shape)
    tokenizer, _ = train_tokenizer(TEXT * 5, 320, max_bytes=1_000_000, min_frequency=1)
    save_model(wide, tokenizer, tmp_path / "m")
    group = [] if quant == "int8" else ["--group-size", "32"]
    if shape.is_moe:  # in this process, which has transformers loaded
        options = HfOptions(quant=quant)
        report = convert(Conversion(str(tmp_path / "m"), tmp_path / "out", options=options))
    else:
        done = kllm("convert", "m", "out", "--quant", quant, *group, "--json", cwd=tmp_path)
        report = json.loads(done.stdout)
    assert report["quant"] == quant and report["bytes"] < (300_000 if shape.is_moe else 200_000)
    cost = report["perplexity"]
    assert cost["before"] != cost["after"] and abs(cost["after"] / cost["before"] - 1) < 0.2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == (
        "awq" if quant == "awq" else "compressed-tensors"
    )
    assert "verified" in report and "perplexity" in (tmp_path / "out" / "README.md").read_text()
    again, _ = load_model(tmp_path / "out")  # every command takes it
    for name, tensor in again.state_dict().items():
        apart = (tensor - wide.state_dict()[name]).pow(2).mean().sqrt()
        assert apart < 0.5 * wide.state_dict()[name].pow(2).mean().sqrt()


def test_a_minimind_pth_round_trip_and_a_tokenizer_from_elsewhere(source: Path, tmp_path: Path) -> None:
    done = kllm("convert", source, "m.pth", "--to", "torch", cwd=tmp_path)
    assert "MiniMind's own code does not run it" in done.stderr  # the head is untied
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]
    back = kllm("convert", "m.pth", "hf", "--tokenizer", source, cwd=tmp_path)
    assert "checked with transformers" in back.stdout
    assert same(source, tmp_path / "hf")
    bare = kllm("convert", "m.pth", "bare", cwd=tmp_path)
    assert "no tokenizer is beside the model" in bare.stderr


def test_rows_of_parts_of_characters_are_the_mean_of_their_bytes() -> None:
    from kllm.export.vocabulary import change_vocabulary

    old, _ = train_tokenizer(["猫在家里睡觉"] * 9, 300, max_bytes=10**6, min_frequency=1)
    new, _ = train_tokenizer(["狗喜欢跑步和游泳", "鸟会飞翔"] * 9, 330, max_bytes=10**6, min_frequency=1)
    model = random_model(BASE.with_(vocab_size=old.vocab_size))
    changed, _ = change_vocabulary(model, old, new)
    was, rows = model.model.embed_tokens.weight, changed.model.embed_tokens.weight
    single = {old.bytes_of(i): i for i in range(old.vocab_size) if len(old.bytes_of(i)) == 1}
    parts = 0
    for i in range(new.vocab_size):
        data = new.bytes_of(i)
        if (
            b"\xef\xbf\xbd" in new.decode([i]).encode()
            and len(data) > 1
            and old.token_to_id(new.id_to_token(i)) is None
        ):
            ids = [single[data[k : k + 1]] for k in range(len(data))]
            torch.testing.assert_close(rows[i], was[ids].mean(0))
            parts += 1
    assert parts > 2


def test_a_run_goes_on_with_its_model_not_with_a_rounded_export(tmp_path: Path) -> None:
    from kllm.export.resolve import resolve

    for stage, kind in (("01-sft", "sft"), ("02-export", "export")):
        (tmp_path / stage / "final").mkdir(parents=True)
        (tmp_path / stage / "final" / "config.json").write_text("{}")
        (tmp_path / stage / "status.json").write_text(json.dumps({"kind": kind, "state": "done"}))
    assert resolve(tmp_path) == tmp_path / "01-sft" / "final"
    assert resolve(tmp_path / "02-export") == tmp_path / "02-export" / "final"


def test_what_is_read_is_never_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_model(*load_model(source), out)
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    write_peft({"model.layers.0.self_attn.q_proj": (a, b)}, out / "adapter", alpha=2, rank=2, base="x")
    with pytest.raises(KllmError, match="lies in it"):
        convert(Conversion(str(source), out, adapters=(str(out / "adapter"),), overwrite=True))
    assert (out / "adapter").is_dir()


def test_a_peft_folder_is_not_written_as_another(source: Path, tmp_path: Path) -> None:
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    write_peft({"model.layers.0.self_attn.q_proj": (a, b)}, tmp_path / "a", alpha=2, rank=2, base="x")
    with pytest.raises(KllmError, match="is a PEFT folder already"):
        convert(Conversion(str(tmp_path / "a"), tmp_path / "out", to="peft"))


def test_an_adapter_is_kept_beside_the_model(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source)
    size = model.shape.hidden_size
    pairs = {}
    for layer in range(2):
        for name in ("q_proj", "o_proj"):  # MiniMind adapts square layers only
            stem = f"model.layers.{layer}.self_attn.{name}.lora"
            pairs[f"{stem}.A.weight"] = torch.randn(2, size)
            pairs[f"{stem}.B.weight"] = torch.randn(size, 2)
    torch.save(pairs, tmp_path / "lora.pth")
    kllm("convert", source, "both", "--adapter", "lora.pth", "--keep-adapter", "--no-verify", cwd=tmp_path)
    kllm("convert", source, "merged", "--adapter", "lora.pth", "--no-verify", cwd=tmp_path)
    kllm("convert", "lora.pth", "alone", "--to", "peft", "--base", "me/base", cwd=tmp_path)
    assert same(source, tmp_path / "both")
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base" and config["r"] == 2
    merged = load_model(tmp_path / "merged")[0].state_dict()
    name = "model.layers.1.self_attn.o_proj"
    delta = pairs[f"{name}.lora.B.weight"] @ pairs[f"{name}.lora.A.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], model.state_dict()[f"{name}.weight"] + delta)
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    for folder in (tmp_path / "both" / "adapter", tmp_path / "alone"):
        theirs = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        torch.testing.assert_close(theirs.state_dict()[f"{name}.weight"], merged[f"{name}.weight"])
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
