"""What the paper only warns of, measured (section 5): repetition, verbosity, toxicity, translated code (footnote 12).

On fixed prompts; a chat model's answers: see `chat_answers`. Every figure has its 95% interval over the prompts, and
human text of the same length beside it where it has some of the same: alone, a share of repeated words says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ttl_utils import toxicity
from ttl_utils.code_words import looks_like_code, translated_words
from ttl_utils.errors import SourceError
from ttl_utils.files import read_json, write_json
from ttl_utils.model import choose_hardware
from ttl_utils.resampling import ratio, resample
from ttl_utils.run import Run, Stage
from ttl_utils.sampling import generate
from ttl_utils.schema import Generation
from ttl_utils.subject import load_model, subject_of
from ttl_utils.text_measures import distinct_counts, longest_loop, passages, repeated_share, words_of
from ttl_utils.tokenizer_comparison import held_out

# figure -> (its name in the table, what it means)
MEASURES = {
    "repetition": ("repeated 4-grams", "share of a text's runs of four words that stood in it before (seq-rep-4)"),
    "loop": ("longest loop", "share of a text's words in its longest stretch of one unit again and again"),
    "distinct_1": ("distinct words", "different words of all texts, of all their words (distinct-1)"),
    "distinct_2": ("distinct pairs", "the same of pairs of words (distinct-2)"),
    "distinct_3": ("distinct triples", "the same of runs of three words (distinct-3)"),
    "ended": ("ended by themselves", "share of texts that the model closed within the limit"),
    "tokens": ("tokens", "mean length, the end token aside"),
    "words": ("words", "mean length, between spaces"),
    "verbosity": ("length beside the limit", "tokens by max_new_tokens; 1: every text was cut off"),
    "toxic": ("toxic", "share of texts that the classifier scores below the threshold"),
    "toxicity_score": ("toxicity score", "its mean score; low is toxic"),
    "code": ("still code", "share of the code prompts' continuations that look like code"),
    "translated": ("translated code words", "share of them with a keyword in Portuguese (footnote 12)"),
    "translated_of_code": ("the same, of code", "share of those that look like code"),
}
# of text that a person wrote, these can be counted too
HUMAN = ("repetition", "loop", "distinct_1", "distinct_2", "distinct_3", "toxic", "toxicity_score")
# a row of `generate`
GENERATED = ("prompt", "kind", "text", "tokens", "ended", "seed", "cut")


def generation_report(run: Run) -> dict:
    """All of it, for the subject of stage 04; {} where `evaluation.generation` is null.

    Kept in `04_evaluation/reports/generation.json` and read from there the next time. Texts are sampled again only
    where what they hang on changes. A classifier that could not be had is asked for again at each call.

    Returns:
        key, hardware, figures (by name: value, low, high, held_out; the metrics hold these), toxicity (status, reason)
        and samples: the rows of `generate` with what was measured of each.

    Raises:
        TTLError: an earlier stage is missing, the model is damaged, or the context too short.
    """
    settings = run.params.evaluation.generation
    if settings is None:
        return {}
    stage, corpus = run.need("04_evaluation"), run.need("01_data")
    subject = subject_of(run)
    options = settings.model_dump()
    asked = options.pop("toxicity")
    texts_key = {"weights": subject.weights + subject.beside_weights, "seed": run.params.seed, **options}
    key = {"texts": texts_key, "toxicity": asked, "held_out": corpus.manifest()["outputs"]["corpus"]["fingerprint"]}
    path = stage.folder / "reports" / "generation.json"
    known = read_json(path) if path.is_file() else {"key": {}}
    # before the work: a wrong parameter is named at once
    same = known["key"] == key
    done = same and known["toxicity"]["status"] == "done"
    scorer, reason = (None, "") if done else classifier(settings)
    if done or (same and scorer is None):
        return known
    with stage.measuring():
        if known["key"].get("texts") == texts_key:
            rows, hardware = known["samples"], known["hardware"]
        else:
            chosen = choose_hardware(run.params.pretraining)
            hardware = f"{chosen.device}, {chosen.precision}"
            model = load_model(subject.folder, chosen)
            prompts = list(dict.fromkeys(settings.prompts + settings.code_prompts))
            rows = generate(model, subject.tokenizer, prompts, settings, run.params.seed)
            del model
        lengths = [len(words_of(row["text"])) for row in rows if row["kind"] == "text"]
        human = passages(_held_out(corpus, len(lengths), run.params.seed), lengths)
        result = {"key": key, "hardware": hardware, **measured(rows, human, settings, run.params.seed, scorer=scorer)}
    result["toxicity"] |= {"reason": reason} if reason else {}
    # the report last: where it stands, the metrics hold its figures
    stage.add_metrics(generation=result["figures"] | {"toxicity": result["toxicity"]})
    write_json(path, result)
    return result


def _held_out(corpus: Stage, texts: int, seed: int) -> list[str]:
    """Held-out documents of all domains, mixed."""
    found = [text for _, text in held_out(corpus, texts)] if texts else []
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]


def classifier(settings: Generation | None) -> tuple[toxicity.Scorer | None, str]:
    """The classifier, or why there is none."""
    if settings is None or settings.toxicity is None:
        return None, "evaluation.generation.toxicity is null: no classifier is named"
    try:
        return toxicity.load(settings.toxicity), ""
    except SourceError as error:
        return None, str(error)


def measured(
    rows: list[dict],
    human: list[str],
    settings: Generation,
    seed: int,
    chat: bool = False,
    scorer: toxicity.Scorer | None = None,
) -> dict[str, Any]:
    """figures, toxicity and samples of the report; `human` is a passage for each row of kind "text"."""
    rows = [_with_measures(row, settings, chat) for row in rows]
    texts = [row for row in rows if row["kind"] == "text"]
    beside = [
        _with_measures({**row, "text": text}, settings, chat) for row, text in zip(texts, human, strict=True) if text
    ]
    if scorer:
        for group in (rows, beside):
            for row, score in zip(group, scorer.scores([row["text"] for row in group]), strict=True):
                # an empty text says nothing
                row["toxicity_score"] = float(score) if row["text"].strip() else None
                row["toxic"] = None if row["toxicity_score"] is None else float(score) < settings.toxicity.threshold
    figures = {}
    for name in MEASURES:
        group = [row for row in rows if row["kind"] == "code"] if "code" in name or name == "translated" else texts
        reference = interval(_parts(name, beside), seed)["value"] if name in HUMAN else None
        figures[name] = interval(_parts(name, group), seed) | {"held_out": reference}
    status = {"status": "done", "threshold": settings.toxicity.threshold} if scorer else {"status": "not run"}
    return {"figures": figures, "toxicity": status, "samples": rows}


def _with_measures(row: dict, settings: Generation, chat: bool) -> dict:
    text, words = row["text"], words_of(row["text"])
    # an earlier report's measures go
    found = {name: row[name] for name in GENERATED} | {
        "words": len(text.split()),
        "verbosity": row["tokens"] / settings.max_new_tokens,
    }
    found |= {"repetition": repeated_share(words), "loop": longest_loop(words) / len(words) if words else None}
    if row["kind"] == "code":
        # an answer begins anew, a continuation in the prompt's last line
        before = "" if chat else row["prompt"]
        code, translated = looks_like_code(text, before), translated_words(text, before)
        found |= {"code": code, "code_words": translated, "translated": bool(translated)}
        found["translated_of_code"] = bool(translated) if code else None
    return found


def _parts(name: str, rows: Iterable[dict]) -> np.ndarray:
    """(prompts, 2): sums of a figure over each prompt's texts, and how many texts have it."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    if name.startswith("distinct_"):
        words = [[words_of(row["text"]) for row in group] for group in groups.values()]
        return distinct_counts(words, int(name.removeprefix("distinct_")))
    values = [[row[name] for row in group if row.get(name) is not None] for group in groups.values()]
    return np.array([(sum(found), len(found)) for found in values], float).reshape(-1, 2)


def interval(parts: np.ndarray, seed: int) -> dict[str, float | None]:
    """value: the ratio of the columns' sums; low, high: its 95% interval, prompts drawn again (Efron 1979).

    None where there is nothing to count. Prompts that all agree have no spread to draw from, and no interval; of few
    prompts it is somewhat too narrow.
    """
    parts = parts[parts[:, 1] > 0]
    if not len(parts):
        return {"value": None, "low": None, "high": None}
    found = ratio("value", parts, resample(parts, seed), 0, 1)
    spread = len(np.unique(parts[:, 0] / parts[:, 1])) > 1
    return {"value": found["value"], **{end: found[f"value_{end}"] if spread else None for end in ("low", "high")}}


def generation_table(report: dict, measures: dict[str, tuple[str, str]] = MEASURES) -> pd.DataFrame:
    """A row for each figure: measure, value, 95% interval, held-out text's value, what it means."""
    rows = []
    for name, found in report.get("figures", {}).items():
        title, meaning = measures[name]
        if found["value"] is None and name.startswith("toxic") and "reason" in report["toxicity"]:
            meaning = f"not run: {report['toxicity']['reason']}"
        ends = "" if found["low"] is None else f"{found['low']:.3g} to {found['high']:.3g}"
        rows.append((title, found["value"], ends, found["held_out"], meaning))
    table = pd.DataFrame(rows, columns=["measure", "value", "95% interval", "held-out text", "what it means"])
    return table.astype({"value": float, "held-out text": float})


def samples_table(report: dict, n: int) -> pd.DataFrame:
    """`n` texts, chosen by rule: the most repetitive, the median one, then the first of each prompt in turn.

    A text below the toxicity threshold is not shown: a last row counts them.
    """
    columns = ["chosen as", "prompt", "text", "tokens", "ended", "repetition"]
    rows = report.get("samples", [])
    shown = [row for row in rows if not row.get("toxic")]
    ranked = sorted((row for row in shown if row["repetition"] is not None), key=lambda row: -row["repetition"])
    chosen = [("most repetitive", ranked[0]), ("median repetition", ranked[len(ranked) // 2])] if ranked else []
    firsts: dict[str, dict] = {}
    for row in shown:
        firsts.setdefault(row["prompt"], row)
    chosen += [("first of its prompt", row) for row in firsts.values()]
    picked: dict[int, tuple[str, dict]] = {}
    for why, row in chosen:
        picked.setdefault(row["seed"], (why, row))
    table = pd.DataFrame([row | {"chosen as": why} for why, row in list(picked.values())[:n]], columns=columns)
    if withheld := len(rows) - len(shown):
        note = f"{withheld} of {len(rows)} texts are not shown: the classifier scores them as toxic"
        table = pd.concat([table, pd.DataFrame([{"chosen as": "not shown", "text": note}])], ignore_index=True)
    return table
