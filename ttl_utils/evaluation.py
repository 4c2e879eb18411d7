"""Stage 04: perplexity over all checkpoints, the harness, and downstream fine-tuning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttl_utils import checkpoints
from ttl_utils.blocks import TokenBlocks
from ttl_utils.downstream import run_downstream
from ttl_utils.errors import DamagedFile, ParameterError
from ttl_utils.files import read_json, write_json
from ttl_utils.harness import over_checkpoints, run_harness, write_harness
from ttl_utils.model import Hardware, choose_hardware
from ttl_utils.perplexity import by_group, perplexity
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.subject import Subject, blocks_of, load_model, subject_of
from ttl_utils.task_files import open_task, wanted
from ttl_utils.tokenizer import load_tokenizer


def scores_folder(run: Run) -> Path:
    """Scores by the hash of the weights, beside the stage that made these: they outlive stage 04's folder."""
    return run.stage("03_pretraining").folder.parent / "scores"


def evaluate(run: Run) -> Stage:
    """Make stage 04.

    Raises:
        TTLError: a task is unknown, the model cannot be evaluated, or a set has other labels or columns than it should.
    """
    stage = run.stage("04_evaluation")
    if stage.reuse():
        _try_again(run, stage)
        return stage
    settings, status = run.params.evaluation, stage.folder / "status.json"
    # a typing error costs no evaluation
    wanted(settings)
    with stage.work() as energy:
        corpus, subject, hardware = run.need("01_data"), subject_of(run), choose_hardware(run.params.pretraining)
        print(f"evaluating {subject.name} ({subject.origin}, weights {subject.weights[:12]})\n{hardware}")
        # another model's longer context would not compare, nor fit in memory
        context = min(subject.context, run.params.model.max_position_embeddings)
        blocks, text_bytes = blocks_of(run, subject, context)
        rows = []
        if subject.origin == "this run":
            rows = list(perplexity_over_checkpoints(run, blocks, text_bytes, hardware, status))
        model = load_model(subject.folder, hardware)
        if rows and rows[-1]["step"] == run.need("03_pretraining").metrics()["steps"]:
            # the last checkpoint has the model's weights
            final = rows[-1]
        else:
            with Progress("held-out tokens scored", blocks.tokens, status) as progress:
                final = perplexity(
                    model, blocks, text_bytes=text_bytes, batch_size=settings.batch_size, progress=progress
                )
        groups = by_group(model, corpus, subject.tokenizer, context, batch_size=settings.batch_size, status=status)
        harness = _harness(run, stage, subject, model, hardware, energy)
        del model
        downstream = _downstream(run, stage, subject, hardware, energy)
        metrics = {
            **_about(subject),
            "origin": subject.origin,
            "context": context,
            "perplexity": final["perplexity"],
            "bits_per_byte": final["bits_per_byte"],
            "loss": final["loss"],
            "scored_tokens": final["scored_tokens"],
            **{f"by_{name}": values for name, values in groups.items()},
            "checkpoints": rows,
            "harness": harness,
            "downstream": downstream,
            "precision": hardware.precision,
        }
        stage.finish(metrics, {})
    return stage


def _about(subject: Subject) -> dict:
    names = ("weights", "beside_weights", "revision")
    return {"model": subject.name, **{name: getattr(subject, name) for name in names}}


def _harness(run: Run, stage: Stage, subject: Subject, model: Any, hardware: Hardware, energy: Any) -> dict[str, dict]:
    settings = run.params.evaluation
    rows = run_harness(
        model,
        subject.tokenizer,
        wanted(settings),
        about=_about(subject),
        cache=scores_folder(run),
        batch_size=settings.batch_size,
        device=hardware.device,
        limit=settings.harness_limit,
        seed=run.params.seed,
        status=stage.folder / "status.json",
        energy=energy,
    )
    write_harness(stage.folder / "harness.json", list(rows.values()))
    return rows


def _downstream(run: Run, stage: Stage, subject: Subject, hardware: Hardware, energy: Any) -> dict[str, dict]:
    folder, corpus = stage.folder / "downstream", run.need("01_data")
    return run_downstream(run, corpus, subject.folder, subject.tokenizer, folder, hardware, _about(subject), energy)


def not_run(metrics: dict) -> tuple[list[str], list[str]]:
    """The tasks, and the sets (or encoders on them), whose data could not be had."""
    tasks = [key for key, row in metrics["harness"].items() if row["status"] == "not run"]
    sets = {name: [found, *found.get("baselines", {}).values()] for name, found in metrics["downstream"].items()}
    return tasks, [name for name, rows in sets.items() if any(row.get("status") == "not run" for row in rows)]


def _try_again(run: Run, stage: Stage) -> None:
    """Of a finished stage, what could not be run: a data set or an encoder that was out of reach may be there now."""
    settings, hardware = run.params.evaluation, choose_hardware(run.params.pretraining)
    tasks, sets = not_run(stage.metrics())
    missing = [item for item in wanted(settings) if item.key in tasks]
    if any(open_task(item, run.params.seed).task for item in missing):
        subject = subject_of(run)
        with stage.measuring() as energy:
            harness = _harness(run, stage, subject, load_model(subject.folder, hardware), hardware, energy)
        stage.add_metrics(harness=harness)
    if sets:
        with stage.measuring() as energy:
            found = _downstream(run, stage, subject_of(run), hardware, energy)
        stage.add_metrics(downstream=found)


def checkpoint_scores(run: Run) -> list[dict]:
    """Figure 2: `evaluation.checkpoint_tasks` over all checkpoints of stage 03, finished or under way.

    What was scored before is read from the run's `scores/`. Rows: step, tokens, energy_kwh, scores by task.
    """
    settings = run.params.evaluation
    items = [item for item in wanted(settings) if item.key in settings.checkpoint_tasks]
    found = _checkpoints(run) if items and settings.model is None else []
    if not found:
        return []
    hardware, stage = choose_hardware(run.params.pretraining), run.stage("04_evaluation")
    with stage.measuring() as energy:
        rows = over_checkpoints(
            found,
            lambda path: (load_model(path, hardware), load_tokenizer(path)),
            items,
            about={"model": run.name, "revision": None},
            cache=scores_folder(run),
            dtype=str(hardware.dtype).removeprefix("torch."),
            batch_size=settings.batch_size,
            device=hardware.device,
            limit=settings.harness_limit,
            seed=run.params.seed,
            energy=energy,
        )
    if stage.finished and stage.manifest()["identity"] == stage.identity():
        stage.add_metrics(checkpoint_scores=rows)
    return rows


def _checkpoints(run: Run) -> list[Path]:
    return checkpoints.list_checkpoints(run.stage("03_pretraining").folder / "checkpoints")


def perplexity_over_checkpoints(
    run: Run, blocks: TokenBlocks, text_bytes: int, hardware: Hardware, status: Path | None = None
) -> Iterator[dict]:
    """Perplexity of every whole checkpoint, oldest first; kept in the run's `scores/`, so that it costs what is new."""
    tokens = run.need("02_tokenizer").manifest()["outputs"]["tokens"]["fingerprint"]
    found = _checkpoints(run)
    with Progress("checkpoints evaluated", len(found), status) as progress:
        for number, path in enumerate(found):
            try:
                state = read_json(path / "state.json")
                checkpoints.check(path)
            except (DamagedFile, FileNotFoundError) as error:
                # one of a running stage may just have been thinned out
                print(f"checkpoint {path.name} is not evaluated: {error}")
                continue
            weights = read_json(path / "checkpoint.json")[checkpoints.WEIGHTS]
            key = [weights, tokens, blocks.block_size, hardware.precision]
            name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
            cache = scores_folder(run) / f"perplexity-{name}.json"
            if not cache.is_file():
                model = load_model(path, hardware)
                size = run.params.evaluation.batch_size
                write_json(cache, perplexity(model, blocks, text_bytes=text_bytes, batch_size=size))
            yield {**{name: state[name] for name in ("step", "tokens", "energy_kwh")}, **read_json(cache)}
            progress.update(number + 1)


def evaluate_under_way(run: Run) -> list[dict]:
    """Perplexity and `checkpoint_tasks` of the checkpoints there are, also while stage 03 is running.

    Raises:
        ParameterError: `evaluation.model` names another model.
        MissingStage: there is no whole checkpoint yet.
    """
    if run.params.evaluation.model is not None:
        raise ParameterError("evaluation.model: a run's own checkpoints are evaluated here, so leave it null")
    subject = subject_of(run, under_way=True)
    hardware = choose_hardware(run.params.pretraining)
    print(hardware)
    blocks, text_bytes = blocks_of(run, subject)
    scores = {row["step"]: row["scores"] for row in checkpoint_scores(run)}
    rows = perplexity_over_checkpoints(run, blocks, text_bytes, hardware)
    return [{**row, "scores": scores.get(row["step"], {})} for row in rows]
