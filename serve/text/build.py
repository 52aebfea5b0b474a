"""Puts a text replica together from its options: the one place that chooses classes. Everything else gets them passed.

`build_engine` stops at the engine, for the offline benchmark and tests; `build_text` makes and starts a `Backend`.
Whatever a user can get wrong ends here as a `ConfigError` that says what to change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from models.attention.build import make_attention
from models.parallel import ALONE
from models.text.base import CausalLM
from serve.compute import (
    SMALL_MODEL,
    choose_device,
    keep_freed_memory,
    process_age_s,
    set_threads,
    settle_threads,
    take_memory,
    use_huge_pages,
)
from serve.engine.engine import Engine
from serve.engine.interface import DeviceFault, Observer
from serve.errors import ConfigError
from serve.model_folder import find_model
from serve.options import ModelOptions, SpeculativeOptions
from serve.ranks.launch import Launcher
from serve.request import ModelCard
from serve.text.backend import TextBackend
from serve.text.build_ranks import Loading, Ranks
from serve.text.cache_size import CacheSize, cache_bytes, choose_cache_size
from serve.text.grammar.compiler import GrammarCompiler
from serve.text.grammar.vocabulary import load_vocabulary
from serve.text.graph_memory import measure_graphs
from serve.text.kv_cache import KVCache
from serve.text.load import attention_of, cache_of, load_model
from serve.text.load_progress import LoadProgress
from serve.text.pace import TextPace
from serve.text.prefix_digest import PrefixDigest
from serve.text.runner import TokenRunner
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenBatch, TokenOutput
from serve.text.speculation.build import (
    check_draft,
    draft_cache,
    draft_options,
    find_draft,
    make_proposer,
    speculation_of,
)
from serve.text.speculation.draft_length import AdaptiveLength

log = logging.getLogger(__name__)

TextEngine = Engine[Sequence, TokenBatch, TokenOutput]

_DEFAULT_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}


def build_text(
    options: ModelOptions,
    folder: Path | None = None,
    *,
    num_replicas_here: int = 1,
    observer: Observer | None = None,
    progress: bool = True,
    on_death: Callable[[BaseException], None] | None = None,
    launcher: Launcher | None = None,
) -> TextBackend:
    """Load the model, size the cache, warm up, start the engine's thread. Blocks until the model can answer.

    `folder`: where the model's files are, when that is known already. `launcher`: starts the other ranks of a model
    that takes several; None: as processes here.
    """
    folder = folder or find_model(options, "text")[0]
    ranks = start_ranks(options, num_replicas_here, launcher)
    engine, card = build_engine(
        options,
        folder,
        num_replicas_here=num_replicas_here,
        observer=observer,
        progress=progress,
        on_death=on_death,
        ranks=ranks,
    )
    engine.start()
    assert isinstance(engine.scheduler, TokenScheduler)
    vocabulary = partial(load_vocabulary, folder, card.vocab_size, engine.scheduler.eos_token_ids)
    grammars = GrammarCompiler(vocabulary)
    grammars.prepare()
    return TextBackend(engine, card, grammars, ranks)


def start_ranks(options: ModelOptions, num_replicas_here: int = 1, launcher: Launcher | None = None) -> Ranks | None:
    """The other ranks of a model that takes several; None for one. Raises ConfigError and EngineDead."""
    if options.num_ranks == 1:
        return None
    return Ranks.start(options, set_threads(options, num_replicas_here * options.num_ranks), launcher)


def build_engine(
    options: ModelOptions,
    folder: Path | None = None,
    *,
    num_replicas_here: int = 1,
    observer: Observer | None = None,
    progress: bool = True,
    on_death: Callable[[BaseException], None] | None = None,
    depth: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[TextEngine, ModelCard]:
    """The same up to an engine that nobody steps yet, and the card of its model.

    `depth`: steps in flight. None: with stages, one less than there are, so that each has a batch; else 1 on CUDA,
    which computes while the host prepares, and 0 on CPU, where it would gain nothing. `ranks`: the processes of a
    model that takes several, closed here when building fails and by the caller afterwards; None: they are started
    here, and end with this process.
    """
    folder = folder or find_model(options, "text")[0]
    ranks = ranks or start_ranks(options, num_replicas_here)
    try:
        return _build(options, folder, num_replicas_here, observer, progress, on_death, depth, ranks)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise


def _build(
    options: ModelOptions,
    folder: Path,
    num_replicas_here: int,
    observer: Observer | None,
    progress: bool,
    on_death: Callable[[BaseException], None] | None,
    depth: int | None,
    ranks: Ranks | None,
) -> tuple[TextEngine, ModelCard]:
    started = time.monotonic()
    device = choose_device(options)
    threads = set_threads(options, num_replicas_here * options.num_ranks)
    keep_freed_memory()
    loading = None if ranks is None else Loading.begin(ranks, options, folder)
    model = _load(options, folder, device, progress=progress, loading=loading)
    is_large_on_cpu = device.type == "cpu" and model.num_parameters >= SMALL_MODEL
    if is_large_on_cpu:
        use_huge_pages()
    speculation = speculation_of(options)
    draft = _load_draft(options, speculation, model, folder, device, progress=progress)
    threads = settle_threads(options, threads, model.num_parameters)
    budget = options.max_num_batched_tokens or max(_DEFAULT_BATCHED_TOKENS[device.type], options.max_num_seqs)
    stages = options.pipeline_parallel_size
    if depth is None:
        depth = stages - 1 if stages > 1 else int(device.type == "cuda")
    runner, size = _fit_runner(
        options, model, speculation, draft, device, budget, num_replicas_here, loading, overlaps=depth > 0
    )
    scheduler = TokenScheduler(
        KVCache(
            size.num_blocks, options.block_size, options.enable_prefix_caching, digest=PrefixDigest(options.block_size)
        ),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=size.max_model_len,
        eos_token_ids=model.spec.eos_token_ids,
        vocab_size=model.spec.vocab_size,
        draft_length=None if speculation is None else AdaptiveLength(speculation.num_speculative_tokens),
        runs_ahead=runner.runs_ahead,
        num_stages=stages,
    )
    engine: TextEngine = Engine(
        scheduler,
        runner,
        depth=depth,
        max_waiting=options.max_num_waiting,
        step_timeout_s=options.step_timeout_s,
        canary_period_s=options.canary_period_s,
        observer=observer,
        pace=TextPace(scheduler),
        on_death=on_death,
        idle_work=partial(_take, runner, take_memory(runner.kv_cache)) if is_large_on_cpu else runner.capture_next,
    )
    if ranks is not None:
        ranks.group.watch(on_death or (lambda error: None))
    card = ModelCard(
        name=options.name,
        kind="text",
        source=options.model,
        device=str(device),
        dtype=str(model.spec.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters,
        max_model_len=size.max_model_len,
        kv_cache_tokens=size.num_blocks * options.block_size,
        vocab_size=model.spec.vocab_size,
        threads=threads,
        load_s=process_age_s(since=started),
        aliases=options.served_model_name[1:],
        created=int(time.time()),
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        is_reproducible=speculation is None or speculation.rejection_sample_method != "standard",
        ranks=() if loading is None else loading.cards(options.block_size),
        slo_ttft_s=options.slo_ttft_s,
        slo_tpot_s=options.slo_tpot_s,
    )
    log.info(
        "model ready model=%s device=%s dtype=%s kv_cache_dtype=%s threads=%d max_model_len=%d kv_cache_tokens=%d "
        "load_s=%.1f",
        *(card.name, card.device, card.dtype, options.kv_cache_dtype, threads, card.max_model_len),
        *(card.kv_cache_tokens, card.load_s),
    )
    return engine, card


def _take(runner: TokenRunner, parts: Iterator[bool]) -> bool:
    """Idle work of a large model on CPU: the next part of the cache's memory, on every rank."""
    if runner.peers is not None:
        runner.peers.tell_idle()
    return next(parts, False)


def _fit_runner(
    options: ModelOptions,
    model: CausalLM,
    speculation: SpeculativeOptions | None,
    draft: CausalLM | None,
    device: torch.device,
    max_num_tokens: int,
    num_replicas_here: int,
    loading: Loading | None,
    *,
    overlaps: bool,
) -> tuple[TokenRunner, CacheSize]:
    """A warm runner whose cache takes what the weights and a step of `max_num_tokens` leave. Raises ConfigError.

    A draft model's cache is part of it: both have the same blocks. `overlaps`: steps are begun before the one before
    has ended. Drafts then stay on the device, unless other ranks have to be told of them.
    """
    cache = cache_of(options, model, device)
    extra = None if draft is None else draft_cache(options, draft, device)
    block_bytes = cache.block_bytes + (0 if extra is None else extra.block_bytes)
    max_drafts = 0 if speculation is None else speculation.num_speculative_tokens
    attention = attention_of(options, cache, model.rank_spec.num_heads)
    can_capture = all(getattr(part, "is_capturable", False) for part in (model, attention))
    has_graphs = device.type == "cuda" and can_capture and not options.enforce_eager and loading is None
    max_rows_in_graph = options.max_num_seqs if has_graphs else 0

    def measure_all_graphs() -> int:
        if not max_rows_in_graph:
            return 0
        again = attention_of(options, cache, model.rank_spec.num_heads)
        num_bytes = measure_graphs(model, again, cache, max_rows=max_rows_in_graph, max_drafts=max_drafts)
        if draft is not None and extra is not None and getattr(draft, "is_capturable", False):
            again = make_attention("auto", extra, draft.spec.num_heads)
            num_bytes += measure_graphs(draft, again, extra, max_rows=max_rows_in_graph, max_drafts=1)
        return num_bytes

    def measure() -> int:
        num_bytes = cache_bytes(
            options,
            model,
            cache,
            max_num_tokens=max_num_tokens,
            num_replicas_here=num_replicas_here,
            measure_graphs=measure_all_graphs,
        )
        return num_bytes // block_bytes

    try:
        num_blocks = measure() if loading is None else loading.fit(measure, max_num_tokens, num_replicas_here)
        size = choose_cache_size(
            options, cache, max_positions=model.spec.max_positions, memory_bytes=num_blocks * cache.block_bytes
        )
        if loading is not None:
            loading.ranks.group.call("allocate", num_blocks=size.num_blocks + 1)
        runner = TokenRunner(
            model,
            attention,
            cache,
            num_blocks=size.num_blocks,
            max_model_len=size.max_model_len,
            max_rows_in_graph=max_rows_in_graph,
            max_drafts=max_drafts,
            proposer=None
            if speculation is None
            else make_proposer(
                speculation,
                draft,
                extra,
                num_blocks=size.num_blocks,
                max_num_tokens=max_num_tokens,
                overlaps=overlaps and loading is None,
                max_rows_in_graph=max_rows_in_graph,
                max_model_len=size.max_model_len,
            ),
            rejects=speculation is not None and speculation.rejection_sample_method == "standard",
            peers=None if loading is None else loading.peers(options),
        )
        runner.warm_up()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{options.model!r} runs out of device memory at max_num_batched_tokens {max_num_tokens}; lower that, "
            f"kv_cache_memory_bytes or gpu_memory_utilization",
            param="gpu_memory_utilization",
        ) from error
    except DeviceFault as error:
        raise ConfigError(f"{options.model!r}: {error}", param="model") from error
    return runner, size


def _load_draft(
    options: ModelOptions,
    speculation: SpeculativeOptions | None,
    target: CausalLM,
    folder: Path,
    device: torch.device,
    *,
    progress: bool,
) -> CausalLM | None:
    """The model that drafts for `target`, from `folder`; None when none does. Raises ConfigError."""
    wanted = draft_options(options, speculation)
    if wanted is None:
        return None
    draft_folder = find_draft(wanted)
    draft = _load(wanted, draft_folder, device, progress=progress)
    check_draft(draft, target, draft_folder, folder)
    return draft


def _load(
    options: ModelOptions, folder: Path, device: torch.device, *, progress: bool, loading: Loading | None = None
) -> CausalLM:
    """With ranks it returns when all of them have loaded."""
    bar = LoadProgress(options.name) if progress else None
    try:
        place = ALONE if loading is None else loading.ranks.place
        model = load_model(options, folder, device, place=place, progress=bar)
    finally:
        if bar is not None:
            bar.close()
    if loading is not None:
        loading.loaded(model, device)
    return model
