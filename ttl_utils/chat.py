"""Stage 05: fine-tuning to chat (paper, section 4.3), loss on the answers only, packed without leaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttl_utils.chat_answers import answers, figures
from ttl_utils.checkpoints import save_model_folder
from ttl_utils.conversations import (
    Example,
    answer_ids,
    collate,
    learned_tokens,
    load_examples,
    prepare_chat_tokenizer,
    rows_of,
)
from ttl_utils.document_attention import documents_apart
from ttl_utils.errors import ParameterError
from ttl_utils.files import write_json
from ttl_utils.generation import classifier
from ttl_utils.ledger import stage_energy
from ttl_utils.loss import IGNORED, summed_loss
from ttl_utils.model import Hardware, choose_hardware
from ttl_utils.named_models import CHAT_BASE
from ttl_utils.records import read_records
from ttl_utils.restore import restore
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Chat
from ttl_utils.session import Loop
from ttl_utils.step import Step
from ttl_utils.subject import Subject, check_context, load_model, subject_of
from ttl_utils.training import train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def base_of(run: Run) -> tuple[Subject, int]:
    """The model to begin from (`chat.base_model`, or stage 03's), whose tokenizer gets the template; the pieces it had.

    Raises:
        TTLError: stage 03 is missing, or the model cannot be had or cannot serve.
    """
    base = subject_of(run, key=CHAT_BASE)
    check_context(base, run.params.model.max_position_embeddings, "model.max_position_embeddings, chat's rows")
    known = len(base.tokenizer)
    prepare_chat_tokenizer(base.tokenizer, run.params.chat)
    return base, known


def chat_steps(
    examples: list[Example], settings: Chat, context: int, pad: int, seed: int
) -> tuple[Callable[[int, Accelerator], Step], int]:
    """Training steps over epochs, and how many an epoch has; rows are made once and shuffled at each epoch."""
    rows = rows_of(examples, context, settings.faithful)
    per_step = settings.tokens_per_step // context
    steps_per_epoch = -(-len(rows) // per_step)

    def get_step(step: int, accelerator: Accelerator) -> Step:
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        chosen = [rows[n] for n in order[place * per_step : (place + 1) * per_step]]
        # a last, short step is filled with rows of padding, so that all processes do the same work
        chosen += [[]] * (per_step - len(chosen))
        whole = collate(examples, chosen, context, pad, settings.faithful)
        targets = int((whole["labels"][:, 1:] != IGNORED).sum())
        mine = {key: value[accelerator.process_index :: accelerator.num_processes] for key, value in whole.items()}
        size = settings.per_device_train_batch_size
        parts = range(0, len(mine["labels"]), size)
        return Step([{key: value[n : n + size] for key, value in mine.items()} for n in parts], targets)

    return get_step, steps_per_epoch


def plan(examples: list[Example], settings: Chat, context: int) -> str:
    """Rows, steps and warm-up, beside the same with each conversation padded as the authors did."""
    rows, per_step = len(rows_of(examples, context, settings.faithful)), settings.tokens_per_step // context
    steps, padded = (-(-count // per_step) * settings.num_train_epochs for count in (rows, len(examples)))
    warmup = settings.warmup_steps
    text = (
        f"{len(examples):,} conversations {'padded' if settings.faithful else 'packed'} into {rows:,} rows of "
        f"{context:,} tokens, {per_step:,} a step: {settings.num_train_epochs} epochs are {steps:,} steps "
        f"({padded:,} if padded), {warmup:,} of them warm-up ({warmup / steps:.1%}; {warmup / padded:.1%})"
    )
    if warmup >= steps:
        text += (
            f"\nchat.warmup_steps {warmup:,} is as long as the run: the learning rate rises to the end, to "
            f"{steps / warmup:.0%} of its peak; the paper's share would be {round(warmup * steps / padded):,} steps"
        )
    return text


@torch.no_grad()
def answer_loss(model: PreTrainedModel, examples: list[Example], context: int, pad: int) -> float:
    """Mean nats per learned token: of answers alone, packed, however the model was trained."""
    nats, count = [], 0
    rows = rows_of(examples, context)
    for start in range(0, len(rows), 8):
        batch = collate(examples, rows[start : start + 8], context, pad)
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
        nats.append(summed_loss(model, {key: value.to(model.device) for key, value in batch.items()}))
    return math.fsum(torch.stack(nats).tolist()) / count


def grow_embeddings(model: PreTrainedModel, known: int, size: int) -> None:
    """Rows from `known` to `size`, each the mean of those before: random ones would draw probability from these."""
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    if size > known:
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:size] = layer.weight[:known].mean(0)


def _hardware(settings: Chat) -> Hardware:
    hardware = choose_hardware(settings)
    if hardware.attention == "flash_attention_2":
        # it keeps packed conversations apart at batch size 1 alone, and cannot compute in float32 at all
        why = "attention: sdpa (FlashAttention 2 would mix the conversations packed in a row)"
        hardware = replace(hardware, attention="sdpa", reasons=(*hardware.reasons[:2], why))
    return hardware


def tell_turn(losses: list[float], epoch: int, loss: float) -> None:
    """Says when the validation loss has turned up; `losses`: of the epochs before, from 0."""
    if losses and loss > min(losses):
        print(
            f"epoch {epoch}: the validation loss, {loss:.4f}, is above that of epoch {int(np.argmin(losses))}, "
            f"{min(losses):.4f}: what is learned now are these conversations by heart. Fewer num_train_epochs, or a "
            "lower learning_rate, would stop before"
        )


def _epochs(records: list[dict]) -> list[float]:
    """The validation loss before the first step, and after each epoch."""
    return [row["validation_loss"] for row in records if "validation_loss" in row]


def fine_tune_chat(run: Run, on_record: Callable[[list[dict]], None] | None = None) -> Stage:
    """Make stage 05: answers before, fine-tuning, answers after.

    Raises:
        TTLError: there are no conversations, the base model cannot serve, or training diverged or was interrupted.
    """
    stage = run.stage("05_chat")
    if stage.reuse():
        return stage
    settings, seed = run.params.chat, run.params.seed
    context = run.params.model.max_position_embeddings
    if settings.copy_to:
        restore(settings.copy_to, stage.folder, run.name, stage.identity())
    earlier = stage_energy(run.folder / "energy.jsonl", stage.name, stage.begun())
    with stage.work() as energy:
        hardware = _hardware(settings)
        print(hardware)
        base, known = base_of(run)
        tokenizer = base.tokenizer
        (examples, counts), (held_out, held_counts) = (load_examples(run, tokenizer, s) for s in ("train", "test"))
        print(plan(examples, settings, context))
        # weights stay in float32: the loop's autocast chooses the precision of the arithmetic
        model = load_model(base.folder, hardware, torch.float32)
        if model.config.model_type != "llama":
            raise ParameterError(
                f"{CHAT_BASE} {base.name!r} is a {model.config.model_type}: name a Llama, in which conversations in a "
                "row are known to stay apart"
            )
        grow_embeddings(model, known, len(tokenizer))
        pad, status = tokenizer.pad_token_id, stage.folder / "status.json"
        # the precision of training, so that before and after differ by the weights alone
        dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float16
        autocast = torch.autocast(hardware.device, dtype, enabled=hardware.mixed_precision != "no")
        with autocast:
            sides = {"before": answers(model, tokenizer, settings, seed, status)}
        get_step, per_epoch = chat_steps(examples, settings, context, pad, seed)

        def evaluate(model: Any, step: int) -> dict:
            loss, epoch = round(answer_loss(model, held_out, context, pad), 6), step // per_epoch
            tell_turn(_epochs(read_records(stage.folder / "metrics.jsonl")), epoch, loss)
            return {"epoch": epoch, "validation_loss": loss, "perplexity": round(math.exp(min(loss, 99)), 4)}

        loop = Loop(
            settings=settings,
            hardware=hardware,
            max_steps=per_epoch * settings.num_train_epochs,
            folder=stage.folder,
            energy=energy,
            energy_before=earlier[0],
            label="fine-tuning: steps",
            eval_steps=per_epoch,
            evaluate=evaluate,
            on_record=on_record,
            run=run.name,
            config=run.params.flat(),
        )
        with documents_apart(model):
            records = train(model, tokenizer, get_step, loop)
        model.eval()
        with autocast:
            sides["after"] = answers(model, tokenizer, settings, seed, status)
        metrics = _metrics(examples, records, settings, context)
        metrics |= {"training": counts, "validation": held_counts}
        metrics |= {key: getattr(hardware, key) for key in ("device", "precision", "attention")}
        metrics |= {"base": {"name": base.name, "origin": base.origin, "revision": base.revision}}
        human = [tokenizer.decode(ids, skip_special_tokens=True) for one in held_out for ids in answer_ids(one)]
        asked = run.params.evaluation.generation
        scorer, why = classifier(asked)
        scored = {"status": "done", "threshold": asked.toxicity.threshold} if scorer else {"status": "not run"}
        metrics["toxicity"] = scored | ({"reason": why} if why else {})
        for side, rows in sides.items():
            found = figures(rows, human, settings, seed, scorer, asked and asked.toxicity)
            metrics[f"answers_{side}"], sides[side] = found
        energy.sample(write=True)
        # of all sessions; what is asked of the finished stage later is not the fine-tuning's
        spent = stage_energy(run.folder / "energy.jsonl", stage.name, stage.begun())
        metrics |= dict(zip(("energy_kwh", "emissions_kg", "duration_s"), spent, strict=True))
        write_json(stage.folder / "answers.json", sides)
        outputs = {
            "model": save_model_folder(model, tokenizer, stage.folder / "model"),
            "curve": [stage.folder / "metrics.jsonl"],
        }
        stage.finish(metrics, outputs)
    return stage


def _metrics(examples: list[Example], records: list[dict], settings: Chat, context: int) -> dict:
    learned, tokens = learned_tokens(examples), sum(len(example.ids) for example in examples)
    slots = len(rows_of(examples, context, settings.faithful)) * context
    speeds = sorted(row["tokens_per_second"] for row in records if "tokens_per_second" in row)
    speed = speeds[len(speeds) // 2]
    epochs = _epochs(records)
    return {
        "validation_loss_before": epochs[0],
        "validation_loss_after": epochs[-1],
        "validation_loss_by_epoch": epochs[1:],
        "best_epoch": int(np.argmin(epochs)),
        "steps": records[-1]["step"],
        "useful_tokens_per_second": speed * learned / slots,
        "tokens_per_second": speed,
        "padding_share": 1 - tokens / slots,
        # the authors padded every conversation to the context
        "padding_share_unpacked": 1 - tokens / (len(examples) * context),
        "learned_share": learned / tokens,
        "learned_tokens": learned,
    }
