"""Tries grammars before anybody depends on them, in a process of its own that is killed when one costs too much.

    parent ── one line of JSON: {"kind", "source", "is_compact"} ─▶ here ── {"text"} or {"refused"} ─▶ parent

Checking and compiling other people's schemas can take exponential time or memory, or overflow a stack; here that ends
this process and nothing else (`compiler.py` starts another). A grammar that passes is then walked for some
steps under the limits of the real matcher, over a vocabulary of single bytes.

What was compiled is not sent back: llguidance builds its automata as they are used, so that the text is the result, and
to compile it again costs the parent what it cost here.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from typing import Any

from serve.text.grammar.source import BadGrammar, to_llguidance
from serve.text.grammar.vocabulary import Vocabulary

CPU_S = 0.4
"""For one grammar. The slowest of the ordinary schemas in the tests takes 0.02 s."""
MEMORY_BYTES = 512 << 20
"""Address space beyond what the process has at its start."""
STACK_BYTES = 1 << 20
"""An eighth of what the threads of the parent have: what recurses too deeply there has ended here before."""
MAX_TEXT_BYTES = 4 << 20
NUM_STEPS = 64


def main() -> None:
    setup = json.loads(sys.stdin.buffer.readline())
    vocabulary = _bytes_vocabulary(setup["special"], setup["end_ids"])
    _limit()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # SIGPROF ends a process that does not handle it
        answer = json.dumps(_answer(vocabulary, job))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _limit() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides


def _bytes_vocabulary(special: dict[str, int], end_ids: list[int]) -> Vocabulary:
    """Special tokens under their own ids, so that a grammar may name them, and every byte."""
    taken = {*special.values(), *end_ids}
    tokens = [b""] * (max(taken, default=0) + 1 + 256)
    free = (token_id for token_id in range(len(tokens)) if token_id not in taken)
    for byte, token_id in zip(range(256), free):
        tokens[token_id] = bytes([byte])
    return Vocabulary(tokens, special=special, end_ids=end_ids)


def _answer(vocabulary: Vocabulary, job: dict[str, Any]) -> dict[str, str]:
    try:
        text = to_llguidance(job["kind"], job["source"], is_compact=job["is_compact"], special=vocabulary.special)
        if len(text) > MAX_TEXT_BYTES:
            raise BadGrammar(f"it becomes {len(text)} bytes of grammar; at most {MAX_TEXT_BYTES} are allowed")
        _try(vocabulary, text)
    except BadGrammar as error:
        return {"refused": " ".join(str(error).split())[:400]}
    except RecursionError:
        return {"refused": "it is nested too deeply"}
    except MemoryError:
        return {"refused": "it needs too much memory; make it smaller"}
    return {"text": text}


def _try(vocabulary: Vocabulary, text: str) -> None:
    """Compile and walk. Raises BadGrammar."""
    matcher = vocabulary.matcher(text)
    choose = random.Random(0)
    for step in range(NUM_STEPS):
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if step == 0 and matcher.stop_reason().startswith("NoExtension"):
            raise BadGrammar("no output matches it")
        if matcher.is_error():
            raise BadGrammar(matcher.get_error())
        going_on = [i for i in vocabulary.spelled if mask[i >> 3] >> (i & 7) & 1 and i not in vocabulary.end_ids]
        if not going_on:
            return
        matcher.consume_token(choose.choice(going_on))
        if matcher.is_error():
            raise BadGrammar(matcher.get_error())
        if matcher.is_stopped():
            return


if __name__ == "__main__":
    main()
