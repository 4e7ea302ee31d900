"""The prefix cache: keys and values of token sequences that were computed before, page by page.

A trie of pages of 16 tokens, one root per tenant (a salt and an adapter): a node's place says which tokens
come before it, so equal tokens after different beginnings are never confused. Pages are copies (a memcpy is
100 times faster than computing them), evicted in order of last use, leaves first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from kllm.engine.rows import PAGE, Row

_MOST_COMPARED = 64  # partial matches are looked for among so many pages


class _Node:
    """One page (or the shorter end of a sequence) and what follows it."""

    __slots__ = ("children", "full", "parent", "parts", "tokens")

    def __init__(self, parent: _Node | None, tokens: tuple[int, ...], parts: list[Tensor]) -> None:
        self.parent, self.tokens, self.parts = parent, tokens, parts
        self.full: dict[tuple[int, ...], _Node] = {}
        self.children: dict[int, list[_Node]] = {}
        """By first token, whole pages (which are in `full` too) and shorter ends."""

    def candidates(self, token: int) -> list[_Node]:
        """Children that start with `token`."""
        return self.children.get(token, [])

    def add(self, child: _Node) -> None:
        self.children.setdefault(child.tokens[0], []).append(child)
        if len(child.tokens) == PAGE:
            self.full[child.tokens] = child

    def remove(self, child: _Node) -> None:
        self.full.pop(child.tokens, None)
        siblings = self.children[child.tokens[0]]
        siblings.remove(child)
        if not siblings:
            del self.children[child.tokens[0]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class PrefixCache:
    """Finds, keeps and forgets prefixes.

    Args:
        enabled: False finds and keeps nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._roots: dict[Hashable, _Node] = {}
        self._tenants: dict[_Node, Hashable] = {}
        self._used: OrderedDict[_Node, None] = OrderedDict()
        self.nbytes = 0

    @property
    def pages(self) -> int:
        """Pages held."""
        return len(self._used)

    def match(self, tenant: Hashable, ids: Sequence[int], limit: int) -> tuple[int, list[_Node]]:
        """The longest known beginning of `ids`, at most `limit` tokens: its length and its pages."""
        node = self._roots.get(tenant)
        found: list[_Node] = []
        at = 0
        while node is not None and at < limit:
            wanted = tuple(ids[at : min(at + PAGE, limit)])
            child, common = self._best(node, wanted)
            # part of a page only where it completes the match: the same prompt again
            if child is None or (common < PAGE and at + common < limit):
                break
            found.append(child)
            at += common
            node = child
        for page in reversed(found):  # parents last: they must outlive their children
            self._used.move_to_end(page)
        return at, found

    def _best(self, node: _Node, wanted: tuple[int, ...]) -> tuple[_Node | None, int]:
        if wanted in node.full:
            return node.full[wanted], len(wanted)
        best, most = None, 0
        for child in reversed(node.candidates(wanted[0])[-_MOST_COMPARED:]):
            common = _common(child.tokens, wanted)
            if common > most:
                best, most = child, common
                if most == len(wanted):
                    break
        return best, most

    @torch.inference_mode()
    def load(self, row: Row, length: int, pages: Sequence[_Node]) -> None:
        """Copies the first `length` tokens of `pages` into `row`."""
        if not length:
            return
        for number, page in enumerate(pages):
            at = number * PAGE
            upto = min(at + len(page.tokens), length)
            for into, part in zip(row.parts(at, upto), page.parts, strict=True):
                into.copy_(part[:, :, :, : upto - at])

    @torch.inference_mode()
    def store(self, tenant: Hashable, ids: Sequence[int], row: Row, room: int) -> None:
        """Keeps the keys and values of `ids`, which `row` holds, as far as `room` bytes more allow."""
        if not self.enabled or not ids:
            return
        root = self._roots.get(tenant)
        if root is None:
            root = self._roots[tenant] = _Node(None, (), [])
            self._tenants[root] = tenant
        node = root
        path: list[_Node] = []
        for at in range(0, len(ids), PAGE):
            tokens = tuple(ids[at : at + PAGE])
            child, common = self._best(node, tokens)
            if child is None or common < len(tokens):
                child = self._insert(node, tokens, row, at, room)
                if child is None:
                    break
                room -= child.nbytes
            path.append(child)
            node = child
        for page in reversed(path):
            self._used.move_to_end(page)
        self._drop_empty(root)

    def _insert(self, parent: _Node, tokens: tuple[int, ...], row: Row, at: int, room: int) -> _Node | None:
        views = row.parts(at, at + len(tokens))
        if sum(view.nbytes for view in views) > room:
            return None
        node = _Node(parent, tokens, [view.clone(memory_format=torch.contiguous_format) for view in views])
        parent.add(node)
        self._used[node] = None
        self.nbytes += node.nbytes
        for other in list(parent.candidates(tokens[0])):  # a shorter end that this page continues
            if len(other.tokens) < len(tokens) and tokens[: len(other.tokens)] == other.tokens:
                self._forget(other)
        return node

    def evict(self, wanted: int) -> None:
        """Forgets the pages longest unused, at least `wanted` bytes of them if there are so many."""
        goal = self.nbytes - wanted
        while self.nbytes > max(goal, 0) and self._used:
            leaf = next(page for page in self._used if not page.children)
            self._forget(leaf)

    def clear(self) -> None:
        """Forgets everything."""
        self._roots.clear()
        self._tenants.clear()
        self._used.clear()
        self.nbytes = 0

    def _forget(self, node: _Node) -> None:
        if node.children:
            return
        assert node.parent is not None
        node.parent.remove(node)
        del self._used[node]
        self.nbytes -= node.nbytes
        self._drop_empty(node.parent)

    def _drop_empty(self, root: _Node) -> None:
        if root.parent is None and not root.children and root in self._tenants:
            del self._roots[self._tenants.pop(root)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
