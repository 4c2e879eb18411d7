"""What a device can do, and what it is doing: peak rates, memory, power."""

from __future__ import annotations

import contextlib
import difflib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from ttl_utils import paper
from ttl_utils.errors import ParameterError
from ttl_utils.model import Hardware

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Peak:
    """`flops_per_second` of dense matrix products, None where the device is not known."""

    flops_per_second: float | None
    source: str


def gpus() -> pd.DataFrame:
    """The known GPUs by name; NaN where one has no rate of its own in a precision."""
    table = paper.table("devices").set_index("gpu")
    numbers = table.drop(columns="device_name").apply(pd.to_numeric)
    return numbers.assign(device_name=table.device_name)


def find_gpu(name: str) -> pd.Series:
    """A known GPU, by the name of our table or by the driver's.

    Raises:
        ParameterError: naming the nearest known ones.
    """
    known = gpus()
    plain = {_plain(gpu): gpu for gpu in known.index}
    if _plain(name) in plain:
        return known.loc[plain[_plain(name)]]
    for _, row in known.iterrows():
        if re.fullmatch(row.device_name, name):
            return row
    near = [plain[key] for key in plain if _plain(name) and key.startswith(_plain(name))]
    near = near or [plain[key] for key in difflib.get_close_matches(_plain(name), plain)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ParameterError(f"gpu: {name!r} is not a GPU whose figures are known.{hint} Known: {', '.join(known.index)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def peak(hardware: Hardware) -> Peak:
    """The device's dense peak at this precision: NVIDIA's figure for a GPU, a measurement of half a second on a CPU."""
    if hardware.device == "cpu":
        return Peak(_measured_product(), "measured: a 2048-square fp32 matrix product, the best of half a second")
    if hardware.device != "cuda":
        return Peak(None, "unknown device")
    import torch

    name = torch.cuda.get_device_name()
    try:
        gpu = find_gpu(name)
    except ParameterError:
        return Peak(None, f"unknown device: {name}")
    if pd.isna(gpu[hardware.precision]):
        return Peak(None, f"unknown: {gpu.name} has no {hardware.precision} rate of its own")
    return Peak(float(gpu[hardware.precision]), f"NVIDIA's data sheet: {gpu.name}, {hardware.precision}, dense")


def _measured_product() -> float:
    import torch

    # no random numbers: whoever measures leaves torch's random state as it was
    one = torch.full((2048, 2048), 0.5)
    best, end = float("inf"), time.perf_counter() + 0.5
    # the first product warms up; on a slow machine a second one still counts
    torch.mm(one, one)
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(one, one)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048**3 / best


def gpu_readings() -> dict[str, float]:
    """Memory that torch holds at most so far, power and temperature; {} without CUDA, and nothing that fails."""
    import torch

    if not torch.cuda.is_available():
        return {}
    readings = {
        "gpu_memory_gib": lambda: round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "gpu_power_w": lambda: torch.cuda.power_draw() / 1000,
        "gpu_temperature_c": torch.cuda.temperature,
    }
    found = {}
    for name, read in readings.items():
        # NVML may be missing, or refuse in a container
        with contextlib.suppress(Exception):
            found[name] = float(read())
    return found


def put(values: np.ndarray, device: str) -> torch.Tensor:
    """An array on a device; a GPU's copy is not waited for."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)
