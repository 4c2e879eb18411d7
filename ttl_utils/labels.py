"""Words and numbers of figures, in English or Portuguese."""

from __future__ import annotations

import csv
import re
from contextvars import ContextVar
from functools import cache
from importlib.resources import files

from matplotlib.ticker import FuncFormatter, ScalarFormatter

from ttl_utils.errors import TTLError

LANGUAGE: ContextVar[str] = ContextVar("language", default="en")
UNITS = {"en": {1e9: "B", 1e6: "M", 1e3: "k"}, "pt": {1e9: " bi", 1e6: " mi", 1e3: " mil"}}


@cache
def _portuguese() -> dict[str, str]:
    with files("ttl_utils").joinpath("labels_pt.csv").open(encoding="utf-8") as file:
        return {row["english"]: row["portuguese"] for row in csv.DictReader(file)}


def label(text: str, *values: str) -> str:
    """The text in the language of the figures; each `{}` in it takes a value.

    Raises:
        TTLError: there is no Portuguese for it.
    """
    if LANGUAGE.get() == "pt":
        if text not in _portuguese():
            raise TTLError(f"no Portuguese for {text!r}: add a row to ttl_utils/labels_pt.csv")
        text = _portuguese()[text]
    return text.format(*values) if values else text


def translated(text: str, language: str) -> str:
    """The same for words of a table, in the language given; where there is no Portuguese they stay as they are."""
    return _portuguese().get(text, text) if language == "pt" else text


def label_of_data(text: str) -> str:
    """The same for words of the data, such as 'duplicate 5-grams': their numbers are values."""
    found = re.findall(r"\d[\d,]*", text)
    return label(re.sub(r"\d[\d,]*", "{}", text), *(number(int(digits.replace(",", "")), ",") for digits in found))


def number(value: float, form: str = "g") -> str:
    """A number with the language's decimal sign."""
    text = format(value, form)
    return text if LANGUAGE.get() == "en" else text.translate(str.maketrans(",.", ".,"))


@FuncFormatter
def thousands(value: float, _: int) -> str:
    """Tick labels such as 200k, 1.5M and 10B; in Portuguese 200 mil, 1,5 mi, 10 bi."""
    for unit, name in UNITS[LANGUAGE.get()].items():
        if abs(value) >= unit:
            return number(value / unit) + name
    return number(value)


@FuncFormatter
def whole(value: float, _: int) -> str:
    return number(value, ",.0f")


@FuncFormatter
def percent(value: float, _: int) -> str:
    return f"{number(100 * value)}%"


class DecimalComma(ScalarFormatter):
    def __call__(self, value: float, place: int | None = None) -> str:
        return super().__call__(value, place).replace(".", ",")
