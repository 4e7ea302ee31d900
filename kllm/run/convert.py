"""`kllm convert`: load anything, change what was asked for, write it, prove it, say so in its card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kllm.errors import UserError
from kllm.export import hub
from kllm.export.load import load_model
from kllm.export.resolve import resolve
from kllm.export.resolve_adapter import check_unmerged, resolve_adapter
from kllm.export.tokenizers import load_tokenizer, tokenizer_of
from kllm.files import new_directory, new_file
from kllm.model.transformer import Transformer
from kllm.run.convert_adapter import base_of, keep_adapter, split_weight, to_peft
from kllm.run.exportcard import export_card
from kllm.run.hffolder import HfOptions, hf_folder
from kllm.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What is asked for; see `kllm convert --help`."""

    source: str
    out: Path
    to: str = "hf"
    """hf (kllm is the same), torch (a MiniMind-named .pth) or peft (a LoRA file as a PEFT folder)."""
    options: HfOptions = field(default_factory=HfOptions)
    tokenizer: str | None = None
    rope_scaling: str | None = None
    factor: float | None = None
    adapters: tuple[str, ...] = ()
    """Each PATH or PATH@WEIGHT; merged into the model, the sum of their changes times their weights."""
    merge: bool = False
    """The source is an adapter: it is merged into its base model."""
    keep_adapter: bool = False
    base: str | None = None
    """What a PEFT folder, written or kept, names as its base model, or the model that `merge` merges into."""
    push: str | None = None
    private: bool = False
    overwrite: bool = False
    assume: Mapping[str, Any] = field(default_factory=dict)


def convert(job: Conversion, say: Say = lambda line: None) -> dict[str, Any]:
    """Does the conversion and returns its report (what was written, how it compares).

    Nothing appears at `job.out` before it was verified.

    Raises:
        UserError, KllmError: bad input, or what was written cannot be verified.
    """
    if job.merge:
        job = _into_base(job)
    _check(job)
    report: dict[str, Any] = {"source": job.source, "out": str(job.out), "to": job.to}
    if job.to == "peft":
        heads = job.assume.get("num_attention_heads")
        return report | to_peft(job.source, job.out, job.base or "", heads)
    place = resolve(job.source)
    model, tokenizer = load_model(place, assume=job.assume, tokenizer=_wants_tokenizer(job), say=say)
    if job.tokenizer is not None:
        tokenizer = _replaced_tokenizer(place, say)
    model, tokenizer = _change(job, model.eval(), tokenizer, report)
    if job.options.quant is not None and tokenizer is None:
        raise UserError("quantising needs a tokenizer, to read texts", job.source, "--tokenizer DIR")
    if change := report.get("vocabulary"):
        say(f"vocabulary: {change['kept']:,} of {change['rows']:,} rows kept")
    if job.to == "torch":
        return report | _torch(job, model, say)
    with new_directory(job.out) as aside:
        report |= hf_folder(model, tokenizer, aside, job.options, say)
        if job.keep_adapter:
            keep_adapter(job.adapters[0], model, aside / "adapter", job.base or str(job.out.resolve()))
            report["adapter"] = str(job.out / "adapter")
        card = export_card(job.out.name, job.source, report)
        (aside / "README.md").write_text(card, encoding="utf-8")
    if job.push is not None:
        report["pushed"] = hub.push(job.out, job.push, private=job.private)
    return report


def _into_base(job: Conversion) -> Conversion:
    """`RUN OUT --merge` as `BASE OUT --adapter RUN`."""
    for flag, wrong in (("--keep-adapter", job.keep_adapter), ("--to peft", job.to == "peft")):
        if wrong:
            raise UserError(f"--merge makes one model, {flag} does not", where="flag --merge")
    resolve_adapter(job.source)
    base = job.base or base_of(job.source)
    return replace(job, source=base, adapters=(f"{job.source}@1", *job.adapters), merge=False, base=None)


def _wants_tokenizer(job: Conversion) -> bool:
    """The source's own is read, and refused when it is broken, only if it goes into the result."""
    return job.to != "torch" and job.tokenizer is None


def _replaced_tokenizer(place: Path, say: Say) -> Tokenizer | None:
    """The source's own tokenizer, which tells the rows to keep; a broken one is what --tokenizer cures."""
    try:
        return tokenizer_of(place)
    except UserError as e:
        say(f"rows are kept as they are, for the model's own tokenizer cannot be read: {e}")
        return None


def _check(job: Conversion) -> None:
    if job.push is not None:
        if job.to not in ("hf", "kllm"):
            raise UserError(f"only a Hugging Face folder is pushed, not --to {job.to}", where="flag --push")
        hub.check_repo(job.push)
    if (job.rope_scaling is None) != (job.factor is None):
        raise UserError("--rope-scaling and --factor belong together", hint="--rope-scaling yarn --factor 4")
    if job.factor is not None and job.factor <= 1:
        raise UserError(f"must be above 1, got {job.factor:g}", where="flag --factor")
    if job.keep_adapter and (len(job.adapters) != 1 or split_weight(job.adapters[0])[1] != 1):
        raise UserError("--keep-adapter keeps one adapter as it is", hint="--adapter PATH, once")
    _check_flags(job)
    if Path(job.source).exists() and job.out.exists() and _place(job) == job.out.resolve():
        raise UserError("source and result are the same", where=str(job.out), hint="name another OUT")
    adapters = [split_weight(text)[0] for text in job.adapters]
    for adapter in adapters:
        check_unmerged(job.source, adapter)
    for given in (job.source, *adapters, job.tokenizer, job.options.calibrate):
        if given is not None and Path(given).exists() and job.out.resolve() in Path(given).resolve().parents:
            # it would be replaced, with what is read from it
            raise UserError(f"{given} lies in it", where=str(job.out), hint="name another OUT")
    if job.to == "torch":
        _check_file(job)
    else:
        _check_folder(job)


def _check_flags(job: Conversion) -> None:
    """Flags that would be taken and do nothing."""
    folder, options = job.to in ("hf", "kllm"), job.options
    wrong = {
        "--quant": options.quant is not None and not folder,
        "--keep-adapter": job.keep_adapter and not folder,
        "--adapter": bool(job.adapters) and job.to == "peft",
        "--tokenizer": job.tokenizer is not None and job.to == "peft",
        "--rope-scaling": job.rope_scaling is not None and job.to == "peft",
        "--base": job.base is not None and job.to != "peft" and not job.keep_adapter,
        "--group-size": options.group_size is not None and options.quant is None,
        "--calibrate": options.calibrate is not None and options.quant is None,
    }
    for flag, meaningless in wrong.items():
        if meaningless:
            needs = "--quant" if flag in ("--group-size", "--calibrate") and folder else "another --to"
            raise UserError(f"does nothing with --to {job.to}", where=f"flag {flag}", hint=f"needs {needs}")
    if options.quant == "awq" and options.dtype == "bfloat16":
        raise UserError("awq is kept in float16", where="flag --dtype", hint="leave --dtype out")


def _place(job: Conversion) -> Path:
    source = Path(job.source)
    return (source if job.to == "peft" else resolve(source)).resolve()


def _check_file(job: Conversion) -> None:
    if job.out.is_dir() or job.out.suffix not in (".pth", ".pt"):
        raise UserError("one file is written, named .pth", where=str(job.out), hint=f"{job.out}.pth")
    if job.out.exists() and not job.overwrite:
        raise UserError("is there already", where=str(job.out), hint="--overwrite, or name a new file")


def _check_folder(job: Conversion) -> None:
    if job.out.is_file():
        raise UserError("is a file; a directory is written", where=str(job.out), hint="name a new folder")
    if job.out.is_dir() and any(job.out.iterdir()):
        marks = ("config.json", "adapter_config.json")
        if not any((job.out / mark).is_file() for mark in marks):  # never replace what is no model
            raise UserError("is there and holds no model", where=str(job.out), hint="name a new folder")
        if not job.overwrite:
            raise UserError("is there already", where=str(job.out), hint="--overwrite, or name a new folder")


def _change(
    job: Conversion, model: Transformer, tokenizer: Tokenizer | None, report: dict[str, Any]
) -> tuple[Transformer, Tokenizer | None]:
    if job.adapters:
        from kllm.export.adapter import adapter_targets, merge_adapters, read_adapter

        if job.keep_adapter:  # written at the end, refused now
            kept = job.adapters[0]
            adapter_targets(model, read_adapter(kept, model.shape.head_dim), kept)
        else:
            report["merged"] = merge_adapters(model, [split_weight(text) for text in job.adapters])
    if job.tokenizer is not None:
        new = load_tokenizer(job.tokenizer)
        if tokenizer is None:  # weights alone: the tokenizer they were trained with
            _fits(new, model, job.tokenizer)
        else:
            from kllm.export.vocabulary import change_vocabulary

            model, change = change_vocabulary(model, tokenizer, new)
            report["vocabulary"] = change.to_dict()
        tokenizer = new
    if job.rope_scaling is not None and job.factor is not None:
        model = _stretch(model, job.rope_scaling, job.factor)
    return model, tokenizer


def _fits(tokenizer: Tokenizer, model: Transformer, where: str) -> None:
    if tokenizer.vocab_size > model.shape.vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size:,} tokens, the model {model.shape.vocab_size:,} rows",
            where=where,
            hint="give the one that the model was trained with",
        )


def _stretch(model: Transformer, kind: str, factor: float) -> Transformer:
    """The same weights with longer positions; they must not be stretched already."""
    shape = model.shape
    if shape.rope_scaling is not None:
        raise UserError(f"the model has rope_scaling {shape.rope_scaling['rope_type']} already")
    length = shape.max_position_embeddings
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = length
    longer = Transformer(shape.with_(rope_scaling=scaling, max_position_embeddings=int(length * factor)))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


def _torch(job: Conversion, model: Transformer, say: Say) -> dict[str, Any]:
    """A .pth, read again and compared bit by bit."""
    from kllm.export.pth import minimind_config, write_pth
    from kllm.export.verify import same_weights

    with new_file(job.out) as aside:
        write_pth(model, aside, job.options.dtype)
        if job.options.verify is not False:
            same_weights(model, load_model(aside, tokenizer=False)[0], job.options.dtype, job.out)
    try:
        generation, config = minimind_config(model.shape)
        say(f"{generation} runs it with {json.dumps(config)}")
    except UserError as e:
        say(f"MiniMind's own code does not run it: {e.message}")
    return {
        "parameters": model.num_parameters(),
        "dtype": job.options.dtype,
        "bytes": job.out.stat().st_size,
    }
