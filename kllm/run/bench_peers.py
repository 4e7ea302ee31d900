"""Who is measured by `kllm bench generate`: our engine, transformers, llama.cpp; one interface for all."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kllm.engine.engine import Engine
from kllm.engine.params import SamplingParams
from kllm.errors import KllmError
from kllm.export.hf import save_model
from kllm.run.bench import Cost

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.run.bench_llamacpp import LlamaCpp


@dataclass(frozen=True)
class Task:
    """A piece of work: every prompt is continued by `new_tokens`, all at once, whatever ends a text.

    `shared`: the prompts are one and the same, sampled at temperature 1; otherwise greedy.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    shared: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of all streams together."""
        return len(self.prompts) * self.new_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence at its end."""
        return max(map(len, self.prompts)) + self.new_tokens


class Peer(Protocol):
    """Something that can do a task."""

    name: str
    computed: int | None
    """Prompt tokens that went through the model in the last run; None if it does not say."""

    def run(self, task: Task, number: int) -> tuple[Cost | None, list[list[int]]]:
        """One round: its own cost (None: the caller's clocks hold) and the new tokens of every stream."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class Ours:
    """This engine over `model`, its weights laid out as asked (`fp32`, `int8`, `int4`)."""

    def __init__(self, model: Transformer, weights: str, *, streams: int, context: int) -> None:
        self.name = f"kllm {weights}"
        self.computed: int | None = None
        self.engine = Engine(model, None, max_batch=streams, max_context=context, weights=weights)

    def run(self, task: Task, number: int) -> tuple[Cost | None, list[list[int]]]:
        # a salt of its own keeps a round from finding the prompts of the one before
        salt = f"{task.name}/{number}"
        params = [
            SamplingParams(
                max_tokens=task.new_tokens,
                temperature=1.0 if task.shared else 0.0,
                top_p=1.0,
                seed=k,
                ignore_eos=True,
                salt=salt,
            )
            for k in range(len(task.prompts))
        ]
        done = self.engine.generate([list(p) for p in task.prompts], params)
        self.computed = sum(c.prompt_tokens - c.cached_tokens for c in done)
        return None, [c.token_ids for c in done]

    def close(self) -> None:
        del self.engine


class Transformers:
    """transformers' `generate`: SDPA, float32, its dynamic cache, nothing ends a text early.

    Args:
        model: its weights are written to `scratch` and read back by transformers.

    Raises:
        KllmError: transformers refuses them.
    """

    def __init__(self, model: Transformer, scratch: Path) -> None:
        import transformers

        self.name = "transformers fp32"
        self.version: str = transformers.__version__
        self.computed: int | None = None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        save_model(model, None, scratch)
        try:
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                scratch,
                dtype=torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=False,
                local_files_only=True,
            ).eval()
        except Exception as e:  # whatever it raises: this peer cannot take part
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            raise KllmError(f"transformers {self.version} cannot load it: {reason}") from e
        self.model.generation_config.eos_token_id = None  # cheaper than forbidding it at every step
        self._check_cache()

    def _check_cache(self) -> None:
        """KllmError unless generate keeps keys and values: without, a token pays for all before it."""
        row = torch.tensor([[1, 2, 3]])
        seen: list[int] = []
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: seen.append(int(inputs[0].shape[1]))
        )
        try:
            found = self._generate(row, 4, return_dict_in_generate=True)
        finally:
            hook.remove()
        kind = type(found.past_key_values).__name__
        if kind != "DynamicCache" or seen != [3, 1, 1, 1]:
            raise KllmError(f"transformers does not use its cache: {kind}, {seen} tokens a step")

    def _generate(self, rows: torch.Tensor, new_tokens: int, **how: Any) -> Any:
        with torch.inference_mode():
            return self.model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **({"do_sample": False, "use_cache": True} | how),
            )

    def run(self, task: Task, number: int) -> tuple[Cost | None, list[list[int]]]:
        if task.shared:
            rows = torch.tensor([task.prompts[0]])
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            out = self._generate(rows, task.new_tokens, num_return_sequences=len(task.prompts), **how)
        else:
            rows = torch.tensor(task.prompts)
            out = self._generate(rows, task.new_tokens)
        self.computed = len(task.prompts) * rows.shape[1]
        return None, out[:, rows.shape[1] :].tolist()

    def close(self) -> None:
        del self.model


class LlamaCppPeer:
    """llama.cpp over a GGUF file of the same weights, in a child that takes its turn."""

    def __init__(self, child: LlamaCpp, quant: str) -> None:
        self.child, self.name = child, f"llama.cpp {quant}"
        self.computed: int | None = None

    def run(self, task: Task, number: int) -> tuple[Cost | None, list[list[int]]]:
        return self.child.run(task.prompts, task.new_tokens, task.shared)

    def close(self) -> None:
        self.child.close()


def has_transformers() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("transformers") is not None


def same_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of streams' tokens that agree up to each stream's first difference."""
    equal = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(b)
        differs = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        equal += min([*differs, len(a), len(b)])
    return equal / total if total else 1.0
