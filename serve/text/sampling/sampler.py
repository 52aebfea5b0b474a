"""Chooses the next token of every row from its logits. Stateless: what a row draws depends on its own request alone.

Each row goes logit bias → minimum length → grammar → penalties → temperature → min-p → top-k → top-p → Gumbel-max. A
row pays only for what its request asks: a batch of plain greedy rows is one argmax. A filter is a threshold on the
scores, and scores equal to the threshold all stay: which of two equal tokens a sort puts first can then not change the
outcome. (Logits of bfloat16 models are often equal.)

A step is planned on the host before its forward is queued, and sampled on the device after it. `Sampler` here is for
CPU and the reference; on CUDA `DeviceSampler` follows the same rules in kernels (`device_sampler.py`). Rows are worked
on a few at a time, so that the dozen passes over them stay in the core's cache.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from models.kernels.available import has_kernels
from models.staging import Staging
from serve.errors import RequestFailed
from serve.request import SamplingParams
from serve.text.sampling.gumbel import GumbelNoise, Stream, row_key, uniform
from serve.text.sampling.logprobs import Scores, score
from serve.text.sampling.token_filter import keep_nucleus_, keep_top_k_
from serve.text.sampling.token_mask import mask_tokens_
from serve.text.sequence import PENDING, Row, Sequence
from serve.text.speculation.verification import reject_
from serve.transfer import copy_to_device, to_device

_CPU_BLOCK = 1 << 16
"""Elements worked on at once on CPU: 256 KiB of float32, and as much again for the noise, fit a core's L2 cache."""


@dataclass(slots=True)
class Sampled:
    """What the rows of one step drew, on the device."""

    token_ids_R: torch.Tensor
    best_R: torch.Tensor
    """The largest raw logit of each row: NaN or infinite when the row is nothing to choose from."""
    scored: list[int]
    """Rows that asked for log-probabilities, in the order of `scores`."""
    scores: Scores | None
    processed_RV: torch.Tensor | None = None
    """What the draws came from before the noise, for who asked: their softmax is the distribution of the draw."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A draft token and what it was drawn from."""

    token_id: int
    scores_V: torch.Tensor | None
    """None: there was no choice."""


@dataclass(slots=True)
class Recipe:
    """What one job asks of the sampler, looked up once. `history` repeats its token ids in a form torch can read."""

    params: SamplingParams
    is_plain: bool
    """Greedy over the raw logits, always."""
    end_ids: tuple[int, ...]
    """Not to be chosen before `min_tokens`."""
    history: array[int] = field(default_factory=lambda: array("q"))

    def is_plain_at(self, num_output: int) -> bool:
        return self.is_plain and num_output >= self.params.min_tokens


class SamplingPlan(Protocol):
    """What `plan` tells `sample` of one step."""

    @property
    def needs_inputs(self) -> bool:
        """Whether the rows' newest input tokens matter: some have penalties."""


class TokenSampler(Protocol):
    """One per runner."""

    def plan(
        self,
        rows: Seq[Row],
        staging: Staging,
        *,
        stream: Stream = Stream.TARGET,
        proposals: Seq[Proposal | None] | None = None,
    ) -> SamplingPlan:
        """Host work: what the device needs to choose a token for each of `rows` (all sample) is put into `staging`.

        A row with drafts comes once for every token it samples, as `Row.after` gives it. `proposals`: the drafts in the
        places of the draws, to be decided on by rejection sampling (`speculation/verification.py`).
        """

    def sample(
        self,
        logits_RV: torch.Tensor,
        plan: Any,
        inputs_R: torch.Tensor | None = None,
        behind_R: torch.Tensor | None = None,
        *,
        keeps_scores: bool = False,
    ) -> Sampled:
        """Draw by `plan`, a `SamplingPlan` of its own. `logits_RV` stays as it is. Nothing here waits for the device.

        `inputs_R`: each row's newest input token, which is to be given when `plan.needs_inputs`. `behind_R` (int64): by
        how many positions each draw lies before `Row.sample_position`; None: by none.
        """

    def penalised(self, scores_RV: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """What comes before the temperature, on any scores, which are overwritten. For beams: forks replace their
        tokens, so nothing is kept from step to step."""

    def forget(self, job_id: str) -> None:
        """The job has ended."""

    def warm_up(self, rejects: bool) -> None:
        """Do what is slow the first time; `rejects`: drafts will be decided on."""


def make_sampler(vocab_size: int, eos_token_ids: Seq[int], device: torch.device) -> TokenSampler:
    if has_kernels(device):
        from serve.text.sampling.device_sampler import DeviceSampler

        return DeviceSampler(vocab_size, eos_token_ids, device)
    assert device.type != "cuda", "sampling on CUDA needs Triton, which is not installed: pip install triton"
    return Sampler(vocab_size, eos_token_ids, device)


@dataclass(slots=True)
class _Plan:
    rows: Seq[Row]
    recipes: list[Recipe]
    special: list[int]
    """Rows that are more than the largest logit."""
    stream: Stream
    proposals: Seq[Proposal | None] | None
    needs_inputs: bool


class Sampler:
    """A `TokenSampler` for CPU. Keeps nothing that a result depends on; `forget` drops what it looked up for a job."""

    def __init__(self, vocab_size: int, eos_token_ids: Seq[int], device: torch.device):
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._noise = GumbelNoise(vocab_size, device)
        self._recipes: dict[str, Recipe] = {}
        self._rows_at_once = max(1, _CPU_BLOCK // vocab_size)

    def plan(
        self,
        rows: Seq[Row],
        staging: Staging,
        *,
        stream: Stream = Stream.TARGET,
        proposals: Seq[Proposal | None] | None = None,
    ) -> _Plan:
        recipes = [self.recipe(row.job) for row in rows]
        special = [
            i
            for i, (row, recipe) in enumerate(zip(rows, recipes))
            if not recipe.is_plain_at(row.sample_position - row.job.num_prompt)
        ]
        return _Plan(rows, recipes, special, stream, proposals, any(recipes[i].params.needs_history for i in special))

    def sample(
        self,
        logits_RV: torch.Tensor,
        plan: _Plan,
        inputs_R: torch.Tensor | None = None,
        behind_R: torch.Tensor | None = None,
        *,
        keeps_scores: bool = False,
    ) -> Sampled:
        rows, recipes, special = plan.rows, plan.recipes, plan.special
        logits_RV = logits_RV.float()
        if len(special) < len(rows):
            token_ids_R, best_R = greedy(logits_RV)
        else:
            token_ids_R = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            best_R = logits_RV.amax(-1)
        positions = [row.sample_position for row in rows]
        if behind_R is not None:
            positions = [position - behind for position, behind in zip(positions, behind_R.tolist())]
        processed_RV = logits_RV.clone() if keeps_scores else None
        for at in range(0, len(special), self._rows_at_once):
            block = special[at : at + self._rows_at_once]
            index = to_device(block, self._device)
            scores_RV = self._shape(
                logits_RV[index],
                [rows[i] for i in block],
                [recipes[i] for i in block],
                None if inputs_R is None else inputs_R[index],
            )
            if processed_RV is not None:
                processed_RV[index] = scores_RV
            self._perturb_(
                scores_RV,
                [recipes[i].params for i in block],
                [positions[i] for i in block],
                plan.stream,
                [None] * len(block) if plan.proposals is None else [plan.proposals[i] for i in block],
            )
            token_ids_R[index] = _argmax(scores_RV)
        scored, num_top = scored_rows(recipes)
        scores = score(logits_RV[scored], token_ids_R[scored], num_top) if scored else None
        return Sampled(token_ids_R, best_R, scored, scores, processed_RV)

    def forget(self, job_id: str) -> None:
        self._recipes.pop(job_id, None)

    def warm_up(self, rejects: bool) -> None:
        """Nothing is slow the first time."""

    def processed(self, logits_RV: torch.Tensor, rows: Seq[Row], inputs_R: torch.Tensor | None = None) -> torch.Tensor:
        """The scores from which `sample` draws (before the noise): their softmax is the distribution of the draw."""
        return self._shape(logits_RV.clone(), rows, [self.recipe(row.job) for row in rows], inputs_R)

    def penalised(self, scores_RV: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        recipes = [self._new_recipe(row.job.sampling) for row in rows]
        self._bias_(scores_RV, rows, recipes)
        mask_tokens_(scores_RV, rows)
        self._penalise_(scores_RV, rows, recipes, None)
        return scores_RV

    def recipe(self, job: Sequence) -> Recipe:
        recipe = self._recipes.get(job.id)
        if recipe is None or recipe.params is not job.sampling:
            recipe = self._recipes[job.id] = self._new_recipe(job.sampling)
        return recipe

    def _new_recipe(self, params: SamplingParams) -> Recipe:
        return Recipe(
            params=params,
            is_plain=params.is_greedy and not params.needs_history and not params.logit_bias and params.grammar is None,
            end_ids=params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids),
        )

    def _perturb_(
        self,
        scores_RV: torch.Tensor,
        params: Seq[SamplingParams],
        positions: Seq[int],
        stream: Stream,
        proposals: Seq[Proposal | None],
    ) -> None:
        """Decide on proposals and add the noise: the largest score of a row is then its token."""
        drawn = [i for i, p in enumerate(params) if not p.is_greedy]
        for i in drawn:
            if (proposal := proposals[i]) is not None:
                reject_(
                    scores_RV[i : i + 1],
                    to_device([proposal.token_id], self._device),
                    None if proposal.scores_V is None else proposal.scores_V[None],
                    to_device([uniform(params[i].seed, positions[i], Stream.ACCEPT)], self._device, torch.float64),
                )
        keys = [
            row_key(params[i].seed, positions[i], stream if proposals[i] is None else Stream.RECOVER) for i in drawn
        ]
        _on_rows_(scores_RV, drawn, lambda part: self._noise.perturb_(part, keys))

    def _shape(
        self, scores_RV: torch.Tensor, rows: Seq[Row], recipes: Seq[Recipe], inputs_R: torch.Tensor | None
    ) -> torch.Tensor:
        params = [recipe.params for recipe in recipes]
        self._bias_(scores_RV, rows, recipes)
        mask_tokens_(scores_RV, rows)
        if any(p.needs_history for p in params):
            self._penalise_(scores_RV, rows, recipes, inputs_R)
        tempered = [i for i, p in enumerate(params) if p.temperature not in (0.0, 1.0)]
        temperatures = [params[i].temperature for i in tempered]
        # The maximum is taken off first, so that a tiny temperature cannot overflow.
        _on_rows_(
            scores_RV,
            tempered,
            lambda part: part.sub_(part.amax(-1, keepdim=True)).div_(self._column(temperatures)),
        )
        self._filter_(scores_RV, params)
        return scores_RV

    def _bias_(self, scores_RV: torch.Tensor, rows: Seq[Row], recipes: Seq[Recipe]) -> None:
        """Add the requests' biases and mask end tokens that come too early."""
        at: list[int] = []
        ids: list[int] = []
        values: list[float] = []
        for i, (row, recipe) in enumerate(zip(rows, recipes)):
            params = recipe.params
            for token_id, bias in params.logit_bias:
                at.append(i)
                ids.append(token_id)
                values.append(bias)
            if row.sample_position - row.job.num_prompt < params.min_tokens and row.job.matcher is None:
                at += [i] * len(recipe.end_ids)
                ids += recipe.end_ids
                values += [-math.inf] * len(recipe.end_ids)
        if at:
            where = to_device([at, ids], self._device)
            scores_RV.index_put_((where[0], where[1]), self._column(values)[:, 0], accumulate=True)

    def _penalise_(
        self, scores_RV: torch.Tensor, rows: Seq[Row], recipes: Seq[Recipe], inputs_R: torch.Tensor | None
    ) -> None:
        """Repetition penalty over prompt and output; presence and frequency penalties over the output."""
        for i, (row, recipe) in enumerate(zip(rows, recipes)):
            params = recipe.params
            if not params.needs_history:
                continue
            history = recipe.history
            history.extend(row.job.token_ids[len(history) : row.sample_position - len(row.drafts)])
            seen = copy_to_device(torch.frombuffer(history, dtype=torch.int64), self._device)
            if row.drafts:
                seen = torch.cat([seen, to_device(row.drafts, self._device)])
            if row.token_ids[-1] == PENDING:
                assert inputs_R is not None, "`plan.needs_inputs` was not heeded"
                seen = torch.cat([seen, inputs_R[i : i + 1]])
            scores_V = scores_RV[i]
            if params.repetition_penalty != 1.0:
                old = scores_V[seen]
                penalty = params.repetition_penalty
                scores_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
            if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
                output = seen[row.job.num_prompt :]
                counts_V = torch.zeros_like(scores_V).index_add_(
                    0, output, torch.ones_like(output, dtype=scores_V.dtype)
                )
                scores_V.sub_(counts_V * params.frequency_penalty + (counts_V > 0) * params.presence_penalty)

    def _filter_(self, scores_RV: torch.Tensor, params: Seq[SamplingParams]) -> None:
        """Min-p, then top-k, then top-p: tokens that may not be drawn get -inf. Greedy rows need none of it."""
        min_p = [i for i, p in enumerate(params) if p.min_p > 0.0 and not p.is_greedy]
        margins = [math.log(params[i].min_p) for i in min_p]
        _on_rows_(
            scores_RV,
            min_p,
            lambda part: part.masked_fill_(part < part.amax(-1, keepdim=True) + self._column(margins), -math.inf),
        )
        top_k = [i for i, p in enumerate(params) if 0 < p.top_k < self._vocab_size and not p.is_greedy]
        ks = [params[i].top_k for i in top_k]
        _on_rows_(scores_RV, top_k, lambda part: keep_top_k_(part, ks))
        top_p = [i for i, p in enumerate(params) if p.top_p < 1.0 and not p.is_greedy]
        for i in top_p:
            keep_nucleus_(scores_RV[i], params[i].top_p)

    def _column(self, values: list[float]) -> torch.Tensor:
        return to_device(values, self._device, torch.float32)[:, None]


def require_finite(best_logits: Iterable[float], rows: Seq[Row]) -> None:
    """Raise `RequestFailed` when a row's logits are nothing to choose from; the engine then tries the jobs alone."""
    finite = [math.isfinite(best) for best in best_logits]
    if not all(finite):
        bad = [row.job.id for row, ok in zip(rows, finite) if not ok]
        raise RequestFailed(
            f"the model's logits contain NaN or infinity for {', '.join(bad)}; "
            f"the checkpoint or its dtype is unfit for this input (try dtype float32)"
        )


def greedy(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the largest logits of each row, and that logit."""
    token_ids_R = _argmax(logits_RV)
    return token_ids_R, logits_RV.gather(1, token_ids_R[:, None])[:, 0]


def scored_rows(recipes: Seq[Recipe]) -> tuple[list[int], int]:
    """Rows that ask for log-probabilities, and the most alternatives that one of them wants."""
    scored = [i for i, recipe in enumerate(recipes) if recipe.params.logprobs is not None]
    return scored, max((recipes[i].params.logprobs or 0 for i in scored), default=0)


def _argmax(scores_RV: torch.Tensor) -> torch.Tensor:
    """The first of the largest, per row. numpy's on CPU: 0.08 ms against torch's 0.85 for 32 x 32000, one thread."""
    if scores_RV.device.type == "cpu":
        return torch.from_numpy(scores_RV.numpy().argmax(-1))
    return scores_RV.argmax(-1)


def _on_rows_(scores_RV: torch.Tensor, at: list[int], change_: Callable[[torch.Tensor], object]) -> None:
    """Apply an in-place change to the rows `at`, and to them only: a row must not depend on what its mates ask."""
    if len(at) == len(scores_RV):
        change_(scores_RV)
    elif at:
        index = to_device(at, scores_RV.device)
        part = scores_RV[index]
        change_(part)
        scores_RV[index] = part
