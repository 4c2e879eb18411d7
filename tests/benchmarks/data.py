"""The data of a training step beside the step itself, and how long a resume takes: `python -m tests.benchmarks.data`.

Tokens lie in memory-mapped files (200 MB, random ids), written by the benchmark: the system holds them in its cache,
so the disk itself is not measured. Steps are fp32 on the CPU; the 160m shape takes 1 x 2048 tokens a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.common import SHAPES, Vocabulary, shape_params, table, write_tokens
from ttl_utils import blocks, carbon
from ttl_utils.blocks import TokenBlocks, step_indices
from ttl_utils.health import Health
from ttl_utils.lean import make_lean
from ttl_utils.ledger import stage_energy
from ttl_utils.loss import Learner
from ttl_utils.model import new_model
from ttl_utils.pretraining import block_steps
from ttl_utils.records import Records
from ttl_utils.step import Step, make_optimizer

# rows of 2,048 tokens in the larger published set, and of a step (section 3.4)
PAPER_BLOCKS, PAPER_ROWS = 3_033_690, 4
EARLY, LATE = 40, 400_000
# the paper's 160m, 26,912 tokens a second on average: rows of the energy ledger by then, one in 15 seconds
LATE_SAMPLES = round(LATE * 8192 / 26_912 / 15)
ONE_PROCESS: Any = SimpleNamespace(num_processes=1, process_index=0)


def steps_of(shape: str, paths: list[Path], isolate: bool) -> Callable[[int], Step]:
    params = shape_params(shape)
    settings = params.pretraining.model_copy(update={"isolate_documents": isolate})
    run: Any = SimpleNamespace(params=SimpleNamespace(pretraining=settings, pretraining_seed=0))
    get_step = block_steps(TokenBlocks(paths, params.model.max_position_embeddings), run)
    return lambda step: get_step(step, ONE_PROCESS)


def seconds_of(work: Callable[[int], object], count: int) -> float:
    """Median seconds of `work(0)`, `work(1)`, ..."""
    times = []
    for number in range(count):
        started = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def step_seconds(shape: str, get_step: Callable[[int], Step], count: int) -> float:
    """Forward, backward and optimizer alone, the first step left out."""
    params = shape_params(shape)
    model = make_lean(new_model(params.model, Vocabulary(params.tokenizer.vocab_size), 0, "sdpa")).train()
    learner, optimizer = Learner(model), make_optimizer(model, params.pretraining)
    steps = [get_step(number) for number in range(count + 1)]

    def work(number: int) -> None:
        for batch in steps[number].micro_batches:
            (learner(**batch) / steps[number].targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    work(count)
    return seconds_of(work, count)


def loading(shapes: list[str], paths: list[Path]) -> None:
    rows: list[tuple] = [("", "data, ms", "step, ms", "share")]
    for shape in shapes:
        step_s = step_seconds(shape, steps_of(shape, paths, False), 10 if shape == "nano" else 3)
        for isolate in (False, True):
            get_step = steps_of(shape, paths, isolate)
            # the first one makes the epoch's order
            get_step(0)
            data_s = seconds_of(get_step, 1000)
            name = f"{shape}, documents isolated" if isolate else shape
            rows.append((name, f"{data_s * 1e3:.3f}", f"{step_s * 1e3:,.0f}", f"{data_s / step_s:.3%}"))
    table("Data of a step beside the step", rows)


def read(get_step: Callable[[int], Step]) -> None:
    for step in range(300):
        get_step(step)


def peak_mb(work: Callable[[], object]) -> float:
    blocks._order.cache_clear()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def memory(shapes: list[str], paths: list[Path]) -> None:
    """What Python and numpy hold at most; mapped pages are the system's, and it takes them back."""
    files = [path for path in paths if path.suffix == ".bin"]
    rows: list[tuple] = [
        ("", *(f"{sum(path.stat().st_size for path in part) / 1e6:.0f} MB" for part in (files[:1], files)))
    ]
    for shape, isolate in itertools.product(shapes, (False, True)):
        name = f"{shape}, documents isolated" if isolate else shape
        peaks = []
        for part in (paths[:2], paths):
            get_step = steps_of(shape, part, isolate)
            peaks.append(f"{peak_mb(partial(read, get_step)):.2f}")
        rows.append((name, *peaks))
    table("Peak memory of 300 steps' data, MB, by the size of the files", rows)
    order = peak_mb(lambda: step_indices(0, 0, PAPER_ROWS, PAPER_BLOCKS))
    print(f"  the order of an epoch of {PAPER_BLOCKS:,} blocks: {order:.0f} MB while it is made")


def records(step: int) -> list[dict]:
    """A curve up to a step: a record in 100 steps, an evaluation in 100,000."""
    rows: list[dict] = []
    for at in range(0, step + 1, 100):
        row = {"step": at, "tokens": at * 8192}
        if at % 100_000 == 0:
            rows.append({**row, "validation_loss": 3.1, "perplexity": 22.1, "bits_per_byte": 1.1, "energy_kwh": 1.5})
        if at:
            # a loss that falls and jitters as one does
            loss = 2.8 + 7.5 / (1 + at / 500) + 0.05 * ((at * 7919) % 101 / 101 - 0.5)
            row |= {"loss": round(loss, 6), "loss_std": 0.05, "learning_rate": 5e-4, "tokens_per_second": 26912.3}
            rows.append({**row, "share_of_peak": 0.1036, "data_share": 0.0003, "energy_kwh": 1.234567})
    return rows


def resume(folder: Path) -> None:
    params = shape_params("160m")
    sample = folder / "sample.jsonl"
    with carbon.track(sample, "03_pretraining", params.carbon):
        pass
    line = sample.read_text().splitlines()[0] + "\n"
    found: dict[int, dict[str, float]] = {}
    for step, samples in ((EARLY, 1), (LATE, LATE_SAMPLES)):
        curve, ledger = folder / f"{step}.jsonl", folder / f"energy-{step}.jsonl"
        curve.write_text("".join(json.dumps(row) + "\n" for row in records(step)))
        ledger.write_text(line * samples)

        def order(number: int, step: int = step) -> None:
            # made anew, as in a new process
            blocks._order.cache_clear()
            step_indices(number, step, PAPER_ROWS, PAPER_BLOCKS)

        def health(rows: list[dict]) -> None:
            watch = Health(vocab_size=params.tokenizer.vocab_size, warmup_steps=params.pretraining.warmup_steps)
            for row in rows:
                watch.see(row)

        kept = Records(curve, step, None).rows
        works = {
            f"order of {PAPER_BLOCKS:,} blocks": order,
            "metrics.jsonl read and written": lambda _, curve=curve, step=step: Records(curve, step, None),
            "health of its records": lambda _, kept=kept: health(kept),
            "energy ledger": lambda _, ledger=ledger: stage_energy(ledger, "03_pretraining"),
        }
        found[step] = {name: seconds_of(work, 5) for name, work in works.items()}
        found[step]["all"] = sum(found[step].values())
    rows: list[tuple] = [("", f"at step {EARLY}, ms", f"at step {LATE:,}, ms")]
    rows += [(name, *(f"{found[step][name] * 1e3:.1f}" for step in (EARLY, LATE))) for name in found[EARLY]]
    table("What a resume does besides opening its checkpoint, which is as large at any step", rows)
    print(f"  by step {LATE:,}: {len(kept):,} records, {LATE_SAMPLES:,} rows of the energy ledger")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=["nano", "160m"])
    parser.add_argument("--megabytes", type=float, default=200)
    given = parser.parse_args()
    # ids that both vocabularies hold
    vocab_size = min(shape_params(shape).tokenizer.vocab_size for shape in given.shapes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_tokens(folder / "tokens", round(given.megabytes * 1e6 / 2), vocab_size)
        loading(given.shapes, paths)
        memory(given.shapes, paths)
        resume(folder)


if __name__ == "__main__":
    main()
