"""Confidence intervals of ratios by drawing documents again (Efron 1979)."""

from __future__ import annotations

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95


def resample(counts: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(documents, k) -> (resamples, k): sums over as many documents drawn with replacement."""
    generator, size = np.random.default_rng(seed), len(counts)
    # about 32 MB of weights at a time
    step = max(1, 2**22 // size)
    parts = [min(step, resamples - start) for start in range(0, resamples, step)]
    even = np.full(size, 1 / size)
    return np.concatenate([generator.multinomial(size, even, part) @ counts.astype(float) for part in parts])


def ratio(name: str, counts: np.ndarray, drawn: np.ndarray, over: int, under: int) -> dict[str, float | None]:
    """`name`: the ratio of two columns' sums; `name_low`, `name_high`: its 95% interval over the resampled sums.

    Documents count as independent: those made from one another (phrasings of one instruction) make it too narrow.
    One document says nothing about the spread, and has no interval.
    """
    value, low, high = float(counts[:, over].sum() / counts[:, under].sum()), None, None
    if len(counts) > 1:
        low, high = np.quantile(drawn[:, over] / drawn[:, under], ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return {name: value, f"{name}_low": low, f"{name}_high": high}
