"""What to tell somebody who wrote a key that does not exist: the near one, ours, or the right stage.

Names of other tools are known here only, as hints; no alias is ever accepted, so that a recipe says one
thing in one way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from kllm.config.base import Section
from kllm.config.schema import find_field, leaves, paths_ending_in
from kllm.config.stages import STAGES

_TOKENS = "in tokens, not rows"
_FOLLOWS = "accumulation follows from batch_tokens / micro_batch_tokens"

ALIASES: dict[str, tuple[str, str]] = {
    # other tools' name: (ours, remark)
    "learning_rate": ("optim.lr", ""),
    "max_lr": ("optim.lr", ""),
    "min_lr": ("optim.min_lr_ratio", "a share of lr"),
    "adam_beta1": ("optim.betas", ""),
    "adam_beta2": ("optim.betas", ""),
    "beta1": ("optim.betas", ""),
    "beta2": ("optim.betas", ""),
    "adam_epsilon": ("optim.eps", ""),
    "optimizer": ("optim.name", ""),
    "lr_scheduler_type": ("optim.schedule", ""),
    "lr_scheduler": ("optim.schedule", ""),
    "scheduler": ("optim.schedule", ""),
    "warmup_ratio": ("optim.warmup", "a fraction of the steps if below 1"),
    "warmup_steps": ("optim.warmup", "a number of steps if 1 or more"),
    "lr_warmup_steps": ("optim.warmup", "a number of steps if 1 or more"),
    "num_train_epochs": ("train.epochs", ""),
    "num_epochs": ("train.epochs", ""),
    "max_steps": ("train.steps", ""),
    "max_iters": ("train.steps", ""),
    "iters": ("train.steps", ""),
    "train_iters": ("train.steps", ""),
    "num_iterations": ("train.steps", ""),
    "max_tokens": ("train.tokens", ""),
    "per_device_train_batch_size": ("train.micro_batch_tokens", _TOKENS),
    "micro_batch_size": ("train.micro_batch_tokens", _TOKENS),
    "device_batch_size": ("train.micro_batch_tokens", _TOKENS),
    "batch_size": ("train.batch_tokens", _TOKENS),
    "global_batch_size": ("train.batch_tokens", _TOKENS),
    "total_batch_size": ("train.batch_tokens", _TOKENS),
    "gradient_accumulation_steps": ("train.batch_tokens", _FOLLOWS),
    "accumulation_steps": ("train.batch_tokens", _FOLLOWS),
    "grad_clip": ("train.max_grad_norm", ""),
    "grad_clip_norm": ("train.max_grad_norm", ""),
    "clip_grad_norm": ("train.max_grad_norm", ""),
    "gradient_clip_val": ("train.max_grad_norm", ""),
    "save_steps": ("train.save_every", ""),
    "save_interval": ("train.save_every", ""),
    "steps_per_save": ("train.save_every", ""),
    "eval_steps": ("train.eval_every", ""),
    "eval_interval": ("train.eval_every", ""),
    "steps_per_eval": ("train.eval_every", ""),
    "logging_steps": ("train.log_every", ""),
    "log_interval": ("train.log_every", ""),
    "log_every_n_steps": ("train.log_every", ""),
    "save_total_limit": ("train.keep_last", ""),
    "load_best_model_at_end": ("train.keep_best", ""),
    "bf16": ("train.dtype", "bfloat16"),
    "fp16": ("train.dtype", "bfloat16 or float32"),
    "precision": ("train.dtype", ""),
    "torch_dtype": ("train.dtype", ""),
    "mixed_precision": ("train.dtype", ""),
    "torch_compile": ("train.compile", ""),
    "use_compile": ("train.compile", ""),
    "gradient_checkpointing": ("train.activation_checkpointing", ""),
    "grad_checkpoint": ("train.activation_checkpointing", ""),
    "cutoff_len": ("dataset.seq_len", ""),
    "max_seq_len": ("dataset.seq_len", ""),
    "max_seq_length": ("dataset.seq_len", ""),
    "max_length": ("dataset.seq_len", ""),
    "block_size": ("dataset.seq_len", ""),
    "sequence_len": ("dataset.seq_len", ""),
    "context_length": ("dataset.seq_len", ""),
    "sample_packing": ("dataset.packing", ""),
    "packed": ("dataset.packing", ""),
    "neat_packing": ("dataset.packing", ""),
    "val_size": ("dataset.val_fraction", ""),
    "val_set_size": ("dataset.val_fraction", ""),
    "eval_split": ("dataset.val_fraction", ""),
    "dataset_prepared_path": ("dataset.cache_dir", ""),
    "data_path": ("data", ""),
    "dataset_name": ("data", ""),
    "datasets": ("data", ""),
    "train_data": ("data", ""),
    "train_file": ("data", ""),
    "train_files": ("data", ""),
    "model_name_or_path": ("model.path", ""),
    "base_model": ("model.path", ""),
    "checkpoint_dir": ("model.path", ""),
    "from_weight": ("model.path", ""),
    "init_from": ("model.path", ""),
    "model_type": ("model.preset", ""),
    "dim": ("model.hidden_size", ""),
    "n_embd": ("model.hidden_size", ""),
    "d_model": ("model.hidden_size", ""),
    "n_layer": ("model.num_hidden_layers", ""),
    "n_layers": ("model.num_hidden_layers", ""),
    "depth": ("model.num_hidden_layers", ""),
    "n_head": ("model.num_attention_heads", ""),
    "n_heads": ("model.num_attention_heads", ""),
    "n_kv_heads": ("model.num_key_value_heads", ""),
    "n_routed_experts": ("model.num_experts", ""),
    "n_shared_experts": ("model.num_shared_experts", ""),
    "aux_loss_alpha": ("model.router_aux_loss_coef", ""),
    "use_moe": ("model.preset", "k-moe or k3-moe"),
    "tokenizer_path": ("tokenizer.path", ""),
    "tokenizer_name": ("tokenizer.path", ""),
    "template": ("tokenizer.chat_template", "a jinja file"),
    "report_to": ("log.sinks", ""),
    "use_wandb": ("log.sinks", "[wandb]"),
    "use_swanlab": ("log.sinks", "[swanlab]"),
    "wandb_project": ("log.project", ""),
    "lora_r": ("lora.rank", ""),
    "lora_rank": ("lora.rank", ""),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    "lora_target": ("lora.targets", ""),
    "target_modules": ("lora.targets", ""),
    "lora_modules": ("lora.targets", ""),
    "loraplus_lr_ratio": ("lora.lr_ratio", ""),
    "init_lora_weights": ("lora.init", ""),
    "pissa_init": ("lora.init", "pissa"),
    "load_in_4bit": ("lora.base", "int4"),
    "load_in_8bit": ("lora.base", "int8"),
    "quantization_bit": ("lora.base", "int8 or int4"),
    "loss_type": ("preference.loss", ""),
    "pref_loss": ("preference.loss", ""),
    "pref_beta": ("preference.beta", ""),
    "dpo_beta": ("preference.beta", ""),
    "pref_ftx": ("preference.rpo_alpha", ""),
    "simpo_gamma": ("preference.gamma", "a share of beta"),
    "gamma_beta_ratio": ("preference.gamma", ""),
    "ref_model": ("preference.loss", "the model as it was before the stage is the reference"),
    "teacher_model": ("teacher.path", ""),
    "teacher_model_name_or_path": ("teacher.path", ""),
    "distillation_temperature": ("distill.temperature", ""),
    "lmbda": ("distill.on_policy", ""),
}

_RECIPE_ALIASES = {
    "output_dir": "the run folder is runs/NAME, or --out DIR",
    "out_dir": "the run folder is runs/NAME, or --out DIR",
    "save_dir": "the run folder is runs/NAME, or --out DIR",
    "overwrite_output_dir": "--fresh moves an old run aside",
    "resume_from_checkpoint": "the same command again continues",
    "resume": "the same command again continues",
    "logging_dir": "logs are in the run folder",
    "do_train": "the stages say what is done",
    "num_processes": "did you mean nproc?",
    "num_gpus": "did you mean nproc?",
    "world_size": "did you mean nproc?",
    "random_seed": "did you mean seed?",
    "finetuning_type": "the stage says it: sft (all weights), lora (an adapter)",
}

_KIND_ALIASES = {
    "pt": "pretrain",
    "train": "pretrain",
    "finetune": "sft",
    "fine-tune": "sft",
    "full_sft": "sft",
    "qlora": "lora",
    "adapter": "lora",
    "preference": "dpo",
    "kto": "dpo",
    "orpo": "dpo",
    "simpo": "dpo",
    "rlhf": "dpo",
    "kd": "distill",
    "gkd": "distill",
    "distillation": "distill",
}


def nearest(word: str, known: Iterable[str], cutoff: float = 0.66) -> str | None:
    """The known word that looks most like `word`, if one does."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def kind_hint(word: str) -> str:
    """A sentence for an unknown stage kind."""
    guess = _KIND_ALIASES.get(word.lower()) or nearest(word, STAGES)
    return f", did you mean {guess}?" if guess else f", one of {', '.join(STAGES)}"


def unknown_key(kind: str | None, section: type[Section], prefix: tuple[str, ...], key: str) -> str:
    """The whole sentence about a key that `section` (at `prefix` inside a stage of `kind`) does not have.

    `kind` None means the top of the recipe.
    """
    word = key.strip().lower().replace("-", "_").lstrip("_")
    if word in section.model_fields:
        return f"unknown key, did you mean {word}?"
    if word in _RECIPE_ALIASES:
        return f"unknown key: {_RECIPE_ALIASES[word]}"
    return _elsewhere(kind, prefix, word) or _similar(kind, section, prefix, word) or _known(section)


def _own(target: str, remark: str = "") -> str:
    return f"unknown key, kllm calls it {target}" + (f" ({remark})" if remark else "")


def _elsewhere(kind: str | None, prefix: tuple[str, ...], word: str) -> str | None:
    """The key exists under this name, or another tool's name for it is known."""
    own_kind = kind or "pretrain"
    for path in paths_ending_in(own_kind, word):
        return f"unknown key here, did you mean {path if kind else f'{path} inside a stage'}?"
    if word in ALIASES:
        target, remark = ALIASES[word]
        if kind is None:
            return f"{_own(target, remark)}, inside a stage"
        if find_field(STAGES[own_kind], tuple(target.split("."))):
            return _own(target, remark)
    others = [k for k in STAGES if k != kind and _belongs(k, prefix, word)]
    if others:
        what = f"kllm calls it {ALIASES[word][0]}, and it" if word in ALIASES else "it"
        kinds = with_article(" or ".join(filter(None, (", ".join(others[:-1]), others[-1]))))
        return f"unknown key: {what} belongs to {kinds} stage" + (f", not {kind}" if kind else "")
    return None


def _belongs(kind: str, prefix: tuple[str, ...], word: str) -> bool:
    target, _ = ALIASES.get(word, ("", ""))
    known = target and find_field(STAGES[kind], tuple(target.split(".")))
    return bool(known or find_field(STAGES[kind], (*prefix, word)) or paths_ending_in(kind, word))


def with_article(kind: str) -> str:
    """`a pretrain`, `an eval`, `an sft`."""
    return f"an {kind}" if kind.startswith(("eval", "sft")) else f"a {kind}"


def _similar(kind: str | None, section: type[Section], prefix: tuple[str, ...], word: str) -> str | None:
    """A misspelt key: of this section first, then of the stage, then of another tool."""
    near = nearest(word, section.model_fields)
    if near:
        return f"unknown key, did you mean {near}?"
    stage = STAGES[kind or "pretrain"]
    names = {leaf.path[-1]: leaf.key for leaf in leaves(stage)}
    for alias, (target, _) in ALIASES.items():
        if find_field(stage, tuple(target.split("."))):
            names[alias] = target
    near = nearest(word, names, cutoff=0.75)
    if near:
        return f"unknown key, did you mean {names[near]}{'' if kind else ' inside a stage'}?"
    return None


def _known(section: type[Section]) -> str:
    names = list(section.model_fields)
    shown = ", ".join(names[:14]) + (" ..." if len(names) > 14 else "")
    return f"unknown key, known here: {shown}"
