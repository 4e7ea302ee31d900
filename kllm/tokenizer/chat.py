"""The one conversation encoder: training, evaluation, chat and serving all go through it.

Conversation -> template -> pieces -> ids and loss mask. Only what the template itself writes can become
a control token; what users, tools and system prompts say is plain text whatever it looks like. The mask
covers the assistant's words, its reasoning and tool calls and its end-of-turn token, from the template's
`{% generation %}` blocks. Pieces are tokenised apart at the borders of those blocks, so a turn's header
never merges with its content, and a prompt's ids are exactly the start of the training row's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kllm.errors import UserError
from kllm.tokenizer.messages import Neutraliser, normalise, normalise_tools, private_characters
from kllm.tokenizer.template import DEFAULT_TEMPLATE, SPAN_CLOSE, SPAN_OPEN, compile_template, render
from kllm.tokenizer.tokenizer import Tokenizer

__all__ = ["DEFAULT_TEMPLATE", "ChatEncoder", "Encoded", "render"]

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_FRAMES = 64  # sets of template variables whose turn frame is remembered
_CACHED_CHARS = 48  # headers and separators; longer pieces rarely repeat

Messages = Sequence[Mapping[str, Any]]
Marks = tuple[str, str, str]  # private characters: breaks a token's text, opens a span, closes a span


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: token ids.
        mask: for each of them, whether it is the assistant's (to be trained on).
    """

    ids: list[int]
    mask: list[bool]


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Args:
        tokenizer: its `chat_template` is used; one without a template gets `DEFAULT_TEMPLATE` if it has
            that template's turn tokens.
        **defaults: template variables for every call, e.g. `enable_thinking=False`.

    Raises:
        UserError: no template, or a broken one.
    """

    def __init__(self, tokenizer: Tokenizer, **defaults: Any) -> None:
        template = tokenizer.chat_template
        if template is None and {"<|im_start|>", "<|im_end|>"} <= tokenizer.added_tokens.keys():
            template = DEFAULT_TEMPLATE
        if template is None:
            raise UserError(
                "the tokenizer has no chat template",
                where="tokenizer",
                hint="give one: tokenizer.chat_template",
            )
        compile_template(template)
        self.tokenizer = tokenizer
        self.template = template
        self._variables = {**tokenizer.role_tokens, **defaults}
        self._neutraliser = Neutraliser(tokenizer.control_tokens, tokenizer.special_tokens)
        self._tagged = _GENERATION.search(template) is not None
        self._cache: dict[str, list[int]] = {}
        self._frames: OrderedDict[bytes, tuple[str, str] | None] = OrderedDict()

    def encode(self, messages: Messages, tools: Any = None, /, **kwargs: Any) -> Encoded:
        """Ids and mask of one conversation; see `encode_batch`."""
        return self.encode_batch([(messages, tools)], **kwargs)[0]

    def encode_batch(self, conversations: Sequence[tuple[Messages, Any]], /, **kwargs: Any) -> list[Encoded]:
        """Ids and mask of (messages, tools) pairs, tokenised together.

        Args:
            conversations: tools may be None, a list or a JSON string.
            **kwargs: template variables.

        Raises:
            UserError: malformed messages, or a template without `{% generation %}` whose turns cannot be
                told apart otherwise.
        """
        split = [self._pieces(messages, tools, False, kwargs) for messages, tools in conversations]
        return self._tokenise(split)

    def prompt(self, messages: Messages, tools: Any = None, /, **kwargs: Any) -> list[int]:
        """Ids of a conversation up to the header of the answer to come."""
        return self._tokenise([self._pieces(messages, tools, True, kwargs)])[0].ids

    def shows(self, tools: Any) -> bool:
        """Whether the template writes `tools` into a prompt; one that refuses them does not."""
        asked = [{"role": "user", "content": "?"}]
        try:
            return self.prompt(asked, tools) != self.prompt(asked)
        except UserError:
            return False

    def text(
        self, messages: Messages, tools: Any = None, *, add_generation_prompt: bool = False, **kwargs: Any
    ) -> str:
        """The conversation as the template writes it."""
        tools = normalise_tools(tools, messages)
        variables = {**self._variables, **kwargs}
        return render(
            normalise(messages),
            self.template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    # ---- template to pieces

    def _pieces(
        self, messages: Messages, tools: Any, prompt: bool, kwargs: Mapping[str, Any]
    ) -> list[tuple[str | int, bool]]:
        """(text or token id, trained) in order."""
        tools = normalise_tools(tools, messages)
        clean = normalise(messages)
        seen = json.dumps([clean, tools, kwargs], ensure_ascii=False, default=str)
        breaker, opening, closing = private_characters(seen, self.template)
        safe = [self._neutraliser.message(message, breaker) for message in clean]
        given = {**kwargs, "tools": tools}  # callers' words too: no control token in them
        variables = {**self._variables, **{k: self._neutraliser.plain(v, breaker) for k, v in given.items()}}
        if self._tagged:
            variables |= {SPAN_OPEN: opening, SPAN_CLOSE: closing}
            text = render(safe, self.template, add_generation_prompt=prompt, **variables)
        else:
            text = self._marked(safe, prompt, variables, (breaker, opening, closing))
        return self._split(text, (breaker, opening, closing))

    def _split(self, text: str, marks: Marks) -> list[tuple[str | int, bool]]:
        breaker, opening, closing = marks
        control = self.tokenizer.control_tokens
        pieces: list[tuple[str | int, bool]] = []
        trained = False
        at = 0
        for match in _splitter(tuple(control.items()), opening, closing).finditer(text):
            if match.start() > at:
                pieces.append((text[at : match.start()].replace(breaker, ""), trained))
            at = match.end()
            found = match[0]
            if found in (opening, closing):
                trained = found == opening
            else:
                entry = control.get(found) or control[found.replace(closing, "").strip()]
                pieces.append((entry[0], trained))
                trained = trained and closing not in found
        if at < len(text):
            pieces.append((text[at:].replace(breaker, ""), trained))
        return pieces

    # ---- templates without generation blocks

    def _marked(
        self, messages: list[dict[str, Any]], prompt: bool, variables: dict[str, Any], marks: Marks
    ) -> str:
        """The rendered text with span marks put in, found from the template's own turn frame."""
        text = render(messages, self.template, add_generation_prompt=prompt, **variables)
        answers = sum(message["role"] == "assistant" for message in messages)
        marked = self._by_frame(text, answers, prompt, variables, marks)
        if marked is None and not prompt:
            marked = self._by_prefix(text, messages, variables, marks)
        if marked is None and not prompt and answers:
            raise UserError(
                "the chat template does not show which words are the assistant's",
                where="chat template",
                hint="put {% generation %} and {% endgeneration %} around them",
            )
        return text if marked is None else marked

    def _by_frame(
        self, text: str, answers: int, prompt: bool, variables: dict[str, Any], marks: Marks
    ) -> str | None:
        """Marks between each genuine assistant header and the end-of-turn token after it."""
        frame = self._frame(variables)
        if frame is None:
            return None
        head, end = frame
        before, *turns = text.split(head)
        if len(turns) != answers + prompt:
            return None
        out = [before]
        for index, turn in enumerate(turns):
            stop = turn.find(end)
            if prompt and index == answers:  # the turn to come: only the border
                out += [head, marks[1], marks[2], turn]
            elif stop < 0:
                return None
            else:
                stop += len(end)
                out += [head, marks[1], turn[:stop], marks[2], turn[stop:]]
        return "".join(out)

    def _frame(self, variables: dict[str, Any]) -> tuple[str, str] | None:
        """(assistant header, end of turn) if the template has a fixed header with a control token in it."""
        given = {k: v for k, v in variables.items() if k != "tools"}
        text = json.dumps(given, sort_keys=True, default=str)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()
        if key not in self._frames:
            self._frames[key] = self._find_frame(given)
            if len(self._frames) > _FRAMES:  # variables come from requests: there is no end of them
                self._frames.popitem(last=False)
        return self._frames[key]

    def _find_frame(self, variables: dict[str, Any]) -> tuple[str, str] | None:
        probe = "0815 probe 0815"
        user = {"role": "user", "content": "question"}
        try:
            asked = render([user], self.template, **variables)
            headed = render([user], self.template, add_generation_prompt=True, **variables)
            answered = render([user, {"role": "assistant", "content": probe}], self.template, **variables)
        except UserError:
            return None
        if not headed.startswith(asked) or probe not in answered:
            return None
        # A think block in the generation prompt is given to the model; in training it is the model's own.
        head = headed[len(asked) :].split("<think>")[0]
        tail = answered.split(probe, 1)[1]
        special = self.tokenizer.special_tokens
        ends = sorted((tail.find(token), -len(token)) for token in special if token in tail)
        if not ends or not any(token in head for token in self.tokenizer.control_tokens):
            return None
        return head, tail[: ends[0][0] - ends[0][1]]

    def _by_prefix(
        self, text: str, messages: list[dict[str, Any]], variables: dict[str, Any], marks: Marks
    ) -> str | None:
        """Marks where the text grows by one assistant message, if each rendering starts the next."""
        out, at = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                return None
            before = render(messages[:index], self.template, add_generation_prompt=True, **variables)
            after = render(messages[: index + 1], self.template, **variables)
            if not (text.startswith(after) and after.startswith(before) and len(before) >= at):
                return None
            out += [text[at : len(before)], marks[1], text[len(before) : len(after)], marks[2]]
            at = len(after)
        return "".join([*out, text[at:]])

    # ---- pieces to ids

    def _tokenise(self, conversations: list[list[tuple[str | int, bool]]]) -> list[Encoded]:
        known = self._cache
        fresh = dict.fromkeys(
            piece
            for pieces in conversations
            for piece, _ in pieces
            if isinstance(piece, str) and piece not in known
        )
        texts = list(fresh)
        table = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))
        out = []
        for pieces in conversations:
            ids: list[int] = []
            mask: list[bool] = []
            for piece, trained in pieces:
                part = [piece] if isinstance(piece, int) else known.get(piece) or table.get(piece, [])
                ids += part
                mask += [trained] * len(part)
            out.append(Encoded(ids, mask))
        if len(known) < 4096:
            known.update((text, ids) for text, ids in table.items() if len(text) <= _CACHED_CHARS)
        return out


@lru_cache(maxsize=64)
def _splitter(
    control: tuple[tuple[str, tuple[int, bool, bool]], ...], opening: str, closing: str
) -> re.Pattern[str]:
    """Finds control tokens (with the white space that they swallow, past a span's end too) and span marks."""
    ordered = sorted(control, key=lambda item: -len(item[0]))
    parts = [
        (r"\s*" if left else "") + re.escape(token) + (rf"\s*{closing}?\s*" if right else "")
        for token, (_, left, right) in ordered
    ]
    return re.compile("|".join([opening, closing, *parts]))
