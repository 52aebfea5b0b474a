"""Language models whose next token depends on the last one only, for exact distributions, and engines over them.

They need no attention and no cache, so thousands of requests take seconds, through the real scheduler and runner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging
from models.text.base import DecoderSpec
from serve.engine.engine import Engine
from serve.request import SamplingParams
from serve.text.kv_cache import KVCache
from serve.text.runner import TokenRunner
from serve.text.sampling.sampler import Sampler
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Row, Sequence
from serve.text.speculation.draft_length import DraftLength
from serve.text.speculation.draft_model import DraftModel
from serve.text.speculation.prompt_lookup import PromptLookup

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 4, 512
names = itertools.count()


class Markov:
    """A `CausalLM`: row i of a table holds the logits after token i."""

    def __init__(self, table_VV: torch.Tensor):
        vocab_size = len(table_VV)
        self.table_VV = table_VV
        self.spec = DecoderSpec("Markov", 1, vocab_size, 1, 1, 1, vocab_size, 1 << 20, (0,), torch.float32)
        self.num_parameters = vocab_size**2

    @classmethod
    def random(cls, vocab_size: int, seed: int, scale: float) -> Markov:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(vocab_size, vocab_size, generator=generator) * scale)

    @classmethod
    def always(cls, *chances: float) -> Markov:
        """The same distribution after every token."""
        return cls(torch.tensor(chances).log().repeat(len(chances), 1))

    def forward(self, token_ids_T, positions_T, context):
        return torch.nn.functional.one_hot(token_ids_T, self.spec.vocab_size).float()

    def logits(self, hidden_RD):
        return hidden_RD @ self.table_VV


class NoAttention:
    """An `AttentionBackend` for models without any."""

    def allocate(self, num_blocks: int) -> list[None]:
        return [None]

    def plan(self, layout: TokenLayout, staging: Staging) -> None: ...


def markov_engine(
    target: Markov,
    *,
    drafter: Markov | PromptLookup | None = None,
    draft_length: DraftLength | None = None,
    rejects: bool = False,
    runs_ahead: bool = False,
    depth: int = 0,
    num_blocks: int = NUM_BLOCKS,
    **options: int,
) -> Engine:
    cache = KVCacheSpec(1, 1, 1, BLOCK, torch.float32, CPU)
    proposer = drafter
    if isinstance(drafter, Markov):
        proposer = DraftModel(
            drafter, NoAttention(), cache, num_blocks=num_blocks, max_num_tokens=512, rejects=rejects,
            runs_ahead=runs_ahead,
        )  # fmt: skip
    scheduler = TokenScheduler(
        KVCache(num_blocks, BLOCK),
        **{"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 512} | options,
        eos_token_ids=target.spec.eos_token_ids,
        vocab_size=target.spec.vocab_size,
        draft_length=draft_length,
        runs_ahead=runs_ahead,
    )
    runner = TokenRunner(target, NoAttention(), cache, num_blocks=num_blocks, proposer=proposer, rejects=rejects)
    return Engine(scheduler, runner, depth=depth)


def request(prompt: list[int], **sampling) -> Sequence:
    params = SamplingParams(**{"max_tokens": 3, "ignore_eos": True} | sampling)
    return Sequence(id=f"job-{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=params)


def generate(engine: Engine, jobs: list[Sequence]) -> list[tuple[int, ...]]:
    streams = [engine.submit(job) for job in jobs]
    while engine.step():
        pass
    engine.check_health()
    return [tuple(token for update in stream.take() for token in update.token_ids) for stream in streams]


def exact(target: Markov, prompt: list[int], num_tokens: int, **sampling) -> dict[tuple[int, ...], float]:
    """Output → its probability under plain sampling, by going through them all."""
    sampler = Sampler(target.spec.vocab_size, target.spec.eos_token_ids, CPU)
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        chances = dict(_extended(target, sampler, prompt, chances, sampling))
    return chances


def _extended(
    target: Markov, sampler: Sampler, prompt: list[int], chances: dict[tuple[int, ...], float], sampling: dict
) -> Iterator[tuple[tuple[int, ...], float]]:
    for output, chance in chances.items():
        job = request([*prompt, *output], **sampling)
        job.num_prompt = len(prompt)
        at = len(job.token_ids)
        row = Row(job, 0, job.token_ids[-1:], at - 1, [], samples=True, sample_position=at)
        scores = sampler.processed(target.table_VV[job.token_ids[-1]][None], [row])
        for token_id, share in enumerate(scores[0].double().softmax(-1).tolist()):
            yield (*output, token_id), chance * share
