"""Downstream classification (paper, section 4.1, table 5): fine-tune, score, beside the constant answer."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ttl_utils import hub
from ttl_utils.checkpoints import save_model_folder
from ttl_utils.corpus import documents
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Downstream
from ttl_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ttl_utils.model import Hardware


def load_downstream(item: Downstream, corpus: Stage) -> dict[str, Any]:
    """{"train": [(text, label)], "test": [...]}; {"status": "not run", "reason"} where the hub cannot be reached."""
    if item.source:
        rows = {
            side: [row for row in documents(corpus, "downstream", side) if row["source"] == item.source]
            for side in ("train", "test")
        }
    else:
        try:
            rows = {
                side: list(hub.load(item.dataset, item.config, split, item.revision, streaming=False))
                for side, split in (("train", item.train_split), ("test", item.test_split))
            }
        except SourceError as error:
            return {"status": "not run", "reason": str(error)}
    data = {side: [_example(item, row) for row in found] for side, found in rows.items()}
    if not data["train"] or not data["test"]:
        raise TTLError(f"downstream {item.name!r}: {len(data['train'])} training and {len(data['test'])} test examples")
    unseen = {label for _, label in data["test"]} - {label for _, label in data["train"]}
    if unseen:
        raise TTLError(
            f"downstream {item.name!r}: label {sorted(unseen, key=str)[0]!r} of the test set is not in the training set"
        )
    return data


def _example(item: Downstream, row: dict) -> tuple[str, Any]:
    try:
        return item.text.format(**row), row[item.label]
    except KeyError as error:
        raise TTLError(f"downstream {item.name!r}: there is no column {error}; there are {', '.join(row)}") from None


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-averaged F1 over the labels that occur in `labels` or `predicted`."""
    f1 = []
    for label in np.union1d(predicted, labels):
        hits = np.sum((predicted == label) & (labels == label))
        f1.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": float(np.mean(f1))}


def constant_answer(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """The scores of always answering the training set's most frequent label."""
    label = Counter(train.tolist()).most_common(1)[0][0]
    return scores(np.full(len(test), label), test)


def fine_tune(data: dict, item: Downstream, base: Path, folder: Path, run: Run, hardware: Hardware) -> dict[str, Any]:
    """Fine-tune a classifier on the base model; the best epoch by test accuracy, as in the paper, and the last.

    The paper chooses the epoch on the test set, which flatters a little: the last epoch stands beside it.
    """
    from transformers import AutoModelForSequenceClassification

    settings, started = run.params.evaluation, time.monotonic()
    tokenizer = load_tokenizer(base)
    names = sorted({label for _, label in data["train"]}, key=str)
    place = {label: index for index, label in enumerate(names)}
    labels = {side: np.array([place[label] for _, label in rows]) for side, rows in data.items()}
    ids = {side: [_ids(tokenizer, text, item.max_length) for text, _ in rows] for side, rows in data.items()}
    torch.manual_seed(run.params.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(names),
        id2label={index: str(label) for label, index in place.items()},
        label2id={str(label): index for label, index in place.items()},
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).to(hardware.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.downstream_learning_rate,
        weight_decay=settings.downstream_weight_decay,
        eps=1e-8,
    )
    autocast = torch.autocast(hardware.device, torch.bfloat16, enabled=hardware.precision == "bf16")
    size, epochs, best = settings.downstream_batch_size, [], None
    steps = -(-len(ids["train"]) // size) * settings.downstream_epochs
    with Progress(f"{item.name}: steps", steps) as progress:
        for epoch in range(settings.downstream_epochs):
            model.train()
            order = np.random.default_rng([run.params.seed, epoch]).permutation(len(ids["train"]))
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                inputs = _padded([ids["train"][n] for n in chosen], tokenizer.pad_token_id, hardware.device)
                with autocast:
                    logits = model(**inputs).logits
                target = torch.from_numpy(labels["train"][chosen]).to(hardware.device)
                cross_entropy(logits.float(), target).backward()
                optimizer.step()
                optimizer.zero_grad()
                progress.update(progress.done + 1)
            found = scores(_predict(model, ids["test"], tokenizer.pad_token_id, hardware, autocast), labels["test"])
            epochs.append({"epoch": epoch + 1, **found})
            if best is None or found["accuracy"] > best["accuracy"]:
                best = epochs[-1]
                save_model_folder(model, tokenizer, folder)
    return {
        "accuracy": best["accuracy"],
        "macro_f1": best["macro_f1"],
        "best_epoch": best["epoch"],
        "last_epoch": epochs[-1],
        "epochs": epochs,
        "constant_answer": constant_answer(labels["train"], labels["test"]),
        "labels": [str(name) for name in names],
        "train_examples": len(ids["train"]),
        "test_examples": len(ids["test"]),
        "stderr": float(np.sqrt(best["accuracy"] * (1 - best["accuracy"]) / len(ids["test"]))),
        "seed": run.params.seed,
        "from_mirror": bool(item.dataset and hub.mirrored(item.dataset)),
        "duration_s": round(time.monotonic() - started, 2),
    }


def _ids(tokenizer: Any, text: str, max_length: int) -> list[int]:
    # a format that begins with <s> brings its own; the tokenizer would put another before it
    text = text.removeprefix("<s>")
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]


def _padded(rows: list[list[int]], pad: int, device: str) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask, (batch, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _predict(model: Any, rows: list[list[int]], pad: int, hardware: Hardware, autocast: Any) -> np.ndarray:
    model.eval()
    predicted = np.empty(len(rows), dtype=np.int64)
    order = np.argsort([len(row) for row in rows], kind="stable")
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        with autocast:
            logits = model(**_padded([rows[n] for n in chosen], pad, hardware.device)).logits
        predicted[chosen] = logits.argmax(-1).cpu().numpy()
    return predicted
