"""Low-rank adapters beside the matrices of a prepared model, chosen for every token of a step.

For a token of adapter i a matrix gives W x + B_i A_i x (LoRA, Hu et al. 2021, eq. 3; the scale is in B). The
adapters of a step lie side by side: x A^T [N, R] in one product, each token keeps the columns of its own
adapter, times B [R, out] in a second one, added onto W x. What the base would say is not touched: its tokens
get exact zeros added. DoRA (Liu et al. 2024, eq. 5) scales the outputs: m / |W + B A| * (W x + B A x), the
norm per output and known beforehand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.model.kernels import Kernel
from kllm.model.presets import ModelShape

_SMALL = 512  # numbers times zero cost less than another product below so many
_KEPT = 4  # sets of several adapters whose matrices are kept side by side


@dataclass(frozen=True)
class AdapterWeights:
    """What an adapter adds to a model as it is in memory.

    Attributes:
        pairs: module name -> A [r, in], B [out, r]: its weight becomes W + B A (the scale is in B).
        magnitudes: module name -> m [out], for DoRA modules: the weight's rows are then scaled to length m.
        where: what to call it in errors.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    where: str = "adapter"


@dataclass(frozen=True)
class Site:
    """A matrix that adapters may change, which may be several of the model's, one under another.

    Attributes:
        names, sizes: of the model's modules, and the outputs of each.
        inputs: of all of them.
        rows: int64 [out], the order of their outputs in the matrix; None as they come.
        kernel, bias: what multiplies, the bias [out] included.
        squares: float32 [out], the squared length of each row of the matrix.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    inputs: int
    rows: Tensor | None
    kernel: Kernel
    bias: Tensor | None
    squares: Tensor


@dataclass(frozen=True)
class _Beside:
    """The adapters of a set at a site, side by side, by part of the site and then by adapter.

    Attributes:
        a, b: [in, R], [R, out]; b is zero where a column's part does not reach.
        blocks: of b, that are not zero: columns of `low` and the outputs that they reach.
        owners: int64 [R], whose column it is: 1 for the first of the set, ...
        scales, shifts: [1 + adapters, out], the base's first; None without DoRA.
    """

    a: Tensor
    b: Tensor
    blocks: tuple[tuple[slice, slice], ...]
    owners: Tensor
    scales: Tensor | None = None
    shifts: Tensor | None = None


class Chosen:
    """The adapters of a step, for every site; made by `Adapters.choose`.

    Args:
        beside: site number -> matrices.
        slots: int64 [N], which adapter of the set each token has, 0 the base; None: all have the only one.
    """

    def __init__(self, beside: Mapping[int, _Beside], slots: Tensor | None) -> None:
        self._beside, self._slots = beside, slots
        self._others: dict[Tensor, Tensor] = {}

    def add(self, site: int, x: Tensor, y: Tensor) -> Tensor:
        """y [N, out], the site's own product of x [N, in], with what the tokens' adapters add; in place."""
        found = self._beside.get(site)
        if found is None:
            return y
        low = x @ found.a
        if self._slots is not None:
            low.masked_fill_(self._other(found.owners), 0.0)
        if low.numel() < _SMALL:
            y.addmm_(low, found.b)
        else:
            for columns, outputs in found.blocks:
                y[:, outputs].addmm_(low[:, columns], found.b[columns, outputs])
        if found.scales is not None:
            y.mul_(self._rows(found.scales))
        if found.shifts is not None:
            y.add_(self._rows(found.shifts))
        return y

    def _rows(self, table: Tensor) -> Tensor:
        return table[1] if self._slots is None else table[self._slots]

    def _other(self, owners: Tensor) -> Tensor:
        """bool [N, R]: the column is another's. Sites with the same columns share it."""
        if owners not in self._others:
            assert self._slots is not None
            self._others[owners] = self._slots[:, None] != owners
        return self._others[owners]


class Adapters:
    """The adapters of one prepared model. Every one has a number that no other ever gets; 0 is the base.

    Args:
        shape: of the model.
        dtype: of activations.
        device: where the model lives.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.numbers: dict[str, int] = {}
        """Of the adapters there are."""
        self._sites: list[Site] = []
        self._scaled: dict[int, AdapterWeights] = {}  # DoRA: what they do depends on the model's weights
        self._alone: dict[int, dict[int, _Beside]] = {}
        self._sets: OrderedDict[tuple[int, ...], dict[int, _Beside]] = OrderedDict()
        self._next = 1

    # -- sites ---------------------------------------------------------------------------------------

    def clear_sites(self) -> None:
        """The model is about to be laid out anew: `place` every site again, in the same order."""
        self._sites = []

    def place(self, site: Site) -> int:
        """Registers a site; its number."""
        self._sites.append(site)
        return len(self._sites) - 1

    def refit(self) -> None:
        """The sites have other weights now: what was computed from the old ones is computed again."""
        for number, weights in self._scaled.items():
            self._fit(number, weights)

    # -- adapters ------------------------------------------------------------------------------------

    def add(self, name: str, weights: AdapterWeights) -> int:
        """Takes an adapter in; its number.

        Raises:
            UserError: the name is taken; as `check_adapter`.
        """
        if name in self.numbers:
            raise UserError(f"there is an adapter {name!r} already", where=weights.where)
        check_adapter(weights, self.shape)
        number = self._next
        self._fit(number, weights)
        self._next += 1
        self.numbers[name] = number
        if weights.magnitudes:
            self._scaled[number] = weights
        return number

    def remove(self, name: str) -> None:
        """Forgets an adapter; KeyError if there is none of that name."""
        number = self.numbers.pop(name)
        del self._alone[number]
        self._scaled.pop(number, None)
        self._sets.clear()

    @torch.no_grad()
    def _fit(self, number: int, weights: AdapterWeights) -> None:
        at = {name: i for i, site in enumerate(self._sites) for name in site.names}
        touched = sorted({at[name] for name in weights.pairs})
        owners: dict[int, Tensor] = {}
        self._alone[number] = {i: self._only(self._sites[i], weights, owners) for i in touched}
        self._sets.clear()

    def _only(self, site: Site, weights: AdapterWeights, owners: dict[int, Tensor]) -> _Beside:
        """One adapter at a site; sites with the same rank share `owners`."""
        pairs = [weights.pairs.get(name) for name in site.names]
        rank, total = sum(a.shape[0] for a, _ in filter(None, pairs)), sum(site.sizes)
        a, b = torch.zeros(rank, site.inputs), torch.zeros(rank, total)
        lengths = torch.full((total,), torch.nan)
        blocks = []
        at = row = 0
        for name, size, pair in zip(site.names, site.sizes, pairs, strict=True):
            outputs = slice(row, row + size)
            row += size
            if pair is None:
                continue
            columns = slice(at, at + pair[0].shape[0])
            at = columns.stop
            a[columns], b[columns, outputs] = pair[0], pair[1].t()
            blocks.append((columns, outputs))
            if name in weights.magnitudes:
                lengths[outputs] = weights.magnitudes[name].flatten()
        a, b, lengths = a.to(self.device), b.to(self.device), lengths.to(self.device)
        if site.rows is not None:  # they stay within their part
            b, lengths = b[:, site.rows], lengths[site.rows]
        scales = shifts = None
        if not lengths.isnan().all():
            scale = self._output_scale(site, a, b, lengths)
            scales = torch.stack((torch.ones_like(scale), scale)).to(self.dtype)
            if site.bias is not None:  # it is inside y, and DoRA does not scale it
                shift = site.bias.float() * (1 - scale)
                shifts = torch.stack((torch.zeros_like(shift), shift)).to(self.dtype)
        a, b = a.t().to(self.dtype).contiguous(), b.to(self.dtype).contiguous()
        if not (a.isfinite().all() and b.isfinite().all()):  # 0 x inf would reach the neighbours
            raise UserError(f"its numbers do not fit {self.dtype}", where=weights.where)
        if rank not in owners:
            owners[rank] = torch.ones(rank, dtype=torch.int64, device=self.device)
        return _Beside(a, b, tuple(blocks), owners[rank], scales, shifts)

    def _output_scale(self, site: Site, a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
        """m / |W + B A| per output, 1 where there is no m.

        |W + B A|^2 = |W|^2 + 2 B (A W^T) + B (A A^T) B^T per row, so the matrix itself is not needed: the
        kernel gives A W^T.
        """
        cross = site.kernel(a.to(self.dtype)).double()
        if site.bias is not None:
            cross -= site.bias.double()
        wide = b.double()
        squares = site.squares.double() + (wide * (2 * cross + (a.double() @ a.double().t()) @ wide)).sum(0)
        scale = lengths.double() / squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return torch.where(scale.isnan(), 1.0, scale).float()

    # -- steps ---------------------------------------------------------------------------------------

    def choose(self, numbers: Sequence[int], counts: Sequence[int]) -> Chosen | None:
        """The adapters of a step, None if it has none.

        Args:
            numbers: the adapter of each run of tokens, 0 for the base.
            counts: tokens in each run.
        """
        active = tuple(sorted(set(numbers) - {0}))
        if not active:
            return None
        beside = self._set(active)
        if len(active) == 1 and 0 not in numbers:
            return Chosen(beside, None)
        slot = {number: i for i, number in enumerate(active, 1)}
        each = [s for number, n in zip(numbers, counts, strict=True) for s in [slot.get(number, 0)] * n]
        return Chosen(beside, torch.tensor(each, dtype=torch.int64, device=self.device))

    def _set(self, active: tuple[int, ...]) -> dict[int, _Beside]:
        if len(active) == 1:
            return self._alone[active[0]]
        if active in self._sets:
            self._sets.move_to_end(active)
            return self._sets[active]
        found: dict[int, list[tuple[int, _Beside]]] = {}
        for slot, number in enumerate(active, 1):
            for site, one in self._alone[number].items():
                found.setdefault(site, []).append((slot, one))
        columns: dict[tuple[int, ...], Tensor] = {}
        beside = self._sets[active] = {i: _joined(ones, len(active), columns) for i, ones in found.items()}
        if len(self._sets) > _KEPT:
            self._sets.popitem(last=False)
        return beside


def _joined(ones: Sequence[tuple[int, _Beside]], slots: int, known: dict[tuple[int, ...], Tensor]) -> _Beside:
    """Several adapters at a site, each with its slot in a set of `slots`; `known` are owners made before."""
    pieces = [(outputs, slot, columns, one) for slot, one in ones for columns, outputs in one.blocks]
    pieces.sort(key=lambda piece: (piece[0].start, piece[1]))
    a = torch.cat([one.a[:, columns] for _, _, columns, one in pieces], dim=1)
    b = a.new_zeros(a.shape[1], ones[0][1].b.shape[1])
    reached: dict[int, tuple[slice, slice]] = {}
    owners: list[int] = []
    for outputs, slot, columns, one in pieces:
        part = one.b[columns, outputs]
        new = slice(len(owners), len(owners) + len(part))
        owners += [slot] * len(part)
        b[new, outputs] = part
        first = reached.get(outputs.start, (new, outputs))[0].start
        reached[outputs.start] = slice(first, new.stop), outputs
    key = tuple(owners)
    if key not in known:
        known[key] = torch.tensor(owners, dtype=torch.int64, device=a.device)
    scales = _table(slots, {slot: one.scales for slot, one in ones}, 1.0)
    shifts = _table(slots, {slot: one.shifts for slot, one in ones}, 0.0)
    return _Beside(a, b, tuple(reached.values()), known[key], scales, shifts)


def _table(slots: int, given: Mapping[int, Tensor | None], otherwise: float) -> Tensor | None:
    """[1 + slots, out]: row s is the adapter's own row 1, if it has one, else constant; None if none has."""
    known = {slot: rows[1] for slot, rows in given.items() if rows is not None}
    if not known:
        return None
    some = next(iter(known.values()))
    table = some.new_full((1 + slots, len(some)), otherwise)
    for slot, row in known.items():
        table[slot] = row
    return table


def adaptable(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The modules of a model that can have an adapter per token: name -> (outputs, inputs)."""
    H, q, kv = shape.hidden_size, shape.q_size, shape.kv_size
    inner, mlp = shape.intermediate_size, "mlp"
    if shape.is_moe:
        inner, mlp = shape.shared_size, "mlp.shared_expert"
    sizes = {
        f"self_attn.{n}_proj": size
        for n, size in zip("qkvo", ((q, H), (kv, H), (kv, H), (H, q)), strict=True)
    }
    if inner:
        sizes |= {
            f"{mlp}.gate_proj": (inner, H),
            f"{mlp}.up_proj": (inner, H),
            f"{mlp}.down_proj": (H, inner),
        }
    layers = range(shape.num_hidden_layers)
    return {f"model.layers.{i}.{name}": size for i in layers for name, size in sizes.items()}


def check_adapter(weights: AdapterWeights, shape: ModelShape) -> None:
    """Whether a model of this shape can take the adapter per token.

    Raises:
        UserError: another model's adapter, or one of routed experts or of a router.
    """
    known = adaptable(shape)
    for name, (a, b) in weights.pairs.items():
        if name not in known:
            raise _unservable(name, weights.where)
        if (b.shape[0], a.shape[1]) != known[name]:
            message = f"{name} is {known[name]}, the adapter's {b.shape[0], a.shape[1]}"
            raise UserError(message, where=weights.where, hint="another base model?")


def _unservable(name: str, where: str) -> UserError:
    parts = name.split(".")
    if "experts" in parts or "shared_experts" in parts or parts[-2:] == ["mlp", "gate"]:
        hint = "merge it: kllm convert --merge"
        return UserError(f"{name}: experts and routers cannot have an adapter per request", where, hint)
    return UserError(f"the model has no linear layer {name}", where=where, hint="another base model?")
