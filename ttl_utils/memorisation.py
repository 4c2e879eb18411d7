"""How much of its training text a model writes by heart: passages that greedy decoding completes.

A passage is extractable when its first tokens, as prompt, make the model write the following ones exactly (Carlini et
al. 2023, "Quantifying Memorization Across Neural Language Models", section 3.1). Passages of held-out text, which the
model never saw, are the control: what they give is predictable rather than remembered.

Limits: one length of prompt, and exact words: a lower bound. Passages lie within one document of the packed tokens, so
that shorter documents are not tried; a text that stands there many times is drawn as often.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ttl_utils.blocks import TokenBlocks
from ttl_utils.decoding import greedy
from ttl_utils.files import read_json, write_json
from ttl_utils.model import choose_hardware
from ttl_utils.progress import Progress
from ttl_utils.resampling import LEVEL, ratio, resample
from ttl_utils.run import Run, Stage
from ttl_utils.subject import load_model, same_tokens
from ttl_utils.tokenizer import load_tokenizer

# Carlini et al. 2023 score the 50 tokens after a prompt; 50 is their shortest prompt
PROMPT, CONTINUATION = 50, 50
# of each side; passages that are decoded at once
PASSAGES, BATCH = 500, 100
# standard normal deviate of a 95% interval
Z = 1.959964


def memorisation(run: Run, name: str, stage: Stage) -> dict[str, Any]:
    """Share of passages completed, and mean number of tokens right from the first on, of `train` and `test`.

    Kept in `export/memorisation-<name>.json` for these weights, tokens and settings. A model whose context holds less
    than a passage gets half of it as prompt; one whose tokens are others than the run's is not measured.
    """
    folder, tokens = stage.folder / "model", run.stage("02_tokenizer")
    if not same_tokens(run, SimpleNamespace(tokenizer=load_tokenizer(folder))):
        return {"reason": "the run has packed no tokens of this model's vocabulary"}
    context = read_json(folder / "config.json")["max_position_embeddings"]
    lengths = (PROMPT, CONTINUATION) if context >= PROMPT + CONTINUATION else (context // 2, context - context // 2)
    key = {
        "weights": stage.manifest()["outputs"]["model"]["fingerprint"],
        "tokens": tokens.manifest()["outputs"]["tokens"]["fingerprint"],
        "settings": [*lengths, PASSAGES, run.params.seed],
    }
    path = run.folder / "export" / f"memorisation-{name}.json"
    if path.is_file() and (known := read_json(path))["key"] == key:
        return known["figures"]
    sides = {}
    for side in ("train", "test"):
        paths = [file for file in tokens.files("tokens") if file.name.startswith(f"{side}-")]
        sides[side] = sample_passages(paths, sum(lengths), run.params.seed)
    figures: dict[str, Any] = {"prompt": lengths[0], "continuation": lengths[1]}
    passages_in_all = sum(map(len, sides.values()))
    with stage.measuring(), Progress(f"passages completed by {name}", passages_in_all) as progress:
        model = load_model(folder, choose_hardware(run.params.pretraining))
        for side, passages in sides.items():
            figures[side] = completed(model, passages, lengths[0], run.params.seed, progress)
    write_json(path, {"key": key, "figures": figures})
    return figures


def sample_passages(paths: list[Path], length: int, seed: int, most: int = PASSAGES) -> np.ndarray:
    """(passages, length): up to `most` different places, drawn evenly from those where a document goes on so long."""
    blocks = TokenBlocks(paths, length)
    starts = [starts + before for starts, before in zip(blocks.starts, blocks.offsets, strict=False)]
    begins = np.unique(np.concatenate([[0], *starts, [blocks.tokens]]).astype(np.int64))
    # places of each document at which a passage may begin
    room = np.maximum(np.diff(begins) - length + 1, 0)
    ends = np.cumsum(room)
    total = int(ends[-1]) if len(ends) else 0
    drawn = np.random.default_rng(seed).choice(total, min(most, total), replace=False, shuffle=False)
    which = np.searchsorted(ends, drawn, side="right")
    places = begins[which] + drawn - (ends - room)[which]
    spans = [blocks.span(place, place + length) for place in np.sort(places).tolist()]
    return np.stack(spans) if spans else np.empty((0, length), np.int64)


def completed(model: Any, passages: np.ndarray, prompt: int, seed: int, progress: Progress) -> dict[str, Any] | None:
    """Figures of passages (passages, length); None where there are none."""
    if not len(passages):
        return None
    right = []
    for start in range(0, len(passages), BATCH):
        rows = torch.from_numpy(passages[start : start + BATCH]).to(model.device)
        written = greedy(model, rows[:, :prompt], rows.shape[1] - prompt)[0]
        # tokens right before the first wrong one
        right.append((written == rows[:, prompt:]).long().cumprod(1).sum(1).cpu().numpy())
        progress.update(progress.done + len(rows))
    prefix = np.concatenate(right)
    whole, counts = int((prefix == passages.shape[1] - prompt).sum()), np.stack([prefix, np.ones_like(prefix)], 1)
    low, high = wilson(whole, len(prefix))
    figures = {"passages": len(prefix), "completed": whole, "share": whole / len(prefix), "low": low, "high": high}
    return figures | ratio("mean_prefix", counts, resample(counts, seed), 0, 1)


def wilson(found: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); sensible also at none and at all."""
    share, spread = found / of, Z**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def sentence(figures: dict[str, Any]) -> str:
    """What was found, in words."""
    if "reason" in figures:
        return f"Not measured: {figures['reason']}."
    said = [f"Prompted with {figures['prompt']} tokens of a passage, the model must write the next "]
    said[0] += f"{figures['continuation']} exactly, decoding greedily."
    for side, text in (("train", "training text"), ("test", "held-out text, the control")):
        found = figures[side]
        if found is None:
            said.append(f"No document of the {text} is as long as a passage: not measured.")
            continue
        share = f"{found['share']:.2%}; {LEVEL:.0%} interval {found['low']:.2%} to {found['high']:.2%}"
        said.append(
            f"Of {found['passages']:,} passages of {text}, {found['completed']:,} were completed ({share}); on average "
            f"the first {found['mean_prefix']:.2f} tokens were right."
        )
    return " ".join(said)
