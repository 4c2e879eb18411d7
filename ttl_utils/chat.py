"""Stage 05: fine-tuning to chat (paper, section 4.3), loss on the answers only, packed without leaks."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttl_utils import carbon
from ttl_utils.checkpoints import save_model_folder
from ttl_utils.corpus import documents
from ttl_utils.errors import TTLError
from ttl_utils.files import write_json
from ttl_utils.loss import IGNORED, summed_loss
from ttl_utils.model import choose_hardware
from ttl_utils.restore import restore
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Chat
from ttl_utils.session import Loop
from ttl_utils.step import Step
from ttl_utils.subject import load_model
from ttl_utils.tokenizer import load_tokenizer
from ttl_utils.training import train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def chat_template(settings: Chat) -> str:
    """The paper's template in Jinja: the user's words between two tokens, each answer closed by `</s>`.

    The space before the words is the one that the tokenizer puts before a text, and not after a control token:
    with it the template gives the ids of `encode`.
    """
    return (
        "{{ bos_token }}{% for message in messages %}{% set words = message['content'] | trim %}"
        "{% if words %}{% set words = ' ' + words %}{% endif %}{% if message['role'] == 'user' %}"
        f"{{{{ '{settings.user_open}' + words + '{settings.user_close}' }}}}"
        "{% else %}{{ words + eos_token }}{% endif %}{% endfor %}"
    )


def prepare_chat_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Chat) -> PreTrainedTokenizerBase:
    """Add the template and its two tokens (32,000 + 2 rows in the paper)."""
    tokenizer.add_tokens([settings.user_open, settings.user_close], special_tokens=True)
    tokenizer.chat_template = chat_template(settings)
    return tokenizer


@dataclass
class Example:
    """One conversation as ids and labels of the same length; a label is IGNORED where nothing is learned."""

    ids: list[int]
    labels: list[int]
    cut: bool = False


def encode(messages: list[dict], tokenizer: PreTrainedTokenizerBase, settings: Chat, context: int) -> Example | None:
    """Learned: the assistant's words and the end token after them. None where nothing learned fits the context.

    A user who types a control token types text: the words are encoded without them.
    """
    opened, closed = tokenizer.convert_tokens_to_ids([settings.user_open, settings.user_close])
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for message in messages:
        text = message["content"].strip()
        words = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if message["role"] == "user":
            ids += [opened, *words, closed]
            labels += [IGNORED] * (len(words) + 2)
        else:
            ids += [*words, tokenizer.eos_token_id]
            labels += [*words, tokenizer.eos_token_id]
    cut = len(ids) > context
    ids, labels = ids[:context], labels[:context]
    return Example(ids, labels, cut) if any(label != IGNORED for label in labels[1:]) else None


def pack(lengths: Iterable[int], context: int) -> list[list[int]]:
    """Rows of example indices whose lengths sum to at most `context`: best fit, longest first."""
    rows: list[list[int]] = []
    # (free, row), sorted: the fullest row with room is found by bisection
    room: list[tuple[int, int]] = []
    lengths = list(lengths)
    for index in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(room, (lengths[index], 0))
        free, row = room.pop(place) if place < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def collate(examples: list[Example], rows: list[list[int]], context: int, pad: int) -> dict[str, torch.Tensor]:
    """Tensors (batch, context): positions start again at each conversation, which keeps them apart."""
    ids = np.full((len(rows), context), pad, dtype=np.int64)
    labels = np.full((len(rows), context), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            example = examples[index]
            stop = start + len(example.ids)
            ids[number, start:stop] = example.ids
            # the first token is predicted from another conversation's last: never a target
            labels[number, start:stop] = [IGNORED, *example.labels[1:]]
            positions[number, start:stop] = np.arange(stop - start)
            start = stop
        # the padding is a document of its own
        positions[number, start:] = np.arange(context - start)
    return {
        key: torch.from_numpy(value)
        for key, value in {"input_ids": ids, "labels": labels, "position_ids": positions}.items()
    }


def packed_steps(
    examples: list[Example], settings: Chat, context: int, pad: int, seed: int
) -> tuple[Callable[[int, Accelerator], Step], int]:
    """Training steps over epochs, and how many there are; rows are packed once and shuffled at each epoch."""
    rows = pack([len(example.ids) for example in examples], context)
    per_step = settings.tokens_per_step // context
    steps_per_epoch = -(-len(rows) // per_step)

    def get_step(step: int, accelerator: Accelerator) -> Step:
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        chosen = [rows[n] for n in order[place * per_step : (place + 1) * per_step]]
        # a last, short step is filled with rows of padding, so that all processes do the same work
        whole = collate(examples, chosen + [[]] * (per_step - len(chosen)), context, pad)
        targets = int((whole["labels"][:, 1:] != IGNORED).sum())
        mine = {key: value[accelerator.process_index :: accelerator.num_processes] for key, value in whole.items()}
        size = settings.per_device_train_batch_size
        parts = range(0, len(mine["labels"]), size)
        return Step([{key: value[n : n + size] for key, value in mine.items()} for n in parts], targets)

    return get_step, steps_per_epoch * settings.num_train_epochs


@torch.no_grad()
def answer_loss(model: PreTrainedModel, examples: list[Example], context: int, pad: int) -> float:
    """Mean nats per learned token."""
    nats, count = 0.0, 0
    rows = pack([len(example.ids) for example in examples], context)
    for start in range(0, len(rows), 8):
        batch = collate(examples, rows[start : start + 8], context, pad)
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
        nats += summed_loss(model, {key: value.to(model.device) for key, value in batch.items()}).item()
    return nats / count


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Chat, seed: int
) -> dict[str, Any]:
    """Sample one answer; `ended` says whether the model closed it by itself."""
    example = encode(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}],
        tokenizer,
        settings,
        model.config.max_position_embeddings,
    )
    if example is None:
        raise TTLError(f"the question is longer than the context of {model.config.max_position_embeddings} tokens")
    ids = torch.tensor([example.ids[:-1]], device=model.device)
    torch.manual_seed(seed)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(settings.max_new_tokens, model.config.max_position_embeddings - ids.shape[1]),
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
    )[0, ids.shape[1] :].tolist()
    return {
        "prompt": prompt,
        "answer": tokenizer.decode(made, skip_special_tokens=True).strip(),
        "ended": made[-1:] == [tokenizer.eos_token_id],
    }


def grow_embeddings(model: PreTrainedModel, size: int) -> None:
    """Rows for new tokens, each the mean of the old ones: random rows would draw probability from the others."""
    old = model.get_input_embeddings().weight.shape[0]
    if size == old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)


def load_examples(run: Run, tokenizer: PreTrainedTokenizerBase, side: str) -> tuple[list[Example], dict]:
    """The conversations of a side; those that do not fit are counted."""
    context = run.params.model.max_position_embeddings
    examples, counts = [], {"conversations": 0, "nothing learned fits the context": 0, "cut at the context": 0}
    for row in documents(run.need("01_data"), "chat", side, ["messages"]):
        counts["conversations"] += 1
        example = encode(row["messages"], tokenizer, run.params.chat, context)
        if example is None:
            counts["nothing learned fits the context"] += 1
            continue
        counts["cut at the context"] += example.cut
        examples.append(example)
    if not examples:
        raise TTLError(f"01_data has no conversation for chat ({side}): give data.sources one with use: chat")
    return examples, counts


def fine_tune_chat(run: Run, on_record: Callable[[list[dict]], None] | None = None) -> Stage:
    """Make stage 05: answers before, fine-tuning, answers after.

    Raises:
        TTLError: there are no conversations, or training diverged or was interrupted.
    """
    stage = run.stage("05_chat")
    if stage.reuse():
        return stage
    settings, seed = run.params.chat, run.params.seed
    context = run.params.model.max_position_embeddings
    if settings.copy_to:
        restore(settings.copy_to, stage.folder, run.name, stage.identity())
    earlier = carbon.stage_energy(run.folder / "energy.jsonl", stage.name, stage.begun())
    with stage.work() as energy:
        hardware = choose_hardware(settings)
        if hardware.attention == "flash_attention_2":
            # it keeps packed conversations apart at batch size 1 alone, and cannot compute in float32 at all
            why = "attention: sdpa (FlashAttention 2 would mix the conversations packed in a row)"
            hardware = replace(hardware, attention="sdpa", reasons=(*hardware.reasons[:2], why))
        print(hardware)
        base = run.need("03_pretraining").folder / "model"
        tokenizer = prepare_chat_tokenizer(load_tokenizer(base), settings)
        (examples, counts), (held_out, held_counts) = (load_examples(run, tokenizer, s) for s in ("train", "test"))
        # weights stay in float32: the loop's autocast chooses the precision of the arithmetic
        model = load_model(base, hardware, torch.float32)
        grow_embeddings(model, len(tokenizer))
        pad = tokenizer.pad_token_id
        # the precision of training, so that before and after differ by the weights alone
        dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float16
        with torch.autocast(hardware.device, dtype, enabled=hardware.mixed_precision != "no"):
            before = answer_loss(model, held_out, context, pad)
            answers = {"before": [answer(model, tokenizer, prompt, settings, seed) for prompt in settings.prompts]}
        get_step, steps = packed_steps(examples, settings, context, pad, seed)

        def evaluate(model: Any, step: int) -> dict:
            loss = answer_loss(model, held_out, context, pad)
            return {"validation_loss": round(loss, 6), "perplexity": round(math.exp(loss), 4)}

        records = train(
            model,
            tokenizer,
            get_step,
            Loop(
                settings=settings,
                hardware=hardware,
                max_steps=steps,
                folder=stage.folder,
                energy=energy,
                energy_before=earlier[0],
                label="fine-tuning: steps",
                # once an epoch
                eval_steps=max(1, steps // settings.num_train_epochs),
                evaluate=evaluate,
                on_record=on_record,
                run=run.name,
                config=run.params.flat(),
            ),
        )
        model.eval()
        after = answer_loss(model, held_out, context, pad)
        answers["after"] = [answer(model, tokenizer, prompt, settings, seed) for prompt in settings.prompts]
        write_json(stage.folder / "answers.json", answers)
        metrics = _metrics(examples, records, settings, context)
        metrics |= {"validation_loss_before": before, "validation_loss_after": after, "steps": steps}
        metrics |= {"training": counts, "validation": held_counts, "precision": hardware.precision}
        outputs = {
            "model": save_model_folder(model, tokenizer, stage.folder / "model"),
            "curve": [stage.folder / "metrics.jsonl"],
        }
        stage.finish(metrics, outputs)
    return stage


def _metrics(examples: list[Example], records: list[dict], settings: Chat, context: int) -> dict:
    learned = sum(sum(label != IGNORED for label in example.labels[1:]) for example in examples)
    tokens = sum(len(example.ids) for example in examples)
    slots = len(pack([len(example.ids) for example in examples], context)) * context
    speeds = sorted(row["tokens_per_second"] for row in records if "tokens_per_second" in row)
    speed = speeds[len(speeds) // 2]
    return {
        "useful_tokens_per_second": speed * learned / slots,
        "tokens_per_second": speed,
        "padding_share": 1 - tokens / slots,
        # the authors padded every conversation to the context
        "padding_share_unpacked": 1 - tokens / (len(examples) * context),
        "learned_share": learned / tokens,
        "learned_tokens": learned,
    }
