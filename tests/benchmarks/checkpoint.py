"""A checkpoint's write time beside the disk's own rate: `python -m tests.benchmarks.checkpoint [--size 160m]`.

The disk's own rate is that of the same bytes written in large pieces to files of the same sizes, and synced. The plain
way writes with safetensors' own function, then reads back to hash, then syncs. All in turn, each round; needs about 3
GiB of memory and 8 GB of disk at the 160m's shape.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ttl_utils import checkpoints
from ttl_utils.files import sha256
from ttl_utils.model import new_model
from ttl_utils.params import load_params
from ttl_utils.step import make_optimizer


def any_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"p{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="p0")), bos_token="p1", eos_token="p2"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="160m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the disk to measure; default: the system's temporary one")
    arguments = parser.parse_args()

    params = load_params({"size": arguments.size})
    tokenizer = any_tokenizer(params.tokenizer.vocab_size)
    model = new_model(params.model, tokenizer, seed=0, attention="sdpa")
    optimizer = make_optimizer(model, params.pretraining)
    for weights in model.parameters():
        weights.grad = torch.randn_like(weights)
    optimizer.step()
    optimizer.zero_grad()
    names = {id(weights): name for name, weights in model.named_parameters()}
    moments = {
        f"{names[id(weights)]}/{key}": value for weights, kept in optimizer.state.items() for key, value in kept.items()
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        folder = Path(root)
        sizes: list[int] = []

        def ours() -> None:
            made = checkpoints.save_checkpoint(folder, 1, model, tokenizer, optimizer, {})
            sizes[:] = [path.stat().st_size for path in made.iterdir()]

        def disk() -> None:
            block = memoryview(os.urandom(1 << 24))
            for number, size in enumerate(sizes):
                with (folder / f"plain-{number}").open("wb", buffering=0) as file:
                    for start in range(0, size, len(block)):
                        file.write(block[: size - start])
                    os.fsync(file.fileno())

        def plain() -> None:
            other = folder / "library"
            other.mkdir()
            checkpoints.save_pretrained(model, tokenizer, other)
            save_file(moments, other / "optimizer.safetensors")
            for path in other.iterdir():
                sha256(path)
                with path.open("r+b") as file:
                    os.fsync(file.fileno())

        def verify() -> None:
            checkpoints.check(folder / "step-0000001")

        def load() -> None:
            checkpoints.load_checkpoint(folder / "step-0000001", model, optimizer)

        writers = {"ours": ours, "the disk itself": disk, "safetensors, then hash, then sync": plain}
        readers = {"verify (all bytes read and hashed)": verify, "load weights and optimizer": load}
        seconds: dict[str, list[float]] = {name: [] for name in (*writers, *readers)}

        def measure(name: str, work: Callable[[], None]) -> None:
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(folder / "library", ignore_errors=True)
            for path in folder.glob("plain-*"):
                path.unlink()

        ours()
        for number in range(arguments.rounds):
            # each is first in turn: many disks take the first gigabytes faster than what follows
            for name in sorted(writers, key=lambda name: (list(writers).index(name) - number) % len(writers)):
                measure(name, writers[name])
            for name, work in readers.items():
                measure(name, work)
    gigabytes = sum(sizes) / 1e9
    print(f"{arguments.size}: {gigabytes:.2f} GB in {len(sizes)} files, {os.cpu_count()} cores, medians of rounds")
    print(f"{'':36} {'seconds':>8} {'GB/s':>6} {'to the disk itself':>19}")
    for name, times in seconds.items():
        # of the same round: other work on the machine slows both
        ratio = statistics.median(a / b for a, b in zip(times, seconds["the disk itself"], strict=True))
        median = statistics.median(times)
        print(f"{name:36} {median:8.2f} {gigabytes / median:6.2f} {ratio:19.2f}")


if __name__ == "__main__":
    main()
