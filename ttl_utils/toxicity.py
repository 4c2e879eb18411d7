"""Toxicity scores of a classifier with one output, and how much hangs on the threshold.

The paper (section 3.2) names `nicholasKluge/ToxicityModelPT`: BERTimbau (109,038,209 parameters), fine-tuned on toxic
and non-toxic texts, Apache 2.0. By its model card the score is a logit, positive for non-toxic and negative for toxic
text (the card's two examples score 5.892 and -4.663); as a verdict it is right for 70.4% of HateCheck Portuguese and
74.0% of ToLD-Br. So a text is rejected when its score is *below* the threshold. The corpus card says "above a
pre-defined toxicity threshold", which means the same, and names no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ttl_utils import hub
from ttl_utils.errors import ParameterError, SourceError, reason
from ttl_utils.schema import Toxicity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# a token of running text has four or five characters: what lies further on could never be read
CHARACTERS_PER_TOKEN = 16
# what is added to the threshold to see how much hangs on it, in units of the score (logits)
STEPS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


@dataclass
class Scorer:
    """A classifier ready to score; `hardware` says on what it computes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int

    @property
    def hardware(self) -> str:
        return f"{self.model.device.type}, {str(self.model.dtype).removeprefix('torch.')}"

    def scores(self, texts: list[str]) -> np.ndarray:
        """(texts,) float32: the model's score of each text's first `max_length` tokens; the rest is not read.

        A score does not depend on the texts beside it but for rounding (about 1e-6 on a CPU); the same list gives the
        same scores.
        """
        import torch

        heads = [text[: CHARACTERS_PER_TOKEN * self.max_length] for text in texts]
        # texts of like length together: little padding; the longest first: a batch too large for memory fails at once
        order = np.argsort([-len(head) for head in heads], kind="stable")
        scores = np.empty(len(texts), np.float32)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [heads[place] for place in places],
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                scores[places] = self.model(**batch).logits[:, 0].float().cpu().numpy()  # (batch, 1)
        return scores


def load(settings: Toxicity) -> Scorer:
    """The classifier: a hub id, its folder in the mirror, or a local folder; safetensors only, and no code of its own.

    Raises:
        SourceError: the model cannot be had, or is no classifier with one output.
        ParameterError: the model cannot read so many tokens.
    """
    import torch
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = hub.model_folder(settings.model, settings.revision)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=settings.revision)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            place,
            revision=settings.revision,
            use_safetensors=True,
            # half precision is twice as fast on a GPU, and finer in fp16 than in bf16
            dtype=torch.float16 if device == "cuda" else torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, HTTPError, SafetensorError) as error:
        raise SourceError(f"toxicity model {settings.model!r} does not open: {reason(error)}") from error
    if found["missing_keys"] or model.config.num_labels != 1:
        lacking = f"lacks {min(found['missing_keys'])}" if found["missing_keys"] else "has more outputs"
        raise SourceError(
            f"toxicity model {settings.model!r} is no classifier with one output (it {lacking}): data.toxicity.model "
            "needs one whose score is low for toxic text"
        )
    most = getattr(model.config, "max_position_embeddings", settings.max_length)
    if settings.max_length > most:
        raise ParameterError(f"toxicity.max_length {settings.max_length}: {settings.model} reads {most} at most")
    return Scorer(model.to(device), tokenizer, settings.max_length, settings.batch_size)


def sensitivity(scores: np.ndarray, sources: Sequence[str], threshold: float) -> pd.DataFrame:
    """What each source loses at thresholds around the chosen one: source, documents, threshold, rejected, share."""
    names = np.asarray(sources, dtype=object)
    rows = []
    for source in dict.fromkeys(sources):
        mine = scores[names == source]
        for step in STEPS:
            rejected = int((mine < threshold + step).sum())
            rows.append((source, len(mine), threshold + step, rejected, rejected / len(mine)))
    return pd.DataFrame(rows, columns=["source", "documents", "threshold", "rejected", "share"])
