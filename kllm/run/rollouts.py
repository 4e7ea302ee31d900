"""Training on the model's own answers: pairs for online preferences, texts for on-policy distillation.

A harvest asks some prompts of the model as it is, through the one engine, and trains on the answers for a
few steps before the next. What is left of a harvest is part of the checkpoint, so that a resumed run sees
the same batches. Every process answers its share of the prompts; all of them see the whole harvest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import nn

from kllm.config.align import RolloutSection
from kllm.config.stages import DistillStage, DpoStage
from kllm.data.annotate import annotate
from kllm.data.batch import Batch
from kllm.data.loader import val_batches
from kllm.data.pack import generator
from kllm.data.shards import Shard
from kllm.engine.engine import Engine
from kllm.engine.params import SamplingParams, choice_seed
from kllm.errors import KllmError, UserError
from kllm.model.lora import plain_model
from kllm.objectives.reference import reference_logprobs
from kllm.run.collect_prompts import Prompt, PromptList
from kllm.run.judge import Judge, check_prompts, judge_of
from kllm.tokenizer.chat import ChatEncoder

if TYPE_CHECKING:
    from kllm.run.learning import Learning, Materials

EMPTY_HARVESTS = 8
"""Harvests in a row without anything to learn from, after which the run ends."""

Document = list[Any]
"""[tokens, mask] of a text, or [tokens, mask, shared, chosen] of a pair; JSON-able."""


@dataclass
class _Answered:
    prompt: Prompt
    ids: list[int]
    answers: list[list[int]]
    texts: list[str]


class OwnAnswers:
    """A source of batches made from the model's own answers.

    Args:
        materials: of the stage.
        rollout: how answers are sampled.
        sources: where the prompts are.
        samples: answers to a prompt.
        documents: answered prompts -> documents to train on.
        batches: documents of one step -> its micro-batches, for all processes.
    """

    def __init__(
        self,
        materials: Materials,
        rollout: RolloutSection,
        sources: Sequence[str],
        samples: int,
        documents: Callable[[list[_Answered]], list[Document]],
        batches: Callable[[list[Document]], list[Batch]],
    ) -> None:
        self.materials, self.rollout, self.samples = materials, rollout, samples
        self.documents, self.batches = documents, batches
        encoder = ChatEncoder(materials.tokenizer)
        longest = materials.stage.dataset.seq_len - rollout.max_tokens
        every = [(prompt, encoder.prompt(prompt.messages, prompt.tools)) for prompt in PromptList(sources)]
        self.prompts = [(prompt, ids) for prompt, ids in every if len(ids) <= longest]
        if not self.prompts:
            raise UserError("no prompt that fits dataset.seq_len", where="rollout.prompts")
        if (long := len(every) - len(self.prompts)) and materials.ctx.is_main:
            left = f"left out: {long:,} of {len(every):,} prompts"
            materials.ctx.reporter.message(f"{left}, too long for dataset.seq_len and rollout.max_tokens")
        self.engine: Engine | None = None
        self.harvests = self.cursor = 0
        self.waiting: list[list[Document]] = []
        """Documents of the steps to come."""

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.prompts) // self.rollout.prompts_per_step)

    def take(self, n: int = 1, policy: Any = None) -> list[Batch]:
        """This process's micro-batches of the next step; asks the model when nothing is left."""
        if n == 0:
            return []
        for _ in range(EMPTY_HARVESTS):
            if self.waiting:
                break
            self.waiting = self._harvest()
        if not self.waiting:
            raise KllmError(
                f"nothing to learn in {EMPTY_HARVESTS} harvests: all answers to a prompt got the same mark",
                where="rollout",
                hint="raise rollout.temperature or rollout.samples, or take easier prompts",
            )
        documents = self.waiting.pop(0)
        runtime = self.materials.runtime
        mine = documents[runtime.rank :: runtime.world] or documents[:1]
        return self.batches(mine)

    def state_dict(self) -> dict[str, Any]:
        """Harvests so far, the place in the prompts, and what is left to train on."""
        return {"harvests": self.harvests, "cursor": self.cursor, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.harvests, self.cursor = state["harvests"], state["cursor"]
        self.waiting = state["waiting"]

    def _harvest(self) -> list[list[Document]]:
        rollout, runtime = self.rollout, self.materials.runtime
        wanted = min(rollout.prompts_per_step * rollout.refresh_every, len(self.prompts))
        chosen = [self._prompt(self.cursor + i) for i in range(wanted)]
        self.cursor += wanted
        self.harvests += 1
        answered = self._answer(chosen[runtime.rank :: runtime.world])
        documents = self.documents(answered)
        if runtime.world > 1:
            shares: list[Any] = [None] * runtime.world
            dist.all_gather_object(shares, documents)
            documents = [d for share in shares for d in share]
        steps = min(rollout.refresh_every, len(documents) // runtime.world)
        return [documents[i::steps] for i in range(steps)] if steps else []

    def _prompt(self, number: int) -> tuple[Prompt, list[int]]:
        """The prompts in a new order every epoch."""
        epoch, place = divmod(number, len(self.prompts))
        order = generator(self.materials.ctx.seed, epoch, 3).permutation(len(self.prompts))
        return self.prompts[int(order[place])]

    def _answer(self, chosen: Sequence[tuple[Prompt, list[int]]]) -> list[_Answered]:
        rollout, model = self.rollout, plain_model(self.materials.model)
        if self.engine is None:
            self.engine = Engine(
                model,
                self.materials.tokenizer,
                max_batch=64,
                max_context=self.materials.stage.dataset.seq_len,
            )
        else:
            self.engine.reload(model)
        seed = (self.materials.ctx.seed * 1_000_003 + self.harvests) & 0x7FFFFFFF
        asked, params = [], []
        for number, (_, ids) in enumerate(chosen):
            own = choice_seed(seed, 1 + number * self.materials.runtime.world + self.materials.runtime.rank)
            for sample in range(self.samples):
                asked.append(ids)
                params.append(
                    SamplingParams(
                        max_tokens=rollout.max_tokens,
                        temperature=rollout.temperature,
                        top_p=rollout.top_p,
                        seed=choice_seed(own, sample),
                    )
                )
        done = self.engine.generate(asked, params)
        groups = [done[i : i + self.samples] for i in range(0, len(done), self.samples)]
        return [
            _Answered(prompt, ids, [c.token_ids for c in group], [c.text for c in group])
            for (prompt, ids), group in zip(chosen, groups, strict=True)
        ]


def _shard(documents: Sequence[Document], kind: str, vocab: int) -> Shard:
    """Documents in memory, as stored ones would be."""
    lengths = [len(d[0]) for d in documents]
    meta = {"kind": kind, "docs": len(documents), "tokens": sum(lengths), "source": "the model's own answers"}
    return Shard(
        np.concatenate([np.array(d[0], np.uint16 if vocab <= 1 << 16 else np.uint32) for d in documents]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.array(d[1], np.uint8) for d in documents]),
        meta=meta,
        splits=np.array([d[2:4] for d in documents], np.int32) if kind == "preference" else None,
    )


def _one_batch_list(materials: Materials, shard: Shard, extras: Any = None) -> list[Batch]:
    return val_batches(shard, materials.stage.dataset.seq_len, 1 << 60, materials.micro_rows, extras=extras)


# -- online preferences -------------------------------------------------------------------------------


def pair_of(ids: list[int], chosen: list[int], rejected: list[int]) -> Document:
    """A pair as a stored document: shared beginning | chosen | rejected, each answer behind the last token of
    the prompt (see `kllm.data.encode_pairs`)."""
    tokens = [*ids[:-1], ids[-1], *chosen, ids[-1], *rejected]
    mask = [0] * len(ids) + [1] * len(chosen) + [0] + [1] * len(rejected)
    return [tokens, mask, len(ids) - 1, 1 + len(chosen)]


def best_and_worst(answered: Sequence[_Answered], judge: Judge) -> list[Document]:
    """The best and the worst answer to each prompt; nothing where all are equally good."""
    marks = judge([(a.prompt, text) for a in answered for text in a.texts])
    documents, at = [], 0
    for one in answered:
        own = marks[at : at + len(one.texts)]
        at += len(one.texts)
        best, worst = max(range(len(own)), key=own.__getitem__), min(range(len(own)), key=own.__getitem__)
        if own[best] > own[worst] and one.answers[best] and one.answers[worst]:
            documents.append(pair_of(one.ids, one.answers[best], one.answers[worst]))
    return documents


def online_pairs(materials: Materials, stage: DpoStage, annotated: bool) -> OwnAnswers:
    """Pairs of the model's own answers, best against worst (Guo et al. 2024, arXiv 2402.04792).

    Args:
        annotated: the pairs carry log-probabilities of the model as the stage found it, of which a copy is
            kept; an objective that finds its reference under an adapter, or has none, does without.

    Raises:
        UserError: no such reward, no prompts, or prompts that the reward cannot judge.
    """
    reference: nn.Module | None = None
    if annotated:
        reference = copy.deepcopy(materials.model).eval().requires_grad_(False)
    judge = judge_of(stage.rollout)
    chunk, runtime = stage.train.loss_chunk, materials.runtime

    def batches(documents: list[Document]) -> list[Batch]:
        shard = _shard(documents, "preference", materials.model.shape.vocab_size)
        if reference is None:
            return _one_batch_list(materials, shard)

        def compute(batch: Batch) -> dict[str, Any]:
            with runtime.autocast():
                return {"reference": reference_logprobs(reference, batch.to(runtime.device), chunk)}

        known = annotate(
            shard,
            "online",
            {"reference": (np.dtype("<f4"), 0)},
            compute,
            micro_tokens=stage.train.micro_batch_tokens,
            seq_len=stage.dataset.seq_len,
        )
        return _one_batch_list(materials, shard, known)

    own = OwnAnswers(
        materials,
        stage.rollout,
        [source.path for source in stage.rollout.prompts] or ["builtin:world/rl"],
        stage.rollout.samples,
        lambda answered: best_and_worst(answered, judge),
        batches,
    )
    check_prompts(stage.rollout, (prompt for prompt, _ in own.prompts))
    return own


# -- on-policy distillation ---------------------------------------------------------------------------


class Mixed:
    """A share of the steps from one source, the rest from another; evenly spread (GKD's lambda).

    Args:
        data: the steps on the data.
        own: the steps on the model's own answers.
        share: of `own`.
    """

    def __init__(self, data: Any, own: OwnAnswers, share: float) -> None:
        self.data, self.own, self.share, self.steps = data, own, share, 0

    def take(self, n: int = 1, policy: Any = None) -> list[Batch]:
        if n == 0:
            return []
        before, self.steps = int(self.steps * self.share), self.steps + 1
        return (self.own if int(self.steps * self.share) > before else self.data).take(n, policy)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "data": self.data.state_dict(), "own": self.own.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.data.load_state_dict(state["data"])
        self.own.load_state_dict(state["own"])


def on_policy(materials: Materials, stage: DistillStage, learning: Learning) -> Learning:
    """The student answers, the teacher's probabilities correct it (Agarwal et al. 2024, arXiv 2306.13649)."""

    def documents(answered: list[_Answered]) -> list[Document]:
        return [
            [[*a.ids, *answer], [0] * len(a.ids) + [1] * len(answer)]
            for a in answered
            for answer in a.answers
            if answer
        ]

    def batches(some: list[Document]) -> list[Batch]:
        return _one_batch_list(materials, _shard(some, "chat", materials.model.shape.vocab_size))

    sources = [s.path for s in stage.rollout.prompts] or [s.path for s in stage.data]
    own = OwnAnswers(materials, stage.rollout, sources, 1, documents, batches)
    learning.source = Mixed(learning.source, own, stage.distill.on_policy)
    return learning
