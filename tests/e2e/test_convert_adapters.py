"""`kllm convert` with adapters: a LoRA run merged into its base, several at once with weights, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_support import chat_model
from support import kllm

from kllm.chat.local import load_local
from kllm.errors import KllmError
from kllm.export.adapter import merge_adapters, save_adapter
from kllm.export.hf import read_tensors
from kllm.export.load import load_model
from kllm.model.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from kllm.model.transformer import Transformer
from kllm.run.convert import Conversion, HfOptions, convert
from kllm.run.convert_adapter import split_weight
from kllm.run.gguf import GgufExport, export_gguf
from kllm.serve.adapters import check_reference

QUICK = HfOptions(verify=False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a model; runs/one and runs/two: what LoRA runs on it leave."""
    lab = tmp_path_factory.mktemp("lab")
    chat_model(lab / "base", context=512)
    for seed, name in enumerate(("one", "two")):
        model = adapted(lab, seed)
        stage = lab / "runs" / name / "02-lora"
        (lab / "runs" / name / "01-sft").mkdir(parents=True)
        stage.mkdir()
        save_adapter(model, stage / "adapter", base=str(lab / "base"))
    return lab


def adapted(lab: Path, seed: int) -> Transformer:
    model, _ = load_model(lab / "base")
    add_lora(model, LoraConfig(rank=2, use_dora=bool(seed)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path)[0].state_dict()


def test_a_lora_run_is_merged_into_its_base(lab: Path, tmp_path: Path) -> None:
    done = kllm("convert", lab / "runs" / "one", "out", "--merge", cwd=tmp_path)
    assert "merged one: 14 modules, rank 2" in done.stdout
    assert "greedy tokens equal" in done.stdout
    wanted = merge_lora(adapted(lab, 0)).state_dict()
    for name, value in weights(tmp_path / "out").items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Written by kllm from `base`" in card
    assert "| adapter merged | one: 14 modules, rank 2 |" in card
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        lab / "base" / "tokenizer.json"
    ).read_bytes()


def test_several_with_weights(lab: Path, tmp_path: Path) -> None:
    one, two = (str(lab / "runs" / name) for name in ("one", "two"))
    flags = ["--adapter", f"{one}@0.5", "--adapter", f"{two}@-2e-1", "--no-verify", "--json"]
    report = json.loads(kllm("convert", lab / "base", "out", *flags, cwd=tmp_path).stdout)
    facts = {"modules": 14, "rank": 2, "scale": 16.0}
    assert report["merged"] == [
        {"adapter": "one", "weight": 0.5, **facts},
        {"adapter": "two", "weight": -0.2, **facts},
    ]
    start = weights(lab / "base")
    ends = [merge_lora(adapted(lab, seed)).state_dict() for seed in (0, 1)]
    for name, value in weights(tmp_path / "out").items():
        wanted = start[name] + 0.5 * (ends[0][name] - start[name]) - 0.2 * (ends[1][name] - start[name])
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)
    again = Conversion(one, tmp_path / "again", options=QUICK, adapters=(f"{two}@-0.2",), merge=True)
    convert(again)
    model, _ = load_model(lab / "base")
    merge_adapters(model, [(one, 1.0), (two, -0.2)])
    for name, value in weights(tmp_path / "again").items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_base_of_an_adapter(lab: Path, tmp_path: Path) -> None:
    """Named by the adapter, beside it, or given; one that is gone is said."""
    adapter = tmp_path / "adapter"
    shutil.copytree(lab / "runs" / "one" / "02-lora" / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())

    def made_for(base: str | None, given: str | None = None) -> Conversion:
        config["base_model_name_or_path"] = base
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        return Conversion(
            str(adapter), tmp_path / "out", options=QUICK, merge=True, base=given, overwrite=True
        )

    convert(made_for(None, str(lab / "base")))
    wanted = read_tensors(tmp_path / "out")
    shutil.copytree(lab / "base", tmp_path / "model")
    convert(made_for("../model"))
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for base, word in (
        (None, "does not say"),
        ("", "does not say"),
        ("/gone", "base model /gone is not there"),
    ):
        with pytest.raises(KllmError, match=word) as caught:
            convert(made_for(base))
        assert "--base MODEL" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("base", {"merge": True}, ("base: no adapter in it", "LoRA run")),
        ("nowhere", {"merge": True}, ("nowhere: no such adapter",)),
        ("runs/one", {"merge": True, "keep_adapter": True}, ("flag --merge", "--keep-adapter")),
        ("runs/one", {"merge": True, "to": "peft"}, ("flag --merge", "--to peft")),
        ("base", {"adapters": ("runs/one@nan",)}, ("flag --adapter runs/one@nan", "nan is no weight")),
        ("base", {"adapters": ("runs/one", "runs/two"), "keep_adapter": True}, ("one adapter as it is",)),
        ("base", {"adapters": ("runs/one@0.5",), "keep_adapter": True}, ("one adapter as it is",)),
        ("base", {"keep_adapter": True}, ("--adapter PATH, once",)),
        ("base", {"adapters": ("runs/none",)}, ("runs/none",)),
        ("base", {"base": "base"}, ("flag --base", "does nothing")),
    ],
)
def test_refusals(
    source: str,
    options: dict,
    words: tuple[str, ...],
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(lab)
    with pytest.raises(KllmError) as caught:
        convert(Conversion(source, tmp_path / "out", options=QUICK, **options))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_merged_is_never_replaced(lab: Path) -> None:
    job = Conversion(
        str(lab / "runs" / "one"), lab / "runs" / "one", options=QUICK, merge=True, overwrite=True
    )
    with pytest.raises(KllmError):
        convert(job)
    assert (lab / "runs" / "one" / "02-lora" / "adapter" / "adapter_config.json").exists()


def test_a_run_is_kept_as_a_folder(lab: Path, tmp_path: Path) -> None:
    job = Conversion(
        str(lab / "base"),
        tmp_path / "out",
        options=QUICK,
        adapters=(str(lab / "runs" / "two"),),
        keep_adapter=True,
    )
    convert(job)
    kept = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    assert kept.read_bytes() == (lab / "runs" / "two" / "02-lora" / "adapter" / kept.name).read_bytes()


def test_a_kept_adapter_names_the_model_beside_it(lab: Path, tmp_path: Path) -> None:
    adapter = str(lab / "runs" / "two")
    for base, named in ((None, str(tmp_path / "out")), ("me/base", "me/base")):
        convert(
            Conversion(
                str(lab / "base"), tmp_path / "out", options=QUICK, adapters=(adapter,), keep_adapter=True,
                base=base, overwrite=True,
            )
        )  # fmt: skip
        kept = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        given = json.loads((Path(adapter) / "02-lora" / "adapter" / "adapter_config.json").read_text())
        assert kept == given | {"base_model_name_or_path": named}


@pytest.mark.parametrize("what", ["chat", "serve", "convert", "gguf"])
def test_an_adapter_is_not_merged_twice(
    what: str, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "run" / "01-lora"
    shutil.copytree(lab / "base", stage / "final")
    shutil.copytree(lab / "runs" / "one" / "02-lora" / "adapter", stage / "adapter")
    (stage / "status.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    calls = {
        "chat": lambda: load_local("run", adapter="run", device="cpu"),
        "serve": lambda: check_reference("run", stage / "final"),
        "convert": lambda: convert(Conversion("run", tmp_path / "out", options=QUICK, adapters=("run@0.5",))),
        "gguf": lambda: export_gguf(GgufExport("run", tmp_path / "out", adapter="run")),
    }
    with pytest.raises(KllmError, match="merged into .* already .*name its base instead: .*base"):
        calls[what]()
    assert not (tmp_path / "out").exists()


def test_a_gguf_of_a_run_names_the_run(lab: Path, tmp_path: Path) -> None:
    adapter = str(lab / "runs" / "one" / "02-lora" / "adapter")
    report = export_gguf(GgufExport(str(lab / "base"), tmp_path / "g", adapter=adapter, verify=False))
    assert report["merged"]["adapter"] == "02-lora"
    assert "adapter `02-lora` merged" in (tmp_path / "g" / "README.md").read_text(encoding="utf-8")


def test_weights_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@2").mkdir()
    assert split_weight("dir@0.5") == ("dir", 0.5)
    assert split_weight("me/lora@main") == ("me/lora@main", 1.0)
    assert split_weight("me/lora@main@0.25") == ("me/lora@main", 0.25)
    assert split_weight("a@2") == ("a@2", 1.0)
