"""From a request's `Grammar` to matchers: tried in the grammar process, compiled here, kept for the next request.

    submit ── cache? ── one job at a time ── grammar process (limits, killed at them) ── compile ── cache ── matcher

Requests for the same grammar at the same time share one compilation. A refusal is kept as well: who sends a hostile
schema again pays with a look-up. The engine's thread has no part in this.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import ConfigError, InvalidRequest, Overloaded, TandemError, Unavailable
from serve.request import Grammar, SamplingParams
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.process import CPU_S, MAX_TEXT_BYTES
from serve.text.grammar.vocabulary import Vocabulary

log = logging.getLogger(__name__)

MAX_SOURCE_BYTES = 512 << 10
MAX_QUEUED = 32
"""Grammars waiting to be compiled; each may take `CPU_S`."""
MAX_CACHED = 256
MAX_CACHED_BYTES = 16 << 20
"""Of sources. What a fresh matcher holds grows with its source; what it builds later belongs to its sequence."""
ANSWER_S = 15.0
"""On the clock, for a process that neither answers nor uses its CPU time: a machine that is busy or stopped."""

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = "import sys; sys.path.insert(0, {root!r}); from serve.text.grammar.process import main; main()"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar that passed. Never advanced: every sequence gets a copy."""

    core: Any
    vocabulary: Vocabulary
    cost: Cost = field(default_factory=Cost)

    def start(self, sampling: SamplingParams) -> Matcher:
        return Matcher(self.core.deep_copy(), self.vocabulary, sampling, self.cost)


class GrammarCompiler:
    """One per replica. `vocabulary` is called once, by `prepare` or when the first grammar comes."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]):
        self._make_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._process: GrammarProcess | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._pending: dict[Grammar, Future[Compiled | TandemError]] = {}
        self._cache: OrderedDict[Grammar, Compiled | TandemError] = OrderedDict()
        self._cached_bytes = 0
        self.num_compiled = 0
        self.num_processes = 0

    async def compile(self, grammar: Grammar) -> Compiled:
        """Raises InvalidRequest for a grammar that is wrong or costs too much, Overloaded when many are waiting."""
        if len(grammar.source) > MAX_SOURCE_BYTES:
            raise InvalidRequest(
                f"{grammar.param} holds {len(grammar.source)} characters of {grammar.kind}; at most {MAX_SOURCE_BYTES} "
                "are allowed",
                param=grammar.param,
            )
        with self._lock:
            found = self._cache.get(grammar)
            if found is not None:
                self._cache.move_to_end(grammar)
            else:
                future = self._pending.get(grammar) or self._enqueue(grammar)
        if found is None:
            found = await asyncio.shield(asyncio.wrap_future(future))  # others may wait for it too
        if isinstance(found, TandemError):
            raise type(found)(f"{grammar.param}: {found.message}", param=grammar.param)
        return found

    def prepare(self) -> None:
        """Read the vocabulary now, on the compiler's thread. For 150 000 tokens that takes two seconds, in one of which
        nothing else runs in this process: better at its start than when others are being served."""
        self._worker.submit(self._prepare)

    @property
    def process_id(self) -> int | None:
        """Of the grammar process, while there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process. Blocks until a running compilation has ended, at most some seconds."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._process is not None:
            self._process.kill()

    def _enqueue(self, grammar: Grammar) -> Future[Compiled | TandemError]:
        if len(self._pending) >= MAX_QUEUED:
            raise Overloaded(
                f"{len(self._pending)} grammars wait to be compiled; send the request again shortly",
                retry_after_s=1.0,
            )
        future = self._pending[grammar] = self._worker.submit(self._compile, grammar)
        return future

    # -- on the worker's thread ------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if importlib.util.find_spec("llguidance") is not None:
            with contextlib.suppress(ConfigError):  # said again, to who asks
                self._vocabulary = self._make_vocabulary()

    def _compile(self, grammar: Grammar) -> Compiled | TandemError:
        result: Compiled | TandemError
        try:
            result = self._compile_now(grammar)
        except TandemError as error:
            result = error
        except Exception:
            log.exception("compiling a grammar failed kind=%s", grammar.kind)
            result = Unavailable("compiling it failed; the server's log has the details")
        with self._lock:
            del self._pending[grammar]
            if isinstance(result, (Compiled, InvalidRequest)):
                self._remember(grammar, result)
        return result

    def _remember(self, grammar: Grammar, result: Compiled | TandemError) -> None:
        self._cache[grammar] = result
        self._cached_bytes += len(grammar.source)
        while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
            oldest, _ = self._cache.popitem(last=False)
            self._cached_bytes -= len(oldest.source)

    def _compile_now(self, grammar: Grammar) -> Compiled:
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidRequest("constrained output needs the package llguidance, which this model's process lacks")
        if self._vocabulary is None:
            try:
                self._vocabulary = self._make_vocabulary()
            except ConfigError as error:
                raise InvalidRequest(f"this model's output cannot be constrained: {error.message}") from error
        self.num_compiled += 1
        job = {"kind": grammar.kind, "source": grammar.source, "is_compact": grammar.is_compact}
        answer = self._ask(self._vocabulary, json.dumps(job).encode() + b"\n")
        if "refused" in answer:
            raise InvalidRequest(answer["refused"])
        core = self._vocabulary.matcher(answer["text"])
        if core.is_error():
            raise InvalidRequest(" ".join(core.get_error().split())[:400])
        return Compiled(core, self._vocabulary)

    def _ask(self, vocabulary: Vocabulary, job: bytes) -> dict[str, str]:
        """The process's answer; a process that died of the job is replaced when the next one comes."""
        for is_last in (False, True):
            if self._process is None:
                self._process = GrammarProcess(vocabulary)
                self.num_processes += 1
            try:
                return self._process.ask(job)
            except BrokenPipeError:  # it was gone before it was asked
                self._drop_process()
                if is_last:
                    raise
            except (InvalidRequest, Unavailable):
                self._drop_process()
                raise
        raise AssertionError

    def _drop_process(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._process = None


class GrammarProcess:
    """The parent's end of `process.py`. Blocks; one thread."""

    def __init__(self, vocabulary: Vocabulary):
        # -P and the explicit root, as for every child: it imports the files this process runs.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT.format(root=str(_ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # an allocator's last words, with parts of the schema
            env={name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
            start_new_session=True,
        )
        setup = {"special": vocabulary.special, "end_ids": vocabulary.end_ids}
        self._setup = json.dumps(setup).encode() + b"\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: bytes) -> dict[str, str]:
        """Raises InvalidRequest when the process dies of the job, Unavailable when it does not answer, and
        BrokenPipeError when it had ended before."""
        stdin = self._process.stdin
        assert stdin is not None
        setup, self._setup = self._setup, b""
        stdin.write(setup + job)
        stdin.flush()
        answer = self._read_line()
        if answer is None:
            status = self._process.wait()
            log.warning("grammar process ended status=%s", status)
            if status == -signal.SIGPROF:
                raise InvalidRequest(f"compiling it takes more than {CPU_S:g} s; make it simpler")
            if status in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
                raise InvalidRequest("compiling it takes too much memory, or it is nested too deeply; make it simpler")
            raise Unavailable(f"the process that compiles grammars ended (status {status}); send the request again")
        found: dict[str, str] = json.loads(answer)
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read_line(self) -> bytes | None:
        """None: the process has ended."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline, line = time.monotonic() + ANSWER_S, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if len(line) > 2 * MAX_TEXT_BYTES or not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Unavailable("the process that compiles grammars did not answer; send the request again")
                chunk = os.read(stdout.fileno(), 1 << 16)
                if not chunk:
                    return None
                line += chunk
        return bytes(line)
