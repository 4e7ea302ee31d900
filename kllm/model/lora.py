"""Adapters in a model: put in, trained alone, switched off, merged, saved.

`add_lora` freezes a Transformer and puts low-rank layers (`lora_layers`) in the place of some of its linear
layers and expert stacks. While they are in, these have other parameter names (`q_proj.base.weight`,
`q_proj.lora_A`); `merge_lora` gives a plain Transformer with Hugging Face's names again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kllm.errors import UserError
from kllm.model.frozen import FrozenLinear, FrozenStack
from kllm.model.lora_layers import (
    EXPERT_PARTS,
    PROJECTIONS,
    LoraConfig,
    LoraExperts,
    LoraLayer,
    LoraLinear,
    LoraStack,
)
from kllm.model.moe import Experts
from kllm.model.transformer import Transformer

__all__ = [
    "LoraConfig",
    "LoraWeights",
    "adapters_off",
    "add_lora",
    "find_targets",
    "is_adapted",
    "load_lora_state",
    "lora_config",
    "lora_pairs",
    "lora_parameters",
    "lora_state",
    "lora_targets",
    "merge_lora",
    "plain_model",
]

Pairs = dict[str, tuple[Tensor, Tensor]]
GROUPS = ("all", "attention", "mlp", "experts", "router")
_PLAIN_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class LoraWeights:
    """An adapter apart from its model, for weights as they are in memory before `add_lora`.

    Attributes:
        pairs: module name -> A [r, K], B [N, r], float32 on the CPU; the change is scale * B A. The
            experts of a stack are modules of their own, `...mlp.experts.3.up_proj`.
        magnitudes: module name -> m [N] (DoRA), else empty.
        rank, alpha, scale, use_rslora: of all of them.
    """

    pairs: Pairs
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 16
    alpha: float = 32.0
    scale: float = 2.0
    use_rslora: bool = False


# -- what can be adapted -----------------------------------------------------------------------------


def _places(model: Transformer) -> dict[str, nn.Module | nn.Parameter]:
    """Every linear layer of the blocks and every stack of experts, by full name; not the gate of a shared
    expert, which no adapter on disk can name."""
    found: dict[str, nn.Module | nn.Parameter] = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear) and _group(name) is not None:
            found[name] = module
        elif isinstance(module, Experts):
            found |= {f"{name}.{part}": getattr(module, part) for part in EXPERT_PARTS}
    return found


def _group(name: str) -> str | None:
    """attention, mlp (dense or shared), experts, router; None for the gate of a shared expert."""
    parts = name.split(".")
    if parts[-2] == "self_attn":
        return "attention"
    if parts[-2] == "experts":
        return "experts"
    if parts[-2:] == ["mlp", "gate"]:
        return "router"
    return "mlp" if parts[-1] in EXPERT_PARTS else None


def find_targets(model: Transformer, targets: tuple[str, ...]) -> list[str]:
    """Full names of the modules that `targets` mean, in the model's order.

    Each is a group: "all" (attention and MLPs, the shared expert among them: what every reader of PEFT
    directories adapts), "attention", "mlp", "experts" (the routed ones), "router"; or the end of a name
    (`q_proj`, `shared_expert.up_proj`, `experts.down_proj`; the last parts alone never mean routed experts);
    or a regular expression that matches a full name whole.

    Raises:
        UserError: a target that matches nothing (what exists is listed), or a broken expression.
    """
    names = list(_places(model))
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in names if _matches(target, name)]
        if not found:
            raise UserError(f"{target!r} matches no layer", "lora.targets", f"there are {_listed(names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def lora_targets(model: Transformer, config: LoraConfig) -> dict[str, torch.Size]:
    """The modules that `add_lora` adapts, with the shapes [..., N, K] of their weights.

    Args:
        model: without adapters; on the device "meta" no more than a shape is needed.

    Raises:
        UserError: a target that matches nothing, a rank that PiSSA cannot take.
    """
    places, found = _places(model), {}
    for name in find_targets(model, config.targets):
        place = places[name]
        weight = place.weight if isinstance(place, nn.Linear) else place
        assert isinstance(weight, Tensor)
        if config.init == "pissa" and config.rank > min(weight.shape[-2:]):
            size = " x ".join(map(str, weight.shape[-2:]))
            message = f"{name} is {size}: it has no {config.rank} singular values"
            raise UserError(message, "lora.rank", "a lower rank")
        found[name] = weight.shape
    return found


def _matches(target: str, name: str) -> bool:
    group = _group(name)
    if target in GROUPS:
        return group == target or (target == "all" and group in ("attention", "mlp"))
    if _PLAIN_NAME.fullmatch(target):
        ends = name == target or name.endswith("." + target)
        return ends and (group != "experts" or "experts." in target)
    try:
        return re.fullmatch(target, name) is not None
    except re.error as e:
        raise UserError(f"{target!r} is a broken regular expression: {e}", "lora.targets") from None


def _listed(names: list[str]) -> str:
    """The groups and the ends of names that this model has."""
    groups = {_group(name) for name in names}
    ends = {re.sub(r"^model\.layers\.\d+\.(self_attn|mlp)\.", "", name) for name in names}
    return ", ".join([g for g in GROUPS if g == "all" or g in groups] + sorted(ends))


# -- in and out --------------------------------------------------------------------------------------


def add_lora(model: Transformer, config: LoraConfig, seed: int) -> list[str]:
    """Freezes the model and puts adapters beside the targets, in place; it computes what it did before.

    With `config.base` int8 or int4 all matrices of attention, MLPs and experts are rounded, adapted or not
    (embedding, head, norms and routers never are), and it computes what it does with those.

    Args:
        model: without adapters.
        seed: of the initial A; the same numbers on every device.

    Returns:
        Full names of the adapted modules.

    Raises:
        UserError: a target that matches nothing, a rank that PiSSA cannot take.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("the model has adapters already")
    places, names = _places(model), list(lora_targets(model, config))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    stacks: dict[str, dict[str, FrozenStack]] = {}
    for name, place in places.items():
        parent, _, last = name.rpartition(".")
        rounded = config.base if last in PROJECTIONS else "none"
        if isinstance(place, nn.Linear):
            if name in names:
                model.set_submodule(name, LoraLinear(place, config, generator, rounded))
            elif rounded != "none":
                model.set_submodule(name, FrozenLinear(place, rounded))
        elif isinstance(place, nn.Parameter):
            stack = LoraStack(place, config, generator) if name in names else FrozenStack(place, config.base)
            stacks.setdefault(parent, {})[last] = stack
    for parent, parts in stacks.items():
        if config.base != "none" or any(isinstance(stack, LoraStack) for stack in parts.values()):
            model.set_submodule(parent, LoraExperts(parts))
    model.train(model.training)  # the new layers too
    return names


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not found:
        raise ValueError("the model has no adapters")
    return found


def lora_config(model: nn.Module) -> LoraConfig:
    """What the model's adapters were made with."""
    return next(iter(_layers(model).values())).config


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """A plain Transformer that computes what the adapted one does; that one is left as it is.

    W + s B A (DoRA: its rows at length m), summed in float64, in the dtype of W before it was rounded.
    What has no adapter is shared with `model`, not copied.
    """
    layers = _layers(model)
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear | FrozenStack):
            key = name if isinstance(module, FrozenStack) else f"{name}.weight"
            base = module.base
            state[key] = layers[name].merged() if name in layers else base.full(base.dtype)
            if isinstance(module, FrozenLinear) and module.bias is not None:
                state[f"{name}.bias"] = module.bias.detach()
    with torch.device("meta"):
        plain = Transformer(model.shape)
    own = model.state_dict()
    missing = [name for name in plain.state_dict() if name not in state]
    plain.load_state_dict(state | {name: own[name] for name in missing}, assign=True)
    if model.shape.tie_word_embeddings:
        plain.lm_head.weight = plain.model.embed_tokens.weight
    plain.requires_grad_(True)
    return plain.to(model.head_weight.device).train(model.training)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside it the model is its base (rounded, if it is): the reference of preference learning.

    For forward passes without a gradient: activation checkpointing would repeat the pass when they are on.
    """
    layers = list(_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


# -- what is trained and saved -----------------------------------------------------------------------


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name: all that is needed of an adapted model by an optimiser."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything of the adapters that `load_lora_state` needs beside the base model and the config.

    What is trained, and what PiSSA took out of the base (`initial_A`, `initial_B`).
    """
    _layers(model)
    kinds = ("lora_A", "lora_B", "lora_magnitude", "initial_A", "initial_B")
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith(kinds)}


@torch.no_grad()
def load_lora_state(model: nn.Module, state: Mapping[str, Tensor], where: str = "adapter state") -> None:
    """Takes over what `lora_state` gave, into a model adapted with the same config on the same base.

    Raises:
        UserError: other modules, another rank or kind of adapter; nothing was changed.
    """
    own = lora_state(model)
    hint = "the adapter's settings changed; start again with --fresh"
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[0]
        what = "is missing" if odd in own else "is not in the model"
        raise UserError(f"{odd} {what}", where, hint)
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            message = f"{name} is {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}"
            raise UserError(message, where, hint)
    for name, layer in _layers(model).items():
        if layer.initial_A is not None:
            a, b = (state[f"{name}.initial_{m}"].to(layer.initial_A) for m in "AB")
            layer.restore_initial(a, b)
    for name, tensor in own.items():
        tensor.copy_(state[name])


@torch.no_grad()
def lora_pairs(model: nn.Module) -> LoraWeights:
    """The adapter as plain matrices for the base as it was before `add_lora`."""
    pairs: Pairs = {}
    magnitudes: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        a, b = (t.float().cpu() for t in layer.change())
        m = None if layer.lora_magnitude is None else layer.lora_magnitude.detach().float().cpu()
        if isinstance(layer, LoraLinear):
            pairs[name] = a, b
            if m is not None:
                magnitudes[name] = m
            continue
        parent, _, last = name.rpartition(".")
        for e in range(len(a)):
            pairs[f"{parent}.{e}.{last}"] = a[e], b[e]
            if m is not None:
                magnitudes[f"{parent}.{e}.{last}"] = m[e]
    config = lora_config(model)
    growth = 2 if config.init == "pissa" else 1
    alpha = config.alpha * (growth**0.5 if config.use_rslora else growth)
    return LoraWeights(pairs, magnitudes, config.rank * growth, alpha, config.scale, config.use_rslora)


def is_adapted(model: nn.Module) -> bool:
    """Whether `add_lora` was there."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def plain_model(model: Transformer) -> Transformer:
    """The model itself, or, adapted, a plain one that computes the same."""
    return merge_lora(model) if is_adapted(model) else model
