"""Stage 03: a Llama from random weights (paper, sections 3.4 and 3.5)."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from ttl_utils import devices
from ttl_utils.blocks import TokenBlocks, step_indices
from ttl_utils.checkpoints import save_model_folder
from ttl_utils.errors import TTLError
from ttl_utils.files import write_text
from ttl_utils.health import findings
from ttl_utils.initial import lineage, starting_point
from ttl_utils.ledger import stage_energy
from ttl_utils.model import choose_hardware, count_parameters, flops_per_token
from ttl_utils.perplexity import perplexity
from ttl_utils.records import read_records
from ttl_utils.restore import restore
from ttl_utils.run import Run, Stage
from ttl_utils.session import Loop
from ttl_utils.step import Step
from ttl_utils.tokenizer import load_tokenizer
from ttl_utils.training import train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def token_blocks(run: Run, side: str) -> TokenBlocks:
    """Blocks of `pretraining.block_size` to train on; what is held out is scored in blocks of the model's context."""
    paths = run.need("02_tokenizer").files("tokens")
    context = run.params.model.max_position_embeddings
    block_size = run.params.pretraining.block_size or context
    return TokenBlocks(
        [path for path in paths if path.name.startswith(f"{side}-")], block_size if side == "train" else context
    )


def block_steps(blocks: TokenBlocks, run: Run) -> Callable[[int, Accelerator], Step]:
    """Packed blocks as training steps: the data order is a pure function of the seed and the step.

    With `isolate_documents`, positions start again at each document of a row, which keeps attention within it; a row
    that begins within a document goes on with the document from position 0. Every token but a row's first is learned
    either way, a document's first one too: it is predicted from the end of the document before, and from nothing else,
    so it says where that document ends.
    """
    settings, seed = run.params.pretraining, run.params.pretraining_seed
    rows = settings.tokens_per_step // blocks.block_size

    def get_step(step: int, accelerator: Accelerator) -> Step:
        if rows % accelerator.num_processes:
            raise TTLError(
                f"pretraining.tokens_per_step {settings.tokens_per_step} is {rows} rows of {blocks.block_size}, which "
                f"{accelerator.num_processes} processes cannot share evenly"
            )
        mine = step_indices(seed, step, rows, len(blocks))[accelerator.process_index :: accelerator.num_processes]
        size = settings.per_device_train_batch_size
        ids = torch.from_numpy(blocks.batch(mine))
        batches = [{"input_ids": part, "labels": part} for part in ids.split(size)]
        if settings.isolate_documents:
            positions = torch.from_numpy(blocks.positions(mine))
            for batch, part in zip(batches, positions.split(size), strict=True):
                batch["position_ids"] = part
        return Step(batches, targets=rows * (blocks.block_size - 1))

    return get_step


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of a prompt: no randomness, so that samples of two steps compare."""
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(made[0], skip_special_tokens=True)


def pretrain(run: Run, on_record: Callable[[list[dict]], None] | None = None) -> Stage:
    """Make stage 03, from scratch or from the newest whole checkpoint.

    Raises:
        TTLError: the loss is not a number, the run was interrupted, or no checkpoint is whole.
    """
    stage = run.stage("03_pretraining")
    if stage.reuse():
        if run.params.pretraining.resume_from_checkpoint is not None:
            print("resume_from_checkpoint: the stage is finished and does not go back; --force makes it anew")
        return stage
    settings, main = run.params.pretraining, os.environ.get("RANK", "0") == "0"
    tokens, hardware = run.need("02_tokenizer"), choose_hardware(settings)
    if settings.isolate_documents and hardware.attention == "flash_attention_2":
        # it keeps documents apart at batch size 1 alone, and would silently mix them in a batch
        why = "attention: sdpa (FlashAttention 2 would mix the documents of a row: isolate_documents)"
        hardware = replace(hardware, attention="sdpa", reasons=(*hardware.reasons[:2], why))
    start = None
    if settings.init_from:
        # before anything is written: a mistake in it leaves nothing behind
        start = starting_point(run, load_tokenizer(tokens.folder), hardware.attention)
    if settings.copy_to and main:
        restore(settings.copy_to, stage.folder, run.name, stage.identity())
    # the sessions before this one: a run that was killed has spent energy too
    earlier = stage_energy(run.folder / "energy.jsonl", stage.name, stage.begun())
    with stage.work() as energy:
        print(hardware)
        tokenizer = load_tokenizer(tokens.folder)
        blocks, held_out = token_blocks(run, "train"), token_blocks(run, "test")
        text_bytes = tokens.metrics()["test_bytes"]
        start = start or starting_point(run, tokenizer, hardware.attention)
        model = start.model
        origin = {"initial_weights": start.origin} if start.origin else {}
        peak = devices.peak(hardware) if main else devices.Peak(None, "unknown device")
        print(f"peak: {peak.source}")
        samples = stage.folder / "samples.jsonl"

        def evaluate(model: Any, step: int) -> dict:
            found = perplexity(
                model,
                held_out,
                text_bytes=text_bytes,
                batch_size=settings.per_device_train_batch_size,
                max_tokens=settings.eval_tokens,
            )
            # a run that goes on from a checkpoint comes by this step again
            rows = [row for row in read_records(samples) if row["step"] < step]
            for prompt in settings.prompts:
                text = complete(model, tokenizer, prompt, settings.max_new_tokens)
                rows.append({"step": step, "prompt": prompt, "text": text})
            write_text(samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            return {
                "validation_loss": round(found["loss"], 6),
                "perplexity": round(found["perplexity"], 4),
                "bits_per_byte": found["bits_per_byte"] and round(found["bits_per_byte"], 6),
            }

        records = train(
            model,
            tokenizer,
            block_steps(blocks, run),
            Loop(
                settings=settings,
                hardware=hardware,
                max_steps=settings.max_steps,
                folder=stage.folder,
                energy=energy,
                energy_before=earlier[0],
                label="pretraining: steps",
                eval_steps=settings.eval_steps,
                evaluate=evaluate,
                on_record=on_record,
                flops_per_token=flops_per_token(run.params.model, len(tokenizer), blocks.block_size)["convention"],
                peak=peak,
                start=start.checkpoint,
                lineage=lineage(run) | origin,
                run=run.name,
                config=run.params.flat(),
            ),
        )
        if main:
            energy.sample(write=True)
            # of all sessions and machines; another machine's last row is an interval old at most
            spent = stage_energy(run.folder / "energy.jsonl", stage.name, stage.begun())
            outputs = {
                "model": save_model_folder(model, tokenizer, stage.folder / "model"),
                "curve": [stage.folder / "metrics.jsonl"],
            }
            stage.finish(_metrics(run, records, spent, hardware, peak, blocks, tokenizer) | origin, outputs)
    return stage


def _metrics(
    run: Run,
    records: list[dict],
    spent: tuple[float, float, float],
    hardware: Any,
    peak: devices.Peak,
    blocks: TokenBlocks,
    tokenizer: Any,
) -> dict:
    settings, model = run.params.pretraining, run.params.model
    logged = [row for row in records if "loss" in row]
    evaluated = [row for row in records if "validation_loss" in row]
    speed = statistics.median(row["tokens_per_second"] for row in logged)
    seen, unique = records[-1]["tokens"], len(blocks) * blocks.block_size
    flops = flops_per_token(model, len(tokenizer), blocks.block_size)
    return {
        "parameters": count_parameters(model, len(tokenizer)),
        "steps": settings.max_steps,
        "tokens": seen,
        "unique_tokens": unique,
        "epochs": seen / unique,
        "train_loss": logged[-1]["loss"],
        "initial_validation_loss": evaluated[0]["validation_loss"],
        "uniform_loss": math.log(len(tokenizer)),
        "validation_loss": evaluated[-1]["validation_loss"],
        "validation_perplexity": evaluated[-1]["perplexity"],
        "bits_per_byte": evaluated[-1]["bits_per_byte"],
        "tokens_per_second": speed,
        "flops_per_second": speed * flops["convention"],
        "peak_flops_per_second": peak.flops_per_second,
        "peak_source": peak.source,
        "data_share": statistics.median(row["data_share"] for row in logged),
        "findings": [
            asdict(found) for found in findings(records, vocab_size=len(tokenizer), warmup_steps=settings.warmup_steps)
        ],
        "flops_per_token": flops,
        "energy_kwh": spent[0],
        "emissions_kg": spent[1],
        "duration_s": spent[2],
        "device": hardware.device,
        "precision": hardware.precision,
        "attention": hardware.attention,
    }
