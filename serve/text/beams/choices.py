"""A beam request's updates as events: on the way what is settled of the best hypothesis, at the end all that was asked.

Choice i is the hypothesis with the i-th best score.
"""

from __future__ import annotations

from serve.engine.stream import Stream
from serve.events import Event, Finished, FinishReason, TokenDelta, Usage
from serve.text.beams.beam import Hypothesis, Node
from serve.text.beams.group import COMPLETE, BeamUpdate
from serve.text.sequence import Sequence


class BeamChoices:
    """An `EventStream` over one beam request."""

    def __init__(self, stream: Stream[Sequence]):
        self._stream = stream
        self._has_begun = False
        self._has_ended = False
        self._is_closed = False
        self._num_delivered = 0
        """Tokens of the best hypothesis."""

    def __aiter__(self) -> BeamChoices:
        return self

    async def __anext__(self) -> list[Event]:
        events: list[Event] = []
        while not events:  # most steps settle nothing
            if self._has_ended:
                raise StopAsyncIteration
            updates: list[BeamUpdate] = await anext(self._stream, [])
            self._has_ended = self._stream.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            if self._is_closed or not (updates or self._has_ended):
                raise StopAsyncIteration
            if self._has_ended:
                updates += self._stream.take()  # what came after the read, before the end
            events = self._delta(0, [node for update in updates for node in update.settled])
            for update in updates:
                for index, hypothesis in enumerate(update.hypotheses):
                    events += self._choice(index, hypothesis)
        return events

    async def aclose(self) -> None:
        self._is_closed = True
        await self._stream.aclose()

    def _delta(self, index: int, nodes: list[Node]) -> list[Event]:
        if not nodes:
            return []
        if index == 0:
            self._num_delivered += len(nodes)
        num_cached = None if self._has_begun else self._stream.job.num_cached
        self._has_begun = True
        logprobs = None if self._stream.job.sampling.logprobs is None else tuple(node.entry() for node in nodes)
        return [TokenDelta(index, tuple(node.token_id for node in nodes), logprobs, num_cached)]

    def _choice(self, index: int, hypothesis: Hypothesis) -> list[Event]:
        job, nodes = self._stream.job, hypothesis.node.path()
        end = nodes.pop() if hypothesis.reason is FinishReason.STOP else None
        if end is not None and end.token_id == COMPLETE:
            end = None
        stop_logprobs = None if end is None or job.sampling.logprobs is None else end.entry()
        finished = Finished(
            index,
            hypothesis.reason,
            Usage(job.num_prompt, len(nodes) + (end is not None), job.num_cached),
            None if end is None else end.token_id,
            stop_logprobs,
            hypothesis.score,
        )
        return [*self._delta(index, nodes[self._num_delivered if index == 0 else 0 :]), finished]
