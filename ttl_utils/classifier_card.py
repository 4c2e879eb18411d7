"""The README.md of a fine-tuned classifier: a model card that says what was measured, and how to feed it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils.classifier import RECIPE, constant_answer
from ttl_utils.examples import BOS, EOS, Examples, cut_format
from ttl_utils.origins import Origin

if TYPE_CHECKING:
    from ttl_utils.run import Run

_CARD = """---
library_name: transformers
pipeline_tag: text-classification
language: {language}
{header}metrics:
- accuracy
- f1
---
# {title}

A text classifier, fine-tuned from {base} on {data}: {training:,} training and {test:,} test examples. Classes: \
{classes}.

**Input.** `{fed}`, cut after {max_length:,} tokens. {control}

```python
{snippet}
```

**Measured** on the test set, seed {seed}. The epoch was chosen by its accuracy on that same set, as the paper does \
(arXiv 2401.16640, table 5), which flatters a little; the last epoch stands beside it. Standard error of the accuracy: \
{stderr:.2%} (one sample of {test:,} examples).

| | accuracy | macro F1 |
|---|---|---|
| this model (epoch {best[epoch]} of {epochs}) | {best[accuracy]:.2%} | {best[macro_f1]:.2%} |
| last epoch | {last[accuracy]:.2%} | {last[macro_f1]:.2%} |
| always the commonest class | {constant[accuracy]:.2%} | {constant[macro_f1]:.2%} |

**Training.** {epochs} epochs, batches of {batch_size}, AdamW at {learning_rate:g} (linear to 0, eps {eps:g}, weight \
decay {decay:g} but for norms and biases), gradients clipped at {clip:g}; {precision} on {device}. Base weights: \
SHA-256 {weights}.

**Licence.** Nothing is granted here: see the data set's and the base model's.
"""
_SNIPPET = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder, or its hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)


def letters(text):
    # a control token that is written in a text is letters
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def classify(**columns):
    ids = {ids}
    with torch.no_grad():
        logits = model(torch.tensor([ids[:{max_length}]])).logits[0]
    return model.config.id2label[logits.argmax().item()]


classify({call})"""


def model_card(
    run: Run,
    examples: Examples,
    pieces: list[str],
    origin: Origin,
    about: dict[str, Any],
    max_length: int,
    result: dict[str, Any],
) -> str:
    """The card; `pieces` is the format as it was fed, `result` what the fine-tuning measured."""
    item, settings = examples.item, run.params.evaluation
    base, hub_id = _base(run, about)
    header = (f"base_model: {base}\n" if hub_id else "") + (f"datasets:\n- {item.dataset}\n" if item.dataset else "")
    data = f"the hub's `{item.dataset}`" if item.dataset else f"`{item.source}`, a source of the run's first stage"
    best, test = result["best_epoch"], len(examples.labels["test"])
    data += f" (revision `{item.revision}`)" if item.revision else ""
    if examples.from_mirror:
        data += ", read from a local mirror, which may not hold the published set"
    control = " and ".join(f"`{piece}`" for piece in (BOS, EOS) if piece in pieces)
    if control:
        control += ": control tokens; a pipeline that is given all this as one string makes other ids of it."
    return _CARD.format(
        language=run.params.data.language,
        header=header,
        title=f"{base.split('/')[-1]}, fine-tuned on {item.name}",
        base=f"`{base}`" + (f" (revision `{about['revision']}`)" if about.get("revision") else ""),
        data=data,
        training=len(examples.labels["train"]),
        test=test,
        classes=", ".join(f"`{name}`" for name in examples.names),
        fed="".join(pieces).replace("\n", "\\n"),
        max_length=max_length,
        control=control,
        snippet=_snippet(item, pieces, origin, max_length),
        seed=result["seed"],
        stderr=(best["accuracy"] * (1 - best["accuracy"]) / test) ** 0.5,
        best=best,
        last=result["last_epoch"],
        constant=constant_answer(examples.labels["train"], examples.labels["test"]),
        epochs=settings.downstream_epochs,
        batch_size=settings.downstream_batch_size,
        learning_rate=settings.downstream_learning_rate,
        decay=settings.downstream_weight_decay,
        eps=RECIPE["adam_epsilon"],
        clip=RECIPE["max_grad_norm"],
        precision=result["precision"],
        device=result["device"],
        weights=", ".join(f"{value[:16]}… ({name})" for name, value in origin.weights.items() if name != "tokenizer"),
    )


def _base(run: Run, about: dict[str, Any]) -> tuple[str, bool]:
    """The base model's name, without the folders of this machine, and whether the hub knows it."""
    name = about.get("model") or run.name
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name).name, False
    return name, True


def _snippet(item: Any, pieces: list[str], origin: Origin, max_length: int) -> str:
    control = {BOS: origin.tokenizer.bos_token_id, EOS: origin.tokenizer.eos_token_id}
    ids = [str(control[p]) if p in control else f"*letters({p!r}.format(**columns))" for p in pieces]
    # any column is a keyword, whatever it is called
    call = "**{" + ", ".join(f'{name!r}: "..."' for name in cut_format(item)[1]) + "}"
    return _SNIPPET.format(ids=f"[{', '.join(ids)}]", max_length=max_length, call=call)
