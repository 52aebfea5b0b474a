"""One target made ready, and loads sent to it: what every action of the command has in common."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import time
from collections.abc import Callable
from typing import Any

from loadtest import progress, result
from loadtest.client import HttpError, Server
from loadtest.flags import UsageError, pairs
from loadtest.measure.checks import Report, check_counts, check_images, check_texts
from loadtest.measure.driver import Driver, Ending, Load, Run, warm_up
from loadtest.measure.outcome import Outcome
from loadtest.measure.slo import Slo, good_share
from loadtest.measure.verdict import verdict
from loadtest.plan import Plan
from loadtest.targets.openai import OpenAIServer, Protocol
from loadtest.targets.target import Failed, Spool, Target
from loadtest.traffic.words import Counter, Words, local_counter

ENDPOINTS = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions", "engine": ""}
METRICS_LAG_S = 1.5
"""Servers publish metrics about once a second."""


class NotReady(Exception):
    """The target could not be asked, or refused what was to be asked. Exit status 1."""


class Session:
    """A ready target and the plan for it."""

    def __init__(self, args: argparse.Namespace, target: Target, plan: Plan, spool: Spool, count: Counter | None):
        self._args = args
        self._target = target
        self._spool = spool
        self._count = count
        self.plan = plan
        self.slo = Slo.parse(args.goodput)
        self._driver: Driver | None = None

    @classmethod
    async def open(cls, args: argparse.Namespace) -> Session:
        """Waits for the server, finds out its models, measures words. Raises UsageError, NotReady and TandemError."""
        plan = _plan(args)
        spool = Spool()
        target = _engine(args, plan, spool) if args.backend == "engine" else await _server(args, plan, spool)
        count: Counter = local_counter(args.tokenizer) if args.tokenizer else target.count_tokens
        if not plan.has_texts:
            return cls(args, target, plan, spool, None)
        try:
            return cls(args, target, Plan(args, await Words.measured(count)), spool, count)
        except Failed:  # OpenAI's own API has no /tokenize
            return cls(args, target, plan, spool, None)

    async def warm_up(self) -> None:
        """Raises NotReady with the server's own words when it answers none."""
        if not self._args.num_warmups:
            return
        try:
            await warm_up(self._target, self.plan.warm_ups(), self._args.num_warmups, self._args.request_timeout)
        except Failed as error:
            raise NotReady(f"no warm-up request was answered: {error}") from None

    async def measure(
        self, load: Load, rate: float, *, title: str = "", on_end: Callable[[Driver, Outcome], None] | None = None
    ) -> tuple[dict[str, Any], Run]:
        """One run, checked, as a result. `on_end` may stop it."""
        driver = Driver(self._target, load, (lambda one: on_end(driver, one)) if on_end else (lambda one: None))
        self._driver = driver
        before = await self._target.queue_seconds()
        gc.collect()
        gc.freeze()
        async with progress.shown(driver, title or self._args.dataset_name, self.slo, self._args.progress):
            run = await driver()
        gc.unfreeze()
        queue_s = await self._queue_since(before) if run.ending is Ending.DONE else {}
        report = await self._checked(run)
        is_there = run.ending is not Ending.DONE or not run.last_error or await self._target.is_there()
        share = good_share(run.outcomes, self.slo)
        ending = verdict(run, report, share, self._args.min_good, is_there)
        return result.assemble(self._args, run, self.slo, report, ending, rate, queue_s), run

    def interrupt(self) -> None:
        if self._driver is not None:
            self._driver.stop(Ending.INTERRUPTED)

    async def aclose(self) -> None:
        await self._target.aclose()

    async def _checked(self, run: Run) -> Report:
        report = Report()
        check_texts(run.outcomes, report, is_eos_ignored=self._args.ignore_eos)
        await asyncio.to_thread(check_images, run.outcomes, report, self._spool)
        if run.ending is Ending.DONE and self._count is not None and isinstance(self._target, OpenAIServer):
            is_chat, target = self._args.backend == "openai-chat", self._target

            async def count_prompt(text: str) -> int:
                """As the server sees it: with its chat template, or with its special tokens."""
                return await (
                    target.count_chat_tokens([{"role": "user", "content": text}])
                    if is_chat
                    else target.count_tokens(text)
                )

            await check_counts(run.outcomes, report, self._count, count_prompt)
        return report

    async def _queue_since(self, before: dict[str, float] | None) -> dict[str, float]:
        if before is None:
            return {}
        await asyncio.sleep(METRICS_LAG_S)
        after = await self._target.queue_seconds() or {}
        return {model: value - before.get(model, 0.0) for model, value in after.items()}


def _plan(args: argparse.Namespace) -> Plan:
    """Tries everything that flags can be wrong in, before anything is waited for."""
    try:
        Slo.parse(args.goodput)
        pairs(args.header, "--header")
        pairs(args.metadata, "--metadata")
        plan = Plan(args, Words.uncounted())
        plan.load()
        if args.tokenizer:
            local_counter(args.tokenizer)
    except ValueError as error:
        raise UsageError(error) from None
    return plan


def _engine(args: argparse.Namespace, plan: Plan, spool: Spool) -> Target:
    from loadtest.targets.engine import InProcess

    args.model = args.model or "tandem-text"
    args.image_model = args.image_model or "tandem-image"
    return InProcess(
        text=args.model if plan.has_texts else "",
        image=args.image_model if plan.has_images else "",
        sampling=_sampling(args),
        ignore_eos=args.ignore_eos,
        spool=spool,
    )


async def _server(args: argparse.Namespace, plan: Plan, spool: Spool) -> Target:
    url = args.base_url or f"http://{args.host}:{args.port}"
    server = Server.at(url.rstrip("/").removesuffix("/v1"), args.api_key, pairs(args.header, "--header"))
    listed = await _listed(server, args.ready_check_timeout_sec)
    kinds = {entry.get("id", ""): entry.get("kind", "") for entry in listed}
    if plan.has_texts:
        args.model = args.model or next((name for name, kind in kinds.items() if kind in ("", "text")), "")
    if plan.has_images:
        args.image_model = args.image_model or next((name for name, kind in kinds.items() if kind == "image"), "")
    for flag, is_needed, name in (
        ("--model", plan.has_texts, args.model),
        ("--image-model", plan.has_images, args.image_model),
    ):
        if is_needed and not name:
            raise NotReady(f"{url} lists no model for this ({', '.join(kinds) or 'none at all'}); give {flag}")
    protocol = Protocol(
        model=args.model,
        image_model=args.image_model,
        endpoint=args.endpoint or ENDPOINTS[args.backend],
        ignore_eos=args.ignore_eos,
        sampling=_sampling(args),
        extra_body=args.extra_body,
    )
    return OpenAIServer(server, protocol, spool)


async def _listed(server: Server, timeout_s: float) -> list[dict[str, Any]]:
    """What /v1/models lists, once it answers. A server without that page lists nothing."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            found = json.loads(await server.get("/v1/models"))
            return list(found.get("data") or [])
        except HttpError as error:
            if error.status in (404, 405):
                return []
            if 400 <= error.status < 500:
                raise NotReady(f"{server.host}:{server.port}: {error}") from None
            if time.monotonic() >= until:
                raise NotReady(f"{server.host}:{server.port} is not ready after {timeout_s:g} s: {error}") from None
        except ValueError:
            raise NotReady(f"{server.host}:{server.port} does not speak OpenAI's API: /v1/models is not JSON") from None
        await asyncio.sleep(0.3)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def on_interrupt(action: Callable[[], None]) -> None:
    """Ctrl-C and SIGTERM end the run, and what was measured is still told."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, action)
