"""How fast are the language check, personal data and the toxicity classifier, and what does the paper's corpus cost?

    python -m tests.benchmarks.language_toxicity [--text FILE]

The first two are timed on one core; the classifier, a random model of BERT's base shape (109 million parameters, as
BERTimbau), on `--threads` threads or on the GPU where there is one. Times are of this process alone, the best of three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from tests.benchmarks.text import documents, read, vocabulary
from ttl_utils import language, toxicity
from ttl_utils.privacy import KINDS, protect
from ttl_utils.schema import PersonalData, Toxicity

# what the paper's corpus holds: 10,564,643 documents; about 30 GB of text
PAPER_BYTES, PAPER_DOCUMENTS = 30e9, 10_564_643
MASK = PersonalData(**{kind: "mask" for kind in KINDS})
# for a document in four: what a page of the web has at its foot
CONTACT = "\nContato: (11) 98765-4321, ana@exemplo.com.br, @exemplo; CPF 529.982.247-25, Lei 8.078/90, 2010-2014"


def seconds(work: Callable[[], object], clock: Callable[[], float], rounds: int = 3) -> float:
    def once() -> float:
        start = clock()
        work()
        return clock() - start

    return min(once() for _ in range(rounds))


def word_vocabulary(path: Path) -> Path:
    """A WordPiece vocabulary from the generator's words and single letters."""
    import numpy as np

    words = vocabulary(20_000, np.random.default_rng(0))
    pieces = [*"abcdefghijklmnopqrstuvwxyzáâãàéêíóôõúçABCDEFGHIJKLMNOPQRSTUVWXYZÁÂÉÍÓÚ0123456789.,;:-()@/"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces), *words]
    path.write_text("\n".join(dict.fromkeys(names)) + "\n", encoding="utf-8")
    return path


def save_model(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    # the base shape is BertConfig's own
    BertForSequenceClassification(BertConfig(vocab_size=29_794, num_labels=1)).save_pretrained(folder)
    vocabulary_file = word_vocabulary(folder / "vocab.txt")
    BertTokenizerFast(vocab=str(vocabulary_file), do_lower_case=False).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a Parquet file's text column, or a text file, in place of made text")
    parser.add_argument("--megabytes", type=float, default=3.0)
    parser.add_argument("--scored", type=int, default=16, help="documents for the classifier")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()

    texts, size = [], 0
    for text in read(asked.text) if asked.text else documents(asked.megabytes):
        made = text if asked.text or len(texts) % 4 else text + CONTACT
        texts.append(made)
        size += len(made.encode())
        if size > asked.megabytes * 1e6:
            break
    print(f"{len(texts):,} documents, {size / len(texts):,.0f} bytes each on average")

    language.check("pt")
    plain = [text.replace("@", " ") for text in texts]
    plain = ["".join(character for character in text if not character.isdigit()) for text in plain]
    cores: dict[str, tuple[float, Callable[[], object]]] = {
        "language": (size, lambda: [language.probability(text, "pt") for text in texts]),
        "personal data": (size, lambda: [protect(text, MASK) for text in texts]),
        "personal data, text without digit or @": (
            sum(len(text.encode()) for text in plain),
            lambda: [protect(text, MASK) for text in plain],
        ),
    }
    rows = []
    for name, (amount, work) in cores.items():
        rate = amount / seconds(work, time.process_time)
        hours = PAPER_BYTES / rate / 3600
        rows.append((name, f"{rate / 1e6:,.1f}", f"{rate * len(texts) / size:,.0f}", hours / 2, hours / 16))

    import torch

    torch.set_num_threads(asked.threads)
    some = texts[: asked.scored]
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch))
        scorer = toxicity.load(Toxicity(model=scratch, threshold=0.0, max_length=512, batch_size=8))
        tokens = sum(len(found) for found in scorer.tokenizer(some, truncation=True, max_length=512)["input_ids"])
        rate = len(some) / seconds(lambda: scorer.scores(some), time.perf_counter, rounds=2)
    per_second = f"{rate * sum(len(text.encode()) for text in some) / len(some) / 1e6:,.3f}"
    where = f"toxicity ({scorer.hardware}, threads: {asked.threads})"
    # cores side by side, each with a process and a thread of its own; on a GPU the number of cores does not matter
    shared = (2, 16) if scorer.model.device.type == "cpu" else (asked.threads, asked.threads)
    hours = PAPER_DOCUMENTS / rate * asked.threads / 3600
    rows.append((where, per_second, f"{rate:,.2f}", hours / shared[0], hours / shared[1]))
    columns = ["step", "MB/s", "documents/s", "hours on 2 cores", "hours on 16 cores"]
    print("\nThe paper's corpus: 30 GB of text, 10,564,643 documents")
    print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="{:,.2f}".format))
    print(f"\nThe classifier read {tokens / len(some):,.0f} tokens a document (512 at most). It is a GPU's work.")


if __name__ == "__main__":
    main()
