"""A run as its files tell it to the verdict: metrics, curve, and whether its configuration is the paper's."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ttl_utils import hub, paper, score_tables
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.figures_pretraining import smoothed, smoothing_window
from ttl_utils.files import read_json
from ttl_utils.records import read_records
from ttl_utils.run import known_runs


@dataclass(frozen=True)
class Judged:
    """`size` is the published size whose configuration and data these are; `of` the one it is a variant of.

    Either is None where there is none; `why` says in what the configuration differs.
    """

    name: str
    folder: Path
    metrics: dict[str, dict]
    about: dict[str, Any]
    size: str | None
    of: str | None
    why: str

    def at(self, path: str) -> Any:
        """The value of this dotted name in metrics.json; None where it is not (yet) there."""
        value: Any = self.metrics
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, path: str) -> float | None:
        """The same, a number.

        Raises:
            DamagedFile: it is something else.
        """
        value = self.at(path)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _damaged(self.folder / "metrics.json", f"{path} is no number")
        return value

    @property
    def pue(self) -> float:
        carbon = self.about.get("parameters", {}).get("carbon")
        return carbon.get("pue", 1.0) if isinstance(carbon, dict) else 1.0

    @cached_property
    def records(self) -> list[dict]:
        """The curve of pretraining, under way too; a reference run keeps its figures' data and not its stages."""
        made = self.about.get("stages", {}).get("03_pretraining", {}).get("folder", "03_pretraining")
        saved = self.folder / "figures" / "03_loss.csv"
        records = read_records((self.folder / made).resolve() / "metrics.jsonl")
        if not records and saved.is_file():
            try:
                rows = pd.read_csv(saved).to_dict("records")
                records = [{name: value for name, value in row.items() if not pd.isna(value)} for row in rows]
                return [{**row, "step": int(row["step"])} for row in records]
            except (ValueError, KeyError) as error:
                raise _damaged(saved, error) from None
        return records

    @property
    def tokens_per_step(self) -> float:
        last = self.records[-1] if self.records else {}
        return last["tokens"] / last["step"] if last.get("step") else math.nan

    def points(self, name: str) -> pd.Series:
        """One column of the curve by step; not a number where the run diverged.

        `loss` is smoothed as in figure 1(a); `arc` is that of the checkpoints, over all its items, in percent.
        """
        if name == "arc":
            rows = self.at("04_evaluation.checkpoint_scores") or []
            scores = {row["step"]: row["scores"].get("paper/arc_pt", {}) for row in rows}
            whole = {"status": "done", "from_mirror": False, "limit": None}
            found = {step: 100 * one["value"] for step, one in scores.items() if one.items() >= whole.items()}
        else:
            stopped = math.nan if name == "loss" else None
            found = {row["step"]: row.get(name, stopped if "not_finite" in row else None) for row in self.records}
        points = pd.Series({step: value for step, value in found.items() if value is not None}, dtype=float)
        if name == "loss" and len(points):
            steps = self.about.get("parameters", {}).get("pretraining", {}).get("max_steps") or 1
            points = pd.Series(smoothed(points.index, points, smoothing_window(steps)), points.index)
        return points.sort_index()

    def scored(self) -> Judged:
        """The same run as the scores of stage 04 have it, which may be another model's: the authors' own weights."""
        model = self.about.get("parameters", {}).get("evaluation", {}).get("model")
        if model is None:
            return self
        size = None if hub.mirrored(model) else score_tables.PUBLISHED_MODELS.get(model)
        return replace(self, size=size, of=size, why=f"another model was evaluated: {model}")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Tables 4 and 5 by task, as notebook 04 judges them."""
        rows = score_tables.of_size(
            self.size, {"harness": {}, "downstream": {}} | self.metrics.get("04_evaluation", {})
        )
        return rows[rows.table.isin(["table 4", "table 5"])].set_index("task")


def load(name: str, folder: Path) -> Judged:
    """The run of this name in a folder of runs; `reference/nano` is one too.

    Raises:
        TTLError: it is not there, or its files are damaged.
    """
    name, known = name.rstrip("/"), known_runs(folder, "run.json", "0?_*/stage.json")
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or known[:10]
        raise TTLError(f"there is no run {name!r} in {folder}; there are: {', '.join(near) or 'none'}")
    place = folder / name
    metrics, about = (_table(place / file) for file in ("metrics.json", "run.json"))
    for table, file, names in ((metrics, "metrics.json", metrics), (about, "run.json", ("parameters", "stages"))):
        if wrong := [key for key in names if not isinstance(table.get(key, {}), dict)]:
            raise _damaged(place / file, f"{', '.join(wrong)} no table of values")
    size = of = None
    why = "what made this run is not known before its first stage ends"
    if about.get("parameters"):
        size, of, why = paper.configuration(about["parameters"], metrics.get("01_data", {}).get("sources", ()))
    return Judged(name, place, metrics, about, size, of, why)


def _table(path: Path) -> dict[str, dict]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise _damaged(path, "no table of values")
    return found


def _damaged(path: Path, what: object) -> DamagedFile:
    return DamagedFile(f"{path} is damaged ({what}): restore it from a copy, or leave this run out")
