"""From what the command line names to models that are served: read, change, quantise, name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kllm.errors import KllmError, UserError
from kllm.serve.adapters import beside, check_reference, read_reference
from kllm.serve.errors import ApiError
from kllm.serve.ops import kllm_version
from kllm.serve.registry import Registry, Served
from kllm.serve.runtime import EngineRuntime
from kllm.serve.settings import Settings
from kllm.serve.sources import Source, default_name

if TYPE_CHECKING:
    import torch

    from kllm.engine.engine import Engine
    from kllm.model.presets import ModelShape
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]

_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")
_OPTIONS = ("max_context", "prefill_chunk", "speculate", "kv_dtype", "kv_memory", "draft", "device", "dtype")


@dataclass(frozen=True)
class LoadOptions:
    """How models are read and run; see the flags of `kllm serve`."""

    device: str = "auto"
    dtype: str = "auto"
    max_context: int | None = None
    kv_memory: int | None = 512 << 20
    kv_dtype: str = "auto"
    prefill_chunk: int | None = None
    prefix_cache: bool = True
    quant: str = "none"
    rope_scaling: str | None = None
    factor: float | None = None
    speculate: int = 0
    draft: str | None = None


def check(sources: Iterable[Source], options: LoadOptions) -> None:
    """What can be seen to be wrong without the network; and without torch, if there is no adapter.

    Raises:
        UserError: no such model, adapter, draft or device; another model's adapter.
    """
    from kllm.export.hub import is_hub_id
    from kllm.export.resolve import resolve

    if not _DEVICE.fullmatch(options.device):
        known = "auto, cpu, cuda, cuda:1, mps"
        raise UserError(f"unknown device {options.device!r}", where="flag --device", hint=known)
    for source in sources:
        local = Path(source.path).expanduser().exists() or not is_hub_id(source.path)
        place = resolve(source.path) if local else None
        if source.adapter is not None:
            check_reference(source.adapter, place)
    draft = options.draft
    if draft is not None and (Path(draft).expanduser().exists() or not is_hub_id(draft)):
        with _flags(options):
            resolve(draft)


@contextlib.contextmanager
def _flags(options: LoadOptions) -> Iterator[None]:
    """Errors in what a flag gave name the flag: `flag --draft nope: ...`."""
    try:
        yield
    except KllmError as error:
        place = (error.where or "").replace("-", "_")
        if place in _OPTIONS:
            error.where = f"flag --{place.replace('_', '-')}"
        elif error.where is not None and error.where == options.draft:
            error.where = f"flag --draft {error.where}"
        raise


def load_all(
    sources: Iterable[Source],
    options: LoadOptions,
    settings: Settings,
    registry: Registry,
    *,
    say: Say,
    on_dead: Callable[[], None] | None = None,
) -> None:
    """Loads every source into `registry`, then opens it.

    Raises:
        UserError, KllmError: a model that cannot be served.
    """
    draft = _draft(options)
    every = list(sources)
    for source in (one for one in every if one.adapter is None):
        mine = {
            one.name: one.adapter for one in every if one.adapter is not None and one.parent == source.name
        }
        for served in load_with_adapters(
            source, mine, options, settings, draft=draft, say=say, on_dead=on_dead
        ):
            registry.add(served)
            for line in served.lines:
                say(f"{served.name}: {line}")
    registry.open()


def load_one(
    source: Source,
    options: LoadOptions,
    settings: Settings,
    *,
    draft: Transformer | None = None,
    say: Say = lambda line: None,
    on_dead: Callable[[], None] | None = None,
) -> Served:
    """One model, ready to answer."""
    return load_with_adapters(source, {}, options, settings, draft=draft, say=say, on_dead=on_dead)[0]


def load_with_adapters(
    source: Source,
    adapters: Mapping[str, str],
    options: LoadOptions,
    settings: Settings,
    *,
    draft: Transformer | None,
    say: Say,
    on_dead: Callable[[], None] | None,
) -> list[Served]:
    """One model, ready to answer, and the adapters on it: name -> where it is."""
    from kllm.export.load import generation_defaults
    from kllm.export.resolve import resolve
    from kllm.model.presets import count_parameters

    place = resolve(source.path)
    model, tokenizer = _model(source, place, options, say)
    encoder = _encoder(tokenizer, source)
    fingerprint = _fingerprint(model, options)
    context = model.shape.max_position_embeddings
    if options.max_context is not None and options.max_context > context:
        say(f"warning: --max-context {options.max_context}: the model has {context:,}")
    numbers = str(next(model.parameters()).dtype).removeprefix("torch.")
    engine = build_engine(model, tokenizer, options, settings, draft)
    weights = {name: read_reference(place, engine.shape) for name, place in adapters.items()}
    for name, one in weights.items():
        engine.add_adapter(name, one)
    runtime = EngineRuntime(engine, encoder=encoder, settings=settings, on_dead=on_dead)
    threading.Thread(target=_warm, args=(runtime,), name="grammars", daemon=True).start()
    size = f"{count_parameters(engine.shape):,} parameters, {numbers} on {engine.device}"
    lines = [f"{size}, context {engine.max_context:,}", engine.kv_line()]
    lines += [line for line in [*_chosen(options), _kernels(engine)] if line]
    if settings.tools and encoder is not None and not encoder.shows([t.schema() for t in settings.tools]):
        lines.append("warning: its chat template shows it no tools: it will not call any")
    served = Served(
        name=source.name,
        runtime=runtime,
        root=default_name(source.path),
        fingerprint=fingerprint,
        generation=generation_defaults(place),
        lines=tuple(lines),
    )
    return [served, *(beside(served, name, one) for name, one in weights.items())]


def _warm(runtime: EngineRuntime) -> None:
    """Reads the vocabulary for grammars before the first one is asked for: a large one takes seconds."""
    with contextlib.suppress(ApiError, UserError):  # the request that wants a grammar will hear it
        _ = runtime.compiler.vocabulary


def build_engine(
    model: Transformer,
    tokenizer: Tokenizer,
    options: LoadOptions,
    settings: Settings,
    draft: Transformer | None = None,
) -> Engine:
    """The engine as the options want it; it may take the model apart."""
    from kllm.engine.engine import Engine

    dtype = model.head_weight.dtype
    try:
        with _flags(options):
            return Engine(
                model,
                tokenizer,
                max_batch=settings.max_running,
                max_context=options.max_context,
                kv_memory=options.kv_memory,
                kv_dtype=options.kv_dtype,
                prefill_chunk=options.prefill_chunk,
                prefix_cache=options.prefix_cache,
                weights="auto" if options.quant == "none" else options.quant,
                speculate=options.speculate,
                draft=draft,
                owns_model=True,
            )
    except UserError as error:
        if error.where != "flag --kv-memory":
            raise
        least = _least_memory(model.shape, options, dtype, draft is not None)
        message = f"{options.kv_memory:,} bytes are too few, at least {least:,}"
        raise UserError(message, where=error.where, hint="sizes like 512MiB") from None


def _least_memory(shape: ModelShape, options: LoadOptions, dtype: torch.dtype, draft: bool) -> int:
    """Bytes of keys and values below which the engine has no row at all."""
    import torch

    from kllm.engine.kvformat import kv_format
    from kllm.engine.rows import Rows

    longest = min(options.max_context or shape.max_position_embeddings, shape.max_position_embeddings)
    rows = Rows(
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        kv_format(options.kv_dtype, shape.head_dim, dtype),
        max_length=longest,
        budget=0,
        device=torch.device("cpu"),
    )
    tokens = 1
    while not rows.longest:
        tokens *= 2
        rows.budget = tokens * rows.token_bytes
    return -(-rows.budget * 4 // 3) if draft else rows.budget  # the draft's have a quarter


def _model(source: Source, place: Path, options: LoadOptions, say: Say) -> tuple[Transformer, Tokenizer]:
    from kllm.export.load import load_model

    device, dtype = _device(options)
    model, tokenizer = load_model(place, device, dtype, say=say)
    if tokenizer is None:
        hint = f"kllm convert {source.path} OUT --tokenizer DIR gives it one"
        raise UserError("the model has no tokenizer beside it", where=source.path, hint=hint)
    if options.rope_scaling is not None and options.factor is not None:
        model = stretched(model, options.rope_scaling, options.factor)
    return model.eval(), tokenizer


def _draft(options: LoadOptions) -> Transformer | None:
    if options.draft is None:
        return None
    from kllm.export.load import load_model

    with _flags(options):
        return load_model(options.draft, *_device(options), tokenizer=False)[0].eval()


def _device(options: LoadOptions) -> tuple[torch.device, torch.dtype]:
    from kllm.train.device import pick_device, pick_dtype

    with _flags(options):
        device = pick_device(options.device)
    return device, pick_dtype(options.dtype, device)


def stretched(model: Transformer, kind: str, factor: float) -> Transformer:
    """The same weights with `factor` times the positions (YaRN, Peng et al. 2023, or linear).

    Raises:
        UserError: the model is stretched already.
    """
    import torch

    from kllm.model.transformer import Transformer

    shape = model.shape
    if shape.rope_scaling is not None:
        raise UserError(
            f"the model has rope_scaling {shape.rope_scaling['rope_type']} already",
            where="flag --rope-scaling",
        )
    length = shape.max_position_embeddings
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = length
    with torch.device("meta"):
        longer = Transformer(shape.with_(rope_scaling=scaling, max_position_embeddings=int(length * factor)))
    longer.load_state_dict(model.state_dict(), assign=True)
    if shape.tie_word_embeddings:
        longer.lm_head.weight = longer.model.embed_tokens.weight
    return longer.to(model.head_weight.device)


def _encoder(tokenizer: Tokenizer, source: Source) -> Any:
    from kllm.tokenizer.chat import ChatEncoder

    try:
        return ChatEncoder(tokenizer)
    except UserError as error:
        if tokenizer.chat_template is not None:
            raise UserError(error.message, where=f"{source.path}, chat template", hint=error.hint) from None
        return None


def _chosen(options: LoadOptions) -> Iterator[str]:
    """What was asked for beyond the usual, in words."""
    if options.kv_dtype != "auto":
        yield f"keys and values in {options.kv_dtype}"
    if options.rope_scaling is not None and options.factor is not None:
        kind = {"yarn": "YaRN"}.get(options.rope_scaling, options.rope_scaling)
        yield f"positions stretched {options.factor:g} times ({kind})"
    if options.draft is not None:
        yield f"guesses {options.speculate or 4} tokens ahead with {options.draft}"
    elif options.speculate:
        plural = "" if options.speculate == 1 else "s"
        yield f"guesses {options.speculate} token{plural} ahead from the text so far"


def _kernels(engine: Engine) -> str:
    """What computes, in words, if the engine tells."""
    line = getattr(engine.prepared, "kernel_line", None)
    return str(line()) if callable(line) else ""


def _fingerprint(model: Transformer, options: LoadOptions) -> str:
    """Of the weights and of every option that changes what is computed."""
    import torch

    kept = (options.quant, options.kv_dtype, options.rope_scaling, options.factor)
    whole = hashlib.sha256(json.dumps([kllm_version(), kept, str(model.shape)]).encode())
    for name, tensor in model.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return f"kllm-{kllm_version()}-{whole.hexdigest()[:12]}"
