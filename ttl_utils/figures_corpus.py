"""Figures of notebooks 01 and 02: where text comes from and goes, and what tokenizers make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ttl_utils.figures import GREY, LIGHT, OURS, PAPER, PAPER_2, save, subplots
from ttl_utils.tokenizer_comparison import MEASURED, PUBLISHED, TABLE_1_WORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttl_utils.run import Run

# steps of a document's way that have a colour of their own; every other step is a quality rule
KEPT = {"training": OURS, "held out": PAPER_2}
FOUND = {
    "exact duplicate": "#6a51a3",
    "near duplicate": "#b3a2d1",
    "same words as a held-out text": "#7fb08a",
    "toxic": PAPER,
}
MOST_RULES = 4
LINES = (OURS, PAPER, PAPER_2, "#6a51a3", "#4b8b5a", GREY)


def flow_table(sources: list[dict]) -> pd.DataFrame:
    """From stage 01's `sources`: rows {source, step, documents}; the steps of a source add up to what was read."""
    rows = [
        {"source": report["source"], "step": step, "documents": count}
        for report in sources
        if report["use"] == "corpus"
        for step, count in [
            *report["rejected"].items(),
            ("training", report["train_documents"]),
            ("held out", report["test_documents"]),
        ]
    ]
    return pd.DataFrame(rows, columns=["source", "step", "documents"])


def flow(run: Run, table: pd.DataFrame) -> Figure:
    """Where each source's documents go, as shares of those read.

    `table`: source, step, documents (or characters); a step is a reason of rejection, `training` or `held out`. The
    commonest quality rules have a bar of their own, the rest share one.
    """
    unit = "documents" if "documents" in table else "characters"
    wide = table.pivot_table(index="source", columns="step", values=unit, aggfunc="sum", sort=False).fillna(0)
    rules = wide.drop(columns=[*KEPT, *FOUND], errors="ignore").sum().sort_values(ascending=False, kind="stable")
    parts = {name: wide[name] for name in rules.index[:MOST_RULES]}
    if len(rules) > MOST_RULES:
        parts["other rules"] = wide[rules.index[MOST_RULES:]].sum(axis=1)
    greys = [str(shade) for shade in np.linspace(0.35, 0.85, max(len(parts), 1))]
    colours = dict(zip(parts, greys, strict=False)) | FOUND | KEPT
    parts |= {name: wide[name] for name in (*FOUND, *KEPT) if name in wide}
    total = wide.sum(axis=1)
    figure, axes = subplots(height=1.5 + 0.42 * len(wide))
    names = [f"{source}\n{count:,.0f}" for source, count in total.items()]
    left = np.zeros(len(wide))
    for name, values in parts.items():
        share = (values / total.where(total > 0, 1)).to_numpy()
        axes.barh(names, share, left=left, color=colours[name], label=name, height=0.7)
        left += share
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=f"Where each source's {unit} go", xlabel=f"share of the {unit} read", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, run, "01_flow", table)


def lengths(run: Run, table: pd.DataFrame) -> Figure:
    """Words per document by kind of text, each kind's bins adding up to one.

    `table`: kind, words_from, words_to (excluded; none in an open last bin), documents; bins grow by equal factors.
    """
    figure, axes = subplots()
    for (kind, rows), colour in zip(table.groupby("kind", sort=False), (OURS, PAPER_2), strict=False):
        first = rows.words_from.clip(lower=0.5).astype(float)
        last = rows.words_to.astype(float).fillna(first * 10**0.25)
        total = rows.documents.sum()
        label = f"{kind}: {total:,} documents"
        share = rows.documents / total
        axes.bar(first, share, last - first, align="edge", color=colour, alpha=0.6, label=label, edgecolor="white")
    axes.set(
        title="Length of documents", xlabel="words per document (log scale)", ylabel="share of the kind", xscale="log"
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend()
    return save(figure, run, "01_lengths", table)


def toxicity(run: Run, table: pd.DataFrame) -> Figure:
    """Share of each source that a threshold rejects; the one of `data.toxicity` is marked.

    `table`: source, threshold, share.
    """
    figure, axes = subplots()
    styles = [(colour, line) for line in ("-", "--", ":") for colour in LINES]
    for (source, rows), (colour, line) in zip(table.groupby("source", sort=False), styles, strict=False):
        rows = rows.sort_values("threshold")
        axes.plot(rows.threshold, rows.share, line, marker="o", ms=3, lw=1.4, color=colour, label=source)
    chosen = run.params.data.toxicity
    if chosen:
        axes.axvline(chosen.threshold, color="black", lw=1, ls=(0, (4, 3)), label=f"chosen: {chosen.threshold:g}")
    axes.set(title="Toxicity: what a threshold rejects", xlabel="threshold", ylabel="share rejected", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside right upper")
    return save(figure, run, "01_toxicity", table)


def minhash_curve(run: Run, table: pd.DataFrame, threshold: float) -> Figure:
    """Probability that two texts are found to be near copies over the share of word n-grams in common.

    `table`: similarity, probability, and `found` where it was measured; `threshold`: where half of the pairs are found.
    """
    figure, axes = subplots(height=3.0)
    axes.plot(table.similarity, table.probability, color=OURS, lw=1.6, label="expected")
    if "found" in table:
        axes.plot(table.similarity, table.found, "o", color=PAPER, ms=4, label="measured")
    axes.axvline(threshold, color="black", lw=1, ls=(0, (4, 3)), label=f"half of the pairs: {threshold:.2f}")
    axes.set(
        title="Near duplicates: which pairs are found",
        xlabel="Jaccard similarity of the texts' word n-grams",
        ylabel="probability of being found",
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
    )
    axes.legend(loc="upper left")
    return save(figure, run, "01_minhash", table)


def efficiency(run: Run, table: pd.DataFrame) -> Figure:
    """Tokens for 7,400 words by tokenizer; published figures, which are of another text, are hatched.

    `table`: tokenizer_comparison.efficiency_table.
    """
    rows = table.dropna(subset="tokens_per_word")
    tokens = rows.tokens_per_word * TABLE_1_WORDS
    figure, axes = subplots(height=1.3 + 0.36 * len(rows))
    # the table's first row is ours
    mine = (rows.text == MEASURED) & (rows.tokenizer == table.tokenizer.iloc[0])
    colours = np.select([mine, rows.text == PUBLISHED], [OURS, "white"], LIGHT)
    names = [_short(name) for name in rows.tokenizer]
    bars = axes.barh(range(len(rows)), tokens, color=colours, height=0.7)
    for bar, text in zip(bars, rows.text, strict=True):
        if text == PUBLISHED:
            bar.set(edgecolor=PAPER, hatch="////", linewidth=0.8)
    labels = [f"{count:,.0f} ({size / 1000:,.1f}k pieces)" for count, size in zip(tokens, rows.vocab_size, strict=True)]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.3)
    counted = int(rows.words.iloc[0])
    scaled = "" if counted == TABLE_1_WORDS else f", scaled from {counted:,}"
    axes.set(
        title=f"Tokens for {TABLE_1_WORDS:,} words (measured on our held-out text{scaled})",
        xlabel="tokens (fewer is better)",
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    shown = [Patch(color=OURS, label="ours, measured here")]
    if (rows.text == MEASURED).sum() > 1:
        shown.append(Patch(color=LIGHT, label="others, same words"))
    if (rows.text == PUBLISHED).any():
        shown.append(Patch(facecolor="white", edgecolor=PAPER, hatch="////", label="table 1, another text"))
    figure.legend(handles=shown, loc="outside lower center", ncols=3)
    return save(figure, run, "02_efficiency", table)


def domains(run: Run, table: pd.DataFrame) -> Figure:
    """Tokens per word by domain, for our tokenizer and those trained beside it; whiskers are 95% intervals.

    `table`: tokenizer_comparison.domain_table.
    """
    rows = table[table.role.isin(["ours", "trained"])]
    places = {name: place for place, name in enumerate(dict.fromkeys(rows.domain))}
    tokenizers = list(dict.fromkeys(rows.tokenizer))
    figure, axes = subplots(height=1.4 + (0.25 + 0.13 * len(tokenizers)) * len(places))
    offsets = (np.arange(len(tokenizers)) - (len(tokenizers) - 1) / 2) * 0.7 / len(tokenizers)
    for name, offset, colour, marker in zip(tokenizers, offsets, LINES, "DosP^v", strict=False):
        mine = rows[rows.tokenizer == name]
        value = mine.tokens_per_word.astype(float)
        # one document has no interval
        low, high = (mine[f"tokens_per_word_{side}"].astype(float).fillna(value) for side in ("low", "high"))
        axes.errorbar(
            value,
            mine.domain.map(places) + offset,
            xerr=np.stack([(value - low).clip(lower=0), (high - value).clip(lower=0)]),
            fmt=marker,
            color=colour,
            ms=5,
            lw=1.4,
            capsize=2.5,
            label=name,
        )
    documents = rows.groupby("domain", sort=False).documents.first()
    names = [f"{_short(name)}\n{documents[name]:,.0f} texts" for name in places]
    axes.set_yticks(list(places.values()), names)
    for edge in range(1, len(places)):
        axes.axhline(edge - 0.5, color="#d0d0d0", lw=0.8)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set(
        title="Tokens per word by domain, at equal vocabulary",
        xlabel="tokens per word (fewer is better); whiskers: 95% interval over documents",
    )
    figure.legend(loc="outside lower center", ncols=len(tokenizers))
    return save(figure, run, "02_domains", table)


def _short(name: str) -> str:
    """An address or a long hub id, cut to what tells it apart."""
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= 34 else f"{name[:33]}…"
