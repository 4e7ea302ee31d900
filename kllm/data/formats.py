"""Every dialect of training data, detected by its keys and brought to one of five record types.

text         {"text"} or {"content"}, a bare string, a plain text file       -> TextRecord
openai       {"messages": [{"role", "content"}...], "tools"?}, or a bare list -> ChatRecord
minimind     {"conversations": [{"role", "content"}...]}                      -> ChatRecord
sharegpt     {"conversations": [{"from", "value"}...]} (Belle alike)          -> ChatRecord
alpaca       {"instruction", "input"?, "output", "history"?, "system"?}       -> ChatRecord
dolly        {"instruction", "context"?, "response"}                          -> ChatRecord
completion   {"prompt", "completion"}, text or messages                       -> ChatRecord
preference   {"chosen", "rejected", "prompt"?}, text or messages              -> PreferenceRecord
kto          {"prompt", "completion", "label": true|false}                    -> RatedRecord
             (a preference pair too: chosen is good, rejected is not; see `records`)
qa           {"question", "answer"}                                           -> PromptRecord, ChatRecord
prompt       {"prompt", "answer"?}                                            -> PromptRecord, ChatRecord
agent        {"conversations", "gt"}, or messages that end in a question, and "answer" -> PromptRecord
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from kllm.data.messages import (
    BadRow,
    Message,
    instruction_prompt,
    read_messages,
    read_text,
    read_tools,
    system_first,
)
from kllm.data.pairs import read_preference
from kllm.data.readers import TextChunk

Want = Literal["text", "chat", "preference", "rated", "prompt"]
CONTAINERS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
KIND: dict[str, Want] = {
    "text": "text", "openai": "chat", "minimind": "chat", "sharegpt": "chat", "alpaca": "chat",
    "dolly": "chat", "completion": "chat", "preference": "preference", "kto": "rated",
    "qa": "prompt", "prompt": "prompt", "agent": "prompt",
}  # fmt: skip
_WANTS = {
    "text": 'pretraining wants documents like {"text": "..."}',
    "chat": 'fine-tuning (sft) wants conversations like {"messages": [...]}',
    "preference": 'preference training wants pairs like {"prompt", "chosen", "rejected"}',
    "rated": 'training on single ratings wants {"prompt", "completion", "label"} or pairs',
    "prompt": 'reinforcement learning wants prompts like {"question", "answer"}',
}
_HAS = {
    "text": "plain text", "chat": "a conversation", "preference": "a preference pair",
    "rated": "a rated answer", "prompt": "a question",
}  # fmt: skip
_HINT = {
    "text": "plain text is for `kllm pretrain`",
    "chat": "conversations are for `kllm sft`",
    "preference": "preference pairs are for `kllm dpo`",
    "rated": "rated answers are for `kllm dpo` with loss kto",
    "prompt": "questions with answers are for sft or reinforcement learning",
}


@dataclass(frozen=True)
class TextRecord:
    """A document; `last` is false for a part whose document goes on in the next record."""

    text: str
    last: bool = True


@dataclass(frozen=True)
class ChatRecord:
    """A conversation (see messages.py for the shape) and the schemas of the tools it may call."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PreferenceRecord:
    """Two continuations of one prompt; chosen is the better."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class RatedRecord:
    """A continuation of a prompt that was called good or bad."""

    prompt: list[Message]
    completion: list[Message]
    good: bool
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to answer and what a right answer is compared with (None if nothing is known)."""

    messages: list[Message]
    answer: Any = None
    tools: list[Any] | None = None


Record = TextRecord | ChatRecord | PreferenceRecord | RatedRecord | PromptRecord


class WrongDialect(BadRow):
    """A well-formed record of another kind of data than the stage wants."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def detect(obj: Any) -> str:
    """The dialect of a record, from its keys. Raises BadRow if it is none that is known."""
    if isinstance(obj, (str, TextChunk)):
        return "text"
    if isinstance(obj, list) and obj and isinstance(obj[0], dict) and ("role" in obj[0] or "from" in obj[0]):
        return "openai"
    if not isinstance(obj, dict):
        raise BadRow(f"the row is a {type(obj).__name__}, not an object")
    keys = {key for key, value in obj.items() if value is not None}
    dialect = _detect_pairs(keys) or _detect_chat(obj, keys) or _detect_flat(obj, keys)
    if dialect is None:
        shown = ", ".join(map(str, list(obj)[:8])) or "none"
        raise BadRow(f"unknown format: no known combination among the keys {shown}")
    return dialect


def _detect_pairs(keys: set[str]) -> str | None:
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if {"prompt", "completion", "label"} <= keys:
        return "kto"
    return None


def _detect_chat(obj: dict[str, Any], keys: set[str]) -> str | None:
    for key in CONTAINERS:
        value = obj.get(key)
        if not isinstance(value, list):
            continue
        first, last = (value[0], value[-1]) if value else (None, None)
        asked = isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human", "tool")
        if "gt" in keys or ("answer" in keys and asked):
            return "agent"
        if isinstance(first, dict) and "from" in first:
            return "sharegpt"
        return "openai" if key == "messages" else "minimind"
    return None


def _detect_flat(obj: dict[str, Any], keys: set[str]) -> str | None:
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"instruction", "response"} <= keys:
        return "dolly"
    if "prompt" in keys and keys & {"completion", "response", "output"}:
        return "completion"
    if keys & {"question", "problem"} and keys & {"answer", "response", "solution"}:
        return "qa"
    if "prompt" in keys:
        return "prompt"
    if isinstance(obj.get("text"), str) or isinstance(obj.get("content"), str):
        return "text"
    return None


def normalise(obj: Any, want: Want, dialect: str | None = None) -> Record:
    """One record as the type that `want` asks for.

    Raises:
        WrongDialect: the record is fine but of another kind (a preference pair given to sft).
        BadRow: the record cannot be used; the text says why.
    """
    if want == "text" and isinstance(obj, dict) and isinstance(obj.get("text"), str):
        dialect = "text"  # Alpaca tables carry the rendered text beside its parts
    dialect = dialect or detect(obj)
    reader = _READERS.get((want, dialect))
    if reader is None:
        reason = f"the row holds {_HAS[KIND[dialect]]} ({dialect} format), but {_WANTS[want]}"
        raise WrongDialect(reason, _HINT[KIND[dialect]])
    return reader(obj)


def records(obj: Any, want: Want) -> list[Record]:
    """What one row gives: one record, or two ratings where `want` is "rated" and the row a pair.

    Raises: as `normalise`.
    """
    if want == "rated" and detect(obj) == "preference":
        pair = _pair(obj)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return [RatedRecord(pair.prompt, answer, good, pair.tools) for answer, good in sides]
    return [normalise(obj, want)]


def _text(obj: Any) -> TextRecord:
    if isinstance(obj, TextChunk):
        return TextRecord(_sound(obj.text), obj.last)
    if isinstance(obj, str):
        text = obj
    else:
        text = obj["text"] if isinstance(obj.get("text"), str) else obj["content"]
    if not text.strip():
        raise BadRow("the text is empty")
    return TextRecord(_sound(text))


def _sound(text: str) -> str:
    """Refuses half surrogate pairs, which JSON can spell but no encoding can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"half of a surrogate pair (\\u{ord(text[error.start]):04x}) in the text") from None
    return text


def _sound_messages(messages: list[Message]) -> None:
    for message in messages:
        _sound(message["content"])
        _sound(message.get("reasoning_content", ""))


def _chat(messages: list[Message], tools: list[Any] | None) -> ChatRecord:
    """Checks that there is something to learn; what follows the last answer is dropped."""
    _sound_messages(messages)
    end = len(messages)
    while end and messages[end - 1]["role"] != "assistant":
        end -= 1
    if not end:
        raise BadRow("no assistant message: nothing to learn")
    if messages[0]["role"] == "assistant" and end == 1:
        raise BadRow("the only message is the assistant's: there is no prompt")
    return ChatRecord(messages[:end], tools)


def _turns(obj: Any) -> tuple[list[Message], list[Any] | None]:
    if isinstance(obj, list):
        return read_messages(obj)
    raw = next(obj[key] for key in CONTAINERS if isinstance(obj.get(key), list))
    messages, tools = read_messages(raw)
    return system_first(messages, obj), _own_tools(obj) or tools


def _own_tools(obj: dict[str, Any]) -> list[Any] | None:
    return read_tools(obj.get("tools")) or read_tools(obj.get("functions"))


def _conversation(obj: Any) -> ChatRecord:
    return _chat(*_turns(obj))


def _instruction(obj: dict[str, Any], extra: str, answer: str) -> ChatRecord:
    said = {"role": "assistant", "content": read_text(obj, answer)}
    return _chat(instruction_prompt(obj, extra) + read_messages([said])[0], _own_tools(obj))


def _completion(obj: dict[str, Any]) -> ChatRecord:
    answer = next(key for key in ("completion", "response", "output", "answer") if obj.get(key) is not None)
    return _chat(*_prompt_and(obj, "prompt", obj[answer], answer))


def _prompt_and(
    obj: dict[str, Any], key: str, answer: Any, name: str
) -> tuple[list[Message], list[Any] | None]:
    messages, tools = _prompt(obj, key)
    if isinstance(answer, list):
        raw = answer
    else:
        raw = [{"role": "assistant", "content": read_text({name: answer}, name)}]
    return messages + read_messages(raw)[0], tools


def _prompt(obj: dict[str, Any], key: str) -> tuple[list[Message], list[Any] | None]:
    value, tools = obj[key], None
    if isinstance(value, list):
        messages, tools = read_messages(value)
    else:
        messages = [{"role": "user", "content": read_text(obj, key)}]
    return system_first(messages, obj), _own_tools(obj) or tools


def _question_key(obj: dict[str, Any]) -> str:
    return next(key for key in ("question", "problem", "prompt") if obj.get(key) is not None)


def _answered(obj: dict[str, Any]) -> ChatRecord:
    """A question with its answer as one exchange; a worked solution teaches more than the bare answer."""
    names = [key for key in ("solution", "response", "answer") if obj.get(key) is not None]
    if not names:
        raise BadRow("the prompt has no answer to learn")
    return _chat(*_prompt_and(obj, _question_key(obj), obj[names[0]], names[0]))


def _verifiable(obj: dict[str, Any]) -> PromptRecord:
    messages, tools = _prompt(obj, _question_key(obj))
    return PromptRecord(messages, obj.get("answer", obj.get("solution")), tools)


def _unanswered(obj: Any) -> PromptRecord:
    """A conversation as a prompt: the last answer is a placeholder and is dropped."""
    raw = obj if isinstance(obj, list) else next(obj[k] for k in CONTAINERS if isinstance(obj.get(k), list))
    last = raw[-1] if raw and isinstance(raw[-1], dict) else {}
    if last.get("role", last.get("from")) in ("assistant", "gpt", "bot", "model"):
        raw = raw[:-1]
    messages, tools = read_messages(raw)
    top = obj if isinstance(obj, dict) else {}
    return PromptRecord(messages, top.get("gt", top.get("answer")), _own_tools(top) or tools)


def _pair(obj: dict[str, Any]) -> PreferenceRecord:
    prompt, chosen, rejected, tools = read_preference(obj)
    _sound_messages([*prompt, *chosen, *rejected])
    return PreferenceRecord(prompt, chosen, rejected, _own_tools(obj) or tools)


def _rated(obj: dict[str, Any]) -> RatedRecord:
    if obj["label"] not in (True, False):
        raise BadRow("label is neither true nor false")
    prompt, tools = _prompt(obj, "prompt")
    whole, _ = _prompt_and(obj, "prompt", obj["completion"], "completion")
    _sound_messages(whole)
    completion = whole[len(prompt) :]
    if not completion or completion[0]["role"] != "assistant":
        raise BadRow("the completion is not an answer of the assistant")
    return RatedRecord(prompt, completion, bool(obj["label"]), tools)


_CHATS = ("openai", "minimind", "sharegpt")
_READERS: dict[tuple[str, str], Callable[[Any], Record]] = {
    ("text", "text"): _text,
    ("chat", "alpaca"): lambda obj: _instruction(obj, "input", "output"),
    ("chat", "dolly"): lambda obj: _instruction(obj, "context", "response"),
    ("chat", "completion"): _completion,
    ("chat", "qa"): _answered,
    ("chat", "prompt"): _answered,
    ("preference", "preference"): _pair,
    ("rated", "kto"): _rated,
    ("prompt", "qa"): _verifiable,
    ("prompt", "prompt"): _verifiable,
    ("prompt", "agent"): _unanswered,
    **{("chat", name): _conversation for name in _CHATS},
    **{("prompt", name): _unanswered for name in _CHATS},
}
