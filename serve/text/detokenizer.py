"""Token ids to text, a few at a time: O(1) a token, never half a character.

Every id has a fixed spelling in bytes (`Spelling`), so a stream needs no second look at earlier tokens. Three families
of `tokenizers` decoders are told apart:

    byte level     (GPT-2, Llama 3, Qwen)   each character of a token stands for one byte; characters span tokens
    byte fallback  (Llama 2, Gemma)         text tokens, and `<0xE4>` tokens that stand for one byte
    pieces         (WordPiece, Metaspace)   text tokens; the first of a text is written differently

Bytes that never become a character turn into U+FFFD, when the next token shows it or at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one stream of ids. What the pushes and `finish` return, joined, is `decode` of all ids.

    One difference, in favour of the reader: a byte-fallback tokenizer decodes a *run* of byte tokens as a whole, so one
    bad byte would turn the run's good characters into U+FFFD too. Here they are out already.
    """

    def __init__(
        self, spelling: Spelling, skip: Collection[int] = (), shown: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Tokens of `skip` have no text; those of `shown` have the one given there."""
        self._spelling = spelling
        self._skip = skip
        self._shown = shown
        self._pending = bytearray()
        """Bytes of a character that is not complete."""
        self._is_first = True
        self._to_strip = spelling.num_leading_spaces_stripped

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete."""
        spelling, out = self._spelling, list[str]()
        for token_id in ids:
            if token_id in self._shown:
                out += (self._flush(), self._shown[token_id])
                continue
            if token_id in self._skip:
                continue
            if self._is_first:
                raw = spelling.first(token_id)
                self._is_first = not spelling.is_token(token_id)
            else:
                raw = spelling.of(token_id)
            if spelling.is_bytes(token_id):
                self._pending += raw
                if not spelling.is_byte_level:
                    out.append(self._complete())
            else:
                out.append(self._flush())
                out.append(raw.decode("utf-8", "replace"))
        if self._pending:
            out.append(self._complete())
        return self._strip("".join(out))

    def finish(self) -> str:
        """U+FFFD for the bytes of a character that will not be completed."""
        return self._strip(self._flush())

    def _flush(self) -> str:
        if not self._pending:
            return ""
        num = 1 if self._spelling.is_byte_level else len(self._pending)
        self._pending.clear()
        return _REPLACEMENT * num

    def _complete(self) -> str:
        """Take the complete characters, and the bytes that cannot become one, from the pending bytes."""
        out = []
        while self._pending:
            try:
                out.append(self._pending.decode("utf-8"))
            except UnicodeDecodeError as error:
                out.append(self._pending[: error.start].decode("utf-8"))
                del self._pending[: error.start]
                if error.reason == "unexpected end of data":
                    break
                num_bad = error.end - error.start
                out.append(_REPLACEMENT * (1 if self._spelling.is_byte_level else num_bad))
                del self._pending[:num_bad]
            else:
                self._pending.clear()
        return "".join(out)

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != " ":
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class Spelling:
    """What each token of a vocabulary contributes to a text, as bytes. Computed when first asked for, then remembered.

    `hidden` is left out of every spelling: what a sealed tokenizer puts before its control tokens. Safe to use from
    several threads: two may compute the same entry, to the same value.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: dict[str, Any] | None, *, hidden: str = "") -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        steps = _steps(decoder)
        kinds = [step["type"] for step in steps]
        self.is_byte_level = "ByteLevel" in kinds
        names = (f"<0x{byte:02X}>" for byte in range(256)) if "ByteFallback" in kinds else ()
        self._byte_tokens = {tokenizer.token_to_id(name): byte for byte, name in enumerate(names)}
        strips = [step for step in steps if step["type"] == "Strip" and step.get("content") == " "]
        self.num_leading_spaces_stripped: int = strips[0]["start"] if strips and "Fuse" in kinds else 0
        self._cache: dict[int, bytes] = {}
        self._anchor, self._anchor_text = (0, "") if self.is_byte_level else self._find_anchor()

    def of(self, token_id: int) -> bytes:
        """The bytes of a token inside a text. Empty for an id that is no token (padded vocabularies have some)."""
        spelled = self._cache.get(token_id)
        if spelled is None:
            spelled = self._cache[token_id] = self._spell(token_id)
        return spelled

    def first(self, token_id: int) -> bytes:
        """The bytes of a token at the start of a text, where "##" stays and the leading space of a piece does not."""
        if self.is_byte_level or self.num_leading_spaces_stripped or self.is_bytes(token_id):
            return self.of(token_id)
        return self._decode(token_id).encode()

    def is_token(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def is_bytes(self, token_id: int) -> bool:
        """Whether the token may hold part of a character."""
        return self.is_byte_level or token_id in self._byte_tokens

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        token = token.replace(self._hidden, "")
        if self.is_byte_level:
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()
        if token_id in self._byte_tokens:
            return bytes([self._byte_tokens[token_id]])
        return self._decode(self._anchor, token_id)[len(self._anchor_text) :].encode()

    def _decode(self, *ids: int) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)).replace(self._hidden, "")

    def _find_anchor(self) -> tuple[int, str]:
        """A plain word to stand before a token, so that the token is not the first one."""
        added = self._tokenizer.get_added_tokens_decoder()
        for token, token_id in self._tokenizer.get_vocab().items():
            if token.isascii() and token.isalnum() and token_id not in added:
                return token_id, self._decode(token_id)
        raise ValueError("the vocabulary holds no plain word of ASCII letters")


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for child in decoder["decoders"] for step in _steps(child)]
    return [decoder]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, inverted: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_of_char()
