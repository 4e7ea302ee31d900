"""How `kllm info` lays out what `kllm.run.info` knows about a model."""

from __future__ import annotations

from typing import Any

from kllm.observe import units
from kllm.observe.console import make_reporter


def print_presets(rows: list[dict[str, Any]]) -> None:
    """All presets, one a line."""
    table = [
        (r["name"], f"{r['parameters']:,}", units.count(r["active_parameters"]), r["about"]) for r in rows
    ]
    make_reporter().table("", ("preset", "parameters", "active", "about"), table)


def print_facts(found: dict[str, Any]) -> None:
    """The page of one model."""
    reporter, shape = make_reporter(), found["shape"]
    total, active = found["parameters"]["total"], found["parameters"]["active"]
    size = f"{total:,} parameters" + ("" if active == total else f", {active:,} active per token")
    layout = (
        f"{shape['num_hidden_layers']} layers x {shape['hidden_size']}, heads {shape['num_attention_heads']}"
        f"/{shape['num_key_value_heads']} x {shape['head_dim']}, vocabulary {shape['vocab_size']:,}"
    )
    parts = [(name, f"{n:,}", units.percent(n / total)) for name, n in found["parameters"]["by_part"].items()]
    reporter.table(
        f"{found['name']}: {size}\n{layout}, loads as {found['format']}", ("part", "count", "share"), parts
    )
    training, inference = found["memory"]["training"], found["memory"]["inference"]
    tokens = f"{found['micro_batch_tokens']:,}-token micro-batch"
    memory = [(f"training, {name}", units.size(n)) for name, n in training.items() if name != "total"]
    memory.append(
        (f"training, total (AdamW, float32, {tokens}; activations estimated)", units.size(training["total"]))
    )
    for dtype in ("float32", "bfloat16"):
        memory.append((f"inference, weights in {dtype}", units.size(inference[f"weights_{dtype}"])))
        context = f"inference, cache of {found['seq_len']:,} tokens in {dtype}"
        memory.append((context, units.size(inference[f"cache_{dtype}"])))
    reporter.table("", ("memory", ""), memory)
    work = [(kind, units.count(n)) for kind, n in found["flops_per_token"].items()]
    reporter.table("", (f"FLOPs per token at {found['seq_len']:,} tokens", ""), work)
