"""Where and how wide a replica computes: device, data type, threads. Text and image models choose alike."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from serve.errors import ConfigError
from serve.options import ModelOptions

SMALL_MODEL = 30_000_000
"""Parameters below which a replica computes on one thread unless told otherwise: its operators take microseconds, so
the gateway beside it is busy all the time, and a barrier that waits for a busy core costs more than a second thread
brings."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25
"""From Linux's mman.h; the last two since 5.14 and 6.1."""
_TAKEN_AT_ONCE = 64 << 20
"""Bytes; 20 to 40 ms."""
_HUGE_PAGE = 2 << 20
_LEAST_REGION = 32 << 20
"""Bytes of a region worth the call; stacks and small heaps stay as they are."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(options: ModelOptions) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError(
            f"device is 'cuda', but this torch ({torch.__version__}) finds no CUDA device; use device 'cpu' or 'auto', "
            f"or install a CUDA build of torch and a driver",
            param="device",
        )
    if options.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(options: ModelOptions, device: torch.device) -> torch.dtype | None:
    """None: as the checkpoint stores it."""
    dtype = _DTYPES.get(options.dtype)
    if dtype is None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return dtype


def set_threads(options: ModelOptions, num_replicas_here: int) -> int:
    """This process's compute threads: as asked for, else its share of the cores.

    More threads than cores cost a scheduler's time slice at every operator's barrier: with one busy neighbour on two
    cores each two-threaded operator took 8.4 ms, whatever its size.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = options.threads or max(1, num_cores // num_replicas_here)
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # settable once a process; nothing here uses those threads
        torch.set_num_interop_threads(1)
    return threads


def keep_freed_memory() -> None:
    """Have glibc give freed memory to the next tensor rather than back to the system, whose pages come back one fault
    each: 221 000 faults and 0.8 of 11 s for 17 000 prompt tokens (0.6 B, bfloat16). Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def use_huge_pages() -> None:
    """Put what this process holds now, its weights, on pages of 2 MiB: every token reads them all, and with pages of 4
    KiB their addresses have to be looked up again and again.

    9 to 11 % more bytes a second from packed bfloat16 weights (12 layers of Qwen3 0.6B, 4 rows, in turns with the same
    on small pages; two threads, virtual machine, Intel Xeon); half a second a GB, once. Linux before 6.1 does it in the
    background. Where it cannot be done nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = _madvise()
        with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file]
        for span, access, _, _, inode, *name in lines:
            if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
                start, end = (int(address, 16) for address in span.split("-"))
                start, end = start + -start % _HUGE_PAGE, end - end % _HUGE_PAGE
                if end - start >= _LEAST_REGION:
                    madvise(start, end - start, _MADV_HUGEPAGE)
                    madvise(start, end - start, _MADV_COLLAPSE)


def take_memory(tensors: Iterable[torch.Tensor]) -> Iterator[bool]:
    """Have the system provide memory that was asked for and never written, a part for each `next`; contents stay.

    A cache whose pages come when they are first written costs its first users 5 to 9 % of their time (Qwen3 0.6B,
    bfloat16, prompts of 64 to 256 tokens), and may find that the memory it was promised is gone.
    """
    with contextlib.suppress(OSError, AttributeError):
        madvise = _madvise()
        for tensor in tensors:
            start = tensor.data_ptr() & -mmap.PAGESIZE
            end = tensor.data_ptr() + tensor.nbytes
            for part in range(start, end, _TAKEN_AT_ONCE):
                if madvise(part, min(_TAKEN_AT_ONCE, end - part), _MADV_POPULATE_WRITE):
                    return
                yield True


def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def settle_threads(options: ModelOptions, threads: int, num_parameters: int) -> int:
    """The same once the model is known: a small one computes on one thread unless told otherwise."""
    if options.threads is None and num_parameters < SMALL_MODEL:
        torch.set_num_threads(threads := 1)
    return threads


def process_age_s(since: float) -> float:
    """Seconds since this process started; since `since` (monotonic) where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            started_ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.monotonic() - since
