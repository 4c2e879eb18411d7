"""What a model answers before and after fine-tuning: the same prompts and random numbers, and figures of each side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ttl_utils.generation import MEASURES, interval, measured
from ttl_utils.sampling import generate
from ttl_utils.schema import Chat
from ttl_utils.text_measures import passages, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLLOWS = "follows_template"
NAMES = ("words", "ended", "repetition", "distinct_1", "distinct_2")
MEANINGS = MEASURES | {
    FOLLOWS: ("follows the template", "share of answers with words, closed by the model, without a control token"),
}


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


def figures(rows: list[dict], human: list[str], settings: Chat, seed: int) -> tuple[dict[str, dict], list[dict]]:
    """Figures by name (value, low, high, held_out), faults counted among them, and the rows with what was measured.

    `human`: held-out answers, of which passages as long as ours are measured beside them.
    """
    beside = passages(human, [len(words_of(row["text"])) for row in rows])
    report = measured(rows, beside, settings.sampling(), seed, chat=True)
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
    before, after = metrics["answers_before"], metrics["answers_after"]
    rows = []
    for name in (FOLLOWS, *NAMES):
        one, low = after[name], after[name]["low"]
        ends = "" if low is None else f"{low:.3g} to {one['high']:.3g}"
        title, meaning = MEANINGS[name]
        rows.append((title, before[name]["value"], one["value"], ends, one["held_out"], meaning))
    columns = ["measure", "before", "after", "95% interval", "held-out answers", "what it means"]
    return pd.DataFrame(rows, columns=columns).astype({"before": float, "after": float, "held-out answers": float})
