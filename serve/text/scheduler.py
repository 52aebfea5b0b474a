"""Decides how many tokens of which sequence the next step computes. Owns queues, token budget and KV blocks.

There is no prefill phase and no decode phase: a sequence has `num_scheduled` positions behind it and more to go, and
each step hands out `{sequence: num_tokens}`. In order:

1. running sequences that need one token (decodes) get it: nobody's prompt delays another one's next token;
2. running prefills, then waiting sequences, share what is left of the budget. What fits goes in whole. What does not
   gets half of what is left, so that a long prompt leaves room to those behind it, and gets back what they do not use.
   No new prompt is cut smaller than an eighth of it: few prompts are half done at a time;
3. nothing is admitted in a step that lacked memory. Admission takes the blocks of the whole prompt and leaves a
   watermark free for the growth of the running ones. So only decodes can run out, and each preemption buys a token.

When a decode finds no free block, the victim has the lowest priority and, among those, loses the least computation per
freed block. It keeps its tokens and waits again, at its old place in the queue.

Steps may overlap. `num_scheduled` and `num_pending` run ahead of what is settled, the epoch of a preempted or removed
sequence makes what is in flight for it stale, and its blocks stay taken until the last step that writes them is
settled. Follows vLLM's V1 scheduler (one token count per request) and Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serve.backend import Load
from serve.engine.interface import Update
from serve.engine.job import Job, Status
from serve.engine.waiting import AGING_S, WaitingQueue, aged_priority
from serve.events import FinishReason, TokenLogprobs
from serve.text.claims import Claims
from serve.text.kv_cache import KVCache
from serve.text.limits import Limits
from serve.text.sequence import PENDING, Row, Sequence, TokenBatch, TokenOutput, TokenUpdate

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
    ):
        if min(max_num_seqs, max_num_batched_tokens) < 1:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens {max_num_batched_tokens}; "
                "both must be at least 1"
            )
        self.kv_cache = kv_cache
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that every decode fits into every step
        self.max_num_batched_tokens = max_num_batched_tokens

        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        """Prompt positions looked up in the prefix cache, at a sequence's first admission."""
        self.num_prefix_hit_tokens = 0
        """Those of them that were found."""

        self._limits = Limits(
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache.num_blocks * kv_cache.block_size,
            vocab_size=vocab_size,
        )
        self._policy = policy
        self._eos = frozenset(eos_token_ids)
        self._waiting: WaitingQueue[Sequence] = WaitingQueue(policy)
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._claims = Claims()
        self._num_tokens_waiting = 0
        self._watermark = int(WATERMARK * kv_cache.num_blocks)

        self._step = 0
        self._settled = -1
        self._freed_with: dict[int, list[list[int]]] = {}  # step -> block tables to free when it is settled

    # -- jobs ------------------------------------------------------------------------------------------------------

    def validate(self, job: Sequence) -> None:
        self._limits.check(job)

    def add(self, job: Sequence) -> None:
        job.end_ids = frozenset(job.sampling.stop_token_ids).union(() if job.sampling.ignore_eos else self._eos)
        self.kv_cache.extend_hashes(job.block_hashes, job.token_ids, job.cache_salt)
        self._num_tokens_waiting += len(job.token_ids)
        self._waiting.add(job)

    def remove(self, job: Sequence) -> None:
        if job in self._running:
            self._release(job)
        elif self._waiting.remove(job) or self._claims.unpark(job):
            self._num_tokens_waiting -= len(job.token_ids)
            job.epoch += 1

    def load(self) -> Load:
        cache = self.kv_cache
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._claims),
            tokens_waiting=self._num_tokens_waiting,
            memory=1 - cache.num_free / cache.num_blocks,
        )

    # -- the next step ---------------------------------------------------------------------------------------------

    def schedule(self, only: Sequence | None = None) -> TokenBatch | None:
        plan = self._plan() if only is None else self._plan_alone(only)
        if not plan:
            return None
        step, self._step = self._step, self._step + 1
        rows = []
        for seq, num_new in plan.items():
            ids, start = seq.token_ids, seq.num_scheduled
            end = start + num_new
            samples = end == len(ids) + seq.num_pending and seq.sampling.max_tokens > 0
            scores = seq.prompt_logprobs is not None and start < seq.num_prompt - 1 and not seq.is_scored
            new_ids = ids[start:end] if start < len(ids) else [PENDING]
            rows.append(Row(seq, seq.epoch, new_ids, start, seq.blocks, samples, end, scores))
            seq.num_scheduled = end
            seq.num_pending += samples
            seq.last_step = step
        return TokenBatch(step, rows)

    def _plan(self) -> dict[Sequence, int]:
        plan: dict[Sequence, int] = {}
        prefills: dict[Sequence, int] = {}
        block_size, is_short = self.kv_cache.block_size, False
        for seq in list(self._running):
            num_new = self._num_wanted(seq)
            if num_new > 1:
                prefills[seq] = num_new
            elif num_new == 1 and seq.status is Status.RUNNING:  # it may have become a victim just now
                if seq.num_scheduled == len(seq.blocks) * block_size and not self.kv_cache.extend(seq.blocks):
                    is_short = True
                    if not self._make_room(seq, plan):
                        continue
                plan[seq] = 1
        if is_short:
            prefills = {seq: num_new for seq, num_new in prefills.items() if seq.status is Status.RUNNING}

        left = self.max_num_batched_tokens - len(plan)
        smallest_start = left // 8
        for seq, num_new in prefills.items():
            left -= self._share(plan, seq, num_new, left)
        while not is_short and left and len(self._running) < self.max_num_seqs:
            first = self._waiting.peek()
            if first is None:
                break
            cached = self._find(first)
            if first.is_scored and self._claims.park(first, self._usable_hashes(first), len(cached)):
                self._waiting.remove(first)
                continue
            num_new = len(first.token_ids) - len(cached) * block_size
            if left < num_new and (left + 1) // 2 < smallest_start:
                break
            if not self._admit(first, cached, self._watermark if self._running else 0):
                break
            prefills[first] = num_new
            left -= self._share(plan, first, num_new, left)
        for seq, num_new in prefills.items():  # what nobody behind could use
            if not left:
                break
            extra = min(left, num_new - plan[seq])
            plan[seq] += extra
            left -= extra
        return plan

    def _plan_alone(self, seq: Sequence) -> dict[Sequence, int]:
        """Nothing is in flight, so what a victim holds comes free at once."""
        if self._claims.unpark(seq):
            self._waiting.add(seq)
        if seq in self._waiting:
            cached = self._find(seq)
            while len(self._running) >= self.max_num_seqs or not self._admit(seq, cached, 0):
                self._preempt(self._victim())
        if seq.num_scheduled == len(seq.blocks) * self.kv_cache.block_size:
            while not self.kv_cache.extend(seq.blocks):
                self._preempt(self._victim(spare=seq))
        return {seq: min(self._num_wanted(seq), self.max_num_batched_tokens)}

    @staticmethod
    def _num_wanted(seq: Sequence) -> int:
        """How many positions could be computed now."""
        if seq.num_pending and seq.num_scheduled == seq.num_to_compute:
            return 0  # the pending token is the last one
        if seq.num_pending > 1 and seq.sampling.needs_history:
            return 0  # penalties count known tokens and the newest, which is on the device; here is a gap between them
        return len(seq.token_ids) + seq.num_pending - seq.num_scheduled

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
        block_size = self.kv_cache.block_size
        num_blocks = -(-len(seq.token_ids) // block_size)
        blocks = self.kv_cache.allocate(cached, num_blocks - len(cached), reserve)
        if blocks is None:
            return False
        self._waiting.remove(seq)
        self._num_tokens_waiting -= len(seq.token_ids)
        self._running[seq] = None
        seq.status = Status.RUNNING
        seq.blocks, seq.num_published = blocks, len(cached)
        seq.num_computed = seq.num_scheduled = len(cached) * block_size
        if not seq.num_preemptions:
            seq.num_cached = seq.num_computed
            if seq.is_scored:
                self.num_prefix_query_tokens += len(seq.token_ids)
                self.num_prefix_hit_tokens += seq.num_cached
        self._claims.claim(seq, seq.block_hashes[len(cached) :])
        return True

    def _make_room(self, seq: Sequence, plan: dict[Sequence, int]) -> bool:
        """Preempt until `seq` has its next block. False: it became a victim, or waits for a step in flight."""
        while not self.kv_cache.extend(seq.blocks):
            if self._freed_with:
                return False  # a victim's blocks are on their way; another victim would bring nothing sooner
            victim = self._victim()
            plan.pop(victim, None)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _victim(self, spare: Sequence | None = None) -> Sequence:
        candidates = (seq for seq in reversed(self._running) if seq is not spare)
        return min(candidates, key=self._cost_of_preempting)  # of equals the one admitted last

    def _cost_of_preempting(self, seq: Sequence) -> tuple[float, float]:
        """Urgency in whole priority levels, waiting included (so nobody is the victim for ever), then loss per gain."""
        num_freed = self.kv_cache.num_unshared(seq.blocks)
        num_lost = seq.num_computed - (len(seq.blocks) - num_freed) * self.kv_cache.block_size
        return -(self._policy(seq) // AGING_S), num_lost / num_freed if num_freed else float("inf")

    def _preempt(self, seq: Sequence) -> None:
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.kv_cache.extend_hashes(seq.block_hashes, seq.token_ids, seq.cache_salt)
        self._num_tokens_waiting += len(seq.token_ids)
        self._waiting.add(seq)

    def _release(self, seq: Sequence) -> None:
        """Take a running sequence's place and blocks away. What is in flight for it is stale from now on."""
        del self._running[seq]
        seq.epoch += 1
        for waiter in self._claims.give_up(seq, seq.block_hashes[seq.num_published :]):
            self._waiting.add(waiter)
        if seq.last_step > self._settled:
            self._freed_with.setdefault(seq.last_step, []).append(seq.blocks)
        else:
            self.kv_cache.free(seq.blocks)
        seq.blocks = []
        seq.num_computed = seq.num_scheduled = seq.num_pending = seq.num_published = 0

    # -- settling --------------------------------------------------------------------------------------------------

    def update(self, batch: TokenBatch, output: TokenOutput) -> list[Update[Sequence]]:
        updates: list[Update[Sequence]] = []
        block_size = self.kv_cache.block_size
        for row, token_id, logprobs, scores in zip(
            batch.rows, output.token_ids, output.logprobs, output.prompt_logprobs, strict=True
        ):
            seq = row.job
            if seq.epoch != row.epoch:
                continue
            seq.num_computed = end = row.start + len(row.token_ids)
            if end >= (seq.num_published + 1) * block_size:
                self._publish(seq)
            prompt_logprobs = None if seq.prompt_logprobs is None else self._score(seq, row, scores)
            finish: FinishReason | None = None
            token_ids: tuple[int, ...] = ()
            if row.samples:
                assert token_id is not None
                seq.num_pending -= 1
                num_output = len(seq.token_ids) - seq.num_prompt
                if token_id in seq.end_ids and num_output >= seq.sampling.min_tokens:
                    seq.stop_token_id, seq.stop_logprobs, finish = token_id, logprobs, FinishReason.STOP
                else:
                    seq.token_ids.append(token_id)
                    token_ids = (token_id,)
                    if num_output + 1 == seq.sampling.max_tokens:
                        finish = FinishReason.LENGTH
            elif end == seq.num_to_compute:  # max_tokens is 0: the prompt was all
                finish = FinishReason.LENGTH
            if finish is not None:
                self._release(seq)
            tokens = None
            if token_ids or prompt_logprobs is not None:
                chosen = None if logprobs is None or not token_ids else (logprobs,)
                tokens = TokenUpdate(token_ids, chosen, prompt_logprobs)
            if tokens is not None or finish is not None:
                updates.append(Update(seq, tokens, finish))
        self._settle(batch)
        return updates

    def abandon(self, batch: TokenBatch) -> None:
        """What was settled before this batch stays; later batches in flight are stale for its sequences."""
        for row in batch.rows:
            seq = row.job
            if seq.epoch == row.epoch:
                seq.epoch += 1
                seq.num_scheduled, seq.num_pending = seq.num_computed, 0
        self._settle(batch)

    def _publish(self, seq: Sequence) -> None:
        """Put the blocks that have become full and computed into the prefix cache, and wake who waits for them."""
        self.kv_cache.extend_hashes(seq.block_hashes, seq.token_ids, seq.cache_salt)
        start, seq.num_published = seq.num_published, seq.num_computed // self.kv_cache.block_size
        for block, key in zip(seq.blocks[start:], seq.block_hashes[start : seq.num_published]):
            self.kv_cache.publish(block, key)
            for waiter in self._claims.published(key):
                self._waiting.add(waiter)

    @staticmethod
    def _score(seq: Sequence, row: Row, scores: list[TokenLogprobs] | None) -> tuple[TokenLogprobs | None, ...] | None:
        """Collect a prompt's log-probabilities over its chunks; all of them once the prompt is done, else None."""
        if scores is not None:
            seq.prompt_scores += scores[len(seq.prompt_scores) - 1 - row.start : seq.num_prompt - 1 - row.start]
        is_first_time = seq.num_output == 0 and seq.num_computed == seq.num_prompt
        return tuple(seq.prompt_scores) if is_first_time else None

    def _settle(self, batch: TokenBatch) -> None:
        self._settled = batch.step
        for blocks in self._freed_with.pop(batch.step, ()):
            self.kv_cache.free(blocks)
