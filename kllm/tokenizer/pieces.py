"""From token ids to bytes to text, whole or as a stream.

Every token of a byte-level or SentencePiece vocabulary stands for some bytes, so text is the UTF-8
reading of their concatenation. One rule for both uses makes a stream add up to exactly what `decode`
returns: nothing comes out while the tail is an incomplete character, and each maximal invalid part
becomes one U+FFFD. Decoders that are not concatenations (WordPiece) go through the library's own.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0..255 in GPT-2's byte-level vocabularies."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [""] * 256
    for byte in kept:
        alphabet[byte] = chr(byte)
    spare = 0x100
    for byte in range(256):
        if not alphabet[byte]:
            alphabet[byte] = chr(spare)
            spare += 1
    return alphabet


_BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry written in the byte-level alphabet."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode("utf-8", "replace")


def decoder_kind(decoder: dict[str, Any] | None) -> tuple[str, bool]:
    """What a tokenizer.json's `decoder` entry does.

    Returns:
        ("bytes" | "sentencepiece" | "other", whether one leading space of the whole text is dropped).
    """
    if not decoder:
        return "other", False
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return "bytes", False
    if kinds == ["Metaspace"] and steps[0].get("replacement") == "▁":
        scheme = steps[0].get("prepend_scheme", "always" if steps[0].get("add_prefix_space") else "never")
        return "sentencepiece", scheme != "never"
    if kinds[:1] == ["Replace"] and kinds[1:] in ([], ["ByteFallback"], ["Strip"], ["ByteFallback", "Strip"]):
        replace, strip = steps[0], steps[-1] if kinds[-1] == "Strip" else None
        known = replace.get("pattern") == {"String": "▁"} and replace.get("content") == " "
        if strip is not None:
            known = known and (strip.get("content"), strip.get("start"), strip.get("stop")) == (" ", 1, 0)
        return ("sentencepiece", strip is not None) if known else ("other", False)
    return "other", False


class Pieces:
    """The bytes of every token id.

    Args:
        vocab: token -> id, added tokens included.
        added: the added tokens' texts -> id (they stand for their own text).
        special: ids that `skip_special_tokens` drops.
        decoder: the `decoder` entry of tokenizer.json.
    """

    def __init__(
        self, vocab: dict[str, int], added: dict[str, int], special: set[int], decoder: dict[str, Any] | None
    ) -> None:
        self.kind, self.drops_first_space = decoder_kind(decoder)
        to_bytes = byte_level_bytes if self.kind == "bytes" else _sentencepiece_bytes
        self.all: list[bytes] = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, index in vocab.items():
            self.all[index] = token.encode() if token in added else to_bytes(token)
        self.visible = [b"" if index in special else piece for index, piece in enumerate(self.all)]

    @property
    def concatenate(self) -> bool:
        """Whether text is the concatenation of the tokens' bytes."""
        return self.kind != "other"

    def text(self, ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; ids outside the vocabulary (padding rows) stand for nothing."""
        pieces = self.visible if skip_special_tokens else self.all
        size = len(pieces)
        data = b"".join([pieces[i] for i in ids if 0 <= i < size])
        if self.drops_first_space and data[:1] == b" ":
            data = data[1:]
        return data.decode("utf-8", "replace")


class StreamDecoder:
    """Text of tokens that come one by one; never half a character.

    Args:
        pieces: the token bytes.
        skip_special_tokens: whether control tokens are left out of the text.
        prompt: ids that came before; their text is not repeated, but a space at the start of what
            follows is then kept.
        shown: control tokens whose text stays in all the same.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
        shown: Sequence[int] = (),
    ) -> None:
        self._pieces = pieces.visible if skip_special_tokens else pieces.all
        self._kept = {i: pieces.all[i] for i in shown if 0 <= i < len(pieces.all)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = pieces.drops_first_space
        for index in prompt[-16:]:
            self.put(index)

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly empty."""
        piece = self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""
        piece = self._kept.get(token_id, piece)
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is still held back, as U+FFFD if it never became a character."""
        return self._decoder.decode(b"", final=True)


class WindowDecoder(StreamDecoder):
    """The same for decoders that are no concatenation: decodes a short window again for each token."""

    def __init__(self, decode: Callable[[list[int]], str], *, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-16:])
        self._shown = self._decode(self._ids) if self._ids else ""

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly empty."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        return "" if text.endswith("\ufffd") else self._emit(text)

    def flush(self) -> str:
        """What is still held back."""
        return self._emit(self._decode(self._ids)) if self._ids else ""

    def _emit(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) > 64:
            self._ids = self._ids[-16:]
            self._shown = self._decode(self._ids)
        return fresh
