"""Small data for every figure that there is, as its CSV file holds it."""

from __future__ import annotations

import math

import pandas as pd

from ttl_utils.figures_pretraining import PANELS, with_findings
from ttl_utils.health import Finding


def records(count: int = 20) -> list[dict]:
    """A loss that falls from 8 to 3, evaluated at both ends and in the middle."""
    rows: list[dict] = []
    for number in range(count + 1):
        row = {"step": 100 * number, "tokens": 204_800 * number, "energy_kwh": number * 1e-5}
        loss = 3 + 5 * math.exp(-number / 4)
        if number:
            rows.append({**row, "loss": loss, **{name: 0.001 * number for name in PANELS if name not in row}})
        if number % (count // 2) == 0:
            epoch = 2 * number // count
            rows.append({**row, "validation_loss": loss, "perplexity": math.exp(loss), "epoch": epoch})
    return rows


def found(*kinds: str) -> list[Finding]:
    return [Finding(kind, 100 * (at + 5), 204_800 * (at + 5), "evidence") for at, kind in enumerate(kinds)]


def flow() -> pd.DataFrame:
    counts = {"duplicate 5-grams": 14, "too few words": 9, "language": 4, "personal data (cpf)": 3, "no text": 2}
    counts |= {"exact duplicate": 30, "near duplicate": 20, "same words as a held-out text": 3, "toxic": 5}
    counts |= {"training": 1900, "held out": 210}
    rows = [(source, step, count) for source in ("news", "a-source-of-a-long-name") for step, count in counts.items()]
    return pd.DataFrame(rows, columns=["source", "step", "documents"])


def efficiency() -> pd.DataFrame:
    measured, published = "measured here", "published: another text"
    rows = [("ours (mine)", 4096, 7000, 1.848, measured), ("owner/another-tokenizer", 32000, 7000, 1.5, measured)]
    rows += [(name, 50_257, 7400, 1.35, published) for name in ("GPorTuguese-2", "TTL")]
    return pd.DataFrame(rows, columns=["tokenizer", "vocab_size", "words", "tokens_per_word", "text"])


def domains() -> pd.DataFrame:
    rows = [
        {"domain": domain, "tokenizer": name, "role": "ours" if name[0] == "o" else "trained", "documents": 1131.0}
        | {f"tokens_per_word{side}": 1.5 + by + at / 10 for side, by in (("", 0), ("_low", -0.1), ("_high", 0.1))}
        for domain in ("news", "tweets")
        for at, name in enumerate(("ours (mine)", "bpe", "unigram", "wordpiece"))
    ]
    return pd.DataFrame(rows)


def curves() -> pd.DataFrame:
    parts = []
    states = ("finished", "step 1,200 of 2,000", "stopped at step 5: not finite", "1 of 2 finished")
    for setting, (seeds, state) in enumerate(zip((2, 1, 1, 2), states, strict=True)):
        for seed in range(seeds):
            rows = pd.DataFrame(records()).reindex(columns=["step", "tokens", "loss", "validation_loss"])
            rows["loss"] += setting / 10 + seed / 50
            about = {"setting": f"learning_rate=0.00{setting}", "seeds": seeds, "state": state, "counted": seed == 0}
            about |= {"run": f"{setting}-{seed}", "measure": "validation_loss", "window": 1090}
            parts.append(rows.assign(smoothed=rows.loss, bits_per_byte=rows.validation_loss / 3, **about))
    return pd.concat(parts)


def search() -> pd.DataFrame:
    names = ["the file's own", "paper's setting", "paper's baseline = attention: eager", "gradient_checkpointing: true"]
    rows = [(name, "ok", 10_817.5, 0.624, name.startswith("paper")) for name in names]
    rows += [("compile: true", status, None, None, False) for status in ("unsupported", "out of memory", "timed out")]
    return pd.DataFrame(rows, columns=["name", "status", "tokens_per_second", "peak_memory_gib", "claim"])


def perplexity_energy() -> pd.DataFrame:
    rows = [
        (series, perplexity, energy, perplexity == 40)
        for series, scale in (("mine", 1e-4), ("paper 160m", 1.0), ("paper 460m", 2.0))
        for perplexity, energy in ((90, scale), (40, 2 * scale), (35, 3 * scale))
    ]
    return pd.DataFrame(rows, columns=["series", "perplexity", "energy_kwh", "diminishing"])


def samples() -> dict[str, pd.DataFrame]:
    curve = pd.DataFrame(records())
    over = [("some_task", 200 * n, 409_600 * n, 0.2 + n / 50, 0.06, 0.25) for n in (1, 2, 3)]
    over += [("another", 200 * n, 409_600 * n, 0.3 + n / 50, None, None) for n in (1, 2, 3)]
    texts = pd.DataFrame({"text": ["news", "tweets of a long name, 2024"], "bits_per_byte": [1.73, 2.25]})
    held_out = curve.loc[curve.perplexity.notna(), ["step", "tokens", "perplexity"]]
    places = [n / 20 for n in range(21)]
    marks = found("loss_spike", "loss_spike", "divergence", "low_utilisation", "slow_data", "not_finite")
    energy = {"stage": ["01_data", "03_pretraining"], "energy_kwh": [4e-5, 3e-4]}
    energy |= {f"{part}_kwh": [1e-5, 1e-4] for part in ("cpu", "gpu", "ram")}
    energy |= {f"{part}_method": ["modelled", "measured"] for part in ("cpu", "gpu", "ram")}
    gpus = [("gpu", name, share / 5, share) for name in ("T4", "A100-40GB") for share in (0.1, 0.4)]
    lines = (("published", "160m"), ("published", "460m"), ("ours", "mine"), ("ours", "another"))
    of_the_paper = pd.DataFrame(
        [(*line, 1e9 * 10**n, 30 - 5 * n + at) for at, line in enumerate(lines) for n in range(3)],
        columns=["kind", "curve", "tokens", "value"],
    )
    return {
        "01_flow": flow(),
        "01_lengths": pd.DataFrame(
            [
                (kind, 10**n, 10 ** (n + 1) if n < 3 else None, 700 + n)
                for kind in ("instruction", "plain")
                for n in range(4)
            ],
            columns=["kind", "words_from", "words_to", "documents"],
        ),
        "01_toxicity": pd.DataFrame(
            [(f"source {n}", at, (1 - at) / (n + 7), 0.65) for n in range(7) for at in places],
            columns=["source", "threshold", "share", "chosen"],
        ),
        "01_minhash": pd.DataFrame({"similarity": places, "probability": [at**4 for at in places]}).assign(
            found=0.5, half_found_at=0.84
        ),
        "02_efficiency": efficiency(),
        "02_domains": domains(),
        "03_loss": with_findings(records(), marks).assign(run="mine"),
        "03_perplexity": held_out.assign(run="mine"),
        "03_speed": curve[["step", "tokens", *PANELS]],
        "03_search": search(),
        "04_perplexity": pd.concat([held_out, texts]),
        "04_scores": pd.DataFrame(
            [("some_task", 29.17, 6.63, 25.0), ("trust, fine-tuned", 68.59, None, 59.0)],
            columns=["task", "score", "stderr", "constant"],
        ),
        "04_checkpoints": pd.DataFrame(over, columns=["task", "step", "tokens", "value", "stderr", "chance"]),
        "04_inference": pd.DataFrame(
            [(way, size, 460.3 * size, 0.08, 64.7) for size in (1, 4) for way in ("fp32", "int8 dynamic")],
            columns=["way", "batch_size", "decode_tokens_per_second", "share_of_limit", "perplexity"],
        ),
        "05_chat_loss": with_findings(records(), []).assign(faithful=False),
        "06_energy": pd.DataFrame(energy),
        "06_perplexity_energy": perplexity_energy(),
        "06_what_if": pd.DataFrame(
            [("grid", "Germany, as in the paper", 2e-4, None), ("grid", "world average", 3e-4, None), *gpus],
            columns=["kind", "name", "value", "share"],
        ),
        "06_forecast": pd.DataFrame(
            {"share": [0.01, 0.1, 0.5], "energy_error": [-4.5, 1.5, 0.2], "duration_error": [3.0, 1.0, 0.1]}
        ),
        "curves": curves(),
        **dict.fromkeys(("figure_1a", "figure_1b", "figure_2"), of_the_paper),
    }
