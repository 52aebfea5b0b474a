"""The models that replicas have told this gateway of: cards and tokenizers, also while none of a model's lives."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve.errors import InvalidRequest, ModelNotFound, RequestFailed, Unavailable
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer, TokenizerBundle
from serve.wire import ReplicaEntry


@dataclass(frozen=True, slots=True)
class Model:
    """What is remembered of a model."""

    card: ModelCard
    tokenizer: Tokenizer | None
    """None for models that take text as it is."""
    digest: bytes
    """Of its tokenizer's files."""


class Catalog:
    """One per gateway, on its event loop."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._expected: dict[str, str] = {}
        """Models the hub names, connected or not, and their kind."""

    def __getitem__(self, name: str) -> Model:
        """The model of that very name, which `find` has returned."""
        return self._models[name]

    def expect(self, entries: Iterable[ReplicaEntry]) -> None:
        """There are replicas of these, which have not told anything yet."""
        self._expected |= {entry.model: entry.kind for entry in entries}

    async def learn(self, name: str, card: ModelCard, bundle: Mapping[str, bytes]) -> Model:
        """What a replica tells of its model; a tokenizer is built anew only when its files differ."""
        files = dict(bundle)
        digest = hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] for name in sorted(files))).digest()
        known = self._models.get(name)
        if known is not None and known.digest == digest:
            tokenizer = known.tokenizer
        else:
            tokenizer = await asyncio.to_thread(Tokenizer, TokenizerBundle(files)) if files else None
        model = self._models[name] = Model(card, tokenizer, digest)
        return model

    def cards(self) -> list[ModelCard]:
        """By name."""
        return [self._models[name].card for name in sorted(self._models)]

    def knows(self, name: str | None) -> bool:
        """Whether a replica has told of the model of that name or alias; without a name, of any model."""
        cards = self.cards()
        return bool(cards) if name is None else any(name in (card.name, *card.aliases) for card in cards)

    def find(self, name: str | None, kind: str | None = None) -> ModelCard:
        """The model of that name or alias; without a name the only one. `kind`: only "text" or "image".

        Raises ModelNotFound, InvalidRequest, Unavailable."""
        known = [model.card for model in self._models.values() if kind in (None, model.card.kind)]
        if name is None:
            return self._only(known, kind)
        for model in self._models.values():
            if name == model.card.name or name in model.card.aliases:
                if model.card not in known:
                    kinds = f"is of kind {model.card.kind}, and this endpoint takes {kind}"
                    raise InvalidRequest(f"{model.card.name} {kinds}: {_names(known)}", param="model")
                return model.card
        if name in self._expected or not self._models:
            raise Unavailable("the model is not ready yet; try again soon")
        raise ModelNotFound(f"there is no such model here; served are {_names(known)}", param="model")

    def tokenizer(self, model: str) -> Tokenizer:
        """The tokenizer of a text model `find` has returned."""
        tokenizer = self._models[model].tokenizer
        if tokenizer is None:
            raise RequestFailed(f"the replica of {model} has sent no tokenizer")
        return tokenizer

    def _only(self, known: Sequence[ModelCard], kind: str | None) -> ModelCard:
        if len(known) == 1:
            return known[0]
        if known:
            raise InvalidRequest(f"model is required; served are {_names(known)}", param="model")
        coming = {self._expected[name] for name in self._expected.keys() - self._models.keys()}
        if not self._models or not coming.isdisjoint({kind, ""}):
            raise Unavailable("no model is ready yet; try again soon")
        raise ModelNotFound(f"no {kind} model is served here", param="model")


def _names(cards: Sequence[ModelCard]) -> str:
    return ", ".join(sorted(repr(card.name) for card in cards)) or "none"
