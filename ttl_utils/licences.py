"""What the licences of texts allow for a model trained on them: a cautious summary (`published/licences.csv`)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# from the best to the worst; what is known to be forbidden is worse than what is not known
MODEL_USES = ("free", "unclear", "non-commercial", "restricted")
_MEANINGS = {
    "free": "A model trained on all of it may be used freely, also commercially",
    "unclear": "Whether a model trained on all of it may be used freely is unclear",
    "non-commercial": "A model trained on all of it may at best be used without commercial purpose",
    "restricted": "A model trained on all of it is at best restricted in its use and sharing",
}
_FILLER = re.compile(r"\b(?:the|licen[cs]e|version|community|international|unported)\b")


@dataclass(frozen=True)
class Licence:
    """What one licence allows and asks for; `model_use` is one of MODEL_USES."""

    licence: str
    model_use: str
    attribution: bool
    share_alike: bool
    note: str


# in a remark beside a licence's name
_LIMITED = re.compile(r"non-?commercial|academic|research|only|\bno\b", re.IGNORECASE)


def _key(licence: str) -> str:
    """The same for all spellings of a licence, a remark in parentheses left out."""
    plain = re.sub(r"\s*\(.*\)\s*$", "", licence.lower(), flags=re.DOTALL)
    return re.sub(r"[^a-z0-9]+", "", _FILLER.sub("", plain))


@cache
def _known() -> dict[str, Licence]:
    with files("ttl_utils").joinpath("published", "licences.csv").open(encoding="utf-8", newline="") as file:
        return {
            _key(row["licence"]): Licence(
                row["licence"], row["model_use"], row["attribution"] == "yes", row["share_alike"] == "yes", row["note"]
            )
            for row in csv.DictReader(file)
        }


def look_up(licence: str) -> Licence:
    """The licence by its name, however it is spelt; one that is not known is unclear."""
    found = _known().get(_key(licence))
    if found and found.model_use == "free" and _LIMITED.search(licence.partition("(")[2]):
        return Licence(licence, "unclear", True, False, "a remark limits its use")
    return found or Licence(licence, "unclear", True, False, "not a licence known here")


def permissive(licence: str) -> bool:
    """Whether a model trained on the text may be used freely; attribution or sharing alike may be asked for."""
    return look_up(licence).model_use == "free"


def combined(licences: Iterable[str]) -> dict:
    """What a model trained on all of it is allowed at best: model_use, attribution, share_alike, obstacles, summary.

    `obstacles` are rows {licence, model_use, note} of what is not free; no licence at all is unclear.
    """
    found = {name: look_up(name) for name in sorted(set(licences))}
    obstacles = [
        {"licence": name, "model_use": licence.model_use, "note": licence.note}
        for name, licence in found.items()
        if licence.model_use != "free"
    ]
    model_use = max((licence.model_use for licence in found.values()), key=MODEL_USES.index, default="unclear")
    attribution = any(licence.attribution for licence in found.values())
    share_alike = any(licence.share_alike for licence in found.values())
    sentences = [_MEANINGS[model_use]]
    if obstacles:
        sentences.append("Obstacles: " + ", ".join(f"{row['licence']} ({row['note']})" for row in obstacles))
    if attribution:
        sentences.append("The sources are to be named")
    if share_alike:
        sentences.append("Who holds a model for an adaptation of its texts shares it under their share-alike licence")
    return {
        "model_use": model_use,
        "attribution": attribution,
        "share_alike": share_alike,
        "obstacles": obstacles,
        "summary": ". ".join([*sentences, "This is a summary, not legal advice."]),
    }
