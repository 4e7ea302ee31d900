"""README.md of a result: the model card, written from what the run recorded and nothing else."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

from kllm.config.dump import dump_yaml
from kllm.config.stages import ExportStage
from kllm.files import write_text
from kllm.observe import units
from kllm.run.context import StageContext
from kllm.run.results import tables

_TITLES = {
    "tokenizer": "Byte-level BPE tokenizer",
    "pretrain": "Language model, pretrained on plain text",
    "sft": "Language model, fine-tuned on conversations",
    "lora": "Language model, fine-tuned on conversations by an adapter that is merged in",
    "dpo": "Language model, trained on preferences",
    "distill": "Language model, taught by another one",
    "export": "Language model for other programs: transformers and vLLM, llama.cpp and ollama",
}


def write_card(ctx: StageContext, status: Mapping[str, Any]) -> None:
    """Writes final/README.md; a stage without a result gets none."""
    if ctx.final_dir.is_dir():
        write_text(ctx.final_dir / "README.md", card(ctx, status))


def card(ctx: StageContext, status: Mapping[str, Any]) -> str:
    """The model card as Markdown with a YAML head, as model hubs read it."""
    head = ["---", "library_name: transformers", "tags: [kllm]"]
    if ctx.kind != "tokenizer":
        head.insert(2, "pipeline_tag: text-generation")
    if isinstance(ctx.stage, ExportStage) and ctx.stage.license:
        head.append(f"license: {ctx.stage.license}")
    lines = [
        *head,
        "---",
        "",
        f"# {ctx.recipe.name}: {ctx.name}",
        "",
        f"{_TITLES.get(ctx.kind, ctx.kind)}.",
        "",
    ]
    lines += _table(("", ""), _facts(ctx, status))
    lines += _results(status)
    lines += _data(status)
    lines += _use(ctx)
    lines += ["## How to reproduce", ""]
    lines += [
        f"With kllm {status.get('versions', {}).get('kllm', '')} and the recipe below in `recipe.yaml`:",
        "",
    ]
    lines += ["```", f"kllm run --recipe recipe.yaml --until {ctx.name}", "```", ""]
    lines += ["```yaml", dump_yaml(ctx.recipe).rstrip(), "```", ""]
    return "\n".join(lines)


def _facts(ctx: StageContext, status: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts: list[tuple[str, Any]] = [
        ("parameters", _number(status.get("parameters"))),
        ("vocabulary", _number(status.get("vocab_size"))),
        ("tokens seen", _number(status.get("tokens"))),
        ("tokens trained on", _number(status.get("trained_tokens"))),
        ("steps", _number(status.get("steps"))),
        ("compute", units.work(status["flops"]) if status.get("flops") else None),
        ("wall time", units.duration(status.get("seconds"))),
        ("hardware", _hardware(status)),
        ("precision", status.get("dtype")),
        ("adapter", _adapter(status)),
        ("software", ", ".join(f"{k} {v}" for k, v in status.get("versions", {}).items())),
        ("seed", ctx.seed),
        ("finished", status.get("ended")),
    ]
    for what, given in status.get("inputs", {}).items():
        facts.append((what, f"{given.get('from')} `{given.get('hash')}`"))
    return [(name, str(value)) for name, value in facts if value is not None]


def _adapter(status: Mapping[str, Any]) -> str | None:
    """What others than kllm must know of the adapter beside the model."""
    if names := status.get("adapter_kllm_only"):
        return f"`adapter/` changes {names} experts or routers: only kllm reads it; it is merged in here"
    return None


def _hardware(status: Mapping[str, Any]) -> str:
    processes = status.get("processes", 1)
    device = str(status.get("device", "cpu"))
    many = f" x {processes}" if processes and processes > 1 else ""
    return f"{device}{many}, {os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"


def _results(status: Mapping[str, Any]) -> list[str]:
    found = tables(status.get("result"))
    lines = ["## Results", ""] if found else []
    for table in found:
        lines += [table.title, ""] if table.title else []
        lines += _table(table.columns, table.rows)
    return lines


def _data(status: Mapping[str, Any]) -> list[str]:
    hashes = (status.get("identity") or {}).get("data") or {}
    if not hashes:
        return []
    counted = {s.get("path"): s for s in (status.get("data") or {}).get("sources", []) if isinstance(s, dict)}
    rows = []
    for path, content in hashes.items():
        known = counted.get(path, {})
        rows.append(
            (
                f"`{path}`",
                _number(known.get("docs")) or "",
                _number(known.get("tokens")) or "",
                f"`{content}`",
            )
        )
    return ["## Data", "", *_table(("source", "documents", "tokens", "content hash"), rows)]


def _use(ctx: StageContext) -> list[str]:
    if ctx.kind == "tokenizer":
        return []
    code = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "```",
    ]
    lines = ["## Use", "", "`kllm chat THIS_FOLDER`, or:", "", *code, ""]
    if isinstance(ctx.stage, ExportStage) and not ctx.stage.hf:
        lines = ["## Use", ""]
    elif isinstance(ctx.stage, ExportStage) and ctx.stage.quant == "awq":
        lines = ["## Use", "", "`kllm chat THIS_FOLDER`, or `vllm serve THIS_FOLDER` on a GPU.", ""]
    if isinstance(ctx.stage, ExportStage) and ctx.stage.gguf:
        file = f"{ctx.recipe.name}-{ctx.stage.gguf[0]}"
        lines += ["With llama.cpp:", "", "```bash", f"llama-cli -m {file}.gguf -cnv", "```", ""]
        if ctx.stage.ollama:
            beside = "Modelfile" if len(ctx.stage.gguf) == 1 else f"{file}.Modelfile"
            create = f"ollama create {ctx.recipe.name} -f {beside} && ollama run {ctx.recipe.name}"
            lines += ["With ollama:", "", "```bash", create, "```", ""]
    return lines


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None


def _table(columns: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]
