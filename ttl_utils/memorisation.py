"""How much of its training text a model writes by heart: passages that greedy decoding completes.

A passage is extractable when its first tokens, as prompt, make the model write the following ones exactly (Carlini et
al. 2023, "Quantifying Memorization Across Neural Language Models", section 3.1). Held-out passages are the control:
what they give is predictable rather than remembered.

The base model's passages lie within one document and one block that training read. The chat model's are conversations
it was tuned on, up to an answer, which is to be completed.

Limits: one length of prompt, and exact words: a lower bound. Shorter documents are not tried; a text that stands there
many times is drawn as often.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from ttl_utils import carbon
from ttl_utils.blocks import TokenBlocks, step_indices
from ttl_utils.conversations import load_examples
from ttl_utils.decoding import greedy
from ttl_utils.files import read_json, write_json
from ttl_utils.loss import IGNORED
from ttl_utils.model import choose_hardware
from ttl_utils.pretraining import token_blocks
from ttl_utils.progress import Progress
from ttl_utils.resampling import LEVEL, ratio, resample
from ttl_utils.run import Run, Stage
from ttl_utils.subject import load_model
from ttl_utils.tokenizer import load_tokenizer

# Carlini et al. 2023 score the 50 tokens after a prompt; 50 is their shortest prompt
PROMPT, CONTINUATION = 50, 50
# of each side; passages that are decoded at once
PASSAGES, BATCH = 500, 100
# ids of the prompt, and of what follows it
Passage = tuple[list[int], list[int]]


def memorisation(run: Run, name: str, stage: Stage) -> dict[str, Any]:
    """Share of passages completed, and mean number of tokens right from the first on, of `train` and `test`.

    Kept in `export/memorisation-<name>.json` for these weights, texts and settings. Where a block holds less than two
    passages, a quarter of it is the prompt.
    """
    texts, group = (run.need("01_data"), "chat") if name == "chat" else (run.need("02_tokenizer"), "tokens")
    block = run.params.pretraining.block_size or run.params.model.max_position_embeddings
    prompt, continuation = (
        (None, CONTINUATION) if name == "chat" else (min(n, block // 4) for n in (PROMPT, CONTINUATION))
    )
    key = {
        "weights": stage.manifest()["outputs"]["model"]["fingerprint"],
        "texts": texts.manifest()["outputs"][group]["fingerprint"],
        "settings": [prompt, continuation, block, PASSAGES, run.params.seed],
    }
    path = run.folder / "export" / f"memorisation-{name}.json"
    if path.is_file() and (known := read_json(path))["key"] == key:
        return known["figures"]
    draw = _answers if name == "chat" else _passages
    sides = {side: draw(run, stage, side, continuation) for side in ("train", "test")}
    figures: dict[str, Any] = {"prompt": prompt, "continuation": continuation}
    # what a model of others had read before is not known here
    begun_from = run.params.chat.base_model if name == "chat" else run.params.pretraining.init_from
    figures["begun_from_another"] = begun_from is not None
    if name == "base":
        blocks = token_blocks(run, "train")
        figures["read_share"] = len(blocks_read(run, stage, blocks)) / len(blocks)
    settings = run.params.chat if name == "chat" else run.params.pretraining
    ledger, passages_in_all = run.folder / "energy.jsonl", sum(map(len, sides.values()))
    # under a name of its own: it is no part of what the model cost
    with (
        carbon.track(ledger, "export", run.params.carbon),
        Progress(f"passages completed by {name}", passages_in_all) as progress,
    ):
        model = load_model(stage.folder / "model", choose_hardware(settings))
        for side, passages in sides.items():
            figures[side] = completed(model, passages, run.params.seed, progress)
    write_json(path, {"key": key, "figures": figures})
    return figures


def blocks_read(run: Run, stage: Stage, blocks: TokenBlocks) -> np.ndarray:
    """Numbers of the blocks that training read, in the order of its first epoch: all of them after a whole one."""
    seen = stage.metrics()["steps"] * (run.params.pretraining.tokens_per_step // blocks.block_size)
    return step_indices(run.params.pretraining_seed, 0, min(seen, len(blocks)), len(blocks))


def _passages(run: Run, stage: Stage, side: str, length: int) -> list[Passage]:
    blocks = token_blocks(run, side)
    read = blocks_read(run, stage, blocks) if side == "train" else np.arange(len(blocks))
    rows = sample_passages(blocks, read, 2 * length, run.params.seed).tolist()
    return [(row[:length], row[length:]) for row in rows]


def sample_passages(blocks: TokenBlocks, read: np.ndarray, length: int, seed: int, most: int = PASSAGES) -> np.ndarray:
    """(passages, length): up to `most` different places, drawn evenly from those within a document and a block read."""
    starts = [starts + before for starts, before in zip(blocks.starts, blocks.offsets, strict=False)]
    edges = np.arange(len(blocks) + 1) * blocks.block_size
    begins = np.unique(np.concatenate([edges, *starts])).astype(np.int64)
    begins = begins[begins <= edges[-1]]
    # places of each stretch at which a passage may begin
    room = np.maximum(np.diff(begins) - length + 1, 0)
    room[~np.isin(begins[:-1] // blocks.block_size, read)] = 0
    ends = np.cumsum(room)
    total = int(ends[-1]) if len(ends) else 0
    drawn = np.random.default_rng(seed).choice(total, min(most, total), replace=False, shuffle=False)
    which = np.searchsorted(ends, drawn, side="right")
    places = begins[which] + drawn - (ends - room)[which]
    spans = [blocks.span(place, place + length) for place in np.sort(places).tolist()]
    return np.stack(spans) if spans else np.empty((0, length), np.int64)


def _answers(run: Run, stage: Stage, side: str, length: int) -> list[Passage]:
    """Conversations up to an answer, in the template, and the answer's first tokens, its end among them."""
    examples, _ = load_examples(run, load_tokenizer(stage.folder / "model"), side)
    found = []
    for example in examples:
        at = 0
        for learned, part in itertools.groupby(example.labels, lambda label: label != IGNORED):
            stop = at + len(list(part))
            if learned:
                found.append((example.ids[:at], example.ids[at : min(stop, at + length)]))
            at = stop
    drawn = np.random.default_rng(run.params.seed).choice(len(found), min(PASSAGES, len(found)), replace=False)
    return [found[place] for place in np.sort(drawn)]


def completed(model: Any, passages: list[Passage], seed: int, progress: Progress) -> dict[str, Any] | None:
    """Figures of passages; None where there are none."""
    if not passages:
        return None
    right = []
    # prompts of one length at once: nothing is padded
    for _, group in itertools.groupby(sorted(passages, key=_prompt_tokens), _prompt_tokens):
        alike = list(group)
        for start in range(0, len(alike), BATCH):
            rows = alike[start : start + BATCH]
            prompts = torch.tensor([prompt for prompt, _ in rows], device=model.device)
            written = greedy(model, prompts, max(len(rest) for _, rest in rows))[0].tolist()
            for mine, (_, rest) in zip(written, rows, strict=True):
                # tokens right before the first wrong one
                wrong = (place for place, token in enumerate(rest) if mine[place] != token)
                right.append((next(wrong, len(rest)), len(rest)))
            progress.update(progress.done + len(rows))
    prefix, lengths = np.array(right).T
    whole, counts = int((prefix == lengths).sum()), np.stack([prefix, np.ones_like(prefix)], 1)
    low, high = binomtest(whole, len(prefix)).proportion_ci(method="wilson")
    figures = {"passages": len(prefix), "completed": whole, "share": whole / len(prefix), "low": low, "high": high}
    return figures | {"mean_tokens": float(lengths.mean())} | ratio("mean_prefix", counts, resample(counts, seed), 0, 1)


def _prompt_tokens(passage: Passage) -> int:
    return len(passage[0])


def sentence(figures: dict[str, Any]) -> str:
    """What was found, in words."""
    if "reason" in figures:
        return f"Not measured: {figures['reason']}."
    most = figures["continuation"]
    if figures["prompt"] is None:
        said = f"Prompted with a conversation up to an answer, the model must write it, or its first {most} tokens,"
        train, test = "answers it was tuned on", "held-out answers, the control"
    else:
        said = f"Prompted with {figures['prompt']} tokens of a passage, the model must write the next {most}"
        train, test = "passages of training text", "passages of held-out text, the control"
    said = [f"{said} exactly, decoding greedily."]
    if figures.get("read_share", 1) < 1:
        said.append(f"Training read {figures['read_share']:.1%} of the packed text, and passages are drawn from that.")
    if figures.get("begun_from_another"):
        said.append("It began from a model of others, whose training text is not tried and may hold the control.")
    for side, text in (("train", train), ("test", test)):
        found = figures[side]
        if found is None:
            said.append(f"There are no {text} that are long enough: not measured.")
            continue
        share = f"{found['share']:.2%}; {LEVEL:.0%} interval {found['low']:.2%} to {found['high']:.2%}"
        said.append(
            f"Of {found['passages']:,} {text}, {found['completed']:,} were completed ({share}); on average the first "
            f"{found['mean_prefix']:.2f} of {found['mean_tokens']:.1f} tokens were right."
        )
    return " ".join(said)
