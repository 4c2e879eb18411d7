"""How large a model and how much text: Chinchilla's law, and what a budget buys (paper, sections 3 to 3.2)."""

from __future__ import annotations

import dataclasses
import math
import re

import pandas as pd

from ttl_utils import costs, memory
from ttl_utils.errors import ParameterError
from ttl_utils.model import count_parameters
from ttl_utils.params import Params

# L = A / N^a + B / D^b + E as printed in the paper; Hoffmann et al. (2022) have a = 0.34
CHINCHILLA = {"A": 406.4, "B": 410.7, "E": 1.69, "a": 0.32, "b": 0.28}
HOFFMANN_EXPONENT = 0.34
TOKENS_PER_PARAMETER = 20
# repeated up to here, text is nearly as good as new (Muennighoff et al. 2023; section 3.2)
MAX_EPOCHS = 4
# tokens of Pt-Corpus-Instruct (section 3.2)
UNIQUE_TOKENS = 6.2e9
# hidden size and layers: our sizes up to 40m, the paper's two, and beyond them the family that these belong to,
# GPT-3 Small, Medium, Large, XL and 2.7B (Brown et al. 2020, table 2.1), with steps between; heads of 64
LADDER = [(128, 4), (256, 5), (384, 7), (512, 8), (640, 10), (768, 12), (896, 18), (1024, 24), (1280, 24), (1536, 24)]
LADDER += [(1792, 24), (2048, 24), (2560, 32)]
SIZES = {(384, 7): "40m", (768, 12): "160m", (1024, 24): "460m"}
UNITS = {"usd": "USD", "us$": "USD", "$": "USD", "brl": "BRL", "r$": "BRL", "kg": "kg"}


def chinchilla_loss(parameters: float, tokens: float, exponent: float = CHINCHILLA["a"]) -> float:
    """Expected loss in nats per token of a model of `parameters` after `tokens` (equation of section 3.1)."""
    law = CHINCHILLA
    return law["A"] / parameters**exponent + law["B"] / tokens ** law["b"] + law["E"]


def chinchilla_optimum(flops: float, exponent: float = CHINCHILLA["a"]) -> tuple[float, float]:
    """Parameters and tokens at which the law's loss is least for 6 x parameters x tokens = `flops`."""
    law, product = CHINCHILLA, flops / 6
    ratio = (exponent * law["A"]) / (law["b"] * law["B"])
    parameters = (ratio * product ** law["b"]) ** (1 / (exponent + law["b"]))
    return parameters, product / parameters


def read_budget(text: str, brl_per_usd: float | None = None) -> tuple[float, str]:
    """An amount in USD or in kg CO2e, from text such as "500 USD", "R$ 2500" or "40 kg".

    Raises:
        ParameterError: no amount, no unit, or reais without a rate.
    """
    number, unit = r"(\d+(?:\.\d{1,2})?)", r"(US\$|R\$|\$|USD|BRL|kg)(?: ?CO2e?)?"
    found = re.fullmatch(rf"{number}\s*{unit}|{unit}\s*{number}", text.strip(), re.IGNORECASE | re.ASCII)
    if not found or not float(found[1] or found[4]):
        raise ParameterError(
            f"budget: {text!r} is not an amount and its unit, such as '500 USD', '2500 BRL' or '40 kg' "
            "(nothing between thousands, a point before cents)"
        )
    amount, name = float(found[1] or found[4]), UNITS[(found[2] or found[3]).lower()]
    if name == "BRL" and brl_per_usd is None:
        raise ParameterError(f"budget: {text!r} needs the rate of the day too, reais per US dollar (brl_per_usd)")
    return (amount / brl_per_usd, "USD") if name == "BRL" else (amount, name)


def hours_for(amount: float, unit: str, params: Params, gpu: pd.Series, usd_per_hour: float | None = None) -> float:
    """Hours on this GPU that the budget pays for.

    Raises:
        ParameterError: a budget in money, and no price of this GPU.
    """
    if unit == "kg":
        return amount / costs.cost(1, params, gpu)["kg"]
    price = costs.price(gpu, usd_per_hour)
    if math.isnan(price):
        raise ParameterError(
            f"budget: no price of a {gpu.name} is known here; give yours in USD an hour (usd_per_hour)"
        )
    return amount / price


def ladder(params: Params) -> dict[str, Params]:
    """Shapes to choose from, smallest first: at this file's context and vocabulary, the file's own among them."""
    own = params.model
    shapes = {(count(params), f"{own.hidden_size} x {own.num_hidden_layers} (this file)"): params}
    for hidden, layers in LADDER:
        heads = hidden // 64
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        values = params.values.model_copy(update={"model": own.model_copy(update=shape)})
        made = dataclasses.replace(params, values=values)
        size = SIZES.get((hidden, layers))
        if count(made) != count(params):
            shapes[count(made), f"{hidden} x {layers}" + (f" ({size})" if size else "")] = made
    return {name: made for (_, name), made in sorted(shapes.items(), key=lambda item: item[0])}


def count(params: Params) -> int:
    return count_parameters(params.model, params.tokenizer.vocab_size)


def affordable(params: Params, gpu: pd.Series, hours: float, utilisation: float, unique_tokens: float) -> pd.DataFrame:
    """What so many hours buy of each shape, at most 4 epochs of it, and what speaks against the shape.

    Proposed is the largest that gets 20 tokens per parameter and fits in this GPU's memory with one row at a time.
    """
    rows = []
    for name, made in ladder(params).items():
        bought = hours * 3600 * costs.speed(made, gpu, utilisation)
        tokens, size = min(bought, MAX_EPOCHS * unique_tokens), count(made)
        verdict = "possible"
        if memory.needed(made, memory.precision_of(made, gpu), rows=1) > memory.USABLE * gpu.memory_gib:
            verdict = "out of memory"
        elif tokens < TOKENS_PER_PARAMETER * size:
            verdict = "too expensive" if tokens == bought else "too little text"
        row = {"hidden x layers": name, "parameters": size, "affordable": bought, "tokens": tokens}
        row |= {"per parameter": tokens / size, "epochs": tokens / unique_tokens}
        row |= {"law": chinchilla_loss(size, tokens), "a 0.34": chinchilla_loss(size, tokens, HOFFMANN_EXPONENT)}
        rows.append({**row, "verdict": verdict})
    table = pd.DataFrame(rows)
    table.loc[table.index[table.verdict == "possible"][-1:], "verdict"] = "proposed"
    return table
