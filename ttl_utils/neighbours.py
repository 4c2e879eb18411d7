"""The training conversations nearest to a text (the paper's vector search, section 4.3): TF-IDF and cosine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttl_utils.corpus import documents
from ttl_utils.errors import TTLError
from ttl_utils.progress import Progress
from ttl_utils.run import Run

# what is kept of a text to be shown; all of it is searched
SHOWN_CHARACTERS = 300


@dataclass
class Neighbours:
    """Exchanges of the training side as sparse rows, (exchanges, words), one matrix for questions, one for answers."""

    vectorizer: Any
    matrices: dict[str, Any]
    shown: list[tuple[str, str]]

    @classmethod
    def of(cls, run: Run) -> Neighbours:
        """Index a run's training conversations; held-out ones are no training data.

        Raises:
            TTLError: there are none.
        """
        # imported here: the terminal does without
        from sklearn.feature_extraction.text import TfidfVectorizer

        shown: list[tuple[str, str]] = []
        # words of one letter count too; float32 halves the matrices
        vectorizer = TfidfVectorizer(strip_accents="unicode", token_pattern=r"\w+", sublinear_tf=True, dtype=np.float32)

        def texts() -> Iterator[str]:
            rows = documents(run.need("01_data"), "chat", "train", ["messages"])
            with Progress("conversations indexed", None) as progress:
                for number, row in enumerate(rows, 1):
                    for pair in _exchanges(row["messages"]):
                        shown.append((_short(pair[0]), _short(pair[1])))
                        yield from pair
                    progress.update(number)

        try:
            matrix = vectorizer.fit_transform(texts())
        except ValueError as error:
            # scikit-learn's own word for texts without a word
            raise TTLError(f"01_data has no conversation to search (chat, train): {error}") from error
        return cls(vectorizer, {"question": matrix[::2], "answer": matrix[1::2]}, shown)

    def nearest(self, text: str, n: int = 3, side: str = "question") -> list[dict[str, Any]]:
        """The `n` exchanges whose question (or `side="answer"`) is nearest; none without a word in common.

        Returns:
            rows of question and answer, shortened, and similarity (cosine, 1.0: the same words as often).
        """
        scores = (self.matrices[side] @ self.vectorizer.transform([text]).T).toarray()[:, 0]
        # of equals the first
        best = np.argsort(-scores, kind="stable")[:n]
        return [
            {"question": self.shown[place][0], "answer": self.shown[place][1], "similarity": float(scores[place])}
            for place in best
            if scores[place] > 0
        ]


def _exchanges(messages: list[dict]) -> Iterator[tuple[str, str]]:
    """Each question with the answer that follows it."""
    for one, other in zip(messages, messages[1:], strict=False):
        if one["role"] == "user" and other["role"] != "user":
            yield one["content"], other["content"]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
