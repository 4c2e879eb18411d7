"""Sizing before training: Chinchilla's estimate, and what a run takes (paper, sections 3.1 and 3.5)."""

from __future__ import annotations

import math

import pandas as pd

from ttl_utils import paper

# L = A / N^a + B / D^b + E as printed in the paper; Hoffmann et al. (2022) have a = 0.34
CHINCHILLA = {"A": 406.4, "B": 410.7, "E": 1.69, "a": 0.32, "b": 0.28}
TOKENS_PER_PARAMETER = 20


def chinchilla_loss(parameters: float, tokens: float, exponent: float = CHINCHILLA["a"]) -> float:
    """Expected loss in nats per token of a model of `parameters` after `tokens` (equation of section 3.1)."""
    law = CHINCHILLA
    return law["A"] / parameters**exponent + law["B"] / tokens ** law["b"] + law["E"]


def chinchilla_table(run: str, parameters: int, tokens: int) -> pd.DataFrame:
    """What the law and the 20-tokens rule say of the paper's runs, and of this one."""
    rows = []
    for size in paper.SIZES:
        figures = paper.headline(size)
        rows.append((f"paper, {size}", *(figures[name].value for name in ("parameters", "tokens", "validation_loss"))))
    rows.append((f"this run ({run})", parameters, tokens, math.nan))
    table = pd.DataFrame(rows, columns=["run", "parameters", "tokens", "published loss"])
    table.insert(3, "20-tokens rule", TOKENS_PER_PARAMETER * table.parameters)
    table["law as printed"] = chinchilla_loss(table.parameters, table.tokens)
    table["law, Hoffmann's exponent"] = chinchilla_loss(table.parameters, table.tokens, 0.34)
    return table
