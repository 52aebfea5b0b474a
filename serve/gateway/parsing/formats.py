"""The formats of calls by name, how to tell a model's from its chat template, and the parser of one choice.

Names are vLLM's. A format also says how a call is forced: what stands before and after the JSON of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from serve.gateway.parsing import hermes, mistral, pythonic, reasoning
from serve.gateway.parsing.calls import CallParser, Section
from serve.gateway.parsing.events import OutputParser
from serve.gateway.parsing.hermes import HermesSection
from serve.gateway.parsing.json_calls import JsonSection
from serve.gateway.parsing.markers import Spellings
from serve.gateway.parsing.mistral import MistralSection
from serve.gateway.parsing.pythonic import PythonicSection
from serve.gateway.parsing.reasoning import ReasoningParser, Stage

PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFormat:
    """How a family of models writes calls."""

    name: str
    section: Callable[[Collection[str], Spellings], Section]
    openings: tuple[str, ...] = ()
    """Markers that begin a section."""
    others: tuple[str, ...] = ()
    """Markers that may be special tokens of the model and are read inside sections, or left out."""
    opener: str = ""
    """A section also begins at the start of the answer when that is this character."""
    before: str = ""
    after: str = ""
    """Around the arguments when a grammar writes the call; NAME stands for the tool's name."""
    trigger: str = ""
    """How every such call begins. Empty: no grammar can write this format."""
    short_ids: bool = False
    """Templates of its models take ids of nine letters and digits only."""

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.openings, *self.others)

    def around(self, name: str) -> tuple[str, str]:
        """What a grammar writes before and after the arguments of a call of `name`."""
        return self.before.replace("NAME", name), self.after


def _list_section(names: Collection[str], spellings: Spellings) -> Section:
    return JsonSection(names, is_list=True)


LIST = CallFormat(
    name="list",
    section=_list_section,
    opener="[",
    before='[{"name": "NAME", "arguments": ',
    after="}]",
    trigger='[{"name": "',
)
"""Of calls forced on models whose own format no grammar can write."""

FORMATS = {
    "hermes": CallFormat(
        name="hermes",
        section=lambda names, spellings: HermesSection(names, spellings(hermes.END)),
        openings=(hermes.START,),
        others=(hermes.END,),
        before='<tool_call>\n{"name": "NAME", "arguments": ',
        after="}\n</tool_call>",
        trigger="<tool_call>",
    ),
    "llama3_json": CallFormat(
        name="llama3_json",
        section=lambda names, _: JsonSection(names, is_list=False),
        openings=(PYTHON_TAG,),
        opener="{",
        before='{"name": "NAME", "parameters": ',
        after="}",
        trigger='{"name": "',
    ),
    "pythonic": CallFormat(
        name="pythonic",
        section=lambda names, _: PythonicSection(names),
        openings=(pythonic.START,),
        others=(pythonic.END, PYTHON_TAG),
        opener="[",
    ),
    "mistral": CallFormat(
        name="mistral",
        section=MistralSection,
        openings=(mistral.START,),
        others=(mistral.ARGS, mistral.CALL_ID),
        before='[TOOL_CALLS][{"name": "NAME", "arguments": ',
        after="}]",
        trigger=mistral.START,
        short_ids=True,
    ),
}
_NAMED = replace(FORMATS["mistral"], before="[TOOL_CALLS]NAME[ARGS]", after="")
"""As newer templates of Mistral's have it."""
ALIASES = {"llama4_json": "llama3_json", "llama4_pythonic": "pythonic"}
"""Other names of vLLM's for the same."""


def call_format(name: str, template: str) -> CallFormat | None:
    """The format of that name; with "auto" the one that `template` asks the model for, None when that is not known."""
    if name != "auto":
        return FORMATS.get(ALIASES.get(name, name))
    if mistral.START in template:
        return _NAMED if mistral.ARGS in template else FORMATS["mistral"]
    if hermes.START in template:
        # Others write something else than JSON between the same tags: Qwen3-Coder tags, GLM pairs.
        is_json = "<function=" not in template and "<arg_key>" not in template
        return FORMATS["hermes"] if is_json else None
    if "func_name1(" in template or pythonic.START in template:
        return FORMATS["pythonic"]
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return FORMATS["llama3_json"]
    return None


def reasoning_format(name: str, template: str) -> str | None:
    """How the model's reasoning is told from its answer: "deepseek_r1", "qwen3" or not at all.

    "auto" is never "deepseek_r1": templates of models that do not reason (DeepSeek V3) hold the tags too, and where
    every answer begins with reasoning the prompt opens it or the model does.
    """
    if name != "auto":
        return None if name == "none" else name
    return "qwen3" if reasoning.END in template else None


def stage_of(prompt_end: str, name: str) -> Stage:
    """Where the answer begins: what the prompt ends with counts, then the format."""
    bare = prompt_end.rstrip()
    if bare.endswith(reasoning.END):
        return Stage.ANSWER
    is_open = name == "deepseek_r1" or bare.endswith(reasoning.START)
    return Stage.EXPECTED if is_open else Stage.UNKNOWN


def make_parser(
    calls: CallFormat | None, names: Collection[str], spellings: Spellings, *, stage: Stage | None = None
) -> OutputParser:
    """The parser of one choice. `stage`: where reasoning is at the start; None: there is none."""
    if calls is None:
        answer = CallParser(lambda: _list_section(names, spellings), spellings)
    else:
        section = calls.section
        answer = CallParser(lambda: section(names, spellings), spellings, markers=calls.openings, opener=calls.opener)
    return answer if stage is None else ReasoningParser(answer, spellings, stage)
