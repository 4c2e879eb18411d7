"""Programming keywords that came out in Portuguese (paper, footnote 12: `importar torch` for `import torch`).

`code_words.csv` holds a line for each keyword and syntax: the English word, its translations, and what must stand
before and after them, as regular expressions in which `<NAME>` and the like are those of `PIECES`. A word counts only
in a keyword's place, with the rest of the syntax around it: `se x > 0:`, never `se quiser`. Where prose could look the
same (`importar carros`, `senão: ...`), the pattern asks for more (a known module, an indented body) and rather misses a
translation than counts prose. Comments and strings do not count, nor names that the code defines itself. Portugol, a
teaching language whose keywords are Portuguese, counts as translated.
"""

from __future__ import annotations

import ast
import csv
import re
import sys
import warnings
from functools import cache
from importlib.resources import files

_KNOWN = (
    "numpy|pandas|torch|tensorflow|keras|sklearn|scipy|matplotlib|seaborn|requests|flask|django|bs4|nltk|transformers"
    "|react|java|javax|angular|express|selenium|pygame|cv2|pytest"
)
PIECES = {
    # where a statement begins: a line, past a prompt's marks, or after a brace, a semicolon or a header's colon
    "START": r"(?:^|(?<=[{};])|(?<=[)\]]:))[ \t]*(?:>>>[ \t]*|\}[ \t]*)?",
    "NAMES": r"<NAME>(?:[ \t]*,[ \t]*<NAME>)*",
    "MODULES": r"<MODULE>(?:[ \t]+(?:as|como)[ \t]+<NAME>)?(?:[ \t]*,[ \t]*<MODULE>)*",
    # known by name, or with a dot
    "MODULE": rf"(?:(?-i:{_KNOWN}|{'|'.join(sorted(sys.stdlib_module_names))})\b(?:\.\w+)*(?:\.\*)?"
    r"|<NAME>(?:\.<NAME>)+(?:\.\*)?)",
    "CALL": r"<DOTTED>\([^\n]*\)",
    # part of a line: without a limit it would be tried in too many ways
    "LINE": r"[^\n]{0,120}?",
    "CONDITION": r"[^\n:{;]{0,120}?<COMPARISON>[^\n:{;]{0,120}?",
    # arrows are none
    "COMPARISON": r"(?:(?<![-=<])>=?|<=?(?![-\w/])|[=!]==?|&&|\|\|)",
    "EXPRESSION": r"<OPERAND>(?:[ \t]*<OPERATOR>[ \t]*<OPERAND>)*",
    "OPERATOR": r"(?:\*\*|//|[-+*/%<>]=?|[=!]==?|&&|\|\||\b(?:and|or|not|is|in|if|else)\b)",
    "OPERAND": r"[-!]?(?:[\"'][^\"'\n]*[\"']|\d[\w.]*|<DOTTED>(?:<ROUND>|<SQUARE>)*"
    r"|(?=[^\n]*[-+*/%<>=\d.\[])<ROUND>|<SQUARE>|\{[^{}\n]*\})",
    # three deep, and two: brackets of any depth would be tried in so many ways that a line of them never ends
    "ROUND": r"\((?:[^()\n]|\((?:[^()\n]|\([^()\n]*\))*\))*\)",
    "SQUARE": r"\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\]",
    "VALUE": r"(?:(?<![<>=!])==?|!=|\breturn\b|[\"'][ \t]*:)[ \t]*",
    "DOTTED": r"<NAME>(?:\.<NAME>)*",
    "NAME": r"[^\W\d]\w*",
    "END": r"[ \t]*;?[ \t]*(?=\n|\}|\Z)",
    "STOP": r"(?=[ \t]*(?:[;,):{]|\n|\Z))",
    # after a header's colon: nothing more, or a statement; documentation goes on in words
    "THEN": r"[ \t]*(?=\n|\Z|(?:return|retorn\w+|break|pass|continue|raise)\b|<DOTTED>[ \t]*[-+*/%]?=|<DOTTED>\()",
    # the next line is indented further than nothing, and is no list
    "BODY": r"[ \t]*(?=\n[ \t]+[^\s•*-])",
}
# text that is no code: whole strings, even unclosed ones of many lines, and comments; an `#include` is none
_QUIET = re.compile(
    r"(?P<string>\"\"\".*?(?:\"\"\"|\Z)|'''.*?(?:'''|\Z)|\"[^\"\n]*\"|'[^'\n]*')"
    r"|#(?![ \t]*(?:inclu|defin))[^\n]*|(?<!:)//[^\n]*|/\*.*?(?:\*/|\Z)",
    re.DOTALL,
)
_DEFINED = re.compile(r"\b(?:def|function|fun|void|int|class|definir|função|classe)[ \t]+([^\W\d]\w*)")
# lines that only code has, in English
_ENGLISH = (
    r"<START>(?:(?:for|while|if|elif|switch|with)\b[^\n]*[:{)]|else[ \t]*[:{]|return\b|import[ \t]+[\w{*]"
    r"|from[ \t]+[\w.]+[ \t]+import\b|(?:def|class|function)[ \t]+<NAME>|print[ \t]*\(|try[ \t]*[:{]|#[ \t]*include"
    r"|(?:var|let|const|public|private|static|void)[ \t]+<NAME>"
    r"|(?:int|float|double|char|bool|boolean|String)[ \t]+<NAME>[ \t]*[=;(,\[]"
    r"|(?:<DOTTED>|\w+\[[^\n]*\])[ \t]*[-+*/%]?=[ \t]*[^\s=]|<DOTTED>(?:\+\+|--)[ \t]*;"
    r"|<DOTTED><ROUND>[\w.()]*[ \t]*;?[ \t]*$|\}[ \t]*$)"
)


def _compiled(pattern: str, flags: int = 0) -> re.Pattern:
    while (filled := re.sub(r"<([A-Z]+)>", lambda found: PIECES[found[1]], pattern)) != pattern:
        pattern = filled
    return re.compile(pattern, re.MULTILINE | flags)


@cache
def table() -> list[dict[str, str]]:
    """The rows of `code_words.csv`: keyword, portuguese, before, after, example."""
    with files("ttl_utils").joinpath("code_words.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def patterns() -> list[tuple[str, re.Pattern]]:
    """(English keyword, pattern); the pattern's group `word` is the Portuguese one."""
    # translators write a keyword with a capital as a sentence's first word
    return [
        (row["keyword"], _compiled(f"{row['before']}(?P<word>{row['portuguese']}){row['after']}", re.IGNORECASE))
        for row in table()
    ]


@cache
def _english() -> re.Pattern:
    return _compiled(_ENGLISH)


def without_words(text: str) -> str:
    """The text with spaces in the place of comments and of what strings hold; every character stays in its place."""

    def blank(found: re.Match) -> str:
        whole = re.sub(r"[^\n]", " ", found[0])
        return whole if found["string"] is None else found[0][0] + whole[1:-1] + (found[0][-1] if whole[1:] else "")

    return _QUIET.sub(blank, text)


def translated_words(text: str, prompt: str = "") -> list[str]:
    """The Portuguese words that stand in a keyword's place in `text`, in order ("importar"); the prompt's are not
    counted, but it is read before them.
    """
    code = without_words(prompt + text)
    own = {name.lower() for name in _DEFINED.findall(code)}
    found: dict[int, str] = {}
    for _, pattern in patterns():
        for match in pattern.finditer(code):
            if match.start("word") >= len(prompt) and match["word"].lower() not in own:
                found.setdefault(match.start("word"), match["word"])
    return [found[place] for place in sorted(found)]


def looks_like_code(text: str, prompt: str = "") -> bool:
    """Whether `text`, after the prompt, still holds code: a line that only code has (English or translated keyword,
    assignment, call, brace), or all of it parses as Python, the last line aside where it is cut off.

    Without a prompt, a single name or value is no code, though it parses.
    """
    if not text.strip():
        return False
    code = without_words(prompt + text)
    if any(found.end() > len(prompt) and found.start() >= len(prompt.rstrip()) for found in _english().finditer(code)):
        return True
    return bool(translated_words(text, prompt)) or any(
        part.strip() and _parses(prompt + part, bare=not prompt) for part in (text, text.rpartition("\n")[0])
    )


def _parses(code: str, bare: bool) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # no Python, or too much of it
        return False
    if not bare:
        return True
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in tree.body)
