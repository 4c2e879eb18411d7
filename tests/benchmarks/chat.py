"""Fine-tuning to chat, packed beside padded: `python -m tests.benchmarks.chat --conversations FOLDER [--shape 160m]`.

FOLDER is a mirror of the hub that holds `nicholasKluge/instruct-aira-dataset-v2`. Padded is the authors' way
(`chat.faithful`). Both take turns of one step on the same weights, so that other work on the machine slows them alike,
and a ratio is taken within a round. Useful tokens are those of the answers, with their end. With `--epochs`, both ways
then train from the same weights (`--base`, or random ones) over the same conversations, and the loss on the answers of
those held out is given after each epoch. fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from tests.benchmarks.common import median_and_interval, shape_params, table
from ttl_utils import hub
from ttl_utils.chat import answer_loss, chat_steps, grow_embeddings, plan
from ttl_utils.conversations import Example, encode, learned_tokens, prepare_chat_tokenizer, rows_of
from ttl_utils.document_attention import documents_apart
from ttl_utils.lean import kept_memory, make_lean
from ttl_utils.loss import Learner
from ttl_utils.model import Hardware, new_model
from ttl_utils.schema import Chat
from ttl_utils.step import learning_rate, make_optimizer, train_step
from ttl_utils.subject import load_model
from ttl_utils.tokenizer import load_tokenizer, train_sentencepiece, training_lines, write_llama_folder

CHAT, CORPUS = "nicholasKluge/instruct-aira-dataset-v2", "nicholasKluge/Pt-Corpus-Instruct"
CPU = Hardware("cpu", "fp32", "sdpa", ("", "", ""))


def begin(arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any, Chat]:
    """Model and tokenizer, with the chat tokens, and the settings of the shape."""
    params = shape_params(arguments.shape)
    chat = params.chat.model_copy(update={"tokens_per_step": arguments.rows * arguments.block})
    chat = chat.model_copy(update={"per_device_train_batch_size": 1, "num_train_epochs": max(1, arguments.epochs)})
    if arguments.base:
        tokenizer, model = load_tokenizer(arguments.base), load_model(arguments.base, CPU)
    else:
        lines = training_lines((row["text"] for row in hub.load(CORPUS, None, "train")), 10_000)
        tokenizer = write_llama_folder(train_sentencepiece(lines, params.tokenizer), folder, arguments.block)
        model = new_model(params.model, tokenizer, 0, "sdpa")
    known = len(tokenizer)
    prepare_chat_tokenizer(tokenizer, chat)
    grow_embeddings(model, known, len(tokenizer))
    return make_lean(model), tokenizer, chat


def conversations(tokenizer: Any, chat: Chat, block: int) -> tuple[list[Example], list[Example]]:
    """To learn from, and one in ten held out."""
    rows = [row["conversations"] for row in hub.load(CHAT, None, "portuguese")]
    made = [encode(messages, tokenizer, chat, block) for messages in rows]
    held_out = set(np.random.default_rng(0).permutation(len(made))[: len(made) // 10].tolist())
    sides: tuple[list, list] = ([], [])
    for number, example in enumerate(made):
        if example:
            sides[number in held_out].append(example)
    return sides


class Way:
    """One way to fine-tune: its steps, and an optimizer on a model that may be shared."""

    def __init__(self, model: Any, examples: list[Example], chat: Chat, block: int, pad: int):
        self.model, self.chat = model, chat
        self.learner, self.optimizer = Learner(model), make_optimizer(model, chat)
        self.get_step, self.per_epoch = chat_steps(examples, chat, block, pad, seed=0)
        self.useful_share = learned_tokens(examples) / (len(rows_of(examples, block, chat.faithful)) * block)
        self.accelerator = Accelerator(cpu=True)

    def step(self, number: int) -> float:
        """Trains one step; returns its slots per second."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.chat, number, self.per_epoch * self.chat.num_train_epochs)
        data = self.get_step(number, SimpleNamespace(process_index=0, num_processes=1))
        with contextlib.nullcontext() if self.chat.faithful else documents_apart(self.model):
            train_step(self.learner, self.optimizer, self.accelerator, data, self.chat.max_grad_norm)
        return self.chat.tokens_per_step / (time.perf_counter() - started)


def speed(model: Any, ways: dict[str, Way], rounds: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in ways}
    model.train()
    # the first round warms up
    for number in range(rounds + 1):
        for name, way in ways.items():
            useful = way.step(number % way.per_epoch) * way.useful_share
            found[name] += [useful] if number else []
        print(f"round {number} of {rounds}: " + ", ".join(f"{name} {(v or [0])[-1]:,.1f}" for name, v in found.items()))
    ratios = [packed / padded for packed, padded in zip(*found.values(), strict=True)]
    rows: list[tuple] = [("", "useful tokens/s", "useful share of slots")]
    rows += [
        (name, f"{median_and_interval(values)[0]:,.1f}", f"{ways[name].useful_share:.2%}")
        for name, values in found.items()
    ]
    middle, low, high = median_and_interval(ratios)
    table("Speed", [*rows, ("ratio", f"{middle:.2f} ({low:.2f} to {high:.2f})", "")])


def losses(start: Any, held_out: list[Example], settings: dict[str, Chat], make: Any, block: int, pad: int) -> None:
    rows: list[tuple] = [("", "learning rate", "tokens a step", "steps", "before", "after each epoch")]
    for name, chat in settings.items():
        model = copy.deepcopy(start)
        way = make(model, chat)
        found = [answer_loss(model.eval(), held_out, block, pad)]
        for epoch in range(chat.num_train_epochs):
            model.train()
            for number in range(epoch * way.per_epoch, (epoch + 1) * way.per_epoch):
                way.step(number)
            found.append(answer_loss(model.eval(), held_out, block, pad))
            print(f"{name}, epoch {epoch + 1}: {found[-1]:.4f}", flush=True)
        after = " ".join(f"{loss:.4f}" for loss in found[1:])
        steps = way.per_epoch * chat.num_train_epochs
        rows.append((name, f"{chat.learning_rate:g}", f"{chat.tokens_per_step:,}", steps, f"{found[0]:.4f}", after))
    table("Loss on held-out answers, nats per token", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=Path, required=True, help="a mirror of the hub")
    parser.add_argument("--shape", choices=("nano", "160m"), default="nano")
    parser.add_argument("--base", type=Path, help="a model folder to begin from, with its tokenizer; default: random")
    parser.add_argument("--limit", type=int, help="conversations to train on")
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="rows of a timed step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=0, help="0: speed alone")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of the padded way; the paper's: 1e-5")
    parser.add_argument(
        "--warmup-share", type=float, default=0.016, help="of all steps; the paper's is 1,000 of 61,000"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, kept_memory(), _mirror(arguments.conversations):
        model, tokenizer, chat = begin(arguments, Path(folder))
        examples, held_out = conversations(tokenizer, chat, arguments.block)
        examples, block, pad = examples[: arguments.limit], arguments.block, tokenizer.pad_token_id
        padded = chat.model_copy(update={"faithful": True})
        print(plan(examples, chat, block))
        print(
            f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}, {torch.get_num_threads()} threads; "
            f"{sum(len(one.ids) for one in examples) / len(examples):.0f} tokens a conversation"
        )
        start = copy.deepcopy(model) if arguments.epochs else None
        make = lambda model, chat: Way(model, examples, chat, block, pad)  # noqa: E731
        if arguments.rounds:
            speed(model, {"packed": make(model, chat), "padded": make(model, padded)}, arguments.rounds)
        if arguments.epochs:
            losses(start, held_out, _settings(arguments, chat, examples), make, block, pad)


def _settings(arguments: argparse.Namespace, chat: Chat, examples: list[Example]) -> dict[str, Chat]:
    """The authors' way, ours with the same numbers, and ours with a row a step, as many conversations as theirs."""

    def one(faithful: bool, tokens: int, rate: float) -> Chat:
        made = chat.model_copy(update={"faithful": faithful, "tokens_per_step": tokens, "learning_rate": rate})
        rows = len(rows_of(examples, arguments.block, faithful))
        steps = -(-rows * arguments.block // tokens) * chat.num_train_epochs
        return made.model_copy(update={"warmup_steps": max(1, round(arguments.warmup_share * steps))})

    rate, authors = arguments.learning_rate, 4 * arguments.block
    return {
        "padded, 4 rows a step": one(True, authors, rate),
        "packed, 4 rows a step": one(False, authors, rate),
        "packed, a row a step": one(False, arguments.block, rate),
    }


def _mirror(folder: Path) -> Any:
    from unittest.mock import patch

    return patch.dict("os.environ", {"TTL_MIRROR": str(folder)})


if __name__ == "__main__":
    main()
