"""Tokens per second and memory of a model that writes, beside its perplexity (paper, section 4.1).

Prefill reads the prompt at once; decode then writes one token at a time with a key-value cache, greedily. Every way of
holding the weights is measured in the same process, in rounds that take turns, on the same tokens. PyTorch's own
attention (sdpa) in all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from ttl_utils.blocks import TokenBlocks
from ttl_utils.decoding import (
    best_seconds,
    free_memory,
    generate_seconds,
    greedy,
    memory_growth,
    read_bandwidth,
    wait,
)
from ttl_utils.devices import peak
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.model import Hardware, choose_hardware
from ttl_utils.perplexity import perplexity
from ttl_utils.progress import Progress
from ttl_utils.provenance import machine
from ttl_utils.quantized import Way, cache_bytes, step_bytes, ways, weight_bytes
from ttl_utils.run import Run
from ttl_utils.schema import Inference
from ttl_utils.subject import blocks_of, load_model, subject_of

# timed turns of each way, and held-out tokens that each one is scored on
ROUNDS, SCORED_TOKENS = 5, 2**14


def product_rate(way: Way, hardware: Hardware) -> float | None:
    """FLOPs per second of large products in this way: NVIDIA's figure on its GPUs, else measured on a layer."""
    if hardware.device == "cuda":
        return peak(Hardware("cuda", way.precision, "")).flops_per_second
    layer = way.make(torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False)))
    weight = next(iter(layer.parameters()), torch.empty(0))
    hidden = torch.full((2048, 2048), 0.5, device=hardware.device, dtype=weight.dtype)
    with torch.inference_mode():
        return 2 * 2048**3 / best_seconds(lambda: (layer(hidden), wait(hardware.device)), 0.5)


# all ways, in rounds


@dataclass(frozen=True)
class _Ready:
    way: Way
    model: Any
    figures: dict[str, Any]

    def turns(self, ids: torch.Tensor, new_tokens: int) -> Callable[[], list[float]]:
        """What takes a turn with this prompt, and gives the seconds of each token."""
        from transformers import StaticCache

        cache = step = None
        if self.way.compiled:
            cache = StaticCache(config=self.model.config, max_cache_len=ids.shape[1] + new_tokens)
            step = self.model.get_compiled_call(None)
        return lambda: greedy(self.model, ids, new_tokens, cache, step)[1]


def measure_inference(
    model: Any,
    settings: Inference,
    hardware: Hardware,
    blocks: TokenBlocks,
    text_bytes: int,
    status: Path | None = None,
) -> list[dict]:
    """A row for each way and batch size, of a model in fp32 on the CPU.

    `step_s` and `first_token_s` have a figure for each round: the median of the round's steps, and the prompt's time.
    Rates count all rows of a batch together. A step's limit is what it must read (weights, and the cache at half of
    the new tokens) at the measured bandwidth, the prompt's is its products at the device's rate. `peak_bytes` are the
    weights and the rise of memory in the way's first turn. A way that fails is a row with the reason.

    Raises:
        ParameterError: prompt and new tokens do not fit in the model's context.
    """
    longest = settings.prompt_tokens + settings.new_tokens
    if longest > blocks.block_size:
        raise ParameterError(
            f"evaluation.inference: prompt_tokens {settings.prompt_tokens:,} and new_tokens {settings.new_tokens:,} "
            f"are {longest:,} tokens, and the model reads {blocks.block_size:,}: ask for fewer"
        )
    found = ways(hardware)
    # two of the largest ways' worth of memory free, beside all of them; else one after another
    together = (len(found) + 2) * weight_bytes(model) < free_memory(hardware.device)
    wanted = np.resize(blocks.span(0, min(blocks.tokens, 2**20)), (max(settings.batch_sizes), settings.prompt_tokens))
    prompts = torch.from_numpy(wanted).to(hardware.device)
    limits = {
        "bandwidth_bytes_per_second": read_bandwidth(hardware.device),
        "threads": torch.get_num_threads() if hardware.device == "cpu" else None,
    }
    rows: list[dict] = []
    with Progress("turns of inference measured", len(found) * len(settings.batch_sizes) * ROUNDS, status) as progress:
        for group in [found] if together else [[way] for way in found]:
            ready, failed = [], {}
            for way in group:
                made: dict[str, Any] = {"status": "done"}
                with _noted(made):
                    ready.append(_ready(way, model, hardware, blocks, text_bytes))
                if made["status"] != "done":
                    failed[way.name] = made
                    progress.update(progress.done + len(settings.batch_sizes) * ROUNDS)
            for batch_size in settings.batch_sizes:
                rows += _batch(ready, prompts[:batch_size], settings.new_tokens, progress)
                rows += [{"way": name, "batch_size": batch_size} | made for name, made in failed.items()]
    order = {way.name: number for number, way in enumerate(found)}
    rows.sort(key=lambda row: (settings.batch_sizes.index(row["batch_size"]), order[row["way"]]))
    plain = {row["batch_size"]: row for row in rows if row["way"] == found[0].name}
    work = _prompt_flops(model, settings.prompt_tokens)
    return [_with_rates(row, settings, limits, plain[row["batch_size"]], work) for row in rows]


def _ready(way: Way, model: Any, hardware: Hardware, blocks: TokenBlocks, text_bytes: int) -> _Ready:
    made = way.make(model)
    # a row at a time: dynamic int8 takes one scale for all that it is given
    scored = perplexity(made, blocks, text_bytes=text_bytes, batch_size=1, max_tokens=SCORED_TOKENS)
    figures = {
        "weight_bytes": weight_bytes(made),
        "step_bytes": step_bytes(made),
        "cache_bytes_per_token": cache_bytes(made.config, made.dtype),
        "product_rate": product_rate(way, hardware),
    }
    return _Ready(way, made, scored | figures)


def _batch(ready: list[_Ready], ids: torch.Tensor, new_tokens: int, progress: Progress) -> list[dict]:
    """Turns of all ways at one batch size, in rounds that go forth and back."""
    rows = []
    for one in ready:
        row = {"way": one.way.name, "batch_size": len(ids), "status": "done", **one.figures}
        row |= {"first_token_s": [], "step_s": []}
        turn = None
        with _noted(row):
            turn = one.turns(ids, new_tokens)
            growth = memory_growth(ids.device.type, turn)
            row["peak_bytes"] = None if growth is None else row["weight_bytes"] + growth
            if not one.way.compiled:
                row["generate_s"] = generate_seconds(one.model, ids, new_tokens)
        rows.append((row, turn))
    for number in range(ROUNDS):
        for row, turn in rows[:: -1 if number % 2 else 1]:
            progress.update(progress.done + 1, f"batch {len(ids)}, {row['way']}")
            if row["status"] == "done":
                with _noted(row):
                    first, *steps = turn()
                    row["first_token_s"].append(first)
                    row["step_s"].append(median(steps))
    return [row for row, _ in rows]


@contextlib.contextmanager
def _noted(row: dict) -> Iterator[None]:
    """An error of whatever kind (memory, an operation that the device lacks) goes into the row as its reason."""
    try:
        yield
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        kind = [] if isinstance(error, TTLError) else [type(error).__name__]
        row |= {"status": "not run", "reason": ": ".join([*kind, *([text] if text else [])])}


def _prompt_flops(model: Any, tokens: int) -> float:
    """Of a prompt's products: all layers for each token, the output layer for the last, causal attention."""
    head = model.get_output_embeddings().weight.numel()
    layers = step_bytes(model) // 4 - head
    return (
        2.0 * layers * tokens + 2.0 * head + 2.0 * model.config.num_hidden_layers * model.config.hidden_size * tokens**2
    )


def _with_rates(row: dict, settings: Inference, limits: dict, plain: dict, prompt_flops: float) -> dict:
    """The row with what follows from its seconds; `against_plain` compares within rounds with the plainest way."""
    row = row | limits
    if row["status"] != "done":
        return row
    size, step, first = row["batch_size"], median(row["step_s"]), median(row["first_token_s"])
    length = settings.prompt_tokens + settings.new_tokens / 2
    read = row["step_bytes"] + size * length * row["cache_bytes_per_token"]
    row |= {
        "prefill_tokens_per_second": size * settings.prompt_tokens / first,
        "decode_tokens_per_second": size / step,
        "decode_slowest": size / max(row["step_s"]),
        "decode_fastest": size / min(row["step_s"]),
        "limit_tokens_per_second": size * limits["bandwidth_bytes_per_second"] / read,
        "share_of_limit": read / step / limits["bandwidth_bytes_per_second"],
        "prefill_share_of_limit": size * prompt_flops / first / row["product_rate"] if row["product_rate"] else None,
        "generate_tokens_per_second": size * settings.new_tokens / row["generate_s"] if "generate_s" in row else None,
    }
    if plain["status"] == "done":
        pairs = zip(plain["step_s"], row["step_s"], strict=True)
        row["against_plain"] = median(other / ours for other, ours in pairs)
    return row


# the report, and its table


def inference_report(run: Run) -> dict:
    """All of it for the model that stage 04 evaluates; {} where `evaluation.inference` is null.

    Kept in `04_evaluation/reports/inference.json`, and read from there the next time, unless the weights, the settings
    or the machine are others. A kill costs what was measured: times of two processes do not compare.

    Returns:
        key: what the figures depend on; rows: those of `measure_inference`.
    """
    settings = run.params.evaluation.inference
    if settings is None:
        return {}
    stage, subject, hardware = run.need("04_evaluation"), subject_of(run), choose_hardware(run.params.pretraining)
    path = stage.folder / "reports" / "inference.json"
    key = {
        "weights": [subject.weights, subject.beside_weights],
        "settings": settings.model_dump(),
        "rounds": ROUNDS,
        "scored_tokens": SCORED_TOKENS,
        "device": torch.cuda.get_device_name() if hardware.device == "cuda" else machine()["processor"],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "torchao") if find_spec(name)},
    }
    if path.is_file() and (known := read_json(path))["key"] == key:
        return known
    blocks, text_bytes = blocks_of(run, subject)
    plain = replace(hardware, device="cpu", attention="sdpa")
    with stage.measuring():
        model = load_model(subject.folder, plain, torch.float32)
        rows = measure_inference(model, settings, hardware, blocks, text_bytes, stage.folder / "status.json")
    report = {"key": key, "rows": rows}
    # the report last: a kill in between measures again
    stage.add_metrics(inference=rows)
    write_json(path, report)
    return report


def inference_table(rows: list[dict]) -> pd.DataFrame:
    """A row for each way and batch size; one that was not run says why."""
    table = [
        {
            "way": row["way"],
            "batch": row["batch_size"],
            "prefill tokens/s": row.get("prefill_tokens_per_second"),
            "first token (ms)": 1e3 * median(row["first_token_s"]) if row["status"] == "done" else None,
            "decode tokens/s": row.get("decode_tokens_per_second"),
            "per sequence": row["decode_tokens_per_second"] / row["batch_size"] if row["status"] == "done" else None,
            "share of the limit": row.get("share_of_limit"),
            "ratio to the first": row.get("against_plain"),
            "generate() tokens/s": row.get("generate_tokens_per_second"),
            "weights (GiB)": row["weight_bytes"] / 2**30 if row["status"] == "done" else None,
            "peak (GiB)": row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None,
            "perplexity": row.get("perplexity"),
            "note": row.get("reason", ""),
        }
        for row in rows
    ]
    return pd.DataFrame(table)
