"""What this machine has for a model's ranks: devices and memory. Imports torch, so only for models that are split."""

from __future__ import annotations

import torch

from serve.options import ModelOptions
from serve.ranks.split import Geometry, check_memory, weight_bytes
from serve.text.cache_size import free_memory_bytes


def computes_on_cuda(options: ModelOptions) -> bool:
    """Whether replicas that start here would."""
    return options.device != "cpu" and torch.cuda.is_available()


def check_devices(options: ModelOptions) -> None:
    """Raise ValueError, its first word an option, unless every rank of every replica can have a device of its own."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cpu" or (options.device == "auto" and not num_devices):
        return
    needed = options.num_ranks * options.num_replicas
    if needed > num_devices:
        replicas = f" in each of {options.num_replicas} replicas" if options.num_replicas > 1 else ""
        most = num_devices // options.num_replicas
        remedy = f"the most ranks that fit are {most}" if most else "set device to 'cpu', or use another machine"
        raise ValueError(
            f"device is {options.device!r} and {options.name!r} has {options.num_ranks} ranks{replicas}, each with a "
            f"CUDA device of its own, but this machine has {num_devices}; {remedy}"
        )


def check_room(options: ModelOptions, geometry: Geometry) -> None:
    """Raise ValueError, its first word an option, when the weights cannot fit this machine's memory."""
    if computes_on_cuda(options):
        check_memory(options, geometry, torch.cuda.get_device_properties(0).total_memory)
        return
    free, needed = free_memory_bytes(), sum(weight_bytes(options, geometry)) * options.num_replicas
    if needed > free:
        raise ValueError(
            f"model is {options.model!r}, whose weights take {needed / 2**30:.1f} GiB on the {options.num_ranks} ranks "
            f"of {options.num_replicas} replicas, but this machine has {free / 2**30:.1f} GiB free; use a smaller "
            f"model, fewer replicas, or dtype 'bfloat16'"
        )
