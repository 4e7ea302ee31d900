"""Who waits, who runs, and how many tokens of whom a step computes: bookkeeping without a model.

First come, first served. Answers under way go first, one token each; then prompts, in chunks, so that a
long one never stalls the others: the oldest gets at least half of the chunk, those behind it the rest.
Memory is taken as it is needed; when there is none left the youngest request gives its row back and
starts again later from its prompt and what it has said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kllm.engine.prefix import PrefixCache
from kllm.engine.request import Request
from kllm.engine.rows import PAGE, Row, Rows


class Scheduler:
    """Queues and memory.

    Args:
        rows: memory for keys and values.
        prefix: what is known already.
        max_running: most requests that run at once.
        chunk: prompt tokens per step beside answers under way; twice as many when there are none.
    """

    def __init__(self, rows: Rows, prefix: PrefixCache, *, max_running: int, chunk: int) -> None:
        self.rows, self.prefix = rows, prefix
        self.max_running, self.chunk = max_running, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def find(self, number: int) -> Request | None:
        """The unfinished request of that id."""
        return next((r for r in (*self.waiting, *self.running) if r.number == number), None)

    # -- memory ----------------------------------------------------------------------------------------

    def _allocate(self, tokens: int) -> Row | None:
        row, short = self.rows.allocate(tokens, self.prefix.nbytes)
        while row is None and short:
            self.prefix.evict(short)
            row, short = self.rows.allocate(tokens, self.prefix.nbytes)
        return row

    def _grow(self, request: Request, tokens: int) -> bool:
        """Makes `request`'s row hold `tokens`; False if there is no memory."""
        row = request.row
        assert row is not None
        if tokens <= row.pool.capacity:
            return True
        larger = self._allocate(tokens)
        if larger is None:
            return False
        request.row = larger  # first of all: whatever fails now, the row has an owner
        self.rows.copy(row, larger)
        self.rows.free(row)
        return True

    def release(self, request: Request, *, keep: bool = True) -> None:
        """Takes a request out of the queues and frees its row; `keep` leaves what it computed for others."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        row, request.row = request.row, None
        if row is None:
            return
        if keep:
            self.remember(request, row, request.tokens[: request.computed])
        self.rows.free(row, wipe=not keep)
        request.computed = 0

    def remember(self, request: Request, row: Row, ids: list[int]) -> None:
        """Puts `ids`, which `row` holds, into the prefix cache as far as memory allows."""
        room = self.rows.budget - self.rows.held_bytes - self.prefix.nbytes
        wanted = (len(ids) + PAGE) * self.rows.token_bytes
        if self.prefix.enabled and room < wanted:
            self.rows.trim()
            room = self.rows.budget - self.rows.held_bytes - self.prefix.nbytes
            if room < wanted:
                self.prefix.evict(wanted - room)
                room = self.rows.budget - self.rows.held_bytes - self.prefix.nbytes
        self.prefix.store(request.tenant, ids, row, max(room, 0))

    def preempt_all(self) -> None:
        """Every running request starts again from its tokens, in order."""
        for request in sorted(self.running, key=lambda r: -r.number):
            self._preempt(request)

    def _preempt(self, request: Request) -> None:
        self.release(request, keep=False)
        self.waiting.appendleft(request)
        self.preemptions += 1

    # -- one step --------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Gives rows to the oldest waiting requests, as far as rows and memory go.

        One whose beginning another is just computing waits for that and lets others pass.
        """
        for request in list(self.waiting):
            if len(self.running) == self.max_running:
                return
            ids = request.tokens
            # the last token must be computed for its logits; prompt log-probabilities need all of them
            limit = len(ids) - 1 if request.params.prompt_logprobs is None or request.drawn else 0
            known, pages = self.prefix.match(request.tenant, ids, limit)
            if self._comes_soon(request, known, limit):
                continue
            row = self._allocate(min(len(ids) + 1, self.rows.longest))
            if row is None:
                return
            self.waiting.remove(request)
            self.running.append(request)
            request.row = row
            self.prefix.load(row, known, pages)
            self.rows.lengths[row] = request.computed = known
            if not request.admitted:
                request.admitted, request.cached = True, known
                self.prefix_queries += len(ids)
                self.prefix_hits += known

    def _comes_soon(self, request: Request, known: int, limit: int) -> bool:
        """Whether the next page of this prompt is being computed for another: worth waiting for."""
        if not self.prefix.enabled:
            return False
        upto = min(known - known % PAGE + PAGE, limit)
        return upto > known and any(
            other.computed < upto < len(other.tokens)
            and other.tenant == request.tenant
            and other.tokens[:upto] == request.tokens[:upto]
            for other in self.running
        )

    def plan(self, extra: dict[Request, int]) -> list[tuple[Request, int]]:
        """Requests of this step and how many tokens of each are computed.

        Args:
            extra: proposed tokens beyond the next one that some requests would like to try.

        Returns:
            (request, count): count 1 + extra for answers under way, a chunk for prompts.
        """
        chosen: list[tuple[Request, int]] = []
        for request in self._by_age():
            if request.row is None or request.pending != 1:
                continue  # preempted by an older one, or a prompt
            more = extra.get(request, 0)
            if more and self._grow(request, len(request.tokens) + more):
                chosen.append((request, 1 + more))
            elif self._secure(request, len(request.tokens)):
                chosen.append((request, 1))
        return chosen + self._chunks(self.chunk if chosen else 2 * self.chunk)

    def _by_age(self) -> Iterator[Request]:
        yield from sorted(self.running, key=lambda r: r.number)

    def _secure(self, request: Request, tokens: int) -> bool:
        """Memory for `tokens` tokens of `request`, taken from younger requests if need be."""
        while not self._grow(request, tokens):
            youngest = max(self.running, key=lambda r: r.number)
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _chunks(self, budget: int) -> list[tuple[Request, int]]:
        prompts = [r for r in self._by_age() if r.pending > 1]
        chosen = []
        for i, request in enumerate(prompts):
            behind = sum(r.pending for r in prompts[i + 1 :])
            # at least half of what is left, and all of it when nobody behind needs it
            count = min(request.pending, max(budget - behind, budget // 2, 1)) if budget > 0 else 0
            if count:
                chosen.append((request, count))
                budget -= count
        return chosen
