"""Speed, energy, emissions and price of a run on a GPU: from published figures and named assumptions."""

from __future__ import annotations

import math
from functools import cache

import pandas as pd

from ttl_utils import devices, paper
from ttl_utils.errors import ParameterError
from ttl_utils.memory import precision_of
from ttl_utils.model import flops_per_token
from ttl_utils.params import Params

PAPER_GPU, PAPER_BUDGET_USD = "A100-40GB", 500
# tokens per second and A100-80GB of the 160m's shape, by the same author a year later (Corrêa et al. 2024)
TUCANO_TOKENS_PER_SECOND = 132_400
TUCANO_KWH_PER_BILLION_TOKENS = 1.40


def flops_of(params: Params) -> dict[str, float]:
    return flops_per_token(params.model, params.tokenizer.vocab_size, params.pretraining.block_size)


paper_params = paper.params_of


@cache
def anchors() -> pd.Series:
    """Shares of a GPU's dense peak that were reached, by the usual convention for FLOPs."""
    a100, shares = devices.find_gpu(PAPER_GPU).bf16, {}
    for size in paper.SIZES:
        mean = paper.headline(size)["tokens_per_second"].value
        shares[f"TTL-{size} (the paper's log)"] = mean * flops_of(paper_params(size))["convention"] / a100
    tucano = TUCANO_TOKENS_PER_SECOND * flops_of(paper_params("160m"))["convention"] / a100
    shares["Tucano-160m (same shape, 8 x A100-80GB)"] = tucano
    # Zhang et al. 2024; Karpathy 2024
    return pd.Series(shares | {"TinyLlama-1.1B (A100-40GB)": 0.56, "llm.c 124M (A100-80GB)": 0.60})


def paper_and_tucano() -> list[float]:
    """The share that the paper reached with its smaller model, and the one that others reached with that shape."""
    return [anchors().iloc[0], anchors().iloc[2]]


def speed(params: Params, gpu: pd.Series, utilisation: float) -> float:
    """Tokens per second of this shape at a share of the GPU's dense peak.

    Raises:
        ParameterError: the GPU has not the precision asked for.
    """
    precision = precision_of(params, gpu)
    if precision is None:
        raise ParameterError(
            f"pretraining.precision {params.pretraining.precision!r}: a {gpu.name} has none of its own; use auto"
        )
    return float(utilisation * gpu[precision] / flops_of(params)["convention"])


@cache
def power() -> tuple[float, float]:
    """The paper's GPU power as a share of its limit (0.82), and the watts beside it (74), by the logs."""
    logs = paper.table("codecarbon_final")
    seconds, rest = logs.duration_s.sum(), (logs.cpu_energy_kwh + logs.ram_energy_kwh).sum()
    limit = devices.find_gpu(PAPER_GPU).power_limit_w
    return logs.gpu_energy_kwh.sum() * 3.6e6 / seconds / limit, rest * 3.6e6 / seconds


def watts(gpu: pd.Series) -> float:
    """Mean power of a machine with this GPU, as the paper's was loaded: for another GPU an assumption."""
    share, rest = power()
    return share * gpu.power_limit_w + rest


def cost(hours: float, params: Params, gpu: pd.Series) -> dict[str, float]:
    """Energy and emissions of so many hours, with the file's PUE and grid."""
    energy_kwh = hours * watts(gpu) / 1000 * params.carbon.pue
    return {"hours": hours, "kWh": energy_kwh, "kg": energy_kwh * intensity(params) / 1000}


def intensity(params: Params) -> float:
    """Grams of CO2 equivalent per kWh where the run takes place."""
    given = params.carbon.carbon_intensity_g_per_kwh
    if given is not None:
        return given
    from ttl_utils.carbon import country_intensity

    return country_intensity(params.carbon.country_iso_code)


def paper_price() -> float:
    """USD an hour, at most: the paper's whole budget over the logged hours of its two runs (sections 3 and 4.2)."""
    return PAPER_BUDGET_USD / (paper.table("codecarbon_final").duration_s.sum() / 3600)


def price(gpu: pd.Series, usd_per_hour: float | None) -> float:
    """USD an hour: as given, else the paper's upper bound for its own GPU, else NaN: no price is published."""
    if usd_per_hour is not None:
        return usd_per_hour
    return paper_price() if gpu.name == PAPER_GPU else math.nan
