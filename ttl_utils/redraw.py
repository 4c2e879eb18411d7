"""Figures and tables made anew from their saved data: in another language, for a column or a page of a paper."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import pandas as pd

from ttl_utils import table_files
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.figures import DRAWN, drawn, load_all, read_table, style_of
from ttl_utils.files import write_bytes
from ttl_utils.run import known_runs, outputs_folder

if TYPE_CHECKING:
    from pathlib import Path


def read_data(path: Path) -> pd.DataFrame:
    """The saved data of a figure or a table.

    Raises:
        DamagedFile: it is no table, or was cut short.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n") or len({len(row) for row in csv.reader(io.StringIO(text), strict=True)}) != 1:
            raise ValueError("a line of it was cut")
        data = read_table(text)
        # matplotlib draws words as categories: a word among numbers would be drawn, and wrong
        for name, column in data.select_dtypes(exclude=["number", "bool"]).items():
            words = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
            if len(words) and 2 * len(words) <= column.notna().sum():
                raise ValueError(f"{words.iloc[0]!r} among the numbers of {name}")
        return data
    except (ValueError, csv.Error) as error:
        raise DamagedFile(f"{path} is damaged ({error}): restore it from a copy, or make its stage anew") from None


def redraw(folder: Path, language: str, width: str) -> list[Path]:
    """Draw all figures of a folder anew from its CSV files, into `<language>-<width>/` there; all of them or none.

    Raises:
        TTLError: there is none, one is not known, or one's data are damaged or lack what is drawn.
    """
    load_all()
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise TTLError(f"{folder} has no figure's data (*.csv): run the notebooks first")
    if unknown := [path.name for path in paths if path.stem not in DRAWN]:
        raise TTLError(
            f"{folder} holds data of no figure known here: {', '.join(unknown)}. Move them elsewhere, or update ttl"
        )
    made, bad = {}, []
    with style_of(language, width):
        for path in paths:
            try:
                _, pictures = drawn(path.stem, read_data(path))
            except DamagedFile as error:
                bad.append(str(error))
            except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
                bad.append(
                    f"{path} does not hold what its figure shows ({type(error).__name__}: {error}): it is damaged, or "
                    "of another version; restore it from a copy, or make its stage anew"
                )
            else:
                place = folder / f"{language}-{width}"
                made |= {place / f"{path.stem}.{kind}": each for kind, each in pictures.items()}
    if bad:
        raise DamagedFile("\n".join(bad))
    for path, content in made.items():
        write_bytes(path, content)
    return list(made)


def retell(folder: Path, language: str) -> int:
    """Make all tables of a folder anew from their CSV files, into `<language>/` there; how many there are."""
    found = [(path, read_data(path)) for path in sorted(folder.glob("*.csv"))]
    for path, frame in found:
        words = path.with_suffix(".md")
        caption = words.read_text(encoding="utf-8").partition("\n")[0] if words.is_file() else path.stem
        table_files.save(folder / language, path.stem, frame, caption, language)
    return len(found)


def redraw_command(run: str, language: str, width: str) -> None:
    root = outputs_folder()
    if not (root / run).is_dir():
        known = ", ".join(known_runs(root, "figures")) or "none"
        raise TTLError(f"there is no run {run!r} in {root}; figures have: {known}")
    made = redraw(root / run / "figures", language, width)
    count = len({path.stem for path in made})
    print(f"{count} figure{'s' if count > 1 else ''} as PNG, SVG and PDF in {made[0].parent}")
    if count := retell(tables := root / run / "tables", language):
        print(f"{count} table{'s' if count > 1 else ''} as Markdown, LaTeX and CSV in {tables / language}")
