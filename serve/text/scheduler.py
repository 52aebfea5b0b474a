"""Decides how many tokens of which sequence the next step computes. Owns queues, token budget and KV blocks.

There is no prefill phase and no decode phase: a sequence has `num_scheduled` positions behind it and more to go, and
each step hands out `{sequence: num_tokens}`. In order:

1. running sequences that need one token (decodes) get it: nobody's prompt delays another one's next token;
2. running prefills, then waiting sequences, share what is left of the budget. What fits goes in whole. What does not
   gets half of what is left, so that a long prompt leaves room to those behind it, and gets back what they do not use.
   No new prompt is cut smaller than an eighth of it: few prompts are half done at a time;
3. nothing is admitted in a step that lacked memory. Admission takes the blocks of the whole prompt and leaves a
   watermark free for the growth of the running ones. So only decodes can run out, and each preemption buys a token.

When a decode finds no free block, another one is preempted (`victim.py`). It keeps its tokens and waits again, at its
old place in the queue.

Drafts come last: when every decode and prefill is planned, what is left of the budget and of the free blocks goes to
draft tokens behind the decodes (`speculation/drafting.py`). No block is published before its tokens are settled.

Steps may overlap. `num_scheduled` and `num_pending` run ahead of what is settled, the epoch of a preempted or removed
sequence makes what is in flight for it stale, and its blocks stay taken until the last step that writes them is
settled. A sequence whose drafts are in flight goes on as if all of them held, or waits where that is of no use.

Where a model is computed in stages (pipeline parallel) a sequence whose next token is in flight waits for it, and a
batch takes no more than its share of the decodes (`turns.py`). Chunks of one prompt still follow each other.

Follows vLLM's V1 scheduler (one token count per request) and Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from serve.backend import Load
from serve.engine.interface import Update
from serve.engine.job import Job, Status
from serve.engine.waiting import WaitingQueue, aged_priority
from serve.events import FinishReason
from serve.text.beams.group import Beam, BeamGroup
from serve.text.claims import Claims
from serve.text.kv_cache import KVCache
from serve.text.limits import Limits
from serve.text.queued import Queued
from serve.text.sequence import Sequence, TokenBatch, TokenOutput, TokenUpdate
from serve.text.speculation.draft_length import DraftLength
from serve.text.speculation.drafting import Drafting
from serve.text.turns import in_turn
from serve.text.victim import choose_victim

WATERMARK = 0.03
"""Share of the blocks left free at admission. vLLM's preemptions fell from 1065 to 187 in a memory-bound run with 0.05
(vllm#44594); not measured here."""


class TokenScheduler:
    """A `Scheduler` over sequences. `eos_token_ids` are the model's own end tokens."""

    def __init__(
        self,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        policy: Callable[[Job], float] = aged_priority,
        draft_length: DraftLength | None = None,
        runs_ahead: bool = False,
        num_stages: int = 1,
    ):
        """`draft_length` says how many drafts a decode gets and hears how it went; None: no speculation. `runs_ahead`:
        the runner goes on from drafts that the host does not know yet. The stages of the model compute as many batches
        at a time; the engine's depth is one less."""
        if min(max_num_seqs, max_num_batched_tokens) < 1:
            budgets = f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens {max_num_batched_tokens}"
            raise ValueError(f"{budgets}; both must be at least 1")
        self.kv_cache = kv_cache
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that every decode fits into every step
        self.max_num_batched_tokens = max_num_batched_tokens

        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        """Prompt positions looked up in the prefix cache, at a sequence's first admission."""
        self.num_prefix_hit_tokens = 0
        """Those of them that were found."""
        self.draft_length = draft_length

        self._limits = Limits(
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache.num_blocks * kv_cache.block_size,
            vocab_size=vocab_size,
            max_num_seqs=self.max_num_seqs,
            block_size=kv_cache.block_size,
        )
        self._policy = policy
        self._num_stages = num_stages
        self._eos = frozenset(eos_token_ids)
        self._waiting: WaitingQueue[Sequence] = WaitingQueue(policy)
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._claims = Claims()
        self._queued = Queued()
        self._num_left = 0  # positions to go, of the running prefills, behind the step planned last
        self._num_seats_taken = 0
        self._watermark = int(WATERMARK * kv_cache.num_blocks)
        self._drafting = Drafting(kv_cache, self._watermark, runs_ahead=runs_ahead)
        self._is_held_up = False  # a decode waited, in the step planned last, for blocks on their way back

        self._step, self._settled = 0, -1
        self._freed_with: dict[int, list[array[int]]] = {}  # step -> block tables to free when it is settled

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos

    # -- jobs ------------------------------------------------------------------------------------------------------

    def validate(self, job: Sequence) -> None:
        self._limits.check(job)

    def add(self, job: Sequence) -> None:
        job.end_ids = frozenset(job.sampling.stop_token_ids).union(() if job.sampling.ignore_eos else self._eos)
        self.kv_cache.extend_hashes(job.block_hashes, job.token_ids, job.cache_salt)
        if isinstance(job, BeamGroup):
            job.begin()
        job.may_run_ahead = self._drafting.may_run_ahead(job)
        self._wait(job)

    def remove(self, job: Sequence) -> None:
        if job in self._running:
            self._release(job)
        elif self._waiting.remove(job) or self._claims.unpark(job):
            self._queued.leave(job)
            job.epoch += 1

    def load(self) -> Load:
        cache = self.kv_cache
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._claims),
            tokens_waiting=self._queued.num_tokens,
            memory=1 - cache.num_free / cache.num_blocks,
            tokens_owed=self._queued.num_owed + (self._num_left if self._running else 0),
        )

    # -- the next step ---------------------------------------------------------------------------------------------

    def schedule(self, only: Sequence | None = None) -> TokenBatch | None:
        length, num_rows = self.draft_length, -(-len(self._running) // self._num_stages)
        num_drafts = 0 if only is not None or length is None else length.choose(num_rows)
        plan = self._plan(num_drafts) if only is None else self._plan_alone(only)
        if not plan:
            return None
        drafts: dict[Sequence, int] = {}
        if num_drafts and not self._is_held_up:
            drafts = self._drafting.plan(plan, num_drafts, self.max_num_batched_tokens - sum(plan.values()))
        step, self._step = self._step, self._step + 1
        shares = (share for job, num_new in plan.items() for share in job.split(num_new))
        rows = [seq.next_row(num_new, step, drafts.get(seq, 0)) for seq, num_new in shares]
        self._drafting.follow(rows, drafts)
        return TokenBatch(step, rows, [row.job.copy for row in rows if isinstance(row.job, Beam) and row.job.copy])

    def _plan(self, num_drafts: int) -> dict[Sequence, int]:
        plan: dict[Sequence, int] = {}
        prefills: dict[Sequence, int] = {}
        is_short = self._is_held_up = False
        for seq in in_turn(self._running, plan, self._num_stages):
            num_new = seq.num_wanted
            if num_new > seq.num_seats:
                prefills[seq] = num_new
            elif num_new and seq.status is Status.RUNNING:  # it may have become a victim just now
                if seq.num_pending and not (
                    seq.last_step == self._step - 1 and self._drafting.may_follow(seq, num_drafts)
                ):
                    continue  # the runner knows what the step before has sampled, and no more
                if not self._drafting.grow(seq):
                    is_short = True
                    if not self._make_room(seq, plan):
                        continue
                plan[seq] = num_new
        if is_short:
            prefills = {seq: num_new for seq, num_new in prefills.items() if seq.status is Status.RUNNING}

        left = self.max_num_batched_tokens - sum(plan.values())
        smallest_start = left // 8
        for seq, num_new in prefills.items():
            left -= self._share(plan, seq, num_new, left)
        while not is_short and left:
            first = self._waiting.peek()
            if first is None or self._num_seats_taken + first.num_seats > self.max_num_seqs:
                break
            cached = self._find(first)
            shared = self._claims.park(first, self._usable_hashes(first), len(cached)) if first.is_scored else 0
            if shared:
                self._waiting.remove(first)
                self._queued.expect(first, shared * self.kv_cache.block_size)
                continue
            num_new = first.num_known - len(cached) * self.kv_cache.block_size
            if left < num_new and (left + 1) // 2 < smallest_start:
                break
            if not self._admit(first, cached, self._watermark + first.num_seats - 1 if self._running else 0):
                break
            prefills[first] = num_new = first.num_wanted
            left -= self._share(plan, first, num_new, left)
        for seq, num_new in prefills.items():  # what nobody behind could use
            if not left:
                break
            extra = min(left, num_new - plan[seq])
            plan[seq] += extra
            left -= extra
        self._num_left = sum(num_new - plan.get(seq, 0) for seq, num_new in prefills.items())
        return plan

    def _plan_alone(self, seq: Sequence) -> dict[Sequence, int]:
        """Nothing is in flight, so what a victim holds comes free at once."""
        if self._claims.unpark(seq):
            self._waiting.add(seq)
        if seq in self._waiting:
            cached = self._find(seq)
            while self._num_seats_taken + seq.num_seats > self.max_num_seqs or not self._admit(seq, cached, 0):
                self._preempt(self._victim())
        while not seq.grow(self.kv_cache):
            self._preempt(self._victim(spare=seq))
        return {seq: min(seq.num_wanted, self.max_num_batched_tokens)}

    @staticmethod
    def _share(plan: dict[Sequence, int], seq: Sequence, num_new: int, left: int) -> int:
        """Plan a prefill: all of it when it fits into what is left of the budget, else half of what is left."""
        chunk = num_new if num_new <= left else (left + 1) // 2
        if chunk:
            plan[seq] = chunk
        return chunk

    # -- admission and preemption ----------------------------------------------------------------------------------

    def _find(self, seq: Sequence) -> list[int]:
        """The cached blocks to start from; none while the prompt is to be scored, for that takes computing it."""
        return self.kv_cache.find(self._usable_hashes(seq)) if seq.is_scored else []

    def _usable_hashes(self, seq: Sequence) -> list[bytes]:
        """At least the last position is computed, for its logits. So its block is, for shared blocks are read-only."""
        return seq.block_hashes[: (len(seq.token_ids) - 1) // self.kv_cache.block_size]

    def _admit(self, seq: Sequence, cached: list[int], reserve: int) -> bool:
        if not seq.allocate(self.kv_cache, cached, reserve):
            return False
        self._waiting.remove(seq)
        self._queued.leave(seq)
        self._num_seats_taken += seq.num_seats
        self._running[seq] = None
        seq.status = Status.RUNNING
        if not seq.num_preemptions:
            seq.num_cached = seq.num_computed
            if seq.is_scored:
                self.num_prefix_query_tokens += len(seq.token_ids)
                self.num_prefix_hit_tokens += seq.num_cached
        self._claims.claim(seq, seq.block_hashes[len(cached) :])
        return True

    def _make_room(self, seq: Sequence, plan: dict[Sequence, int]) -> bool:
        """Preempt until `seq` has what its step needs. False: it became a victim, or waits for a step in flight."""
        while not seq.grow(self.kv_cache):
            if self._freed_with or self._drafting.holds_blocks or seq.num_in_doubt:
                self._is_held_up = True
                return False  # a victim's blocks, or drafts', are on their way; nobody is preempted for a draft
            victim = self._victim()
            plan.pop(victim, None)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _victim(self, spare: Sequence | None = None) -> Sequence:
        return choose_victim([seq for seq in self._running if seq is not spare], self.kv_cache, self._policy)

    def _preempt(self, seq: Sequence) -> None:
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        for part in seq.holders:
            self.kv_cache.extend_hashes(part.block_hashes, part.token_ids, part.cache_salt)
        self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        self._queued.enter(seq, len(self._find(seq)) * self.kv_cache.block_size)
        self._waiting.add(seq)

    def _release(self, seq: Sequence) -> None:
        """Take a running sequence's place and blocks away. What is in flight for it is stale from now on."""
        del self._running[seq]
        self._num_seats_taken -= seq.num_seats
        for waiter in self._claims.give_up(seq, seq.block_hashes[seq.num_published :]):
            self._waiting.add(waiter)
        self._drafting.release(seq)
        for part in seq.holders:
            part.epoch += 1
            if part.last_step > self._settled:
                self._freed_with.setdefault(part.last_step, []).append(part.blocks)
            else:
                self.kv_cache.free(part.blocks)
            part.forget_progress()

    # -- settling --------------------------------------------------------------------------------------------------

    def update(self, batch: TokenBatch, output: TokenOutput) -> list[Update[Sequence]]:
        updates: list[Update[Sequence]] = []
        block_size = self.kv_cache.block_size
        for i, (row, sampled, logprobs, scores) in enumerate(
            zip(batch.rows, output.token_ids, output.logprobs, output.prompt_logprobs, strict=True)
        ):
            seq = row.job
            if seq.epoch != row.epoch:
                continue
            if row.num_in_doubt:
                row.start = seq.num_computed  # all before it is settled
            seq.num_computed = end = row.start + len(row.token_ids)
            if end >= (seq.num_published + 1) * block_size:
                self._publish(seq)
            if isinstance(seq, Beam):
                update = seq.take(output.candidates.get(i), self.kv_cache)
                if update is not None:
                    updates.append(update)
                    if update.finish is not None:
                        self._release(update.job)
                continue
            assert bool(sampled) == row.samples
            prompt_logprobs = None if seq.prompt_logprobs is None else seq.take_scores(row.start, scores)
            finish: FinishReason | None = None
            num_kept = 0
            if row.samples:
                seq.num_pending -= 1
                num_kept, finish = seq.append(sampled, logprobs)
            elif end == seq.num_to_compute:  # max_tokens is 0: the prompt was all
                finish = FinishReason.LENGTH
            if row.num_drafts:
                self._drafting.settle(seq, row, len(sampled) - 1, num_kept)
                if seq.num_computed >= (seq.num_published + 1) * block_size:
                    self._publish(seq)
            if finish is not None:
                self._release(seq)
            tokens = None
            if num_kept or prompt_logprobs is not None:
                chosen = None if logprobs is None or not num_kept else logprobs[:num_kept]
                tokens = TokenUpdate(sampled[:num_kept], chosen, prompt_logprobs)
            if tokens is not None or finish is not None:
                updates.append(Update(seq, tokens, finish, seq.error))
        self._settle(batch)
        if self.draft_length is not None:
            self.draft_length.observe(batch, output)
        return updates

    def abandon(self, batch: TokenBatch) -> None:
        """What was settled before this batch stays; later batches in flight are stale for its sequences."""
        for row in batch.rows:
            if row.job.epoch != row.epoch:
                continue
            for part in row.job.owner.holders:  # one beam's positions may be another's prefix
                part.epoch += 1
                part.num_scheduled, part.num_pending = part.num_computed, 0
            if row.job.num_in_doubt:
                self._freed_with.setdefault(row.job.last_step, []).append(self._drafting.forget(row.job))
        self._settle(batch)

    def _publish(self, seq: Sequence) -> None:
        """Put the blocks that have become full and computed into the prefix cache, and wake who waits for them."""
        self.kv_cache.extend_hashes(seq.block_hashes, seq.token_ids, seq.cache_salt)
        start, seq.num_published = seq.num_published, seq.num_computed // self.kv_cache.block_size
        for block, key in zip(seq.blocks[start:], seq.block_hashes[start : seq.num_published]):
            self.kv_cache.publish(block, key)
            for waiter in self._claims.published(key):
                self._waiting.add(waiter)

    def _settle(self, batch: TokenBatch) -> None:
        self._settled = batch.step
        for blocks in self._freed_with.pop(batch.step, ()):
            self.kv_cache.free(blocks)
