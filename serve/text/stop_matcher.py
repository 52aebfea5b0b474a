"""Stop strings in streamed text: found across token borders, never leaked, in time linear in the text.

An Aho-Corasick automaton (Aho and Corasick, 1975) over all stop strings reads every character once. Its depth is the
length of the longest suffix that may still become a stop string, which is exactly what has to be held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Passes text on until the first stop string is complete. The result does not depend on how the text is cut.

    First means: ends first; of two that end together the longer wins. The text stops before the match, or after it
    with `include`.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._include = include
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        self._build()
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to pass on, and the stop string once one is complete. Text after it is dropped."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        state = self._state
        for index, char in enumerate(text):
            while char not in self._next[state] and state:
                state = self._fail[state]
            state = self._next[state].get(char, 0)
            stop = self._match[state]
            if stop is not None:
                self._matched = stop
                seen = self._held + text[: index + 1]
                self._held = ""
                return (seen if self._include else seen[: len(seen) - len(stop)]), stop
        self._state = state
        seen = self._held + text
        safe = len(seen) - self._depth[state]
        self._held = seen[safe:]
        return seen[:safe], None

    def finish(self) -> str:
        """The text held back: the generation ended before it became a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _build(self) -> None:
        for stop in self._stops:
            node = 0
            for char in stop:
                child = self._next[node].get(char)
                if child is None:
                    child = len(self._next)
                    self._next[node][char] = child
                    self._next.append({})
                    self._fail.append(0)
                    self._depth.append(self._depth[node] + 1)
                    self._match.append(None)
                node = child
            self._match[node] = stop
        queue = deque(self._next[0].values())
        while queue:  # breadth first: the failure link of a node is shallower than the node
            node = queue.popleft()
            for char, child in self._next[node].items():
                fail = self._fail[node]
                while char not in self._next[fail] and fail:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(char, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
                queue.append(child)
