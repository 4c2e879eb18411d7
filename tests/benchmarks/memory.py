"""Peak memory of a training step, ours beside transformers': `python -m tests.benchmarks.memory [--rows 4]`.

A 160m step of 4 x 2048 tokens in fp32 with fused AdamW, twice, so that the optimizer's state is there. Each way runs
in a process of its own, and its peak is what the system says of that process (resident set). `plain` is
`model(input_ids, labels=labels).loss.backward()`. The losses and every gradient are compared. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ttl_utils.params import load_params
from ttl_utils.schema import Model

VOCAB = 32_000


class Vocabulary:
    """What a new model asks of its tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

    def __len__(self) -> int:
        return VOCAB


def model_160m(layers: int) -> tuple[Model, Any]:
    """The 160m's shape, with so many layers, and a model of it."""
    from ttl_utils.model import new_model

    shape = load_params({"size": "160m"}).model.model_copy(update={"num_hidden_layers": layers})
    return shape, new_model(shape, Vocabulary(), seed=0, attention="sdpa").train()


def peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def measure(way: str, rows: int, layers: int, gradients: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from ttl_utils.lean import kept_memory, make_lean
    from ttl_utils.loss import summed_loss

    shape, model = model_160m(layers)
    if way == "ours":
        make_lean(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (rows, shape.max_position_embeddings), generator=drawn)
    losses = []
    with kept_memory() if way == "ours" else contextlib.nullcontext():
        for number in range(2):
            if way == "ours":
                loss = summed_loss(model, {"input_ids": ids, "labels": ids}) / (ids.numel() - rows)
            else:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            if number == 0:
                save_file({name: value.grad for name, value in model.named_parameters()}, gradients)
            optimizer.step()
            optimizer.zero_grad()
    print(json.dumps({"peak": peak_gib(), "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, path = arguments.measure
        return measure(way, arguments.rows, arguments.layers, Path(path))

    from safetensors import safe_open

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {way: Path(folder) / f"{way}.safetensors" for way in ("plain", "ours")}
        for way, path in paths.items():
            command = [sys.executable, "-m", "tests.benchmarks.memory", *sys.argv[1:], "--measure", way, str(path)]
            found[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        with safe_open(paths["plain"], "pt") as plain, safe_open(paths["ours"], "pt") as ours:
            worst = max(
                float((ours.get_tensor(name) - one).abs().max() / one.abs().max())
                for name, one in ((name, plain.get_tensor(name)) for name in plain.keys())  # noqa: SIM118
            )
    print(f"{arguments.layers} layers, {arguments.rows} x 2048 tokens, two steps")
    print(f"{'':8} {'peak GiB':>9} {'of plain':>9} {'loss, step 1':>13} {'step 2':>9}")
    for way, values in found.items():
        ratio = values["peak"] / found["plain"]["peak"]
        first, second = values["losses"]
        print(f"{way:8} {values['peak']:9.2f} {ratio:9.3f} {first:13.6f} {second:9.6f}")
    print(f"gradients: largest difference of a tensor, relative to its largest value: {worst:.1e}")


if __name__ == "__main__":
    main()
