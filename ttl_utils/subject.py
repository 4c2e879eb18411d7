"""A model that the parameters name: the run's own, or any causal language model of a folder or of the hub."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ttl_utils import checkpoints, hub
from ttl_utils.blocks import TokenBlocks
from ttl_utils.corpus import documents
from ttl_utils.encoding import plain_ids
from ttl_utils.errors import DamagedFile, MissingStage, ParameterError, SourceError, TTLError, reason
from ttl_utils.files import read_json, sha256, write_json
from ttl_utils.named_models import EVALUATED, beside_weights, folder_hashes, named
from ttl_utils.packing import PLAIN_CHARACTERS, batches
from ttl_utils.progress import Progress
from ttl_utils.run import Run
from ttl_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ttl_utils.model import Hardware

# one of these holds the pieces, in the forms that transformers reads
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece*.model")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
# in a tokenizer that was told no limit
NO_LIMIT = 10**6


@dataclass(frozen=True)
class Subject:
    """A model to evaluate. `context`: the tokens it reads at once.

    `weights` and `beside_weights` are hashes: of the weights, and of what else decides a score (configuration and
    tokenizer).
    """

    name: str
    folder: Path
    weights: str
    beside_weights: str
    revision: str | None
    origin: Literal["this run", "folder", "hub"]
    tokenizer: PreTrainedTokenizerBase
    context: int


def subject_of(run: Run, under_way: bool = False, key: str = EVALUATED) -> Subject:
    """What the key names, or what stage 03 made; its newest whole checkpoint where that is `under_way`.

    Raises:
        MissingStage: stage 03 is not finished, or has no whole checkpoint yet.
        SourceError: the model cannot be had, is damaged, is no causal language model, or lacks its tokenizer.
    """
    name, revision = named(run.params, key)
    if name is None:
        return _own(run, under_way)
    folder = hub.local_model(name, revision, key)
    origin = "folder" if Path(name).expanduser().is_dir() else "hub"
    return _opened(name, folder, origin, f"{key} {name!r}")


def load_model(folder: Path, hardware: Hardware, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder, in evaluation mode on the device, in the hardware's precision unless told otherwise.

    Raises:
        SourceError: its weights are damaged, of another shape than its configuration, or not all there.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = _config(folder, str(folder))
    # not every other architecture has every attention: transformers chooses
    attention = hardware.attention if config.model_type == "llama" else None
    options: dict[str, Any] = {"config": config, "dtype": dtype or hardware.dtype, "attn_implementation": attention}
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    # else it raises without a name
    options |= {"ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise SourceError(f"{folder} does not open as a causal language model: {reason(error)}") from error
    # what is missing would silently be random
    if wrong := sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind]):
        raise SourceError(f"{folder} does not hold the weights of a {type(model).__name__}: {', '.join(wrong[:3])}")
    return model.to(hardware.device).eval()


def check_context(subject: Subject, asked: int, what: str) -> None:
    """Raises ParameterError where the model reads fewer tokens at once than `what` asks for."""
    if asked > subject.context:
        raise ParameterError(
            f"{what}: {asked:,} tokens at once, and {subject.name} reads {subject.context:,}: ask less"
        )


# opening a folder


def _own(run: Run, under_way: bool) -> Subject:
    stage = run.stage("03_pretraining")
    if stage.finished or not under_way:
        folder = run.need("03_pretraining").folder / "model"
        return _opened(run.name, folder, "this run", f"run {run.name!r}")
    if path := checkpoints.latest_whole(stage.folder / "checkpoints"):
        return _opened(f"{run.name}, step {checkpoints.step_of(path):,}", path, "this run", f"run {run.name!r}")
    raise MissingStage(
        f"03_pretraining of run {run.name!r} has no whole checkpoint yet ({stage.folder / 'checkpoints'}): wait for "
        f"the first one (every {run.params.pretraining.save_steps:,} steps)"
    )


def _opened(name: str, folder: Path, origin: Any, place: str) -> Subject:
    """The subject of a folder, once all that can be known without its weights in memory is as it must be."""
    _check_whole(folder, hub.weight_files(folder, place), place)
    config = _config(folder, place)
    tokenizer = _tokenizer(folder, place)
    text = config.get_text_config()
    highest = max(tokenizer.get_vocab().values())
    if highest >= text.vocab_size:
        raise SourceError(
            f"{place}: its tokenizer has {len(tokenizer):,} pieces, up to id {highest:,}, and the model rows for "
            f"{text.vocab_size:,}: put the tokenizer that it was trained with into {folder}"
        )
    hashes = hub.weight_hashes(folder, place)
    weights = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    context = getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length
    if context > NO_LIMIT:
        raise SourceError(
            f"{place} does not say how many tokens it reads at once: give its tokenizer_config.json a model_max_length"
        )
    return Subject(
        name, folder, weights, beside_weights(folder_hashes(folder)), hub.commit_of(folder), origin, tokenizer, context
    )


def _check_whole(folder: Path, weights: list[Path], place: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / "checkpoint.json").is_file():
            checkpoints.check(folder)
        for path in weights:
            # its header says how long the file is
            with safe_open(path, "pt"):
                pass
    except (DamagedFile, SafetensorError) as error:
        where = "" if isinstance(error, DamagedFile) else f"{path} is damaged: "
        raise SourceError(f"{place}: {where}{reason(error)}. Copy it again, or name another model") from None


def _config(folder: Path, place: str) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise SourceError(f"{place}: {folder} has no config.json, which says what kind of model it is: copy it whole")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{place}: {folder / 'config.json'} does not open: {reason(error)}") from None
    kinds, known = config.architectures or [], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in known or (kinds and kinds[0] not in known.values()):
        found = kinds[0] if kinds else config.model_type
        raise SourceError(f"{place} is no causal language model, but a {found}: name one that predicts the next token")
    return config


def _tokenizer(folder: Path, place: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise SourceError(
            f"{place}: {folder} has no tokenizer (tokenizer.json and tokenizer_config.json, or tokenizer.model): save "
            "the one that it was trained with there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a folder made by others fails in ways that cannot be foreseen
        raise SourceError(f"{place}: its tokenizer does not open ({type(error).__name__}: {reason(error)})") from error


# the tokens it is scored on


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text: BOS, else EOS (in some vocabularies one piece is both), else nothing."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if first is None else [first]


def same_tokens(run: Run, subject: Subject) -> bool:
    """Whether the run's own packed tokens mean the same to this subject: every piece has the same id there."""
    stage = run.stage("02_tokenizer")
    if not stage.finished:
        return False
    theirs = subject.tokenizer.get_vocab()
    return all(theirs.get(piece) == number for piece, number in load_tokenizer(stage.folder).get_vocab().items())


def blocks_of(run: Run, subject: Subject, context: int | None = None) -> tuple[TokenBlocks, int]:
    """The held-out tokens in blocks of the subject's context (or of a shorter one), and their text's UTF-8 bytes.

    The run's own test tokens, where they are in the subject's vocabulary. Else stage 01's held-out documents in the
    subject's, each begun and, with `tokenizer.append_eos`, ended as stage 02 does: the same text, so that bits per byte
    compare. They are kept in `04_evaluation/tokens/`.
    """
    context = context or subject.context
    check_context(subject, context, "the blocks to be scored")
    if same_tokens(run, subject):
        tokens = run.need("02_tokenizer")
        paths = [path for path in tokens.files("tokens") if path.name.startswith("test-")]
        return TokenBlocks(paths, context), tokens.metrics()["test_bytes"]
    folder = _packed(run, subject)
    return _Wide(folder / "test-00000.bin", context), read_json(folder / "tokens.json")["text_bytes"]


class _Wide(TokenBlocks):
    """Ids of 32 bits: others' vocabularies may be larger than 16 can hold."""

    def __init__(self, path: Path, block_size: int):
        super().__init__([path], block_size)
        self.files = [np.memmap(one, dtype="<u4", mode="r") for one in self.paths]
        self.offsets = [0, *(len(file) for file in self.files)]
        self.tokens = self.offsets[-1]


def _packed(run: Run, subject: Subject) -> Path:
    """The held-out documents in the subject's tokens, on disk: whole or not at all."""
    corpus, stage = run.need("01_data"), run.stage("04_evaluation")
    tokenizer, files = subject.tokenizer, sorted({p for name in TOKENIZER_FILES for p in subject.folder.glob(name)})
    key = {
        "corpus": corpus.manifest()["outputs"]["corpus"]["fingerprint"],
        "tokenizer": {path.name: sha256(path) for path in files},
        "append_eos": run.params.tokenizer.append_eos,
    }
    folder = stage.folder / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    record, path = folder / "tokens.json", folder / "test-00000.bin"
    if record.is_file() and path.is_file() and path.stat().st_size == 4 * read_json(record)["tokens"]:
        return folder
    first = first_ids(tokenizer)
    end = [tokenizer.eos_token_id] if key["append_eos"] and tokenizer.eos_token_id not in (None, *first) else []
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokens = text_bytes = done = 0
    texts = (row["text"] for row in documents(corpus, "corpus", "test", ["text"]))
    with (
        (partial / path.name).open("wb") as file,
        Progress(f"held-out documents to tokens of {subject.name}", None, stage.folder / "status.json") as progress,
    ):
        for batch in batches(texts, PLAIN_CHARACTERS):
            for text, ids in zip(batch, plain_ids(tokenizer, batch), strict=True):
                row = np.array([*first, *ids, *end], dtype="<u4")
                row.tofile(file)
                tokens, text_bytes = tokens + len(row), text_bytes + len(text.encode("utf-8"))
            done += len(batch)
            progress.update(done)
    if not done:
        raise TTLError(
            f"{subject.name} has a tokenizer of its own, and 01_data holds no held-out text to encode with it"
        )
    write_json(partial / record.name, {"key": key, "tokens": tokens, "documents": done, "text_bytes": text_bytes})
    checkpoints.swap(folder, partial)
    return folder
