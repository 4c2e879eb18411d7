"""Requests scored per second, lm-eval's own way beside ours: `python -m tests.benchmarks.harness [--shape 160m]`.

Questions with four choices, made by code; random weights. Tokenizing is counted, building the prompts is not. HFLM
with its defaults takes one request at a time, with 16 it sorts and pads them. All take turns in one process. On a
machine that is never idle, `--cpu` counts CPU time instead, with one thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from tests.benchmarks import text
from tests.benchmarks.common import SHAPES, Vocabulary, median_and_interval, table
from ttl_utils.model import new_model
from ttl_utils.params import Params, load_params
from ttl_utils.scoring import Scorer
from ttl_utils.tokenizer import train_sentencepiece, training_lines, write_llama_folder

# name: (worked examples, the same ones for every question, the context where it must be longer than the shape's)
PROMPTS = {
    "0-shot": (0, True, None),
    "3-shot, fixed": (3, True, None),
    "25-shot, as ARC": (25, False, 2048),
    "25-shot, fixed": (25, True, 2048),
}


def questions(shots: int, fixed: bool, count: int) -> list[SimpleNamespace]:
    """Four requests a question, worked examples before it."""
    rng = np.random.default_rng(0)
    names = text.vocabulary(5000, rng)
    weights = 1 / (np.arange(len(names)) + 2.7)
    weights /= weights.sum()

    def some(least: int, most: int) -> str:
        return " ".join(rng.choice(names, rng.integers(least, most), p=weights))

    made = [(f"Pergunta: {some(8, 24)}?\nResposta:", [f" {some(1, 8)}" for _ in range(4)]) for _ in range(count + 25)]
    solved = [f"{question}{choices[rng.integers(4)]}\n\n" for question, choices in made[count:]]
    requests = []
    for question, choices in made[:count]:
        before = "".join(solved[:shots] if fixed else rng.permutation(solved)[:shots])
        requests += [SimpleNamespace(args=(before + question, choice)) for choice in choices]
    return requests


def compare(name: str, params: Params, tokenizer: Any, arguments: argparse.Namespace) -> list[tuple]:
    shots, fixed, context = PROMPTS[name]
    shape = params.model.model_copy(update={"max_position_embeddings": context or params.model.max_position_embeddings})
    model = new_model(shape, Vocabulary(params.tokenizer.vocab_size), 0, "sdpa")
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    common = {"pretrained": model, "tokenizer": tokenizer, "softmax_dtype": torch.float32}
    ways: dict[str, HFLM] = {}
    if not arguments.only_ours:
        ways |= {"HFLM, defaults": HFLM(**common), "HFLM, 16": HFLM(**common, batch_size=16)}
    for tokens in arguments.tokens:
        ways[f"ours, {tokens} a pass" if tokens else "ours"] = Scorer(model, tokenizer, 16, tokens)
    requests = questions(shots, fixed, arguments.questions)
    lengths = [len(ids) for ids in tokenizer(["".join(request.args) for request in requests])["input_ids"]]
    cut = sum(length > shape.max_position_embeddings + 1 for length in lengths)
    clock = time.process_time if arguments.cpu else time.perf_counter
    seconds, found = defaultdict(list), {}
    for turn in range(arguments.rounds + 1):
        for way, lm in ways.items():
            part = requests if turn else requests[:8]
            started = clock()
            found[way] = np.array([value for value, _ in lm.loglikelihood(part, disable_tqdm=True)])
            if turn:
                seconds[way].append(clock() - started)
    rows, ours = [], list(ways)[-1]
    for way in ways:
        ratio = median_and_interval([a / b for a, b in zip(seconds[way], seconds[ours], strict=True)])
        rate = len(requests) / statistics.median(seconds[way])
        about = (name, shape.max_position_embeddings, f"{statistics.mean(lengths):.0f}", f"{cut / len(requests):.0%}")
        off = f"{np.abs(found[way] - found[ours]).max():.0e}"
        rows.append((*about, way, f"{rate:.1f}", "{:.2f} ({:.2f}-{:.2f})".format(*ratio), off))
        print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("nano", "160m"), default="nano")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="*", default=[None], help="of a pass of ours, as it is if not said")
    parser.add_argument("--prompts", nargs="*", default=list(PROMPTS), choices=PROMPTS, metavar="PROMPTS")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, for a busy machine")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    if arguments.cpu:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    params = load_params(SHAPES[arguments.shape])
    with tempfile.TemporaryDirectory() as folder:
        lines = training_lines(text.documents(0.3), params.tokenizer.max_sentence_length)
        model = train_sentencepiece(lines, params.tokenizer.model_copy(update={"vocab_size": 4096}))
        tokenizer = write_llama_folder(model, Path(folder), params.model.max_position_embeddings)
    print(f"{arguments.shape}: {arguments.questions} questions, {arguments.rounds} rounds on {arguments.device}")
    rows = [("prompts", "context", "tokens a request", "truncated", "way", "requests/s", "slower than ours", "off by")]
    for name in arguments.prompts:
        rows += compare(name, params, tokenizer, arguments)
    table("medians with their 95% intervals; the largest difference of a log-likelihood, in nats", rows)


if __name__ == "__main__":
    main()
