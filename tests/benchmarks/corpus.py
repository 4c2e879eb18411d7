"""Stages 01 and 02 on more and more text: is memory flat, is time linear, and how long would the paper's corpus take?

    python -m tests.benchmarks.corpus --megabytes 50 1000

Each size runs in a process of its own; memory is the peak of all its processes together, sampled four times a second.
SentencePiece's training is bounded by its sample, which is the same at every size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

from tests.benchmarks.text import documents

# what the paper's corpus holds: 10,564,643 documents; about 30 GB of text
PAPER_BYTES = 30e9
# tokenizer.train_characters of the 160m
TRAIN_CHARACTERS = 1_000_000_000
STEPS = ("read and judge", "mark", "write", "hash", "train the tokenizer", "encode and pack", "rest")

SCRIPT = """
import json, sys, time
from ttl_utils import corpus, run as runs, tokenizer
from ttl_utils.params import load_params
from ttl_utils.run import Run

times = {}
def timed(module, name, label):
    plain = getattr(module, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            times[label] = times.get(label, 0) + time.perf_counter() - start
    setattr(module, name, call)

timed(corpus, "_read_all", "read and judge")
timed(corpus, "_mark", "mark")
timed(corpus, "_write", "write")
timed(runs, "sha256", "hash")
timed(tokenizer, "train_sentencepiece", "train the tokenizer")
timed(tokenizer, "pack_texts", "encode and pack")
if __name__ == "__main__":
    run = Run(load_params(json.loads(sys.argv[1])))
    start = time.perf_counter()
    one = corpus.prepare_corpus(run).metrics()
    middle = time.perf_counter()
    two = tokenizer.prepare_tokenizer(run).metrics()
    end = time.perf_counter()
    times["rest"] = end - start - sum(times.values())
    print("RESULT " + json.dumps({
        "stage_01_s": middle - start, "stage_02_s": end - middle, "times": times,
        "documents_in": one["documents_in"], "documents_kept": one["documents_kept"],
        "tokens": two["train_tokens"] + two["test_tokens"],
        "sampled": two["read_for_training"]["characters"],
    }))
"""


def write_text(folder: Path, megabytes: float) -> tuple[int, int]:
    """JSON lines in files of about 100 MB; returns documents and bytes of text."""
    count = size = 0
    for number in range(max(1, round(megabytes / 100))):
        with (folder / f"text-{number:03}.jsonl").open("w", encoding="utf-8") as file:
            for text in documents(megabytes / max(1, round(megabytes / 100)), seed=number):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
                size += len(text.encode())
    return count, size


def overrides(folder: Path, workers: int | None) -> dict:
    source = {"name": "made", "use": "corpus", "kind": "plain", "filter": "prose", "licence": "CC0 1.0"}
    sources = [{**source, "files": [str(folder / "*.jsonl")], "columns": ["text"]}]
    return {
        "size": "160m",
        "data": {"sources": sources, "collection": None, "workers": workers},
        "evaluation": {"downstream": []},
        "tokenizer": {"train_samples": 5000, "vocab_size": 8000},
    }


def memory(process: psutil.Process) -> int:
    """Bytes held by a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def measure(megabytes: float, workers: int | None) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count, size = write_text(folder, megabytes)
        script = folder / "made.py"
        script.write_text(SCRIPT)
        environment = os.environ | {"TTL_OUTPUTS": str(folder / "outputs"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(script), json.dumps(overrides(folder, workers))]
        peak, start = 0, time.perf_counter()
        with (folder / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                peak = max(peak, memory(watched))
                time.sleep(0.25)
            log.seek(0)
            text = log.read()
        if process.returncode:
            raise SystemExit(text[-3000:])
        result = json.loads(text.rpartition("RESULT ")[2])
        disk = sum(path.stat().st_size for path in (folder / "outputs").rglob("*") if path.is_file())
    print(f"{megabytes:g} MB: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return result | {"documents": count, "bytes": size, "peak_bytes": peak, "disk_bytes": disk}


def table(results: list[dict]) -> pd.DataFrame:
    rows = []
    for found in results:
        rows.append(
            {
                "text, MB": found["bytes"] / 1e6,
                "documents": found["documents"],
                "stage 01, s": found["stage_01_s"],
                "stage 01, MB/s": found["bytes"] / 1e6 / found["stage_01_s"],
                "stage 02, s": found["stage_02_s"],
                "tokens/s of packing": found["tokens"] / found["times"]["encode and pack"],
                "peak memory, MB": found["peak_bytes"] / 1e6,
                "disk left, bytes per byte of text": found["disk_bytes"] / found["bytes"],
            }
        )
    return pd.DataFrame(rows)


def projection(found: dict, cores: int) -> pd.DataFrame:
    """Hours for the paper's corpus from the largest size measured; only judging is taken to share the cores."""
    scale = PAPER_BYTES / found["bytes"]
    rows = []
    for step in STEPS:
        # the tokenizer learns from train_characters at most, and starting up does not grow with the corpus
        grown = {"train the tokenizer": TRAIN_CHARACTERS / found["sampled"], "rest": 1.0}.get(step, scale)
        seconds = found["times"].get(step, 0) * grown
        # encoding uses threads for a part of its time only: nothing is promised for more cores
        shared = step == "read and judge"
        row = {"step": step, "shares the cores": "yes" if shared else "no"}
        row |= {f"hours, {n} cores": seconds / 3600 * (cores / n if shared else 1) for n in (2, 16)}
        rows.append(row)
    frame = pd.DataFrame(rows)
    total = {"step": "all", "shares the cores": ""} | frame.filter(like="hours").sum().to_dict()
    return pd.concat([frame, pd.DataFrame([total])], ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50, 1000])
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    results = [measure(size, given.workers) for size in given.megabytes]
    pd.set_option("display.width", 200, "display.max_columns", 20)
    print(table(results).round(2).to_string(index=False))
    first, last = results[0], results[-1]
    times = [found["stage_01_s"] + found["stage_02_s"] - found["times"]["train the tokenizer"] for found in results]
    grown = (last["bytes"] / first["bytes"], times[-1] / times[0], last["peak_bytes"] / first["peak_bytes"])
    print(f"\ntext x {grown[0]:.1f}: time x {grown[1]:.1f}, peak memory x {grown[2]:.2f}")
    cores = given.workers or os.cpu_count() or 1
    print(
        f"\nprojected, not run: {PAPER_BYTES / 1e9:.0f} GB of text, from {last['bytes'] / 1e6:.0f} MB on {cores} cores"
    )
    print(projection(last, cores).round(2).to_string(index=False))
    disk = last["disk_bytes"] / last["bytes"] * PAPER_BYTES
    print(f"disk: {disk / 1e9:.0f} GB when done; while stage 01 works, as much again for its Parquet files")


if __name__ == "__main__":
    main()
