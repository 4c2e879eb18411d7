"""Downstream classification (paper, section 4.1, table 5): every set, model and seed, and going on after a stop."""

from __future__ import annotations

import copy
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttl_utils.checkpoints import WEIGHTS, save_pretrained, set_aside, swap
from ttl_utils.classifier import RECIPE, constant_answer, fine_tune
from ttl_utils.classifier_card import model_card
from ttl_utils.errors import SourceError
from ttl_utils.examples import Examples, fed_pieces, load_examples, make_rows, wrong
from ttl_utils.files import read_json, write_json, write_text
from ttl_utils.origins import Origin, find_baseline, find_origin, not_run
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ttl_utils.model import Hardware


@dataclass(frozen=True)
class Work:
    """What all fine-tunings of a stage share."""

    run: Run
    seeds: list[int]
    hardware: Hardware
    progress: Progress
    energy: Any


def run_downstream(
    run: Run,
    corpus: Stage,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    hardware: Hardware,
    about: dict[str, Any],
    energy: Any = None,
) -> dict[str, dict]:
    """Fine-tune `base` and the baselines on each set, with each seed; one entry per set, by its name.

    `folder` gets `<set>/seed-<n>/result.json` as each fine-tuning ends (a baseline's under `<set>/baselines/<name>/`),
    and the first seed's best classifier as `<set>/model/`. What stands there from the same weights, data and settings
    is not done again; a fine-tuning that was stopped half-way begins anew. `about["model"]` is the base model's name;
    `energy` has `sample()`, which gives the kWh so far.

    With several seeds the figures are means over them and `accuracy_std` the sample deviation; `best_epoch` is the
    first seed's. `stderr` is the test set's: what another sample of so many examples would change.

    Raises:
        TTLError: a set's columns or labels do not fit, or a loss is no number.
    """
    settings = run.params.evaluation
    sets = _load_sets(run, corpus)
    found: dict[str, dict] = {name: one for name, one in sets.items() if isinstance(one, dict)}
    readable = {name: one for name, one in sets.items() if isinstance(one, Examples)}
    if not readable:
        return found
    try:
        subject = find_origin(about.get("model") or run.name, base, tokenizer)
    except SourceError as error:
        return {item.name: found.get(item.name, not_run(str(error))) for item in settings.downstream}
    others = {name: find_baseline(name) for name in settings.downstream_baselines}
    seeds = [run.params.seed + number for number in range(settings.downstream_seeds)]
    models = 1 + sum(isinstance(origin, Origin) for origin in others.values())
    total = sum(_steps(run, examples) for examples in readable.values()) * len(seeds) * models
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("fine-tuning steps", total, folder.parent / "status.json") as progress:
        work = Work(run, seeds, hardware, progress, energy)
        for name, examples in readable.items():
            place = folder / _plain(name)
            found[name] = _fine_tunings(work, examples, subject, place, about)
            found[name]["baselines"] = {
                other: _or_not_run(work, examples, origin, place / "baselines" / _plain(other))
                for other, origin in others.items()
            }
    return {item.name: found[item.name] for item in settings.downstream}


def _load_sets(run: Run, corpus: Stage) -> dict[str, Examples | dict]:
    """All of them before any work: what is wrong with one is said at once, what cannot be had is a row."""
    sets: dict[str, Examples | dict] = {}
    for item in run.params.evaluation.downstream:
        if item.name in sets:
            raise wrong(item, "there are two sets of that name in evaluation.downstream")
        try:
            sets[item.name] = load_examples(item, corpus)
        except SourceError as error:
            sets[item.name] = not_run(str(error))
    return sets


def _steps(run: Run, examples: Examples) -> int:
    settings = run.params.evaluation
    return -(-len(examples.labels["train"]) // settings.downstream_batch_size) * settings.downstream_epochs


def _plain(name: str) -> str:
    """A folder's name for a set's or a model's."""
    return re.sub(r"[^\w.-]+", "--", name).strip("-.") or "unnamed"


def _or_not_run(work: Work, examples: Examples, origin: Origin | dict, place: Path) -> dict[str, Any]:
    """A baseline's figures, or the row that says why there are none."""
    if isinstance(origin, dict):
        return origin
    left = work.progress.total - work.progress.done
    try:
        return _fine_tunings(work, examples, origin, place)
    except SourceError as error:
        # of its steps, none is waited for any more
        gone = left - (work.progress.total - work.progress.done)
        work.progress.total -= _steps(work.run, examples) * len(work.seeds) - gone
        return not_run(str(error))


def _identity(run: Run, examples: Examples, origin: Origin, seed: int, max_length: int) -> dict[str, Any]:
    """All that decides a fine-tuning's result, beside rounding."""
    settings = run.params.evaluation
    return {
        "weights": origin.weights,
        "data": examples.fingerprint,
        "max_length": max_length,
        "epochs": settings.downstream_epochs,
        "batch_size": settings.downstream_batch_size,
        "learning_rate": settings.downstream_learning_rate,
        "weight_decay": settings.downstream_weight_decay,
        **RECIPE,
        "seed": seed,
    }


def _fine_tunings(
    work: Work, examples: Examples, origin: Origin, place: Path, about: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One model on one set, with every seed; `about`: it is the one whose first classifier is kept."""
    run, item, rows, results = work.run, examples.item, None, []
    partial = place / ".model.partial"
    # what another model reads may be less than a set asks for
    length = min(item.max_length, origin.context, origin.tokenizer.model_max_length)
    for seed in work.seeds:
        where = f"{item.name} · {origin.name} · seed {seed}"
        identity = _identity(run, examples, origin, seed, length)
        path = place / f"seed-{seed}" / "result.json"
        model = place / "model" if about is not None and seed == work.seeds[0] else None
        old = read_json(path) if path.is_file() else {}
        if old.get("identity") == identity and (model is None or (model / WEIGHTS).is_file()):
            print(f"{where}: done before")
            work.progress.total -= _steps(run, examples)
            results.append(old)
            continue
        for other in (path, model):
            if old and other and other.exists():
                print(f"{where}: {other.name} is kept as {set_aside(other, 'other').name}")
        if rows is None:
            rows = make_rows(examples, origin.tokenizer, origin.encoder, length, origin.vocab_size)
        shutil.rmtree(partial, ignore_errors=True)
        before = work.energy.sample() if work.energy else None
        result = fine_tune(
            origin,
            examples.names,
            rows,
            seed,
            run.params.evaluation,
            work.hardware,
            advance=lambda note, where=where: work.progress.update(work.progress.done + 1, f"{where} · {note}"),
            keep=None if model is None else lambda classifier: _save(classifier, origin.tokenizer, length, partial),
        )
        if model:
            card = model_card(run, examples, fed_pieces(examples, origin.tokenizer), origin, about, length, result)
            write_text(partial / "README.md", card)
            swap(model, partial)
        spent = work.energy.sample() - before if work.energy else None
        results.append({"identity": identity, **result, "energy_kwh": spent})
        write_json(path, results[-1])
    fed = _pair(examples) if origin.encoder else "".join(fed_pieces(examples, origin.tokenizer))
    return summary(examples, results) | {"model": origin.name, "fed": fed, "max_length": length}


def _save(classifier: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path) -> None:
    """A folder for `from_pretrained`, whose tokenizer cuts and pads as the classifier was trained."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side = max_length, "right"
    save_pretrained(classifier, tokenizer, folder)


def _pair(examples: Examples) -> str:
    first, *more = [piece for piece in examples.pieces if piece not in ("<s>", "</s>")]
    return f"a pair: {first} and {' '.join(more)}" if more else first


def summary(examples: Examples, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one model on one set, over its seeds."""

    def over(values: list[dict]) -> dict[str, Any]:
        return {key: statistics.fmean(value[key] for value in values) for key in values[0] if key != "epoch"}

    def deviation(key: str, epoch: str = "best_epoch") -> float | None:
        return statistics.stdev(result[epoch][key] for result in results) if len(results) > 1 else None

    best = over([result["best_epoch"] for result in results])
    count = {side: len(labels) for side, labels in examples.labels.items()}
    each = zip(*(result["epochs"] for result in results), strict=True)
    epochs = [{"epoch": number, **over(list(epoch))} for number, epoch in enumerate(each, start=1)]
    names = ("truncated", "padding_share", "precision", "device")
    return {
        "accuracy": best["accuracy"],
        "accuracy_std": deviation("accuracy"),
        "macro_f1": best["macro_f1"],
        "macro_f1_std": deviation("macro_f1"),
        "best_epoch": results[0]["best_epoch"]["epoch"],
        "last_epoch": epochs[-1] | {"accuracy_std": deviation("accuracy", "last_epoch")},
        "epochs": epochs,
        "constant_answer": constant_answer(examples.labels["train"], examples.labels["test"]),
        "labels": examples.names,
        "train_examples": count["train"],
        "test_examples": count["test"],
        "stderr": float(np.sqrt(best["accuracy"] * (1 - best["accuracy"]) / count["test"])),
        "seed": results[0]["seed"],
        "seeds": [result["seed"] for result in results],
        "runs": [{key: result[key] for key in ("seed", "best_epoch", "last_epoch")} for result in results],
        **{name: results[0][name] for name in names},
        "from_mirror": examples.from_mirror,
        "duration_s": round(sum(result["duration_s"] for result in results), 2),
        "energy_kwh": None if None in (spent := [result["energy_kwh"] for result in results]) else sum(spent),
    }
