"""Tables to read (Markdown, HTML, LaTeX) with numbers as people write them, and as CSV for machines."""

from __future__ import annotations

import base64
import html as entities
import math
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mistune
import pandas as pd

from ttl_utils.errors import TTLError
from ttl_utils.files import write_text
from ttl_utils.labels import translated
from ttl_utils.units import readable

_PORTUGUESE = str.maketrans(",.", ".,")
_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": r"\textendash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2.2rem 0 .6rem } h1 { margin-top: 0 } a { color: #1f5fa8 }
table { border-collapse: collapse; font-size: .84rem; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e2e2e2; vertical-align: top; text-align: left }
th { border-bottom: 2px solid #888 } td { font-variant-numeric: tabular-nums } img { max-width: 100% }
code { background: #f3f3f3; padding: 0 .25em; white-space: nowrap }
pre { background: #f3f3f3; padding: .6rem; overflow-x: auto }
blockquote { border-left: 3px solid #bbb; margin-left: 0; padding-left: 1rem; color: #555 }
"""


def markdown(frame: pd.DataFrame, language: str = "en") -> str:
    """The table in Markdown, numbers to the right, text to the left; a missing value is a dash."""
    head, *rows = [[re.sub(r"([\\|*<])", r"\\\1", cell) for cell in row] for row in _cells(frame, language)]
    # said of text too: a notebook's own style puts every cell to the right
    sides = ["---:" if right else ":---" for right in _right(frame)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, sides, *rows))


def html(frame: pd.DataFrame, language: str = "en") -> str:
    """The table as an HTML element."""
    return _rendered(markdown(frame, language))


def latex(frame: pd.DataFrame, caption: str, label: str, language: str = "en") -> str:
    """The table as a LaTeX float (package booktabs), text escaped."""
    head, *rows = [[_tex(cell) for cell in row] for row in _cells(frame, language)]
    columns = "".join("r" if right else "l" for right in _right(frame))
    body = "\n".join(f"{' & '.join(row)} \\\\" for row in rows)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_tex(caption)}}}\n\\label{{{label}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def _tex(cell: str) -> str:
    # a minus is no hyphen, and two hyphens are no dash
    text = re.sub(r"^-(?=[\d.])", "$-$", cell.translate(_LATEX)).replace("--", "-{}-")
    return re.sub("`([^`]*)`", r"\\texttt{\1}", text).replace("`", r"\textasciigrave{}")


def save(folder: Path, name: str, frame: pd.DataFrame, caption: str, language: str = "en") -> None:
    """Write `<name>.md` and `<name>.tex`, units in their heads, and `<name>.csv`, the frame as it is."""
    # twelve digits: what is left out is rounding
    write_text(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.12g"))
    caption, shown = translated(caption, language), readable(frame)
    write_text(folder / f"{name}.md", f"{caption}\n\n{markdown(shown, language)}\n")
    write_text(folder / f"{name}.tex", latex(shown, caption, f"tab:{name}", language))


def html_page(title: str, text: str, folder: Path | None = None, language: str = "en") -> str:
    """A page of its own from Markdown; images are taken in from `folder`, so that the page needs no other file.

    Raises:
        TTLError: an image that is not there.
    """

    def taken_in(found: re.Match) -> str:
        path = (folder or Path.cwd()) / unquote(entities.unescape(found[1]))
        if not path.is_file():
            raise TTLError(f"the page {title!r} shows {path}, which is not there: make that figure first")
        kind = {".svg": "svg+xml"}.get(path.suffix, path.suffix[1:])
        return f'src="data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"'

    body = re.sub(r'src="(?!https?:|data:)([^"]+)"', taken_in, _rendered(text))
    return (
        f'<!doctype html>\n<html lang="{"pt-BR" if language == "pt" else language}">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{entities.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body>\n</html>\n"
    )


_rendered = mistune.create_markdown(plugins=["table", "url"])


def _right(frame: pd.DataFrame) -> list[bool]:
    """Whether a column stands to the right: it holds numbers, and no text but missing values."""
    return [bool(cells) and all(_is_number(cell) for cell in cells) for cells in _known(frame)]


def _known(frame: pd.DataFrame) -> list[list[Any]]:
    return [[value for value in frame.iloc[:, at] if not pd.isna(value)] for at in range(frame.shape[1])]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cells(frame: pd.DataFrame, language: str) -> list[list[str]]:
    """Heading and rows as text."""
    columns = []
    for at, known in enumerate(_known(frame)):
        found = [value for value in known if _is_number(value) and math.isfinite(value)]
        # years and head counts need no separators; a column that has them has them throughout
        comma = "," if any(abs(value) >= 10_000 for value in found) else ""
        whole = all(value == int(value) for value in found)
        columns.append([_cell(value, comma, whole, language) for value in frame.iloc[:, at]])
    return [[_heading(str(name), language) for name in frame.columns], *map(list, zip(*columns, strict=True))]


def _heading(name: str, language: str) -> str:
    # the unit stays
    words, bracket, unit = name.partition(" (")
    return translated(name, language) if not bracket else translated(words, language) + bracket + unit


def _cell(value: Any, comma: str, whole: bool, language: str) -> str:
    if pd.isna(value):
        return "–"
    if not _is_number(value):
        return " ".join(str(value).split())
    if whole or isinstance(value, Integral) or abs(value) >= 1000:
        text = f"{value:{comma}.0f}"
    else:
        text = f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return text.translate(_PORTUGUESE) if language == "pt" else text
