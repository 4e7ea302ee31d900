"""One tokenizer interface over a Hugging Face `tokenizer.json`, whoever made it.

Plain text and control tokens are kept apart: `encode` never yields an added token, whatever the text
says (users cannot forge a turn), and `encode_raw` reads added tokens, for prompts written by hand.
The files are written by hand as JSON so that transformers 4 and 5, vLLM and llama.cpp read them alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from kllm.errors import UserError
from kllm.files import write_json, write_text
from kllm.tokenizer.pieces import Pieces, StreamDecoder, WindowDecoder
from kllm.tokenizer.source import Source, read_source, template_text, token_name

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_EOS_NAMES = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_KEPT_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "model_max_length",
)
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
_BATCH_CHARS, _BATCH_TEXTS = 200_000, 256  # larger batches are slower: the library holds 300 bytes a token


class Tokenizer:
    """Text to ids and back.

    Args:
        source: what was read or built; see `Tokenizer.load`.
        chat_template: template text that replaces the source's.
    """

    def __init__(self, source: Source, chat_template: str | None = None) -> None:
        self._source = source
        self._config = source.config
        self.chat_template = chat_template or source.chat_template
        self._backend = _backend(source.spec, source.where)
        self._add_missing()
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self._added = {token.content: (index, token) for index, token in self._added_tokens().items()}
        self._roles = {role: self._role(role) for role in _ROLES}
        if self._roles["eos_token"] is None:
            found = next((name for name in _EOS_NAMES if name in self._vocab), None)
            if found is None:
                raise UserError(
                    "no end-of-text token", where=source.where, hint="set eos_token in tokenizer_config.json"
                )
            self._roles["eos_token"] = found
        self.vocab_size = max(self._vocab.values()) + 1
        """Highest id + 1, added tokens included."""

    @classmethod
    def load(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Reads a tokenizer directory (or its tokenizer.json).

        Args:
            path: directory with tokenizer.json, or with GPT-2's vocab.json and merges.txt.
            chat_template: template text, or the path of a .jinja file, instead of the directory's own.

        Raises:
            UserError: missing or broken files, a chat template with a syntax error.
        """
        text = None
        if chat_template is not None:
            from kllm.tokenizer.template import compile_template

            text, where = template_text(chat_template)
            compile_template(text, where)
        return cls(read_source(path), text)

    def with_chat_template(self, text: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return Tokenizer(self._source, text)

    # ---- ids

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer."""
        return self._vocab[str(self._roles["eos_token"])]

    @property
    def pad_token_id(self) -> int:
        """The padding token; the end token if there is none."""
        pad = self._roles["pad_token"]
        return self.eos_token_id if pad is None else self._vocab[pad]

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text, None if there is none."""
        bos = self._roles["bos_token"]
        return None if bos is None else self._vocab[bos]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document: `<|endoftext|>` if there is one, else the end token."""
        return self._vocab.get("<|endoftext|>", self.eos_token_id)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, the end token first."""
        ids = [self.eos_token_id, self.eot_token_id, *self._source.stop_ids]
        ids += [self._vocab[name] for name in ("<|eot_id|>", "<|im_end|>") if name in self._added]
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < self.vocab_size))

    @property
    def added_tokens(self) -> dict[str, int]:
        """Added tokens (control tokens, think and tool tags, reserved ones): text -> id."""
        return {text: index for text, (index, _) in self._added.items()}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Those of `added_tokens` that are control tokens, left out of decoded text."""
        return {text: index for text, (index, token) in self._added.items() if token.special}

    @property
    def role_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... -> text, as chat templates see them; absent if there is none."""
        return {role: text for role, text in self._roles.items() if text is not None}

    @cached_property
    def control_tokens(self) -> dict[str, tuple[int, bool, bool]]:
        """The added tokens that mean something: text -> (id, swallows space before, swallows space after).

        Runs of white space that some vocabularies hold as added tokens are ordinary text.
        """
        return {
            text: (index, token.lstrip, token.rstrip)
            for text, (index, token) in self._added.items()
            if not _is_text(token)
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids: the vocabulary, the template, the special tokens."""
        parts = [self._backend.to_str(), self.chat_template or "", json.dumps(self.role_tokens)]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts the start token before a text."""
        return self.encode_raw("", add_special_tokens=True)[:1] == [self.bos_token_id]

    def spec(self) -> dict[str, Any]:
        """tokenizer.json as data: vocabulary, merges, normalizer, pre_tokenizer, added_tokens, ..."""
        return json.loads(self._backend.to_str())

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, as the file writes it."""
        return self._vocab.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, as the file writes it."""
        return self._backend.id_to_token(token_id)

    # ---- text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Nothing in it becomes an added token, and none is put around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        ids: list[list[int]] = []
        for batch in _batches(texts):
            try:
                encodings = self._plain.encode_batch_fast(batch, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                batch = [_no_surrogates(text) for text in batch]
                encodings = self._plain.encode_batch_fast(batch, add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
        return ids

    def encode_raw(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of text in which added tokens are read as such; for prompts written by hand.

        Args:
            text: e.g. "<|im_start|>user\\nhi<|im_end|>".
            add_special_tokens: also put around it what the tokenizer puts around a text (BOS).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            return self._backend.encode(_no_surrogates(text), add_special_tokens=add_special_tokens).ids

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, U+FFFD for bytes that form no character."""
        pieces = self._pieces
        if pieces.concatenate:
            return pieces.text(ids, skip_special_tokens=skip_special_tokens)
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def stream_decoder(
        self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = (), shown: Sequence[int] = ()
    ) -> StreamDecoder:
        """A decoder for tokens that come one by one; see `StreamDecoder`."""
        if self._pieces.concatenate:
            return StreamDecoder(
                self._pieces, skip_special_tokens=skip_special_tokens, prompt=prompt, shown=shown
            )
        hidden = set(self.special_tokens.values()) - set(shown) if skip_special_tokens else set()
        return WindowDecoder(
            lambda ids: self.decode([i for i in ids if i not in hidden], False), prompt=prompt
        )

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each token stands for: int32 [vocab_size], 0 for special and unused ids."""
        return np.fromiter((len(p) for p in self._pieces.visible), np.int32, count=self.vocab_size)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for (its own text for an added token)."""
        return self._pieces.all[token_id] if 0 <= token_id < self.vocab_size else b""

    # ---- files

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises:
            KllmError: the directory cannot be written.
        """
        target = Path(directory)
        write_text(target / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(target / "tokenizer_config.json", self._config_json())
        write_json(target / "special_tokens_map.json", self.role_tokens)
        if self.chat_template:
            write_text(target / "chat_template.jinja", self.chat_template)

    def _config_json(self) -> dict[str, Any]:
        flags = ("content", *_FLAGS, "special")
        config: dict[str, Any] = {
            # Any other class name makes some reader rebuild the pre-tokenizer from its own code.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(index): {flag: getattr(token, flag) for flag in flags}
                for index, token in self._added_tokens().items()
            },
            **self._roles,
            "clean_up_tokenization_spaces": False,
        }
        config.update({key: self._config[key] for key in _KEPT_KEYS if key in self._config})
        extra = self._config.get("additional_special_tokens") or self._config.get("extra_special_tokens")
        if isinstance(extra, list):
            config["additional_special_tokens"] = [name for t in extra if (name := token_name(t))]
        if self.chat_template:
            config["chat_template"] = self.chat_template
        return config

    # ---- inside

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that knows no added tokens."""
        spec = plain_spec(self.spec())
        return _backend(json.dumps(spec), self._source.where)

    @cached_property
    def _pieces(self) -> Pieces:
        decoder = self._backend.decoder
        spec = json.loads(decoder.__getstate__()) if decoder is not None else None
        return Pieces(self._vocab, self.added_tokens, set(self.special_tokens.values()), spec)

    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return dict(sorted(self._backend.get_added_tokens_decoder().items()))

    def _role(self, role: str) -> str | None:
        name = token_name(self._config.get(role))
        return name if name in self._vocab else None

    def _add_missing(self) -> None:
        """Added tokens that only tokenizer_config.json names."""
        present = {token.content for token in self._added_tokens().values()}
        listed = self._config.get("added_tokens_decoder") or {}
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            if isinstance(entry, dict) and entry.get("content") and entry["content"] not in present:
                flags = {k: bool(entry[k]) for k in _FLAGS if k in entry}
                special = bool(entry.get("special"))
                token = tokenizers.AddedToken(entry["content"], special=special, **flags)
                add = self._backend.add_special_tokens if special else self._backend.add_tokens
                add([token])


def plain_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json in which no text can become an added token (white-space runs stay)."""
    removed = [t["content"] for t in spec["added_tokens"] if not _is_text_entry(t)]
    spec["added_tokens"] = [t for t in spec["added_tokens"] if _is_text_entry(t)]
    model = spec["model"]
    vocab = model.get("vocab")
    # BPE reaches a vocabulary entry through merges only; other models match it as a whole, so hide it.
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        return spec
    merged = {"".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model.get("merges", [])}
    merged.add(model.get("unk_token"))
    hidden = {token: f"\U0010fffe{n}" for n, token in enumerate(removed) if token not in merged}
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(token, token): index for token, index in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocab]
    return spec


def _is_text(token: tokenizers.AddedToken) -> bool:
    return not token.special and not token.content.strip()


def _is_text_entry(entry: dict[str, Any]) -> bool:
    return not entry["special"] and not entry["content"].strip()


def _backend(spec: str, where: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(spec)
    except Exception as e:  # the library raises bare Exception
        raise UserError(
            f"the tokenizers library cannot read it: {e}",
            where=f"{where}/tokenizer.json",
            hint="update tokenizers, or copy the file again",
        ) from e
    backend.no_truncation()
    backend.no_padding()
    return backend


def _batches(texts: Sequence[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS or len(batch) >= _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _no_surrogates(text: str) -> str:
    """Half surrogates, which JSON escapes can produce and UTF-8 cannot hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
