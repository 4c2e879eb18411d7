"""What a device can do: NVIDIA's figures by the driver's names, a measured CPU, readings that may fail."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ttl_utils import devices
from ttl_utils.errors import ParameterError
from ttl_utils.model import Hardware


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("a100-40gb", "A100-40GB"),
        ("rtx 4090", "RTX-4090"),
    ],
)
def test_a_gpu_is_found_by_the_drivers_name_and_by_ours(name, gpu):
    assert devices.find_gpu(name).name == gpu


# each of them holds a known name, and has other rates
@pytest.mark.parametrize(
    "name",
    ["NVIDIA L40S", "NVIDIA T400", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "", "*"],
)
def test_another_gpu_is_not_taken_for_a_known_one(name):
    with pytest.raises(ParameterError, match="Known: T4, L4, RTX-3090"):
        devices.find_gpu(name)


def test_a_name_that_could_be_two_is_told_both():
    with pytest.raises(ParameterError, match="Did you mean A100-40GB or A100-40GB-PCIe or"):
        devices.find_gpu("A100")


def test_dense_rates_of_the_data_sheets():
    gpus = devices.gpus()
    assert gpus.loc["A100-40GB", ["fp32", "tf32", "bf16", "fp16"]].tolist() == [19.5e12, 156e12, 312e12, 312e12]
    assert gpus.loc["H100-SXM", "bf16"] == 989.4e12
    assert gpus.loc["L4", "bf16"] == 121e12
    assert gpus.loc["T4", "fp16"] == 65e12
    assert gpus.loc["T4", ["tf32", "bf16"]].isna().all()
    # tensor cores do tf32 at half their 16-bit rate, and never slower than fp32 without them
    newer = gpus.drop("T4")
    assert (newer.tf32 / newer.bf16).between(0.49, 0.51).all() and (newer.tf32 >= newer.fp32).all()
    assert (newer.bf16 == newer.fp16).all()


def on_cuda(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)


def test_a_gpus_peak_is_that_of_its_precision(monkeypatch):
    on_cuda(monkeypatch, "NVIDIA A100-SXM4-40GB")
    assert devices.peak(Hardware("cuda", "bf16", "sdpa")).flops_per_second == 312e12
    assert devices.peak(Hardware("cuda", "tf32", "sdpa")).flops_per_second == 156e12
    on_cuda(monkeypatch, "Tesla T4")
    none = devices.peak(Hardware("cuda", "bf16", "sdpa"))
    assert none.flops_per_second is None and "T4 has no bf16" in none.source


def test_an_unknown_device_has_no_peak(monkeypatch):
    on_cuda(monkeypatch, "NVIDIA B300")
    assert devices.peak(Hardware("cuda", "bf16", "sdpa")) == devices.Peak(None, "unknown device: NVIDIA B300")
    assert devices.peak(Hardware("mps", "fp32", "sdpa")) == devices.Peak(None, "unknown device")


def test_a_cpu_is_measured_and_the_random_state_stays():
    before = torch.get_rng_state()
    found = devices.peak(Hardware("cpu", "fp32", "sdpa"))
    assert 1e8 < found.flops_per_second < 1e15 and found.source.startswith("measured")
    assert torch.equal(before, torch.get_rng_state())


def test_readings_that_fail_are_left_out(monkeypatch):
    def refuse() -> float:
        raise ModuleNotFoundError("nvidia-ml-py")

    assert devices.gpu_readings() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 60)
    assert devices.gpu_readings() == {"gpu_memory_gib": 3.0, "gpu_temperature_c": 60.0}
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 327_000)
    assert devices.gpu_readings()["gpu_power_w"] == 327.0


def test_every_figure_of_the_table_is_a_number_or_none():
    gpus = devices.gpus().drop(columns="device_name")
    assert all(pd.api.types.is_numeric_dtype(kind) for kind in gpus.dtypes)
    assert gpus.drop(columns=["tf32", "bf16"]).notna().all(axis=None)
