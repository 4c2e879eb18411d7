"""The data sheet of stage 01: what came in, what was rejected and why, what was kept, and what its licences allow."""

from __future__ import annotations

import bisect
from collections import Counter
from pathlib import Path

from ttl_utils import licences
from ttl_utils.errors import TTLError
from ttl_utils.files import write_text
from ttl_utils.schema import Source

# why a document that was judged good is rejected after all, in the order of looking
LATER = ("exact duplicate", "near duplicate", "same words as a held-out text", "toxic")
# the first number of words of each bin: four bins to a factor of ten
LENGTH_BINS = [0, *sorted({round(10 ** (step / 4)) for step in range(25)})]


def length_bin(text: str) -> int:
    """The first number of words of the bin that the text falls into."""
    return LENGTH_BINS[bisect.bisect_right(LENGTH_BINS, len(text.split())) - 1]


def lengths(kept: Counter) -> list[dict]:
    """Documents by kind and number of words: the corpus's, after everything."""
    rows = []
    for key, count in kept.items():
        if key[0].startswith("words "):
            first = int(key[0].removeprefix("words "))
            following = bisect.bisect_right(LENGTH_BINS, first)
            last = LENGTH_BINS[following] if following < len(LENGTH_BINS) else None
            rows.append({"kind": key[1], "words_from": first, "words_to": last, "documents": count})
    return sorted(rows, key=lambda row: (row["kind"], row["words_from"]))


def source_report(source: Source, kept: Counter, counts: Counter) -> dict:
    """One source: documents and characters in, the reasons of every rejection, and what was kept on each side.

    `kept` counts by (what, source, part), `counts` by (what, part[, reason]); a part is one origin of a mixed set.

    Raises:
        TTLError: what was kept and rejected does not add up to what was read.
    """
    names = list(dict.fromkeys(["", *(origin.pattern for origin in source.origins)]))
    parts = {name: _part(source.name, name, kept, counts) for name in names}
    total = _sum(parts.values())
    if total["documents_in"] != total["documents_kept"] + sum(total["rejected"].values()):
        raise TTLError(f"source {source.name!r}: the documents kept and rejected do not add up to those read: a fault")
    report = {"source": source.name, "use": source.use, "kind": source.kind, "licence": source.licence, **total}
    report["left_out_on_reading"] = {key[1]: count for key, count in sorted(counts.items()) if key[0] == "left out"}
    report["licence_characters_in"] = {
        key[1]: count for key, count in sorted(counts.items()) if key[0] == "licence characters"
    }
    if source.origins:
        described = {origin.pattern: origin for origin in source.origins}
        report["parts"] = [
            {
                "part": name or "(no pattern)",
                "kind": described[name].kind if name else source.kind,
                "licence": described[name].licence if name else source.licence,
                **part,
            }
            for name, part in parts.items()
            if part["documents_in"]
        ]
    return report


def _part(source: str, name: str, kept: Counter, counts: Counter) -> dict:
    def mine(what: str) -> int:
        return kept[what, source, name]

    rejected = {key[2]: count for key, count in counts.items() if key[:2] == ("rejected", name)}
    rejected |= {what: mine(what) for what in LATER if mine(what)}
    return {
        "documents_in": counts["documents_in", name],
        "characters_in": counts["characters_in", name],
        "documents_kept": mine("documents"),
        "characters_kept": mine("train characters") + mine("test characters"),
        "train_documents": mine("train documents"),
        "test_documents": mine("test documents"),
        "train_characters": mine("train characters"),
        "test_characters": mine("test characters"),
        "plain_characters": mine("plain characters"),
        "instruction_characters": mine("instruction characters"),
        "rejected": dict(sorted(rejected.items())),
        "masked": {key[2]: count for key, count in sorted(counts.items()) if key[:2] == ("masked", name)},
    }


def _sum(parts) -> dict:
    total: dict = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = dict(sorted((Counter(total.get(key, {})) + Counter(value)).items()))
            else:
                total[key] = total.get(key, 0) + value
    return total


def metrics(reports: list[dict], kept: Counter, toxicity: dict) -> dict:
    """The figures of stage 01; shares are of characters."""
    corpus = [report for report in reports if report["use"] == "corpus"]
    characters = sum(report["characters_kept"] for report in corpus)
    instructions = sum(report["instruction_characters"] for report in corpus)
    names = {report["source"] for report in corpus}
    by_licence: Counter = Counter()
    read: Counter = sum((Counter(report["licence_characters_in"]) for report in corpus), Counter())
    for key, count in kept.items():
        if key[0].startswith("licence ") and key[1] in names:
            by_licence[key[0].removeprefix("licence ")] += count
    return {
        "documents_in": sum(report["documents_in"] for report in corpus),
        "documents_kept": sum(report["documents_kept"] for report in corpus),
        "characters": characters,
        # of characters; the paper's 60/40 names no unit, and its own totals give 66/34 by tokens
        "instruction_share": instructions / characters if characters else None,
        "test_characters": sum(report["test_characters"] for report in corpus),
        "held_out_texts": sum(report["test_documents"] for report in reports),
        "same_words_as_held_out": sum(r["rejected"].get("same words as a held-out text", 0) for r in reports),
        "licences": [
            {"licence": name, "characters_in": count, "characters": by_licence[name]}
            | {"model_use": licences.look_up(name).model_use}
            for name, count in sorted(read.items())
        ],
        "allowed": licences.combined(by_licence),
        "lengths": lengths(kept),
        "toxicity": toxicity,
        "sources": reports,
    }


def write(path: Path, run: str, figures: dict) -> None:
    """The data sheet as Markdown, from the stage's figures alone."""
    lines = [f"# Data sheet of run `{run}`", ""]
    share = figures["instruction_share"]
    lines += ["## Sources", "", *_table(_source_rows(figures["sources"])), ""]
    lines += [f"Instructions: {share:.1%} of the corpus's characters."] if share is not None else []
    lines += [f"{report['source']}: {report['version']}" for report in figures["sources"] if report["version"]]
    lines += ["", "## Why documents were rejected", "", *_table(rejections(figures["sources"]))]
    lines += ["", "## Licences", "", *_table(figures["licences"]), "", figures["allowed"]["summary"]]
    lines += ["", "## Lengths in words, by kind", "", *_table(figures["lengths"])]
    said = figures["toxicity"]
    lines += ["", "## Toxicity", ""]
    if said["ran"]:
        lines += [f"{said['model']}, threshold {said['threshold']}: {said['scored']:,} documents scored.", ""]
        lines += _table(said["sensitivity"])
    else:
        lines += [f"Not run: {said['why']}."]
    write_text(path, "\n".join(lines) + "\n")


def _source_rows(reports: list[dict]) -> list[dict]:
    columns = (
        "documents_in",
        "characters_in",
        "documents_kept",
        "characters_kept",
        "train_documents",
        "test_documents",
    )
    rows = []
    for report in reports:
        head = {"source": report["source"], "use": report["use"], "kind": report["kind"], "licence": report["licence"]}
        rows.append(head | {name: report[name] for name in columns})
        for part in report.get("parts", []):
            head = {"source": f"… {part['part']}", "use": "", "kind": part["kind"], "licence": part["licence"]}
            rows.append(head | {name: part[name] for name in columns})
    return rows


def rejections(reports: list[dict]) -> list[dict]:
    """Rows {source, use, step, reason, count}: what readers left out, what was rejected, what was masked."""
    steps = (("left out on reading", "left_out_on_reading"), ("rejected", "rejected"), ("masked", "masked"))
    return [
        {"source": report["source"], "use": report["use"], "step": step, "reason": reason, "count": count}
        for report in reports
        for step, name in steps
        for reason, count in report[name].items()
    ]


def _table(rows: list[dict]) -> list[str]:
    if not rows:
        return ["None."]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |", "| " + " --- |" * len(rows[0])]
    for row in rows:
        cells = [_cell(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
    return text.replace("|", "\\|")
