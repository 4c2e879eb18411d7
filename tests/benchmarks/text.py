"""Text for the benchmarks, made by code with the word lengths and frequencies of Portuguese."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.tiny import words

FUNCTION_WORDS = words(
    "de a o que e do da em um para com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou "
    "ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos ter seus quem "
    "nas me esse eles estão você tinha foram essa num nem suas meu às minha numa pelos elas havia seja qual será nós"
)
SYLLABLES = words(
    "ca ma ra ta pa da la na sa va ba fa ga ja ça co mo ro to po do lo no so vo bo fo go jo ço me re te pe de le ne se "
    "ve be fe ge mi ri ti pi di li ni si vi bi fi gi cu mu ru tu pu du lu nu su bu fu gu ção são tra pre pro gran cla "
    "flo bra cre dri fru glo man can ven ten pon son mun lha nha lho nho que gui ão ões ência mente dade ável"
)


def vocabulary(size: int, rng: np.random.Generator) -> np.ndarray:
    """Function words first, then words of two to four syllables; the place is the rank."""
    made = dict.fromkeys(FUNCTION_WORDS)
    while len(made) < size:
        made["".join(rng.choice(SYLLABLES, rng.integers(2, 5)))] = None
    return np.array(list(made), dtype=object)


def documents(megabytes: float, length: int = 480, seed: int = 0) -> Iterator[str]:
    """About that much text in documents of about `length` words (480: about 3 kB), all different."""
    rng = np.random.default_rng(seed)
    names = vocabulary(40_000, rng)
    weights = 1 / (np.arange(len(names)) + 2.7)
    cumulated = np.cumsum(weights / weights.sum())
    left = megabytes * 1e6
    while left > 0:
        size = int(rng.gamma(4, length / 4)) + 60
        chosen = names[np.searchsorted(cumulated, rng.random(size)).clip(max=len(names) - 1)]
        sentences, place = [], 0
        while place < size:
            count = int(rng.integers(6, 22))
            sentence = " ".join(chosen[place : place + count])
            sentences.append(sentence[:1].upper() + sentence[1:] + ".")
            place += count
        text = "\n".join(" ".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5))
        left -= len(text.encode())
        yield text


def read(path: Path) -> Iterator[str]:
    """The documents of a Parquet file's `text` column, or of a text file, a line each."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()
    else:
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
