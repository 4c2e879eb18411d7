"""Figures of notebooks 01 and 02: where text comes from and goes, and what tokenizers make of it."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from ttl_utils.figures import (
    LIGHT,
    LINES,
    OURS,
    PAPER,
    PAPER_2,
    bar_labels,
    draw,
    draws,
    label,
    label_of_data,
    legend_below,
    number,
    percent,
    row_height,
    subplots,
    thousands,
    whole,
    wrapped,
)
from ttl_utils.filters import REASONS
from ttl_utils.privacy import KINDS
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
# reasons that have a name in the figure; why a row of a file cannot be read is told in too many ways
NAMED = {*REASONS, "language", "too long", "licence", *(f"personal data ({kind})" for kind in KINDS)}


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
    return draw(run, "01_flow", table)


@draws("01_flow")
def _flow(table: pd.DataFrame) -> Figure:
    """Where each source's documents go, as shares of those read.

    `table`: source, step, documents (or characters); a step is a reason of rejection, `training` or `held out`. The
    commonest quality rules have a bar of their own, the rest share one.
    """
    unit = "documents" if "documents" in table else "characters"
    wide = table.pivot_table(index="source", columns="step", values=unit, aggfunc="sum", sort=False).fillna(0)
    rules = wide.drop(columns=[*KEPT, *FOUND], errors="ignore").sum().sort_values(ascending=False, kind="stable")
    named = [name for name in rules.index if name in NAMED][:MOST_RULES]
    parts = {name: wide[name] for name in named}
    if len(rules) > len(named):
        parts["other reasons"] = wide[rules.index.difference(named)].sum(axis=1)
    greys = [str(shade) for shade in np.linspace(0.35, 0.85, max(len(parts), 1))]
    colours = dict(zip(parts, greys, strict=True)) | FOUND | KEPT
    parts |= {name: wide[name] for name in (*FOUND, *KEPT) if name in wide}
    total = wide.sum(axis=1)
    names = [f"{wrapped(source)}\n{number(count, ',.0f')}" for source, count in total.items()]
    figure, axes = subplots(height=1.1 + row_height(names) * len(wide))
    left = np.zeros(len(wide))
    for name, values in parts.items():
        share = (values / total.where(total > 0, 1)).to_numpy()
        axes.barh(
            names, share, left=left, color=colours[name], label=label_of_data(name), height=0.7, ec="white", lw=0.3
        )
        left += share
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=label(f"Where each source's {unit} go"), xlabel=label(f"share of the {unit} read"), xlim=(0, 1))
    axes.xaxis.set_major_formatter(percent)
    legend_below(figure)
    return figure


def lengths(run: Run, table: pd.DataFrame) -> Figure:
    return draw(run, "01_lengths", table)


@draws("01_lengths")
def _lengths(table: pd.DataFrame) -> Figure:
    """Words per document by kind of text, each kind's bins adding up to one.

    `table`: kind, words_from, words_to (excluded; none in an open last bin), documents; bins grow by equal factors.
    """
    figure, axes = subplots()
    for (kind, rows), colour, hatch in zip(
        table.groupby("kind", sort=False), (OURS, PAPER_2), ("", "//"), strict=False
    ):
        first = rows.words_from.clip(lower=0.5).astype(float)
        last = rows.words_to.astype(float).fillna(first * 10**0.25)
        total = rows.documents.sum()
        look = {"color": colour, "alpha": 0.6, "hatch": hatch, "edgecolor": "white"}
        name = label("{}: {} documents", label(kind), number(total, ","))
        axes.bar(first, rows.documents / total, last - first, align="edge", label=name, **look)
    axes.set(
        title=label("Length of documents"),
        xlabel=label("words per document (log scale)"),
        ylabel=label("share of the kind"),
        xscale="log",
    )
    axes.xaxis.set_major_formatter(whole)
    axes.yaxis.set_major_formatter(percent)
    legend_below(figure)
    return figure


def toxicity(run: Run, table: pd.DataFrame) -> Figure:
    chosen = run.params.data.toxicity
    return draw(run, "01_toxicity", table.assign(chosen=chosen.threshold if chosen else np.nan))


@draws("01_toxicity")
def _toxicity(table: pd.DataFrame) -> Figure:
    """Share of each source that a threshold rejects; the chosen one, that of `data.toxicity`, is marked.

    `table`: source, threshold, share, chosen.
    """
    figure, axes = subplots()
    for (source, rows), style in zip(table.groupby("source", sort=False), cycle(LINES)):
        rows = rows.sort_values("threshold")
        axes.plot(rows.threshold, rows.share, label=str(source), **style)
    chosen = table.chosen.iloc[0]
    if chosen == chosen:
        axes.axvline(chosen, color="black", lw=1, ls=(0, (4, 3)), label=label("chosen: {}", number(chosen)))
    axes.set(
        title=label("Toxicity: what a threshold rejects"),
        xlabel=label("threshold"),
        ylabel=label("share rejected"),
        ylim=(0, None),
    )
    axes.yaxis.set_major_formatter(percent)
    legend_below(figure, 4)
    return figure


def minhash_curve(run: Run, table: pd.DataFrame, threshold: float) -> Figure:
    """`threshold`: where half of the pairs are found."""
    return draw(run, "01_minhash", table.assign(half_found_at=threshold))


@draws("01_minhash")
def _minhash(table: pd.DataFrame) -> Figure:
    """Probability that two texts are found to be near copies over the share of word n-grams in common.

    `table`: similarity, probability, half_found_at, and `found` where it was measured.
    """
    figure, axes = subplots(height=3.0)
    axes.plot(table.similarity, table.probability, color=OURS, label=label("expected"))
    if "found" in table:
        axes.plot(table.similarity, table.found, "o", color=PAPER, label=label("measured"))
    threshold = table.half_found_at.iloc[0]
    name = label("half of the pairs: {}", number(threshold, ".2f"))
    axes.axvline(threshold, color="black", lw=1, ls=(0, (4, 3)), label=name)
    axes.set(
        title=label("Near duplicates: which pairs are found"),
        xlabel=label("Jaccard similarity of the texts' word n-grams"),
        ylabel=label("probability of being found"),
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
    )
    axes.legend(loc="upper left")
    return figure


def efficiency(run: Run, table: pd.DataFrame) -> Figure:
    return draw(run, "02_efficiency", table)


@draws("02_efficiency")
def _efficiency(table: pd.DataFrame) -> Figure:
    """Tokens for 7,400 words by tokenizer; published figures, which are of another text, are hatched.

    `table`: tokenizer_comparison.efficiency_table.
    """
    rows = table.dropna(subset="tokens_per_word")
    tokens = rows.tokens_per_word * TABLE_1_WORDS
    figure, axes = subplots(height=1.3 + 0.36 * len(rows))
    # the table's first row is ours
    mine = (rows.text == MEASURED) & (rows.tokenizer == table.tokenizer.iloc[0])
    colours = np.select([mine, rows.text == PUBLISHED], [OURS, "white"], LIGHT)
    bars = axes.barh(range(len(rows)), tokens, color=colours, height=0.7)
    for bar, text in zip(bars, rows.text, strict=True):
        if text == PUBLISHED:
            bar.set(edgecolor=PAPER, hatch="////", linewidth=0.8)
    pieces = [
        label("{} ({} pieces)", number(count, ",.0f"), number(size, ",.0f"))
        for count, size in zip(tokens, rows.vocab_size, strict=True)
    ]
    bar_labels(axes, bars, pieces)
    axes.set_yticks(range(len(rows)), [wrapped(_short(_named(name))) for name in rows.tokenizer])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.3)
    counted = int(rows.words.iloc[0])
    words = number(TABLE_1_WORDS, ",")
    title = label("Tokens for {} words (measured on our held-out text)", words)
    if counted != TABLE_1_WORDS:
        scaled = number(counted, ",")
        title = label("Tokens for {} words (measured on our held-out text, scaled from {})", words, scaled)
    axes.set(title=title, xlabel=label("tokens (fewer is better)"))
    axes.xaxis.set_major_formatter(thousands)
    shown = [Patch(color=OURS, label=label("ours, measured here"))]
    if (rows.text == MEASURED).sum() > 1:
        shown.append(Patch(color=LIGHT, label=label("others, same words")))
    if (rows.text == PUBLISHED).any():
        published = label("table 1, another text")
        shown.append(Patch(facecolor="white", edgecolor=PAPER, hatch="////", label=published))
    legend_below(figure, handles=shown)
    return figure


def domains(run: Run, table: pd.DataFrame) -> Figure:
    return draw(run, "02_domains", table)


@draws("02_domains")
def _domains(table: pd.DataFrame) -> Figure:
    """Tokens per word by domain, for our tokenizer and those trained beside it; whiskers are 95% intervals.

    `table`: tokenizer_comparison.domain_table.
    """
    rows = table[table.role.isin(["ours", "trained"])]
    places = {name: place for place, name in enumerate(dict.fromkeys(rows.domain))}
    tokenizers = list(dict.fromkeys(rows.tokenizer))
    figure, axes = subplots(height=1.4 + (0.25 + 0.13 * len(tokenizers)) * len(places))
    offsets = (np.arange(len(tokenizers)) - (len(tokenizers) - 1) / 2) * 0.7 / len(tokenizers)
    for name, offset, style in zip(tokenizers, offsets, cycle(LINES), strict=False):
        mine = rows[rows.tokenizer == name]
        value = mine.tokens_per_word.astype(float)
        # one document has no interval
        low, high = (mine[f"tokens_per_word_{side}"].astype(float).fillna(value) for side in ("low", "high"))
        whiskers = np.stack([(value - low).clip(lower=0), (high - value).clip(lower=0)])
        height = mine.domain.map(places) + offset
        axes.errorbar(value, height, xerr=whiskers, capsize=2, label=_named(name), **style | {"ls": ""})
    documents = rows.groupby("domain", sort=False).documents.first()
    names = [f"{wrapped(_short(name))}\n{label('{} texts', number(documents[name], ',.0f'))}" for name in places]
    axes.set_yticks(list(places.values()), names)
    for edge in range(1, len(places)):
        axes.axhline(edge - 0.5, color="#d0d0d0", lw=0.8)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set(
        title=label("Tokens per word by domain, at equal vocabulary"),
        xlabel=label("tokens per word (fewer is better); whiskers: 95% interval over documents"),
    )
    legend_below(figure, len(tokenizers))
    return figure


def _named(tokenizer: str) -> str:
    """The tokenizer's name, where it is ours in the figures' language."""
    run = tokenizer.removeprefix("ours (")
    return tokenizer if run == tokenizer else label("ours ({})", run[:-1])


def _short(name: str) -> str:
    """An address or a long hub id, cut to what tells it apart."""
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= 34 else f"{name[:33]}…"
