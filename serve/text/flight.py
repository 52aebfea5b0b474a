"""A step on its way from the device to the host: what was drawn, scored and found, and how it reads as an output.

Legend: R rows that sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.device_queue import DeviceQueue, Mark
from serve.events import TokenLogprobs
from serve.text.beams.candidates import Candidates
from serve.text.prompt_scores import PromptScores
from serve.text.sampling.logprobs import Scores
from serve.text.sampling.sampler import Sampled, require_finite
from serve.text.sequence import Row, TokenOutput
from serve.text.speculation.verification import until_rejected


@dataclass(slots=True)
class Flight:
    """A submitted step: results in host memory once `done` has happened."""

    rows: list[Row]
    draws: list[Row]
    token_ids_R: torch.Tensor
    best_R: torch.Tensor
    scored: list[int]
    scores: Scores | None
    prompts: list[PromptScores]
    candidates: Candidates | None
    drafting: list[list[Row]]
    """Of the drafts that only the device knew: the rows of the first ones, of the second ones and so on."""
    drafts_D: torch.Tensor | None
    done: Mark | None
    began_s: float = 0.0
    is_typical: bool = True


def take_off(
    rows: list[Row],
    draws: list[Row],
    sampled: Sampled,
    prompts: list[PromptScores],
    candidates: Candidates | None,
    drawn: list[tuple[list[Row], torch.Tensor]],
    *,
    queue: DeviceQueue | None,
) -> Flight:
    """Start the copies to the host; nothing where the device is the host. `drawn`: see `Proposed`."""
    drafting = [drafted for drafted, _ in drawn]
    drafts_D = torch.cat([token_ids for _, token_ids in drawn]) if drawn else None
    token_ids_R, best_R, scores = sampled.token_ids_R, sampled.best_R, sampled.scores
    if queue is None:
        return Flight(
            rows, draws, token_ids_R, best_R, sampled.scored, scores, prompts, candidates, drafting, drafts_D, None
        )
    download = queue.download
    for prompt in prompts:
        prompt.slices = [(part.to_host(download), download(best)) for part, best in prompt.slices]
    return Flight(
        rows,
        draws,
        download(token_ids_R),
        download(best_R),
        sampled.scored,
        None if scores is None else scores.to_host(download),
        prompts,
        None if candidates is None else candidates.to_host(download),
        drafting,
        None if drafts_D is None else download(drafts_D),
        queue.mark(),
    )


def land(flight: Flight) -> TokenOutput:
    """The output, once `done` has happened. RequestFailed for a row whose logits are no numbers."""
    rows, draws = flight.rows, flight.draws
    require_finite(flight.best_R.tolist(), draws)
    if flight.drafts_D is not None:
        _reveal_drafts(flight.drafting, flight.drafts_D.tolist())
    drawn = flight.token_ids_R.tolist()
    scores: dict[int, TokenLogprobs] = {}
    if flight.scores is not None:
        num_top = [draws[i].job.sampling.logprobs or 0 for i in flight.scored]
        scores = dict(zip(flight.scored, flight.scores.tolist(num_top)))
    output, at = TokenOutput([], [], [None] * len(rows)), 0
    for row in rows:
        if not row.samples or row.num_candidates:
            output.token_ids.append(())
            output.logprobs.append(None)
            continue
        num_drafts = len(row.drafts)
        sampled = until_rejected(drawn[at : at + num_drafts + 1], row.drafts) if num_drafts else (drawn[at],)
        output.token_ids.append(sampled)
        output.logprobs.append(tuple(scores[at + i] for i in range(len(sampled))) if at in scores else None)
        at += num_drafts + 1
    for prompt in flight.prompts:
        require_finite([float(best) for _, best in prompt.slices], [rows[prompt.row]] * len(prompt.slices))
        output.prompt_logprobs[prompt.row] = [
            entry for part, _ in prompt.slices for entry in part.tolist([prompt.num_top] * len(part.token_ids_R))
        ]
    if flight.candidates is not None:
        beams = (i for i, row in enumerate(rows) if row.samples and row.num_candidates)
        output.candidates = dict(zip(beams, flight.candidates.tolist()))
    return output


def _reveal_drafts(drafting: list[list[Row]], token_ids: list[int]) -> None:
    """Tell the rows what their drafts were."""
    known = iter(token_ids)
    for place, rows in enumerate(drafting):
        for row in rows:
            row.drafts[place] = next(known)
