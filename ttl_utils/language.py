"""Which language a text is in: py3langid, a naive Bayes over byte n-grams whose model comes with the package."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from ttl_utils.errors import ParameterError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# of a longer text three pieces of this many characters are judged, from its start, middle and end: on prose the verdict
# is that of the whole text, at a fraction of the time, and a text that changes language on its way is still seen
PIECE = 150
_LETTER = re.compile(r"[^\W\d_]")


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check(code: str) -> None:
    """Load the model (about 0.6 s, and 100 MB in each process), and refuse a language that it does not know.

    Raises:
        ParameterError: the languages it knows.
    """
    # zxx is its word for a text in no language
    known = sorted(set(_identifier().labels) - {"zxx"})
    if code not in known:
        raise ParameterError(
            f"data.language {code!r}: the language check does not know it; it knows {', '.join(known)}"
        )


def probability(text: str, code: str) -> float:
    """How probable it is that the text is in this language (ISO 639 code, one that `check` accepts); 0 without letters.

    The model's own figure, softened with the text's length so that it does not jump to 0 or 1. A text of a few words
    is often misjudged.
    """
    if len(text) > 3 * PIECE:
        middle = (len(text) - PIECE) // 2
        text = f"{text[:PIECE]} {text[middle : middle + PIECE]} {text[-PIECE:]}"
    return dict(_identifier().rank(text))[code] if _LETTER.search(text) else 0.0
