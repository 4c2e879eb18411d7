"""Perplexity and bits per byte, exact to the token: of packed blocks, and of documents each on its own (section 4.1).

Sums stay on the device until all is scored: a figure that is read makes the device wait.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ttl_utils.blocks import TokenBlocks
from ttl_utils.corpus import documents
from ttl_utils.devices import put
from ttl_utils.encoding import plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.lean import make_lean
from ttl_utils.loss import IGNORED, summed_loss
from ttl_utils.model import choose_hardware
from ttl_utils.packing import PLAIN_CHARACTERS, batches
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.schema import Evaluation, TextSet
from ttl_utils.subject import Subject, first_ids, load_model, subject_of
from ttl_utils.tokenizer_comparison import further, held_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# logits held at once by a model that makes those of its whole input: 1 GiB in float32
LOGITS = 2**28
# tokens of documents in memory, of which those of similar length are scored together
WINDOW = 2**20
# tokens of padding that cost less than a pass of their own
SPARE = 128


def perplexity(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    text_bytes: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Token-weighted perplexity over consecutive blocks of the model's context, the last one short.

    Every token but a block's first is scored. Documents are not kept apart within a block, as in the paper.
    `max_tokens` scores only the first blocks up to that many tokens. `text_bytes` are the UTF-8 bytes of the text
    that all the tokens stand for; bits per byte is (mean nats per scored token x all tokens) / (ln 2 x bytes).
    """
    whole = len(blocks)
    if max_tokens is not None:
        whole = min(whole, max(1, max_tokens // blocks.block_size))
    rest = blocks.remainder() if max_tokens is None or not whole else blocks.span(0, 0)
    nats, scored = [], 0
    with _scoring(model) as (nats_of, most):
        size = max(1, min(batch_size, most // blocks.block_size))
        full = (blocks.batch(range(start, min(start + size, whole))) for start in range(0, whole, size))
        for ids in chain(full, [rest[None]] * (len(rest) > 1)):
            nats.append(nats_of(ids, ids))
            scored += ids.size - len(ids)
            if progress:
                progress.update(scored)
        if not scored:
            raise TTLError(
                f"there are {blocks.tokens} held-out tokens to score: a larger data.test_share, or more text"
            )
        return _figures(_total(nats), scored, blocks.tokens, text_bytes) | {"scored_tokens": scored}


def by_group(
    model: PreTrainedModel,
    corpus: Stage,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    batch_size: int = 8,
    status: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """Loss and bits per byte of the held-out documents, each on its own, by `source`, `kind` and `domain`.

    A domain is what the comparison of tokenizers calls so: the origin of a document where its source is a mixed one.
    As in `perplexity`, a long document's later blocks leave their first token unscored; bits per byte counts it at the
    mean of the others.
    """
    rows = documents(corpus, "corpus", "test", ["text", "source", "kind"])
    # of the same documents in the same order
    domains = (domain for domain, _ in held_out(corpus, sys.maxsize))
    texts = (((row["source"], row["kind"], domain), row["text"]) for row, domain in zip(rows, domains, strict=False))
    total = sum(report["test_documents"] for report in corpus.metrics()["sources"] if report["use"] == "corpus")
    with Progress("held-out documents scored", total, status) as progress:
        found = score_texts(model, tokenizer, texts, context, batch_size=batch_size, progress=progress)
    groups: dict[str, dict[str, dict]] = {}
    for place, group in enumerate(("source", "kind", "domain")):
        sums: dict[str, Counter] = defaultdict(Counter)
        for key, counts in found.items():
            sums[key[place]].update(counts)
        groups[group] = {name: summary(counts) for name, counts in sums.items()}
    return groups


def texts_report(run: Run) -> dict:
    """Each set of `evaluation.texts`, its documents on their own; kept in `04_evaluation/reports/texts.json`.

    Bits per byte compare, whatever the tokenizer and the language; perplexities do not. `unknown_share` is that of
    tokens which stand for anything: where it is not 0, the bits are too few. A set is measured once for a model; one
    that could not be had is a row with the reason, and is asked for at each call. Where a file that is named in the
    parameters changes, delete the report.

    Returns:
        key: what the figures depend on; texts: a row for each set.
    """
    stage, settings, subject = run.need("04_evaluation"), run.params.evaluation, subject_of(run)
    hardware, path = choose_hardware(run.params.pretraining), stage.folder / "reports" / "texts.json"
    key = {"weights": [subject.weights, subject.beside_weights], "context": subject.context}
    key |= {"limit": settings.texts_limit, "precision": hardware.precision}
    kept = read_json(path) if path.is_file() else {}
    known = [row for row in kept["texts"] if "reason" not in row] if kept.get("key") == key else []
    rows = [next((row for row in known if row["set"] == item.model_dump()), None) for item in settings.texts]
    if len({item.name for item in settings.texts}) < len(rows):
        raise TTLError("evaluation.texts: two sets have the same name, which their figures go by: give one another")
    if None in rows:
        with stage.measuring():
            model = load_model(subject.folder, hardware)
            for place, item in enumerate(settings.texts):
                if rows[place] is None:
                    rows[place] = {
                        "name": item.name,
                        **_measured(model, subject, item, settings),
                        "set": item.model_dump(),
                    }
                    # one at a time: a kill costs the set under way
                    write_json(path, {"key": key, "texts": [row for row in rows if row]})
    result = {"key": key, "texts": rows}
    if result != kept:
        write_json(path, result)
        stage.add_metrics(texts=[{name: value for name, value in row.items() if name != "set"} for row in rows])
    return result


def _measured(model: PreTrainedModel, subject: Subject, item: TextSet, settings: Evaluation) -> dict:
    texts = further(item, settings.texts_limit)
    try:
        with Progress(f"{item.name}: documents scored", settings.texts_limit) as progress:
            found = score_texts(
                model, subject.tokenizer, texts, subject.context, batch_size=settings.batch_size, progress=progress
            )
    except SourceError as error:
        return {"status": "not run", "reason": str(error)}
    if not found:
        return {"status": "not run", "reason": "the set holds no text"}
    counts = found[item.name]
    names = {"tokens": counts["tokens"], "scored_tokens": counts["scored"], "bytes": counts["bytes"]}
    return summary(counts) | names | {"unknown_share": counts["unknown"] / counts["tokens"]}


# documents, each on its own


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[Any, str]],
    context: int,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[Any, Counter]:
    """Sums over the (key, text) of each key: nats, scored, tokens, unknown, bytes, documents.

    Texts of similar length are scored together, up to `batch_size` times the context in tokens with their padding. It
    stands on the right, where no token of a causal model sees it, and is not scored.
    """
    sums: dict[Any, Counter] = defaultdict(Counter)
    nats: dict[Any, list[torch.Tensor]] = defaultdict(list)
    with _scoring(model) as (nats_of, most):
        for key, rows in _windows(_encoded(tokenizer, texts, context, sums)):
            for batch in _similar(rows, min(batch_size * context, most)):
                nats[key].append(nats_of(*_padded([ids for ids, _ in batch])))
                if progress:
                    progress.update(progress.done + sum(begins for _, begins in batch))
        for key, counts in sums.items():
            counts["nats"] = _total(nats[key])
    return dict(sums)


def summary(counts: Counter) -> dict[str, Any]:
    """The figures of what `score_texts` summed."""
    figures = _figures(counts["nats"], counts["scored"], counts["tokens"], counts["bytes"])
    return {"documents": counts["documents"], **figures}


# a document's next block of tokens, and whether it is the first
Row = tuple[np.ndarray, bool]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[Any, str]], context: int, sums: dict[Any, Counter]
) -> Iterator[tuple[Any, Row]]:
    """The texts as rows of at most the context; counts what they hold. BOS, where there is one, is no token of text."""
    keys: deque = deque()

    def read() -> Iterator[str]:
        for key, text in texts:
            if text:
                keys.append(key)
                yield text

    for batch in batches(read(), PLAIN_CHARACTERS):
        for text, ids in zip(batch, plain_ids(tokenizer, batch), strict=True):
            key, whole = keys.popleft(), np.array([*first_ids(tokenizer), *ids])
            rows = [whole[start : start + context] for start in range(0, len(whole), context)]
            sums[key].update(
                documents=1,
                bytes=len(text.encode("utf-8")),
                tokens=len(ids),
                unknown=ids.count(tokenizer.unk_token_id),
                scored=len(whole) - len(rows),
            )
            yield from ((key, (row, place == 0)) for place, row in enumerate(rows) if len(row) > 1)


def _windows(rows: Iterable[tuple[Any, Row]]) -> Iterator[tuple[Any, list[Row]]]:
    """Rows of one key at a time, with no more than WINDOW tokens in memory: the key that has most goes first."""
    waiting: dict[Any, list[Row]] = defaultdict(list)
    tokens: Counter = Counter()
    for key, row in rows:
        waiting[key].append(row)
        tokens[key] += len(row[0])
        if tokens.total() > WINDOW:
            largest = tokens.most_common(1)[0][0]
            del tokens[largest]
            yield largest, waiting.pop(largest)
    yield from waiting.items()


def _similar(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """The longest first, as many together as hold so many tokens and little padding: SPARE, or a sixteenth."""
    batch: list[Row] = []
    held = 0
    for row in sorted(rows, key=lambda row: -len(row[0])):
        size = (len(batch) + 1) * len(batch[0][0]) if batch else 0
        if batch and (size > budget or size - held - len(row[0]) > max(SPARE, size // 16)):
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += len(row[0])
    if batch:
        yield batch


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels, (rows, longest); padding is id 0, and no label."""
    shape = len(rows), max(map(len, rows))
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = labels[place, : len(row)] = row
    return ids, labels


# scoring


@contextlib.contextmanager
def _scoring(model: PreTrainedModel) -> Iterator[tuple[Callable[[np.ndarray, np.ndarray], torch.Tensor], int]]:
    """What gives a batch's nats for its ids and labels, (rows, tokens) each, and the tokens that it takes at once.

    Meanwhile the model is in evaluation mode, makes no gradients, and has lean modules where it is a Llama.
    """
    device = str(next(model.parameters()).device)
    layers = [layer for name, layer in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    # a quantized layer has no matrix to multiply with: such a model is called for its logits
    plain = all(type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter for layer in layers)
    chunked = isinstance(model, LlamaForCausalLM) and plain
    scored = model if chunked else partial(model)

    def nats_of(ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        return summed_loss(scored, {"input_ids": put(ids, device), "labels": put(labels, device)})

    training, kinds = model.training, {module: type(module) for module in model.modules()}
    model.eval()
    if chunked:
        make_lean(model)
    try:
        with torch.no_grad():
            yield nats_of, sys.maxsize if chunked else LOGITS // model.config.get_text_config().vocab_size
    finally:
        model.train(training)
        for module, kind in kinds.items():
            if type(module) is not kind:
                module.__class__ = kind


def _total(nats: list[torch.Tensor]) -> float:
    # in float64 where every device has it
    return torch.stack(nats).cpu().double().sum().item() if nats else 0.0


def _figures(nats: float, scored: int, tokens: int, size: int | None) -> dict[str, float | None]:
    """Of `tokens` tokens of text in `size` bytes, of which `scored` cost `nats`."""
    if not scored:
        return {"loss": None, "perplexity": None, "bits_per_byte": None}
    loss = nats / scored
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss * tokens / size / math.log(2) if size else None,
    }
