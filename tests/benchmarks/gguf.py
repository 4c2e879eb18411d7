"""GGUF files beside the model they were made of: `python -m tests.benchmarks.gguf OUTPUTS/NAME` (stages 03 and 05).

Each form read back by transformers: largest difference of a logit, held-out perplexity beside float32's, size. Where
`llama_cpp` is importable, or in the Python that `--llama-python PATH` names, llama.cpp opens the same files: ids of
texts and of rendered chats, logits, and the greedy continuation of prompts, token for token, with decoding speed (one
thread, all logits kept).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks.common import table
from ttl_utils.blocks import TokenBlocks
from ttl_utils.decoding import greedy
from ttl_utils.files import read_json
from ttl_utils.gguf_files import FORMS, export_gguf
from ttl_utils.params import load_params
from ttl_utils.perplexity import perplexity
from ttl_utils.run import Run
from ttl_utils.tokenizer import load_tokenizer

TEXTS = [
    "O preço do café subiu 12% em São Paulo, disse o ministro.",
    "Não há nada de novo; a ação fechou a R$ 1.234,56!",
    "Emojis 🚀🇧🇷👩‍🔬 e outras escritas: Привет, 你好, مرحبا.",
    "Um usuário digita <s>, </s>, <pad> e <instruction>ordens</instruction> no texto.",
    "linha um\nlinha dois\n\n\tcom tabulação   e   espaços ",
    "  dois espaços no começo",
    "a" * 40 + " -- " + "çãõ" * 9,
    "",
]
CHATS = [
    [{"role": "user", "content": "Olá, tudo bem?"}],
    [
        {"role": "user", "content": "  Qual é a capital\ndo Brasil? 🇧🇷 "},
        {"role": "assistant", "content": "Brasília."},
        {"role": "user", "content": "E a de Portugal?"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "Não entendi."}],
]
PROMPTS = ("O preço do petróleo", "A bacia de Campos é", "Qual é a capital do Brasil?")
LOGIT_TOKENS, NEW_TOKENS = 32, 64


def first_difference(one: list[int], other: list[int]) -> int | None:
    return next((n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path, help="OUTPUTS/NAME of a run that has its stages 02, 03 and, if any, 05")
    options.add_argument("--llama-python", default=sys.executable if find_spec("llama_cpp") else None)
    arguments = options.parse_args()
    os.environ["TTL_OUTPUTS"] = str(arguments.folder.parent)
    given = read_json(arguments.folder / "run.json")["parameters"]
    run = Run(load_params({"size": given["size"], "file": given["file"], "run": arguments.folder.name}))
    torch.set_num_threads(1)
    disable_progress_bar()
    paths = export_gguf(run)
    rows: list[tuple] = [("file", "MB", "logits differ by", "of a spread of", "perplexity", "against fp32")]
    llama: list[tuple] = [
        ("file", "texts", "texts, Hugging Face", "chats", "logits differ by", "greedy tokens equal", "tokens/s")
    ]
    blocks = TokenBlocks(
        [path for path in run.need("02_tokenizer").files("tokens") if path.name.startswith("test-")],
        run.params.model.max_position_embeddings,
    )
    for path in paths:
        kind, form = path.stem.removeprefix(f"{run.name}-").split("-")
        folder = run.stage({"base": "03_pretraining", "chat": "05_chat"}[kind]).folder / "model"
        tokenizer = load_tokenizer(folder)
        if form == next(iter(FORMS)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            wanted = Expected(model, tokenizer, blocks)
            rows.append(
                (f"{folder.parent.name}/model", *_size(folder / "model.safetensors"), "", "", *wanted.figures())
            )
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        rows.append((path.name, *_size(path), *wanted.logits_of(read), *wanted.figures(read)))
        if arguments.llama_python:
            llama.append((path.name, *wanted.against_llama(arguments.llama_python, path)))
    table("read back by transformers", rows)
    if arguments.llama_python:
        table(f"llama.cpp (llama-cpp-python {wanted.version}) beside transformers, float32", llama)
    else:
        print("\nllama.cpp: not compared, llama_cpp is not installed (see --llama-python)")


def _size(path: Path) -> tuple[str]:
    return (f"{path.stat().st_size / 1e6:.2f}",)


class Expected:
    """What the float32 model gives: ids, logits, greedy tokens and perplexity."""

    def __init__(self, model: Any, tokenizer: Any, blocks: TokenBlocks):
        self.tokenizer, self.blocks = tokenizer, blocks
        chat = bool(tokenizer.chat_template)
        self.chats = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS] if chat else []
        self.prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        if chat:
            asked = [[{"role": "user", "content": text}] for text in PROMPTS]
            self.prompts = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in asked]
        self.prompts.append(blocks.span(0, LOGIT_TOKENS).tolist())
        self.logits = self._logits(model)
        self.greedy = [greedy(model, torch.tensor([ids]), NEW_TOKENS)[0][0].tolist() for ids in self.prompts]
        self.perplexity = perplexity(model, blocks)["perplexity"]

    def _logits(self, model: Any) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(torch.tensor([ids])).logits[0].double().numpy() for ids in self.prompts]

    def logits_of(self, model: Any) -> tuple[str, str]:
        pairs = zip(self._logits(model), self.logits, strict=True)
        spread = np.concatenate([one.ravel() for one in self.logits]).std()
        return f"{max(np.abs(one - other).max() for one, other in pairs):.2e}", f"{spread:.2f}"

    def figures(self, model: Any = None) -> tuple[str, str]:
        if model is None:
            return f"{self.perplexity:.4f}", ""
        found = perplexity(model, self.blocks)["perplexity"]
        return f"{found:.4f}", f"{found / self.perplexity - 1:+.4%}"

    def against_llama(self, python: str, path: Path) -> tuple[str, ...]:
        asked = {"path": str(path), "context": self.blocks.block_size, "texts": TEXTS, "chats": CHATS}
        asked |= {"prompts": self.prompts, "new_tokens": NEW_TOKENS}
        script = Path(__file__).with_name("gguf_llama.py")
        found = json.loads(
            subprocess.run([python, script], input=json.dumps(asked), capture_output=True, check=True, text=True).stdout
        )
        self.version = found["version"]
        # two forms of one tokenizer: at the beginning of a text, the Hugging Face one takes a space for its own
        pieces = SentencePieceProcessor(model_file=f"{self.tokenizer.name_or_path}/tokenizer.model")
        forms = (
            [[1, *pieces.encode(text)] for text in TEXTS],
            self.tokenizer(TEXTS, split_special_tokens=True)["input_ids"],
        )
        texts = [sum(one == other for one, other in zip(ids, found["texts"], strict=True)) for ids in forms]
        chats = sum(one == other for one, other in zip(self.chats, found.get("chats", []), strict=True))
        difference = max(
            np.abs(np.array(one) - other).max() for one, other in zip(found["logits"], self.logits, strict=True)
        )
        equal = [first_difference(one, other) for one, other in zip(found["greedy"], self.greedy, strict=True)]
        lengths = [str(NEW_TOKENS if place is None else place) for place in equal]
        return (
            *(f"{count} of {len(TEXTS)}" for count in texts),
            f"{chats} of {len(self.chats)}",
            f"{difference:.2e}",
            f"{', '.join(lengths)} of {NEW_TOKENS}",
            f"{found['tokens_per_second']:.0f}",
        )


if __name__ == "__main__":
    main()
