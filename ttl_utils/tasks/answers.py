"""What the task files of this folder need in Python: lettered questions, fixed worked examples, labels and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ttl_utils.errors import TTLError

Rows = Any  # a split of a `datasets` data set


def _lettered(opening: str) -> Callable[[dict], str]:
    def text(doc: dict) -> str:
        choices = "\n".join(f"{label}. {text}" for text, label in zip(*_choices(doc), strict=True)).strip()
        return f"{opening}:\n{doc['question']}\nAlternativas:\n{choices}\nResposta correta:"

    return text


def _choices(doc: dict) -> tuple[list[str], list[str]]:
    return doc["choices"]["text"], doc["choices"]["label"]


exam_text, oab_text = _lettered("Pergunta"), _lettered("Questão")


def letters(doc: dict) -> list[str]:
    return _choices(doc)[1]


def letter(doc: dict) -> int:
    """The right letter's place among the question's own."""
    return letters(doc).index(doc["answerKey"])


def _by_id(column: str, ids: list) -> Callable[[Rows], Rows]:
    """A function of a split: its rows with these ids, in this order."""

    def shots(rows: Rows) -> Rows:
        values = rows[column][:]
        missing = [value for value in ids if value not in set(values)]
        if missing:
            raise TTLError(
                f"worked examples: no row of the data has the {column} {missing[0]!r} ({len(missing)} absent)"
            )
        return rows.select([values.index(value) for value in ids])

    return shots


def _without(ids: list) -> Callable[[Rows], Rows]:
    """A function of a split: its questions but for the worked examples, and for annulled ones without right answer."""

    def questions(rows: Rows) -> Rows:
        annulled = rows["nullified"][:] if "nullified" in rows.column_names else [False] * len(rows)
        kept = []
        for i, (name, choices, answer) in enumerate(
            zip(*(rows[x][:] for x in ("id", "choices", "answerKey")), strict=True)
        ):
            if answer not in choices["label"] and not annulled[i]:
                raise TTLError(
                    f"question {name!r}: column 'answerKey' holds {answer!r}, which is none of its choices "
                    f"{', '.join(choices['label'])}"
                )
            if answer in choices["label"] and name not in ids:
                kept.append(i)
        return rows.select(kept)

    return questions


# one question of each subject, from the first exam
OAB = [f"2010-01_{number}" for number in (1, 11, 13, 23, 26, 28, 38, 48, 58, 68, 76, 83, 85, 91, 99)]
ENEM = ["2022_21", "2022_88", "2022_143"]
BLUEX = ["USP_2018_3", "UNICAMP_2018_2", "USP_2018_35", "UNICAMP_2018_16", "USP_2018_89"]
ASSIN2 = [
    *(1, 3251, 2, 3252, 3, 4, 5, 6, 3253, 7, 3254, 3255, 3256, 8, 9, 10, 3257, 11, 3258, 12, 13, 14, 15, 3259, 3260),
    *(3261, 3262, 3263, 16, 17, 3264, 18, 3265, 3266, 3267, 19, 20, 3268, 3269, 21, 3270, 3271, 22, 3272, 3273, 23),
    *(3274, 24, 25, 3275),
]
HATEBR = [
    *(48, 44, 36, 20, 3511, 88, 3555, 16, 56, 3535, 60, 40, 3527, 4, 76, 3579),
    *(3523, 3551, 68, 3503, 84, 3539, 64, 3599),
    *(80, 3563, 3559, 3543, 3547, 3587, 3595, 3575, 3567, 3591, 24, 96, 92, 3507, 52, 72),
    *(8, 3571, 3515, 3519, 3531, 28),
    *(32, 0, 12, 3583),
]
HATE_SPEECH = [
    *(52, 50, 39, 28, 3, 105, 22, 25, 60, 11, 66, 41, 9, 4, 91, 42, 7, 20, 76, 1, 104, 13, 67, 54, 97, 27, 24, 14, 16),
    *(48, 53, 40, 34, 49, 32, 119, 114, 2, 58, 83, 18, 36, 5, 6, 10, 35, 38, 0, 21, 46),
]
# rows of the training split, by their place
FAQUAD = [
    *(1893, 949, 663, 105, 1169, 2910, 2227, 2813, 974, 558, 1503, 1958, 2918, 601, 1560, 984, 2388, 995, 2233, 1982),
    *(165, 2788, 1312, 2285, 522, 1113, 1670, 323, 236, 1263, 1562, 2519, 1049, 432, 1167, 1394),
    *(2022, 2551, 2194, 2187),
    *(2282, 2816, 108, 301, 1185, 1315, 1420, 2436, 2322, 766),
]

oab_shots, oab_questions = _by_id("id", OAB), _without(OAB)
enem_shots, enem_questions = _by_id("id", ENEM), _without(ENEM)
bluex_shots, bluex_questions = _by_id("id", BLUEX), _without(BLUEX)
assin2_shots = _by_id("sentence_pair_id", ASSIN2)
hatebr_shots, hate_speech_shots = _by_id("idx", HATEBR), _by_id("idx", HATE_SPEECH)


def faquad_shots(rows: Rows) -> Rows:
    if len(rows) <= max(FAQUAD):
        raise TTLError(f"worked examples: the data have {len(rows)} rows, and row {max(FAQUAD)} is one of the examples")
    return rows.select(FAQUAD)


def similarity(doc: dict) -> str:
    return f"{doc['relatedness_score']:.1f}".replace(".", ",")


def number(text: str) -> float:
    """The first number of a text, with comma or point, at least 1 and at most 5; 5 where there is none."""
    found = re.search(r"\d+(?:[.,]\d+)?", text)
    return min(5.0, max(1.0, float(found[0].replace(",", ".")))) if found else 5.0


def similarity_results(doc: dict, results: list[str]) -> dict[str, tuple[float, float]]:
    return {"pearson": (doc["relatedness_score"], number(results[0]))}


def f1_columns(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """(documents, 3 x labels): whether the label is right, is answered, and both, for each label that is ever right."""
    right, answered = np.array([*zip(*pairs, strict=True)])[..., None] == np.unique([gold for gold, _ in pairs])
    return np.concatenate([right, answered, right & answered], axis=1)


def f1_of(sums: np.ndarray) -> np.ndarray:
    """(…, 3 x labels) sums of `f1_columns` -> (…): the mean F1 of the labels that are right at least once."""
    right, answered, both = np.split(sums, 3, axis=-1)
    f1 = 2 * both / np.maximum(right + answered, 1)
    return (f1 * (right > 0)).sum(-1) / (right > 0).sum(-1)


def f1_macro(pairs: Iterable[tuple[int, int]]) -> float:
    return float(f1_of(f1_columns(pairs).sum(0)))


def pearson_columns(pairs: Iterable[tuple[float, float]]) -> np.ndarray:
    """(documents, 6): what the correlation of two columns is made of."""
    x, y = np.array([*zip(*pairs, strict=True)], dtype=float)
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def pearson_of(sums: np.ndarray) -> np.ndarray:
    """(…, 6) sums of `pearson_columns` -> (…): the correlation; 0 where one of the two never changes."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
    # what is left of a constant by rounding is no spread
    return np.where(spread > 1e-9 * n, (xy - x * y / n) / np.where(spread > 0, spread, 1), 0.0)


def pearson(pairs: Iterable[tuple[float, float]]) -> float:
    return float(pearson_of(pearson_columns(pairs).sum(0)))
