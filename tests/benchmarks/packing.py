"""Text to packed tokens, ours beside the usual way: `python -m tests.benchmarks.packing [--mb 20] [--text FILE]`.

The usual way is `datasets.map(batched=True)` with the Hugging Face tokenizer, then lists grouped into blocks, as
transformers' run_clm example does. Both read the same Parquet file with the same tokenizer; the ids are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import text
from ttl_utils.blocks import DTYPE
from ttl_utils.encoding import Codec
from ttl_utils.packing import pack_texts
from ttl_utils.params import load_params
from ttl_utils.tokenizer import train_sentencepiece, training_lines, write_llama_folder

BLOCK = 2048


def write_corpus(folder: Path, texts: list[str]) -> SimpleNamespace:
    """Stage 01 as far as packing reads it."""
    path = folder / "train-00000.parquet"
    schema = pa.schema([("text", pa.string()), ("licence", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(texts), 1024):
            part = texts[start : start + 1024]
            writer.write_table(pa.table({"text": part, "licence": ["none"] * len(part)}, schema))
    return SimpleNamespace(files=lambda use: [path])


def usual_way(path: Path, tokenizer, folder: Path, processes: int):
    """Tokenize and group with `datasets`; returns the set before grouping, which drops the rest of each batch."""
    import datasets

    def group(rows: dict) -> dict:
        joined = {key: list(chain(*rows[key])) for key in rows}
        whole = len(joined["input_ids"]) // BLOCK * BLOCK
        result = {key: [ids[n : n + BLOCK] for n in range(0, whole, BLOCK)] for key, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    # one process: the tokenizer's own threads share the machine's cores
    spread = {"num_proc": processes} if processes > 1 else {}
    data = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder))
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text", "licence"], **spread)
    data.map(group, batched=True, **spread)
    return data


def ids_of(data) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in data.with_format("arrow")["input_ids"].chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=20, help="text to encode, in MB")
    parser.add_argument("--text", type=Path, help="a Parquet file with a column `text`, or a text file")
    parser.add_argument("--vocab-size", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    source = text.read(arguments.text) if arguments.text else text.documents(arguments.mb)
    texts, size = [], 0
    for one in source:
        if one.strip() and size < arguments.mb * 1e6:
            texts.append(one.strip())
            size += len(one.encode())
    values = load_params({}).tokenizer.model_copy(
        update={"vocab_size": arguments.vocab_size, "append_eos": False, "parity_documents": 1}
    )
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        corpus = write_corpus(folder, texts)
        sample = list(islice(texts, 0, None, max(1, len(texts) // 1000)))
        model = train_sentencepiece(training_lines(sample, values.max_sentence_length), values)
        tokenizer = write_llama_folder(model, folder, BLOCK)
        codec = Codec(tokenizer, model)
        found: dict = {}

        def ours() -> None:
            shutil.rmtree(folder / "tokens", ignore_errors=True)
            stage = SimpleNamespace(folder=folder)
            found["ours"] = pack_texts(corpus, stage, codec, values, "train", len(texts))

        def usual(processes: int) -> Callable[[], None]:
            def work() -> None:
                cache = folder / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                found["usual"] = usual_way(corpus.files("")[0], tokenizer, cache, processes)

            return work

        ways = {"ours": ours, "datasets, 1 process": usual(1)}
        if cores > 1:
            ways[f"datasets, {cores} processes"] = usual(cores)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, work in ways.items():
                started, used = time.perf_counter(), sum(os.times()[:4])
                work()
                seconds[name].append(time.perf_counter() - started)
                # of all processes: on a busy machine a fairer ratio than time
                cpu[name].append(sum(os.times()[:4]) - used)
                if name != "ours":
                    paths = [path for path in found["ours"]["paths"] if path.suffix == ".bin"]
                    packed = np.concatenate([np.fromfile(path, dtype=DTYPE) for path in paths])
                    assert np.array_equal(packed, ids_of(found["usual"])), "the ids differ"
        stored = sum(path.stat().st_size for path in found["ours"]["paths"])
        tokens = found["ours"]["tokens"]
        print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens, {cores} cores; ids equal")
        print(f"bytes per stored token, document starts included: {stored / tokens:.3f}")
        print(f"{'':24} {'tokens/s':>12} {'ours is faster by':>18} {'and takes less CPU by':>22}")
        for name in ways:
            # of the same round: other work on the machine slows both
            ratios = [
                statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True))
                for times in (seconds, cpu)
            ]
            print(f"{name:24} {tokens / statistics.median(seconds[name]):12,.0f} {ratios[0]:18.2f} {ratios[1]:22.2f}")


if __name__ == "__main__":
    main()
