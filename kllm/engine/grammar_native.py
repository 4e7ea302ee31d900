"""The calls into llguidance, and what keeps a stranger's grammar from hanging or ending the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kllm.engine.grammar_text import one_line
from kllm.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from kllm.engine.grammar_vocab import Vocabulary

COMPILE_SECONDS = 4.5
_COMPILERS = 4  # threads that may compile at once; one that hangs keeps its place
_STACK = 256 << 20  # the library recurses along chains of rules; the usual 8 MB overflow at some 2,000
_PROBE_TOKENS = 16


@cache
def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


@cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def native_masks(matchers: list[LLMatcher], size: int) -> np.ndarray:
    """What each grammar allows next, bool [len(matchers), size]; trouble is left in the matchers."""
    from llguidance import numpy as native

    bits = np.zeros((len(matchers), (size + 31) // 32), np.int32)
    try:
        if len(matchers) == 1:
            native.fill_next_token_bitmask(matchers[0], bits, 0)
        else:
            pairs = [(m, i) for i, m in enumerate(matchers)]
            native.fill_next_token_bitmask_par(_executor(), pairs, bits)
    except BaseException as e:  # a panic of the library derives from BaseException
        _reraise_foreign(e)
        bits[:] = 0
        for i, matcher in enumerate(matchers):
            try:
                native.fill_next_token_bitmask(matcher, bits, i)
            except BaseException as one:
                _reraise_foreign(one)
                bits[i] = 0
    return np.unpackbits(bits.view(np.uint8), axis=1, count=size, bitorder="little").view(np.bool_)


def build(vocabulary: Vocabulary, kind: str, source: str) -> LLMatcher:
    """A matcher for the grammar, tried out: many faults show only when the first tokens are taken.

    Args:
        vocabulary: the tokens.
        kind: "json" (a schema), "regex" or "lark".
        source: its text.

    Raises:
        UserError: the grammar is broken, allows nothing or is too complex; without `where`.
    """
    from llguidance import LLMatcher

    make: dict[str, Callable[[str], str]] = {
        "json": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    try:
        native = LLMatcher(vocabulary.native, make[kind](source), log_level=0, limits=_limits())
        if native.is_error():
            message = native.get_error()
            if kind == "regex":  # it was wrapped in a Lark rule, whose place means nothing to the user
                message = message.split("(in regex): ", 1)[-1]
            raise UserError(one_line(message))
        _probe(vocabulary, native.deep_copy())
        return native
    except (UserError, MemoryError):
        raise
    except BaseException as e:
        _reraise_foreign(e)
        raise UserError(f"cannot be compiled: {one_line(str(e))}") from None


def _probe(vocabulary: Vocabulary, native: LLMatcher) -> None:
    """Takes a few random tokens. Only limits count as faults here: others may be this path's alone."""
    random = np.random.default_rng(0)
    for step in range(_PROBE_TOKENS):
        row = native_masks([native], vocabulary.size)[0]
        if not step and (native.is_error() or not row.any()):
            raise UserError("the grammar allows no text: " + one_line(native.get_error()))
        row[list(vocabulary.stops)] = False
        allowed = np.flatnonzero(row)
        if native.is_error() or not len(allowed):
            break
        if not native.consume_token(int(random.choice(allowed))) or native.is_stopped():
            break
    if native.is_error():
        message = one_line(native.get_error())
        if any(word in message for word in ("too many", "fuel", "items", "limit", "complex")):
            raise UserError("the grammar is too complex: " + message)


_slots = threading.BoundedSemaphore(_COMPILERS)
_stack_lock = threading.Lock()


def bounded(make: Callable[[], LLMatcher], where: str) -> LLMatcher:
    """Runs `make` for at most `COMPILE_SECONDS`, on a stack of its own.

    The library cannot be interrupted: what takes longer goes on in its thread (without Python's lock) and
    blocks one of a few places until it ends.

    Raises:
        UserError: from `make`, or out of time or places.
    """
    if not _slots.acquire(timeout=COMPILE_SECONDS):
        raise UserError("too many grammars are being compiled; try again", where=where)
    outcome: list[LLMatcher | BaseException] = []

    def work() -> None:
        try:
            outcome.append(make())
        except BaseException as e:
            outcome.append(e)
        finally:
            _slots.release()

    thread = threading.Thread(target=work, name="grammar", daemon=True)
    with _stack_lock:
        usual = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join(COMPILE_SECONDS)
    if not outcome:
        message = f"takes longer than {COMPILE_SECONDS:g} s to compile"
        raise UserError(message, where=where, hint="make it simpler")
    result = outcome[0]
    if isinstance(result, UserError):
        raise UserError(result.message, where=result.where or where, hint=result.hint)
    if isinstance(result, BaseException):
        raise result
    return result


def _reraise_foreign(error: BaseException) -> None:
    """Passes on what is no fault of the grammar."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
