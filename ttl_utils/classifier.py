"""Fine-tuning a classifier as the model cards do (paper, section 4.1, table 5), and its scores.

The cards use transformers' Trainer: AdamW at 4e-5, decay of everything but norms and biases, linear to 0 without
warm-up, gradients clipped at 1, the test set scored after each epoch. Ours differs in two things: a batch holds texts
of like length, and on a GPU matrices are multiplied in 16 bits where the cards use 32.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ttl_utils.devices import put
from ttl_utils.errors import SourceError, TTLError, reason
from ttl_utils.examples import Rows
from ttl_utils.origins import Origin
from ttl_utils.schema import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ttl_utils.model import Hardware

# what the cards leave at Trainer's defaults, and how rows are grouped: part of a result's identity
RECIPE = {"lr_scheduler_type": "linear", "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "batches_sorted_together": 32}
# padded tokens that are scored at once
SCORED_TOKENS = 8192


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


def open_classifier(origin: Origin, names: list[str]) -> PreTrainedModel:
    """The model in float32 with a new output layer, drawn from torch's random state.

    Raises:
        SourceError: it does not open, or more than its output layer is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            origin.folder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            dtype=torch.float32,
            attn_implementation=None if origin.encoder else "sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"model {origin.name!r} does not open as a classifier: {reason(error)}") from error
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in found["missing_keys"] if key.startswith(body) and ".pooler." not in key)
    if missing:
        raise SourceError(f"model {origin.name!r} lacks weights, such as {missing[0]}: it would begin at random")
    # the answer is read at the last token that is none of these
    model.config.pad_token_id = origin.tokenizer.pad_token_id
    return model


def make_optimizer(model: PreTrainedModel, settings: Evaluation) -> torch.optim.AdamW:
    """Trainer's groups: matrices decay, norms and biases do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.downstream_weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.downstream_learning_rate,
        eps=RECIPE["adam_epsilon"],
        fused=True,
    )


def batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every row once, in batches of like length: shuffled, then sorted within windows, whose batches are shuffled."""
    order = rng.permutation(len(lengths))
    window, found = size * RECIPE["batches_sorted_together"], []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        parts = np.split(rows, range(size, len(rows), size))
        found += [parts[place] for place in rng.permutation(len(parts))]
    return found


def padded(rows: Rows, chosen: np.ndarray, origin: Origin, device: str) -> dict[str, torch.Tensor]:
    """Inputs (batch, longest) padded on the right, on the device.

    A decoder needs no mask: no token sees those after it, and the answer is read at the last one that is no padding.
    """
    longest = max(1, max(len(rows.ids[n]) for n in chosen))
    ids = np.full((len(chosen), longest), origin.tokenizer.pad_token_id)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    for place, n in enumerate(chosen):
        ids[place, : len(rows.ids[n])] = rows.ids[n]
        mask[place, : len(rows.ids[n])] = 1
        if rows.types:
            types[place, : len(rows.types[n])] = rows.types[n]
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if origin.encoder else {})
    inputs |= {"token_type_ids": types} if rows.types else {}
    return {name: put(value, device) for name, value in inputs.items()}


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor], origin: Origin) -> torch.Tensor:
    # a decoder would keep keys and values for a next token that never comes
    return model(**inputs, **({} if origin.encoder else {"use_cache": False})).logits.float()


@torch.inference_mode()
def predict(model: PreTrainedModel, rows: Rows, origin: Origin, hardware: Hardware) -> torch.Tensor:
    """Logits (examples, classes) on the CPU; texts of like length together."""
    model.eval()
    lengths = rows.lengths
    order, start, found = np.argsort(-lengths, kind="stable"), 0, []
    while start < len(order):
        # the first is the longest
        count = max(1, SCORED_TOKENS // max(1, lengths[order[start]]))
        chosen = order[start : start + count]
        with autocast(hardware):
            found.append(_logits(model, padded(rows, chosen, origin, hardware.device), origin))
        start += count
    logits = torch.cat(found).cpu()
    return logits[torch.from_numpy(np.argsort(order))]


def autocast(hardware: Hardware) -> torch.autocast:
    return torch.autocast(hardware.device, hardware.dtype, enabled=hardware.dtype != torch.float32)


def fine_tune(
    origin: Origin,
    names: list[str],
    rows: dict[str, Rows],
    seed: int,
    settings: Evaluation,
    hardware: Hardware,
    advance: Callable[[str], bool],
    keep: Callable[[PreTrainedModel], Any] | None = None,
) -> dict[str, Any]:
    """Epochs of training, each scored on the test set; `keep(model)` is called after each that is the best so far.

    `advance(note)` is called after each step, and says whether the line was shown: then the loss is looked at.
    The paper's table gives the highest accuracy of the epochs on the test set, which flatters a little: the last epoch
    stands beside it. (The cards' code shares the epoch of the lowest test loss, Trainer's default: `test_loss`.)

    Raises:
        TTLError: the loss is no longer a number.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    model = open_classifier(origin, names).to(hardware.device)
    optimizer = make_optimizer(model, settings)
    # 16 bits of fp16 need it; without it every call below does the plain thing
    scaler = torch.amp.GradScaler(hardware.device, enabled=hardware.precision == "fp16")
    train, test, size = rows["train"], rows["test"], settings.downstream_batch_size
    lengths, epochs, best = train.lengths, [], None
    steps, step, padded_tokens = -(-len(lengths) // size) * settings.downstream_epochs, 0, 0
    for epoch in range(1, settings.downstream_epochs + 1):
        model.train()
        summed = torch.zeros((), device=hardware.device)
        for chosen in batches(lengths, size, np.random.default_rng([seed, epoch])):
            inputs = padded(train, chosen, origin, hardware.device)
            target = put(train.labels[chosen], hardware.device)
            with autocast(hardware):
                loss = cross_entropy(_logits(model, inputs, origin), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["max_grad_norm"])
            for group in optimizer.param_groups:
                group["lr"] = settings.downstream_learning_rate * (1 - step / steps)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            summed += loss.detach()
            padded_tokens += inputs["input_ids"].numel()
            step += 1
            # a look at the loss waits for the device: seldom
            if advance(f"epoch {epoch}"):
                _check(summed, origin, step, settings)
        _check(summed, origin, step, settings)
        logits, labels = predict(model, test, origin, hardware), torch.from_numpy(test.labels)
        found = {
            "epoch": epoch,
            **scores(logits.argmax(-1).numpy(), test.labels),
            "test_loss": cross_entropy(logits, labels).item(),
            "train_loss": summed.item() / -(-len(lengths) // size),
        }
        epochs.append(found)
        if best is None or found["accuracy"] > best["accuracy"]:
            best = found
            if keep:
                keep(model)
    return {
        "seed": seed,
        "best_epoch": best,
        "last_epoch": epochs[-1],
        "epochs": epochs,
        "truncated": {side: found.cut for side, found in rows.items()},
        "padding_share": 1 - settings.downstream_epochs * int(lengths.sum()) / padded_tokens,
        "precision": hardware.precision,
        "device": hardware.device,
        "duration_s": round(time.monotonic() - started, 2),
    }


def _check(summed: torch.Tensor, origin: Origin, step: int, settings: Evaluation) -> None:
    if not math.isfinite(summed.item()):
        raise TTLError(
            f"{origin.name}: the loss is no number any more by step {step:,} of its fine-tuning: lower "
            f"evaluation.downstream_learning_rate (it is {settings.downstream_learning_rate:g})"
        )
