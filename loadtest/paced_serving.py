"""A paced replica (`loadtest/paced.py`) in the place of a model that `tandem serve` loads: all else is what is served.

Prompts and tokens are those of the model that the options name, so that gateways find a tokenizer; the device answers
with the same token again and again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from loadtest.paced import PacedTextRunner, TextDevice, text_scheduler
from serve.engine.engine import Engine
from serve.model_folder import find_model
from serve.options import ModelOptions
from serve.ranks.launch import Launcher
from serve.recorder import EngineObserver
from serve.replica import OnDeath, Served
from serve.request import ModelCard
from serve.text.backend import TextBackend
from serve.text.pace import TextPace
from serve.text.tokenizer import Tokenizer, TokenizerBundle

TOKEN_ID = 5


@dataclass(frozen=True, slots=True)
class PacedModel:
    """A `build` of a replica (`serve/replica.py`): takes `load_s`, as large weights would."""

    device: TextDevice
    load_s: float

    def __call__(
        self,
        options: ModelOptions,
        observer: EngineObserver,
        on_death: OnDeath,
        *,
        num_replicas_here: int = 1,
        launcher: Launcher | None = None,
    ) -> Served:
        time.sleep(self.load_s)
        folder, kind = find_model(options)
        bundle = TokenizerBundle.from_folder(folder, None)
        vocab_size = Tokenizer(bundle).vocab_size
        scheduler = text_scheduler(self.device, vocab_size)
        engine: Engine = Engine(
            scheduler,
            PacedTextRunner(self.device, TOKEN_ID),
            max_waiting=options.max_num_waiting,
            observer=observer,
            pace=TextPace(scheduler),
            on_death=on_death,
        )
        engine.start()
        card = ModelCard(
            name=options.name,
            kind=kind,
            source=options.model,
            device="paced",
            dtype="",
            num_parameters=0,
            threads=1,
            load_s=self.load_s,
            max_model_len=self.device.kv_cache_tokens // 4,
            kv_cache_tokens=self.device.kv_cache_tokens,
            vocab_size=vocab_size,
        )
        return Served(TextBackend(engine, card), bundle.files, scheduler.kv_cache.digest)
