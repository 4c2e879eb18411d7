"""Scores as tables: of the harness and of fine-tuning, beside constant answers and beside what was published."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from ttl_utils import hub, paper, tables

if TYPE_CHECKING:
    from ttl_utils.run import Run

# table 4's columns, and the authors' later Portuguese benchmarks, by the tasks of ours that measure them
TABLE_4 = {
    "arc": "arc_pt",
    "hellaswag": "hellaswag_pt",
    "mmlu": "m_mmlu_pt",
    "truthfulqa": "truthfulqa_pt_mc2",
}
PORTUGUESE = ("enem", "bluex", "oab_exams", "assin2_rte", "assin2_sts", "faquad_nli", "hatebr")
TABLE_5 = ("imdb", "faquad_nli", "hatebr", "assin2", "agnews")
PUBLISHED_MODELS = {f"nicholasKluge/TeenyTinyLlama-{size}": size for size in paper.SIZES}
# standard errors of a score within which it counts as reproduced, and as close
REPRODUCED, CLOSE = 2.0, 4.0


def harness(metrics: dict[str, Any]) -> pd.DataFrame:
    """A row per task of the harness, run or not."""
    columns = ["task", "status", "num_fewshot", "metric", "value", "stderr", "samples", "truncated", "chance"]
    rows = [{**row, "task": key} for key, row in metrics["harness"].items()]
    table = pd.DataFrame(rows, columns=[*columns, "constant_answer", "from_mirror", "reason"])
    return table.dropna(axis="columns", how="all")


def downstream(metrics: dict[str, Any]) -> pd.DataFrame:
    """A row per classification set and model that was fine-tuned, beside the constant answer."""
    rows = []
    for name, found in metrics["downstream"].items():
        models = {"ours": found, **found.get("baselines", {})}
        for model, result in models.items():
            row = {"set": name, "model": model, "status": result.get("status", "done"), "reason": result.get("reason")}
            if "accuracy" in result:
                constant = found["constant_answer"]
                row |= {
                    "accuracy": result["accuracy"],
                    "accuracy, last epoch": result["last_epoch"]["accuracy"],
                    "accuracy, constant": constant["accuracy"],
                    "macro-F1": result["macro_f1"],
                    "macro-F1, constant": constant["macro_f1"],
                    "test examples": result["test_examples"],
                    "standard error": result["stderr"],
                    "seeds": len(result.get("seeds", [0])),
                    "deviation over seeds": result.get("accuracy_std"),
                }
            rows.append(row)
    columns = ["set", "model", "status", "accuracy", "accuracy, last epoch", "accuracy, constant", "macro-F1"]
    columns += ["macro-F1, constant", "test examples", "standard error", "seeds", "deviation over seeds", "reason"]
    return pd.DataFrame(rows, columns=columns).dropna(axis="columns", how="all")


def scores(metrics: dict[str, Any]) -> pd.DataFrame:
    """Every score in percent with its standard error, beside a constant answer's (else that of chance)."""
    rows = [
        (key, row["value"], row["stderr"], row["chance"] if row["constant_answer"] is None else row["constant_answer"])
        for key, row in metrics["harness"].items()
        if row["status"] == "done"
    ]
    rows += [
        (f"{name}, fine-tuned", found["accuracy"], found["stderr"], found["constant_answer"]["accuracy"])
        for name, found in metrics["downstream"].items()
        if "accuracy" in found
    ]
    table = pd.DataFrame(rows, columns=["task", "score", "stderr", "constant"])
    return table.assign(**{name: 100 * table[name].astype(float) for name in ("score", "stderr", "constant")})


def checkpoint_table(rows: list[dict]) -> pd.DataFrame:
    """A row per checkpoint: perplexity, bits per byte, and each task's score with its standard error, in percent."""
    table = []
    for row in rows:
        shown = {name: row.get(name) for name in ("step", "tokens", "perplexity", "bits_per_byte")}
        for key, score in row["scores"].items():
            shown[key] = _in_percent(score) if score["status"] == "done" else "not run"
        table.append(shown)
    return pd.DataFrame(table)


def _in_percent(score: dict) -> str:
    error = "" if score["stderr"] is None else f" +- {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def comparable_size(run: Run) -> str | None:
    """The published size that these scores are of: the paper's own configuration, or the authors' own weights."""
    model = run.params.evaluation.model
    if model is None:
        return tables.is_paper_configuration(run)
    return None if hub.mirrored(model) else PUBLISHED_MODELS.get(model)


def against_published(run: Run, metrics: dict[str, Any]) -> pd.DataFrame:
    """Tables 4 and 5, and the Portuguese benchmarks that followed, beside our scores, in percent.

    Of a published size, the verdict counts in standard errors of our score: "reproduced" within two, "close" within
    four, else "differs"; all others are "not comparable". A task that was not run says why in the note.
    """
    return of_size(comparable_size(run), metrics)


def of_size(size: str | None, metrics: dict[str, Any]) -> pd.DataFrame:
    """The same for scores of a published size, or of none."""
    rows = []
    for column, task in TABLE_4.items():
        for protocol in ("paper", "leaderboard"):
            note = "" if protocol == "paper" else "the settings of table 4's English rows"
            rows.append(_row("table 4", f"{protocol}/{task}", column, metrics["harness"], size, note))
    rows += [
        _row("portuguese benchmarks", f"ttl_{name}", name, metrics["harness"], size, "ours ranks, theirs generates")
        for name in PORTUGUESE
    ]
    rows += [_row("table 5", name, name, metrics["downstream"], size, "") for name in TABLE_5]
    columns = ["table", "task", "paper 160m", "paper 460m", "ours", "stderr", "difference (points)", "verdict", "note"]
    return pd.DataFrame(rows, columns=columns)


def _row(table: str, task: str, column: str, found: dict[str, dict], size: str | None, note: str) -> dict:
    files = {"table 4": "table4_harness", "table 5": "table5_downstream"}
    published = paper.table(files.get(table, "portuguese_benchmarks")).set_index("model")[column]
    row: dict[str, Any] = {"table": table, "task": task, "note": note}
    row |= {f"paper {known}": float(published[f"TTL-{known}"]) for known in paper.SIZES}
    ours = found.get(task, {})
    value = ours.get("accuracy" if table == "table 5" else "value")
    if value is None:
        return row | {"verdict": "not run", "note": ours.get("reason") or "not among this run's parameters"}
    row |= {"ours": 100 * value, "stderr": None if ours["stderr"] is None else 100 * ours["stderr"]}
    real = not ours["from_mirror"] and ours.get("limit") is None
    if size is None or not real or task.startswith(("leaderboard/", "ttl_")):
        return row | {"verdict": "not comparable"}
    difference = row["ours"] - row[f"paper {size}"]
    return row | {"difference (points)": difference, "verdict": _verdict(difference, row["stderr"])}


def _verdict(difference: float, stderr: float | None) -> str:
    if not stderr or math.isnan(difference):
        return "not comparable"
    distance = abs(difference) / stderr
    return "reproduced" if distance <= REPRODUCED else "close" if distance <= CLOSE else "differs"
