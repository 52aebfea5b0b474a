"""How the answer of one chat request is read: which parser, which special tokens it sees, where reasoning stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.gateway.parsing import reasoning
from serve.gateway.parsing.events import OutputParser
from serve.gateway.parsing.formats import make_parser, reasoning_format, stage_of
from serve.gateway.parsing.markers import SPECIAL, Spellings
from serve.gateway.parsing.reasoning import Stage
from serve.gateway.tool_use import ToolUse
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer

_PROMPT_END_TOKENS = 16
"""Enough for what a template writes behind an assistant's heading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """For all choices of a request."""

    use: ToolUse | None
    stage: Stage | None
    """Of reasoning at the start of the answer; None: the model has none."""
    spellings: Spellings
    shown: Mapping[int, str]
    """Special tokens that the parser must see, and how they are spelled for it."""

    @property
    def ends_with_call(self) -> bool:
        return self.use is not None and self.use.is_single

    def new_id(self) -> str:
        """The id of a call."""
        return "" if self.use is None else self.use.new_id()

    def parser(self) -> OutputParser:
        """Of one choice."""
        calls = None if self.use is None else self.use.format
        return make_parser(calls, self.use.names if self.use else (), self.spellings, stage=self.stage)


def reading(
    card: ModelCard,
    tokenizer: Tokenizer,
    use: ToolUse | None,
    prompt_ids: list[int],
    *,
    is_held: bool,
    hides_special: bool,
) -> tuple[Reading | None, list[int]]:
    """How to read the answer to a prompt, and what to put behind the prompt. None: the text is the answer.

    `is_held`: a grammar holds the answer from its first token on. There is no reasoning then, and where the template
    has opened it already, it is closed.
    """
    reasons = reasoning_format(card.reasoning_parser, tokenizer.chat_template)
    stage = None
    behind: list[int] = []
    if reasons is not None:
        end = tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
        stage = stage_of(end, reasons)
        if is_held:
            if end.rstrip().endswith(reasoning.START):
                behind += tokenizer.encode_controls(f"\n{reasoning.END}\n\n")
            stage = Stage.ANSWER
    if use is None and stage in (None, Stage.ANSWER):
        return None, behind
    markers = [*(use.format.markers if use else ()), *((reasoning.START, reasoning.END) if stage else ())]
    special = tokenizer.special_ids(markers)
    return Reading(
        use=use,
        stage=stage,
        spellings=Spellings(special.values(), hides=hides_special),
        shown={token_id: SPECIAL + text for token_id, text in special.items()},
    ), behind
