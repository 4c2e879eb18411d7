"""What a model answers before and after fine-tuning: the same prompts and random numbers, and figures of each side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ttl_utils.generation import MEASURES, generation_table, interval, measured
from ttl_utils.sampling import generate
from ttl_utils.schema import Chat, Toxicity
from ttl_utils.text_measures import passages, words_of
from ttl_utils.toxicity import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLLOWS = "follows_template"
NAMES = ("words", "ended", "repetition", "distinct_1", "distinct_2", "toxic", "toxicity_score")
MEANINGS = {
    FOLLOWS: ("follows the template", "share of answers with words, closed by the model, without a control token"),
} | {name: MEASURES[name] for name in NAMES}


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Chat, seed: int, status: Path | None = None
) -> list[dict[str, Any]]:
    """`chat.samples` answers to each of `chat.prompts`: rows of `generate`, and `fault`: how the template is broken."""
    rows = generate(model, tokenizer, settings.prompts, settings.sampling(), seed, chat=True, status=status)
    return [row | {"fault": _fault(row, settings)} for row in rows]


def _fault(row: dict, settings: Chat) -> str:
    """How an answer breaks the template, without a judge of what it says; "" where it does not."""
    if settings.user_open in row["control"] or settings.user_open in row["text"]:
        return "opens a user's turn"
    if row["control"]:
        return "holds a control token"
    if not row["text"]:
        return "empty"
    return "" if row["ended"] else "not ended"


def figures(
    rows: list[dict],
    human: list[str],
    settings: Chat,
    seed: int,
    scorer: Scorer | None = None,
    toxicity: Toxicity | None = None,
) -> tuple[dict[str, dict], list[dict]]:
    """Figures by name (value, low, high, held_out), faults counted among them, and the rows with what was measured.

    `human`: held-out answers, of which passages as long as ours are measured beside them. `scorer`: the classifier of
    `toxicity`, or None: they are not scored.
    """
    beside = passages(human, [len(words_of(row["text"])) for row in rows])
    report = measured(rows, beside, settings.sampling(toxicity), seed, chat=True, scorer=scorer)
    found = {name: report["figures"][name] for name in NAMES}
    found["words"]["held_out"] = float(np.mean([len(text.split()) for text in human]))
    groups: dict[str, list[bool]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(not row["fault"])
    parts = np.array([(sum(group), len(group)) for group in groups.values()], float).reshape(-1, 2)
    found[FOLLOWS] = interval(parts, seed) | {"held_out": None}
    found["faults"] = dict(Counter(row["fault"] for row in rows if row["fault"]))
    samples = [one | {"fault": row["fault"]} for one, row in zip(report["samples"], rows, strict=True)]
    return found, samples


def side_by_side(found: dict[str, list[dict]]) -> pd.DataFrame:
    """The first answer to each prompt, before and after, with what the template misses in each."""
    sides = {side: pd.DataFrame(rows).drop_duplicates("prompt") for side, rows in found.items()}
    return pd.DataFrame(
        {"prompt": sides["before"].prompt}
        | {
            f"{side}{more}": rows[name]
            for side, rows in sides.items()
            for name, more in (("text", ""), ("fault", ": fault"))
        }
    )


def measures_table(metrics: dict) -> pd.DataFrame:
    """A row for each figure: before, after (with its 95% interval), held-out answers, what it means."""
    sides = {}
    for side in ("before", "after"):
        found = metrics[f"answers_{side}"]
        kept = {name: found[name] for name in MEANINGS if name in found}
        sides[side] = generation_table({"figures": kept, "toxicity": metrics.get("toxicity", {})}, MEANINGS)
    table = sides["after"].rename(columns={"value": "after", "held-out text": "held-out answers"})
    table.insert(1, "before", sides["before"].value)
    return table
