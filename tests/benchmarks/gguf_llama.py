"""What llama.cpp makes of a GGUF file, for `tests.benchmarks.gguf`: a request in JSON on stdin, the answer on stdout.

Run by any Python that has llama-cpp-python; nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main() -> None:
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(asked["path"], n_ctx=asked["context"], n_threads=1, logits_all=True, verbose=False)
    answer: dict = {"version": llama_cpp.__version__}
    answer["texts"] = [model.tokenize(text.encode(), add_bos=True, special=False) for text in asked["texts"]]
    if template := model.metadata.get("tokenizer.chat_template"):
        pieces = {"bos_token": "<s>", "eos_token": "</s>"}
        formatter = Jinja2ChatFormatter(template, **pieces, add_generation_prompt=False)
        rendered = [formatter(messages=messages).prompt for messages in asked["chats"]]
        answer["chats"] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in rendered]
    answer["greedy"], answer["logits"] = [], []
    seconds = 0.0
    for ids in asked["prompts"]:
        model.reset()
        model.eval(ids)
        answer["logits"].append(np.array(model.scores[: len(ids)]).astype(float).round(6).tolist())
        made: list[int] = []
        begin = time.perf_counter()
        for _ in range(asked["new_tokens"]):
            made.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(made[-1:])
        seconds += time.perf_counter() - begin
        answer["greedy"].append(made)
    answer["tokens_per_second"] = asked["new_tokens"] * len(asked["prompts"]) / seconds
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
