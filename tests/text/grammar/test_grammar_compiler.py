"""A grammar is tried in a process that may die of it; who sends a bad one is told, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from text.grammar.test_grammar_source import vocabulary

from serve.errors import InvalidRequest, Overloaded
from serve.request import Grammar, GrammarKind, SamplingParams
from serve.text.grammar import compiler as compilation
from serve.text.grammar import process
from serve.text.grammar.compiler import MAX_SOURCE_BYTES, Compiled, GrammarCompiler

pytest.importorskip("llguidance")
GOOD = Grammar(kind="regex", source="[ab]{3}")


@pytest.fixture
def compiler():
    made = GrammarCompiler(vocabulary)
    yield made
    made.close()


def compile_all(compiler: GrammarCompiler, *grammars: Grammar) -> list[Compiled | BaseException]:
    async def run() -> list[Compiled | BaseException]:
        return await asyncio.gather(*map(compiler.compile, grammars), return_exceptions=True)

    return asyncio.run(run())


def grammar(kind: GrammarKind, source: object) -> Grammar:
    return Grammar(kind=kind, source=source if isinstance(source, str) else json.dumps(source), param="response_format")


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(key: str, width: int, length: int) -> dict:
    """Definitions that each refer `width` times to the next: `width ** length` when multiplied out."""
    links = {f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}] * width} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


HOSTILE = {
    "a reference to itself": grammar("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "references in a ring": grammar(
        "json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "an intersection that multiplies": grammar(
        "json_schema",
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"{name}{i}": {}}} for name in "pq"]} for i in range(18)
            ]
        },
    ),
    "a multiple of a large number": grammar("json_schema", {"type": "integer", "multipleOf": 1234567}),
    "thousands of optional properties": grammar(
        "json_schema", {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(4000)}}
    ),
    "brackets in brackets": grammar("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    "a deep schema": grammar("json_schema", nested(200)),
    "a schema elsewhere": grammar("json_schema", {"$ref": "https://schemas.example/x.json"}),
    "a schema of ten megabytes": grammar("json_schema", {"enum": ["x" * 99 for _ in range(100_000)]}),
    "groups in groups": grammar("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "a look behind": grammar("regex", "(?<=a)b"),
    "nothing to begin with": grammar("grammar", "root ::= root"),
    "rules in rules": grammar("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "no grammar": grammar("grammar", "hello"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_and_the_next_request_works(compiler, name):
    refused, made = compile_all(compiler, HOSTILE[name], GOOD)
    assert isinstance(refused, InvalidRequest)
    assert refused.param == "response_format" and str(refused).startswith("response_format")
    assert len(str(refused)) < 600
    assert isinstance(made, Compiled)


COSTLY_LATER = {
    "repetitions in repetitions": grammar("regex", "((a{1,1000}){1,1000}){1,1000}b"),
    "a large count": grammar("regex", "a{1,100000}"),
    "what came twenty-five back": grammar("regex", "(a|b)*a(a|b){25}"),
    "letters of all scripts": grammar("regex", r"\p{L}{1,5000}"),
    "ten thousand values": grammar("json_schema", {"enum": [f"value {i * 7919 % 10007}" for i in range(5_000)]}),
    "a long text": grammar("json_schema", {"type": "string", "minLength": 900_000}),
    "a choice of three, thirty times": grammar("json_schema", chain("anyOf", 3, 30)),
    "an agreement of two, twenty-five times": grammar("json_schema", chain("allOf", 2, 25)),
    "a deep schema": grammar("json_schema", nested(40)),
}


@pytest.mark.parametrize("name", COSTLY_LATER)
def test_a_large_grammar_that_passes_stays_within_its_limits(compiler, name):
    """It is built as it is used: by tokens of one byte each, of which some hundred must not cost much."""
    (made,) = compile_all(compiler, COSTLY_LATER[name])
    assert isinstance(made, Compiled)
    matcher = made.start(SamplingParams(max_tokens=1000))
    for step in range(300):
        mask = matcher.mask()
        if mask is None or matcher.is_complete:
            break
        allowed = [i for i in range(256) if mask[i >> 3] >> (i & 7) & 1]
        if not allowed:
            break
        matcher.accept(allowed[step * 7 % len(allowed)])
    assert not made.cost.is_too_high


def test_a_process_that_is_killed_is_replaced(compiler):
    compile_all(compiler, GOOD)
    first = compiler.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    psutil.Process(first).wait()
    (made,) = compile_all(compiler, grammar("regex", "c+"))
    assert isinstance(made, Compiled)
    assert compiler.process_id != first and compiler.num_processes == 2


def test_cost_ends_the_process_not_the_parent(compiler):
    compile_all(compiler, GOOD)
    first = compiler.process_id
    (refused,) = compile_all(compiler, HOSTILE["a multiple of a large number"])
    assert isinstance(refused, InvalidRequest) and "make it simpler" in str(refused)
    assert compiler.process_id is None or compiler.process_id != first


def test_the_process_ends_with_its_parent():
    code = (
        "import asyncio; from text.grammar.test_grammar_compiler import *\n"
        "c = GrammarCompiler(vocabulary); compile_all(c, GOOD); print(c.process_id, flush=True); os._exit(0)"
    )
    root = Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env, text=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(child.stdout)).wait(timeout=30)


def test_requests_for_one_grammar_share_one_compilation(compiler):
    made = compile_all(compiler, *[GOOD] * 20)
    assert compiler.num_compiled == 1 and len({id(one) for one in made}) == 1
    compile_all(compiler, GOOD)
    assert compiler.num_compiled == 1


def test_a_refusal_is_remembered_for_each_field_by_its_name(compiler):
    bad = Grammar(kind="regex", source="(", param="response_format")
    other = Grammar(kind="regex", source="(", param="structured_outputs")
    for one in (bad, other):
        (refused,) = compile_all(compiler, one)
        assert isinstance(refused, InvalidRequest) and refused.param == one.param
    assert compiler.num_compiled == 1


def test_the_cache_is_bounded_in_entries_and_bytes(compiler, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_CACHED", 3)
    compile_all(compiler, *[grammar("regex", f"a{i}") for i in range(6)])
    assert len(compiler._cache) == 3
    monkeypatch.setattr(compilation, "MAX_CACHED_BYTES", 4)
    compile_all(compiler, grammar("regex", "ab"))
    assert compiler._cached_bytes <= 4


def test_too_many_at_once_are_told_to_come_back(compiler, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_QUEUED", 2)
    results = compile_all(compiler, *[grammar("regex", f"b{i}") for i in range(5)])
    assert sum(isinstance(result, Overloaded) for result in results) == 3
    assert sum(isinstance(result, Compiled) for result in results) == 2


def test_who_leaves_takes_nothing_from_those_who_wait(compiler):
    async def run() -> Compiled:
        leaving, staying = (asyncio.ensure_future(compiler.compile(GOOD)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert isinstance(asyncio.run(run()), Compiled)


def test_a_large_source_is_refused_without_a_look_at_it(compiler):
    (refused,) = compile_all(compiler, grammar("regex", "a" * (MAX_SOURCE_BYTES + 1)))
    assert isinstance(refused, InvalidRequest) and compiler.num_processes == 0


def test_without_llguidance_constrained_output_is_refused(compiler, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (refused,) = compile_all(compiler, GOOD)
    assert isinstance(refused, InvalidRequest) and "llguidance" in str(refused)


def test_the_process_has_the_limits_it_says(compiler):
    compile_all(compiler, GOOD)
    limits = Path(f"/proc/{compiler.process_id}/limits").read_text()
    stack = next(line for line in limits.splitlines() if line.startswith("Max stack size"))
    assert str(process.STACK_BYTES) in stack
    memory = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert "unlimited" not in memory
