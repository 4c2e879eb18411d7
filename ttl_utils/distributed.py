"""Several processes: what was asked for and what runs agree, and weights in shards become whole again."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.model import Hardware


def make_accelerator(hardware: Hardware, log_with: list[str] | None = None, folder: Path | None = None) -> Accelerator:
    """Accelerate, with the processes, the device, the precision and the trackers that were asked for, or an error."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        # Accelerate keeps a process's first device and precision; in a notebook the next cell may want others
        AcceleratorState._reset_state(reset_partial_state=True)
    missing = set(LoggerType.list()) - set(map(str, get_available_trackers()))
    for name in log_with or ():
        # Accelerate itself leaves such a one out, with a line in a log
        if name in missing or name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            what = "is not installed" if name in LOGGER_TYPE_TO_CLASS else f"is no tracker of Accelerate's ({known})"
            raise ParameterError(f"log_with: {name!r} {what}")
    check_launcher(hardware)
    # the other processes wait while the first one evaluates, which may take longer than the default ten minutes
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    fsdp = None
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # its own policy would round the loss and the sums of gradients to 16 bits; autocast alone is what others get
        fsdp = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    accelerator = Accelerator(
        mixed_precision=hardware.mixed_precision,
        cpu=hardware.device == "cpu",
        fsdp_plugin=fsdp,
        kwargs_handlers=[patience],
        log_with=log_with or None,
        project_dir=folder and str(folder),
    )
    if accelerator.num_processes != asked:
        raise TTLError(
            f"{asked} processes were asked for and Accelerate runs {accelerator.num_processes}: set device to cpu, or "
            "start one process for each CUDA GPU"
        )
    if accelerator.device.type != hardware.device:
        raise TTLError(
            f"the parameters put the model on {hardware.device}, and the launcher on {accelerator.device.type}: set "
            f"device to {accelerator.device.type}, or leave --cpu (ACCELERATE_USE_CPU) out"
        )
    return accelerator


def check_launcher(hardware: Hardware) -> None:
    """What `accelerate launch` was asked for stands in the environment; some of it Accelerate drops in silence.

    Raises:
        TTLError: what was asked for is not what would run.
    """
    given = os.environ
    # an address to meet at means several processes; without GPUs for them it starts one, which knows of no others
    if "ACCELERATE_MIXED_PRECISION" in given and "MASTER_PORT" in given and "WORLD_SIZE" not in given:
        raise TTLError(
            "accelerate launch was asked for several processes and started one. Where each has no GPU of its own, "
            f"start them with: torchrun --nproc_per_node N -m -- ttl_utils {shlex.join(sys.argv[1:])}"
        )
    precision = given.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", hardware.mixed_precision):
        raise TTLError(
            f"the launcher asks for mixed precision {precision}, and the parameters give {hardware.precision}: set "
            f"precision to {precision}, or leave --mixed_precision out"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise TTLError(f"the launcher asks for ACCELERATE_USE_{name}; what works here is plain data or FSDP 2")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if hardware.device != "cuda" or given.get("WORLD_SIZE", "1") == "1":
            # Accelerate would train on whole copies of the model
            raise TTLError("FSDP needs several CUDA GPUs: leave --use_fsdp (ACCELERATE_USE_FSDP) out")
        if given.get("FSDP_VERSION") != "2" or parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise TTLError("FSDP works here in version 2 without offloading: see params/accelerate/fsdp.yaml")


def check_same(accelerator: Accelerator, values: dict[str, Any]) -> None:
    """Processes with other parameters, code or checkpoints would train apart, or wait for each other for ever.

    Raises:
        TTLError: naming the first value that differs from the first process's.
    """
    if accelerator.num_processes == 1:
        return
    found = gather_object([values])
    for rank, other in enumerate(found):
        for key, value in other.items():
            if value != found[0][key]:
                raise TTLError(
                    f"process {rank} has {key} {value} and process 0 has {found[0][key]}: start all with the same "
                    "command and code, and a TTL_OUTPUTS that every machine sees"
                )


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, or all of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def prepare(
    accelerator: Accelerator, learner: torch.nn.Module, optimizer: torch.optim.Optimizer, compiled: bool
) -> tuple[torch.nn.Module, Any, Callable[..., None]]:
    """The module and the optimizer to learn with, and `gather(moments)`, which makes those given here current.

    They are the same but for FSDP: there each process learns on shards, and the first one's `learner` and `optimizer`
    are whole copies on the CPU, for evaluation and checkpoints. All processes must call `gather` together.
    """
    shards, sharded = copy.deepcopy((learner, optimizer)) if is_sharded(accelerator) else (learner, optimizer)
    shards, sharded = accelerator.prepare(torch.compile(shards) if compiled else shards, sharded)
    if not is_sharded(accelerator):
        return shards, sharded, lambda moments=False: None
    pairs, state = list(zip(shards.parameters(), learner.parameters(), strict=True)), sharded.optimizer.state
    # the copied state belongs to parameters that are no more
    state.clear()
    for shard, parameter in pairs:
        for key, value in optimizer.state[parameter].items():
            if value.ndim:
                state[shard][key] = distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)
            else:
                # the number of steps, which AdamW counts on the CPU, unless it is fused
                state[shard][key] = value.to(shard.device if optimizer.defaults["fused"] else "cpu")

    @torch.no_grad()
    def gather(moments: bool = False) -> None:
        optimizer.state.clear()
        # one parameter at a time, so that no process ever holds much more than its shards
        for shard, parameter in pairs:
            for key, value in {"": shard, **(state[shard] if moments else {})}.items():
                found = value.full_tensor() if isinstance(value, DTensor) else value
                if not accelerator.is_main_process:
                    continue
                if key:
                    optimizer.state[parameter][key] = found.cpu()
                else:
                    parameter.copy_(found)

    return shards, sharded, gather
