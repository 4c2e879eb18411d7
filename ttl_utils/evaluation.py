"""Stage 04: perplexity and bits per byte over all checkpoints, the harness, and downstream fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttl_utils import checkpoints
from ttl_utils.blocks import TokenBlocks
from ttl_utils.corpus import documents
from ttl_utils.downstream import fine_tune, load_downstream
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.harness import run_harness
from ttl_utils.loss import summed_loss
from ttl_utils.model import choose_hardware
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    text_bytes: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Token-weighted perplexity over consecutive blocks of the model's context, the last one short.

    Every token but a block's first is scored. Documents are not kept apart within a block, as in the paper.
    `max_tokens` scores only the first blocks up to that many tokens. `text_bytes` are the UTF-8 bytes of the text
    that all the tokens stand for; bits per byte is (mean nats per scored token x all tokens) / (ln 2 x bytes).
    """
    device = next(model.parameters()).device
    whole = len(blocks)
    if max_tokens is not None:
        whole = min(whole, max(1, max_tokens // blocks.block_size))
    nats, scored = 0.0, 0
    batches = [range(start, min(start + batch_size, whole)) for start in range(0, whole, batch_size)]
    for indices in batches:
        ids = torch.from_numpy(blocks.batch(indices)).to(device)
        nats += summed_loss(model, {"input_ids": ids, "labels": ids}).item()
        scored += ids.numel() - len(ids)
        if progress:
            progress.update(scored)
    rest = blocks.remainder()
    if (max_tokens is None or not whole) and len(rest) > 1:
        ids = torch.from_numpy(rest[None]).to(device)
        nats += summed_loss(model, {"input_ids": ids, "labels": ids}).item()
        scored += len(rest) - 1
    if not scored:
        raise TTLError(f"there are {blocks.tokens} held-out tokens to score: a larger data.test_share, or more text")
    loss = nats / scored
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss * blocks.tokens / text_bytes / math.log(2) if text_bytes else None,
        "scored_tokens": scored,
    }


def by_source(
    model: PreTrainedModel, corpus: Stage, tokenizer: Any, context: int, status: Path | None = None
) -> dict[str, dict]:
    """Loss and bits per byte of the held-out documents of each source, every document scored on its own.

    As in `perplexity`, a long document's later blocks leave their first token unscored; bits per byte counts it at the
    mean of the others.
    """
    device = next(model.parameters()).device
    # nats, tokens scored, tokens, bytes, documents
    sums: dict[str, np.ndarray] = {}
    with torch.no_grad(), Progress("held-out documents scored", None, status) as progress:
        for row in documents(corpus, "corpus", "test", ["text", "source"]):
            progress.update(progress.done + 1)
            ids = torch.tensor([tokenizer(row["text"], split_special_tokens=True)["input_ids"]], device=device)
            found = sums.setdefault(row["source"], np.zeros(5))
            for block in ids.split(context, dim=1):
                if block.shape[1] > 1:
                    found[:2] += summed_loss(model, {"input_ids": block, "labels": block}).item(), block.shape[1] - 1
            found[2:] += ids.shape[1] - 1, len(row["text"].encode("utf-8")), 1
    return {
        source: {
            "documents": int(count),
            "loss": nats / scored,
            "perplexity": math.exp(nats / scored),
            "bits_per_byte": nats / scored * tokens / size / math.log(2),
        }
        for source, (nats, scored, tokens, size, count) in sums.items()
    }


def load_model(folder: Path, hardware: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder, in evaluation mode on the device, in the hardware's precision unless told otherwise."""
    from transformers import AutoModelForCausalLM

    dtype = dtype or {"bf16": torch.bfloat16, "fp16": torch.float16}.get(hardware.precision, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=hardware.attention)
    return model.to(hardware.device).eval()


def over_checkpoints(run: Run, stage: Stage, blocks: TokenBlocks, text_bytes: int, hardware: Any) -> list[dict]:
    """Perplexity of every checkpoint, kept in `checkpoints.json` so that going on costs only what is new."""
    cache = stage.folder / "checkpoints.json"
    rows = read_json(cache) if cache.is_file() else []
    known = {row["step"] for row in rows}
    found = checkpoints.list_checkpoints(run.need("03_pretraining").folder / "checkpoints")
    with Progress("checkpoints evaluated", len(found), stage.folder / "status.json") as progress:
        for number, path in enumerate(found):
            if checkpoints.step_of(path) not in known and _whole(path):
                state = json.loads((path / "state.json").read_text())
                model = load_model(path, hardware)
                values = perplexity(model, blocks, text_bytes=text_bytes, batch_size=run.params.evaluation.batch_size)
                energy = {"tokens": state["tokens"], "energy_kwh": state["energy_kwh"]}
                rows.append({"step": state["step"], **energy, **values})
                rows.sort(key=lambda row: row["step"])
                write_json(cache, rows)
            progress.update(number + 1)
    return rows


def _whole(path: Path) -> bool:
    try:
        checkpoints.check(path)
    except DamagedFile as error:
        print(f"checkpoint {path.name} is not evaluated: {error}")
        return False
    return True


def evaluate(run: Run) -> Stage:
    """Make stage 04.

    Raises:
        TTLError: a downstream set has labels or columns other than the parameters say.
    """
    stage = run.stage("04_evaluation")
    if stage.reuse():
        return stage
    settings = run.params.evaluation
    with stage.work():
        corpus, tokens, trained = (run.need(name) for name in ("01_data", "02_tokenizer", "03_pretraining"))
        hardware = choose_hardware(run.params.pretraining)
        print(hardware)
        context = run.params.model.max_position_embeddings
        blocks = TokenBlocks([p for p in tokens.files("tokens") if p.name.startswith("test-")], context)
        text_bytes = tokens.metrics()["test_bytes"]
        rows = over_checkpoints(run, stage, blocks, text_bytes, hardware)
        model = load_model(trained.folder / "model", hardware)
        tokenizer = load_tokenizer(trained.folder / "model")
        final = perplexity(model, blocks, text_bytes=text_bytes, batch_size=settings.batch_size)
        sources = by_source(model, corpus, tokenizer, context, stage.folder / "status.json")
        harness = run_harness(
            model,
            tokenizer,
            settings.harness,
            batch_size=settings.batch_size,
            device=hardware.device,
            limit=settings.harness_limit,
            seed=run.params.seed,
        )
        del model
        downstream = {}
        for item in settings.downstream:
            data = load_downstream(item, corpus)
            downstream[item.name] = (
                data
                if "status" in data
                else fine_tune(
                    data, item, trained.folder / "model", stage.folder / "downstream" / item.name, run, hardware
                )
            )
        metrics = {
            "perplexity": final["perplexity"],
            "bits_per_byte": final["bits_per_byte"],
            "loss": final["loss"],
            "scored_tokens": final["scored_tokens"],
            "by_source": sources,
            "checkpoints": rows,
            "harness": harness,
            "downstream": downstream,
            "precision": hardware.precision,
        }
        stage.finish(metrics, {"checkpoints": [stage.folder / "checkpoints.json"]})
    return stage
