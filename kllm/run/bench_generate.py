"""`kllm bench generate`: how fast this engine generates, beside others with the same weights and prompts.

All take turns in one process (llama.cpp in a child of its own), in processor seconds and by the clock.
Beside the speed stands what it costs: the perplexity of the same engine with the same weights.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kllm.errors import KllmError, UserError
from kllm.export import llamacpp
from kllm.export.gguf_write import GgufInfo, write_gguf
from kllm.export.load import load_model
from kllm.model.presets import PRESETS, get_preset
from kllm.model.transformer import Transformer
from kllm.run import bench
from kllm.run.bench import TEXTS, texts_of
from kllm.run.bench_peers import LlamaCppPeer, Ours, Peer, Task, Transformers, has_transformers, same_share
from kllm.run.bench_quality import WEIGHTS, perplexities
from kllm.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]
PEERS = ("transformers", "llama.cpp")
BASELINE = "transformers fp32"
QUANTS = ("f32", "q8_0")
SHARED_STREAMS, SHARED_PROMPT, SHARED_NEW = 16, 64, 16


@dataclass(frozen=True)
class GenerateBench:
    """What is asked for; see `kllm bench generate --help`. `model` is a model, or `preset` a shape."""

    model: str | None = None
    preset: str | None = None
    streams: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 8
    new_tokens: int = 48
    rounds: int = 5
    weights: tuple[str, ...] = ("fp32", "int8")
    threads: int = 1
    peers: tuple[str, ...] = PEERS
    shared: bool = True
    perplexity: bool = True
    text: str | None = None


def bench_generate(job: GenerateBench, say: Say = lambda line: None) -> dict[str, Any]:
    """Measures and returns the report: model, machine, peers, one entry per task, perplexity.

    Raises:
        UserError, KllmError: bad values, no such model, a peer that fails while it runs.
    """
    _check(job)
    model, tokenizer, name = _model(job, say)
    tasks = _tasks(job, model.shape.vocab_size, tokenizer)
    _check_context(tasks, model)
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kllm-bench-")))
            peers, absent = _peers(job, model, tokenizer, tasks, scratch, say)
            for peer in peers:
                stack.callback(peer.close)
            readers = {peer.name: reader for peer in peers if (reader := _reader(peer))}
            measured = [_measure(task, peers, job.rounds, say) for task in tasks]
        costs = _perplexities(job, model, tokenizer, say) if job.perplexity else {}
    finally:
        torch.set_num_threads(before)
    return {
        "bench": "generate",
        "model": name,
        "parameters": model.num_parameters(),
        "machine": bench.machine(),
        "settings": {k: v for k, v in asdict(job).items() if k not in ("model", "preset")},
        "readers": readers,
        "absent": absent,
        "tasks": measured,
        "aggregate": _aggregate(measured),
        "perplexity": costs,
    }


def _check(job: GenerateBench) -> None:
    if job.model is not None and job.preset is not None:
        raise UserError("MODEL and --preset exclude each other")
    if job.model is None and job.preset is None:
        raise UserError("name a model, or --preset NAME for random weights")
    counts = [("streams", s) for s in job.streams] + [
        (name, getattr(job, name)) for name in ("prompt_tokens", "new_tokens", "rounds", "threads")
    ]
    for name, count in counts:
        if count < 1:
            raise UserError(f"must be at least 1, got {count}", where=f"flag --{name.replace('_', '-')}")
    for name, known in (("weights", WEIGHTS), ("peers", PEERS)):
        for value in getattr(job, name):
            if value not in known:
                raise UserError(f"unknown: {value!r}", f"flag --{name}", f"known: {', '.join(known)}")
    if not (job.weights and job.streams):
        raise UserError("nothing to measure", hint="--weights fp32 --streams 1")
    if job.text is not None:
        _check_text(job.text)


def _check_text(where: str) -> None:
    """Texts are read at the end; that there are any is known before the work begins."""
    try:
        found = next(texts_of(where), None)
    except UserError as error:
        raise UserError(str(error), where="flag --text") from None
    if found is None:
        raise UserError(f"no text in {where}", where="flag --text")


def _model(job: GenerateBench, say: Say) -> tuple[Transformer, Tokenizer | None, str]:
    if job.preset is not None:
        get_preset(job.preset)
        model = Transformer(PRESETS[job.preset])
        model.init_weights(0)
        return model.eval(), None, f"{job.preset} (random weights)"
    assert job.model is not None
    model, tokenizer = load_model(job.model, say=say)
    return model.eval(), tokenizer, job.model


def _tasks(job: GenerateBench, vocab: int, tokenizer: Tokenizer | None) -> list[Task]:
    """Prompts: pieces of built-in text (drawn tokens without a tokenizer), the same for everybody."""
    wanted = sum(job.streams) * job.prompt_tokens + SHARED_PROMPT
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(10, vocab - 1), vocab, (wanted,), generator=generator).tolist()
    else:
        ids = []
        for text in texts_of(TEXTS):
            ids += tokenizer.encode(text)
            if len(ids) >= wanted:
                break
    left = iter(ids)

    def prompts(count: int, length: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(islice(left, length)) for _ in range(count))

    tasks = []
    for streams in job.streams:
        name = f"{streams} stream{'s' if streams > 1 else ''}"
        tasks.append(Task(name, prompts(streams, job.prompt_tokens), job.new_tokens))
    if job.shared:
        name = f"shared prefix: {SHARED_STREAMS} samples of one {SHARED_PROMPT}-token prompt"
        tasks.append(Task(name, prompts(1, SHARED_PROMPT) * SHARED_STREAMS, SHARED_NEW, shared=True))
    return tasks


def _check_context(tasks: Sequence[Task], model: Transformer) -> None:
    limit = model.shape.max_position_embeddings
    for task in tasks:
        if task.longest > limit:
            message = f"{task.name}: {task.longest} tokens, the model's context is {limit}"
            raise UserError(message, hint="fewer --new-tokens or --prompt-tokens, or --no-shared")


def _peers(
    job: GenerateBench,
    model: Transformer,
    tokenizer: Tokenizer | None,
    tasks: Sequence[Task],
    scratch: Path,
    say: Say,
) -> tuple[list[Peer], list[str]]:
    """Everybody who can take part, and a line for each who cannot."""
    streams, context = max(len(t.prompts) for t in tasks), max(t.longest for t in tasks)
    absent: list[str] = []
    peers: list[Peer] = [Ours(model, weights, streams=streams, context=context) for weights in job.weights]
    if "transformers" in job.peers:
        if has_transformers():
            say("loading into transformers")
            try:
                peers.append(Transformers(model, scratch / "hf"))
            except KllmError as error:
                absent.append(f"transformers is left out: {error}")
        else:
            absent.append("transformers is not installed: pip install transformers")
    module = llamacpp.available() if "llama.cpp" in job.peers else None
    if module is not None:
        try:
            peers += _llama_peers(job, module, model, tokenizer, streams, context, scratch, say)
        except KllmError as error:
            absent.append(f"llama.cpp is left out: {error}")
    elif "llama.cpp" in job.peers:
        absent.append("llama.cpp is not installed: pip install llama-cpp-python, or --no-deps xllamacpp")
    for line in absent:
        say(line)
    return peers, absent


def _llama_peers(
    job: GenerateBench,
    module: str,
    model: Transformer,
    tokenizer: Tokenizer | None,
    streams: int,
    context: int,
    scratch: Path,
    say: Say,
) -> list[Peer]:
    from kllm.run.bench_llamacpp import LlamaCpp

    found: list[Peer] = []
    try:
        for quant in QUANTS:
            say(f"loading into llama.cpp as {quant}")
            path = scratch / f"model-{quant}.gguf"
            write_gguf(model, tokenizer or _stand_in(model), path, quant, GgufInfo("bench"))
            child = LlamaCpp(module, path, threads=job.threads, streams=streams, context=context)
            found.append(LlamaCppPeer(child, quant))
    except KllmError:
        for peer in found:
            peer.close()
        raise
    return found


def _stand_in(model: Transformer) -> Tokenizer:
    """A GGUF file needs a tokenizer; the bench feeds ids, so any that fits will do."""
    from kllm.tokenizer.train import train_tokenizer

    texts = list(islice(texts_of(TEXTS), 200))
    return train_tokenizer(texts, min(model.shape.vocab_size, 512), max_bytes=1_000_000)[0]


def _reader(peer: Peer) -> str | None:
    if isinstance(peer, Transformers):
        return f"transformers {peer.version}"
    if isinstance(peer, LlamaCppPeer):
        return peer.child.reader
    return peer.engine.prepared.kernel_line() if isinstance(peer, Ours) else None


def _measure(task: Task, peers: Sequence[Peer], rounds: int, say: Say) -> dict[str, Any]:
    """One task by everybody: seconds, rates, ratios beside the baseline."""
    said: dict[str, list[list[int]]] = {}

    def work(peer: Peer) -> bench.Work:
        def one(number: int) -> bench.Cost | None:
            cost, tokens = peer.run(task, number)
            said.setdefault(peer.name, tokens)
            if any(len(row) != task.new_tokens for row in tokens):
                raise KllmError(f"{peer.name} gave fewer tokens than it was asked for", where=task.name)
            return cost

        return one

    say(task.name)
    costs = bench.interleave({p.name: work(p) for p in peers}, rounds)
    rows = []
    for peer in peers:
        row = _row(peer.name, task, costs[peer.name], costs.get(BASELINE))
        if peer.computed is not None:
            row["prompt_tokens_computed"] = peer.computed
        if not task.shared and BASELINE in said:
            row["same_tokens"] = same_share(said[peer.name], said[BASELINE])
        rows.append(row)
    return {
        "name": task.name,
        "streams": len(task.prompts),
        "prompt_tokens": len(task.prompts[0]),
        "new_tokens": task.new_tokens,
        "shared": task.shared,
        "rows": rows,
    }


def _row(name: str, task: Task, costs: bench.Costs, baseline: bench.Costs | None) -> dict[str, Any]:
    cpu, wall = costs.spread("cpu"), costs.spread("wall")
    row: dict[str, Any] = {
        "engine": name,
        "cpu_s": cpu,
        "wall_s": wall,
        "cpu_ms_per_token": {k: 1e3 * v / task.tokens for k, v in cpu.items()},
        "tok_s": {"best": task.tokens / wall["min"], "median": task.tokens / wall["median"]},
    }
    if baseline is not None:
        theirs = baseline.spread("cpu"), baseline.spread("wall")
        row["ratio"] = {"cpu": theirs[0]["min"] / cpu["min"], "wall": theirs[1]["min"] / wall["min"]}
        # neighbours in time saw the same machine
        pairs = [b.cpu / a.cpu for a, b in zip(costs.rounds, baseline.rounds, strict=True)]
        row["ratio"]["cpu_paired_median"] = statistics.median(pairs)
    return row


def _aggregate(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times the tokens per CPU second of one stream the most streams reach, by engine."""
    plain = sorted((t for t in tasks if not t["shared"]), key=lambda t: int(t["streams"]))
    if len(plain) < 2 or plain[0]["streams"] != 1:
        return {}
    first = {row["engine"]: row["cpu_ms_per_token"]["min"] for row in plain[0]["rows"]}
    last = {row["engine"]: row["cpu_ms_per_token"]["min"] for row in plain[-1]["rows"]}
    return {"streams": plain[-1]["streams"], "ratio": {name: first[name] / last[name] for name in first}}


def _perplexities(
    job: GenerateBench, model: Transformer, tokenizer: Tokenizer | None, say: Say
) -> dict[str, Any]:
    if tokenizer is not None:
        return perplexities(model, tokenizer, job.text or TEXTS, say)
    why = "random weights have none worth measuring" if job.preset else "the model has no tokenizer"
    say(f"no perplexity: {why}")
    return {}
