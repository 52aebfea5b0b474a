"""A model's tokens as llguidance reads them, and the limits it works under. llguidance is imported when it is needed.

The same tokenizer files as everything else: byte-level and byte-fallback vocabularies alike are spelled in bytes by
`detokenizer.Spelling`. What spells nothing (padding rows) can never be chosen; special tokens are no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

STEP_LEXER_FUEL = 50_000
STEP_MAX_ITEMS = 20_000
"""Bound the work for one mask: llguidance does 14 and 20 thousand a millisecond."""
MAX_LEXER_STATES = 20_000
"""Bounds a matcher's memory: 1-2 kB a state."""

_UTF8_BYTES = frozenset(bytes([byte]) for byte in (*range(0xC0), *range(0xC2, 0xF5)))
"""All that occur in UTF-8."""


def limits() -> Any:
    """llguidance's limits, the same in the process that tries a grammar first and in the one that uses it."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def load_vocabulary(folder: Path, size: int, end_ids: Iterable[int]) -> Vocabulary:
    """Of the model in `folder`, with `size` rows in its logits. Takes a second or two for 150 000 tokens.

    Raises ConfigError for a tokenizer that cannot write every text.
    """
    from serve.text.tokenizer import Tokenizer, TokenizerBundle

    tokenizer = Tokenizer(TokenizerBundle.from_folder(folder))
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
    missing = _UTF8_BYTES.difference(tokens)
    if missing:
        raise ConfigError(
            f"its tokenizer has no token for {len(missing)} of the bytes that texts are made of; byte-level and "
            "byte-fallback tokenizers have"
        )
    return Vocabulary(
        tokens,
        special={name: token_id for name, token_id in tokenizer.special_tokens.items() if token_id < size},
        end_ids=end_ids,
        encode=partial(tokenizer.encode, add_special_tokens=False),
    )


class Vocabulary:
    """The tokens of a model as llguidance wants them. Raises ImportError where it is not installed."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        special: Mapping[str, int],
        end_ids: Iterable[int],
        encode: Callable[[str], list[int]] | None = None,
    ):
        """`tokens`: what each id of the model spells; empty where it spells nothing and can never be chosen.

        `special`: tokens that are no text, by name. `encode`: the model's own way to write a text, so that a text the
        grammar forces comes in the tokens the model would use; the longest tokens first where there is none.
        """
        from llguidance import LLTokenizer, TokenizerWrapper

        self.special = dict(special)
        self.end_ids = tuple(end_ids)
        self.size = len(tokens)
        self._tokens = list(tokens)
        for name, token_id in self.special.items():
            self._tokens[token_id] = name.encode()
        for token_id in self.end_ids:
            self._tokens[token_id] = self._tokens[token_id] or b"<|end|>"
        self._encode = encode
        self.core: Any = LLTokenizer(
            TokenizerWrapper(_Wrapped(self._tokens, sorted({*self.special.values(), *self.end_ids}), self._write)),
            eos_token=list(self.end_ids),
        )

    @cached_property
    def spelled(self) -> list[int]:
        """The tokens that can be chosen."""
        return [token_id for token_id, text in enumerate(self._tokens) if text]

    def matcher(self, text: str) -> Any:
        """An `LLMatcher` of a grammar that `source.to_llguidance` wrote. It may be in error."""
        from llguidance import LLMatcher

        return LLMatcher(self.core, text, log_level=0, limits=limits())

    def _write(self, text: str) -> list[int]:
        """Never raises: llguidance would end the matcher."""
        if self._encode is not None:
            try:
                ids = self._encode(text)
                if b"".join(self._tokens[token_id] for token_id in ids) == text.encode():
                    return ids
            except Exception:
                pass  # a text the tokenizer cannot write: as if there were none
        return list(self.core.greedy_tokenize(text))


class _Wrapped:
    """The attributes by which llguidance reads a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], write: Callable[[str], list[int]]):
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = special_token_ids[0] if special_token_ids else 0
        self._write = write

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text only")  # how llguidance learns that it is to give no bytes
        return self._write(text)
