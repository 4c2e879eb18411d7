"""A tokenizer of somebody else in the place of the stage's own."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece as spm

from ttl_utils import hub
from ttl_utils.corpus import documents
from ttl_utils.encoding import Codec, plain_ids
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.files import read_json, sha256, write_bytes, write_json
from ttl_utils.packing import PLAIN_CHARACTERS, batches, first_difference
from ttl_utils.run import Stage
from ttl_utils.schema import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def import_tokenizer(settings: Tokenizer, folder: Path, context: int) -> dict:
    """Save the named tokenizer (a folder, or a hub id) in `folder`; returns where it is from.

    As every later stage expects, an encoding begins with the token of the beginning, and there is a token to pad
    with: where there was none it is the unknown or the end token, so that the vocabulary stays as it was.

    Raises:
        SourceError: it cannot be had, or is not a tokenizer.
        TTLError: it is not one that the stages can use.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from transformers import AutoTokenizer

    name = settings.source
    where = hub.model_folder(name, settings.revision)
    try:
        if isinstance(where, str):
            wanted = ["*.json", "*.model", "*.txt"]
            where = Path(snapshot_download(where, revision=settings.revision, allow_patterns=wanted))
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, HTTPError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"tokenizer.source {name!r} does not open as a tokenizer: {reason}") from error
    _check_usable(tokenizer, settings)
    tokenizer = _with_unknown(tokenizer)
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        print(f"tokenizer: no token to pad with, so {tokenizer.pad_token} is")
    # stage 05 gives a template of its own
    tokenizer.model_max_length, tokenizer.chat_template = context, None
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    files = {file: where / file for file in TOKENIZER_FILES if (where / file).is_file()}
    if "tokenizer.model" in files:
        write_bytes(folder / "tokenizer.model", files["tokenizer.model"].read_bytes())
    opened = AutoTokenizer.from_pretrained(folder)
    if opened("a")["input_ids"] != [opened.bos_token_id, *plain_ids(opened, ["a"])[0]]:
        raise TTLError(f"tokenizer.source {name!r}: its encodings cannot be made to begin with {opened.bos_token}")
    # the hub's cache keeps a commit's files in a folder of its name
    commit = where.name if where.parent.name == "snapshots" else None
    return {"name": name, "commit": commit, "sha256": {file: sha256(path) for file, path in files.items()}}


def _check_usable(tokenizer: PreTrainedTokenizerBase, settings: Tokenizer) -> None:
    place = f"tokenizer.source {settings.source!r}"
    if not tokenizer.is_fast:
        raise TTLError(f"{place} has no fast form (tokenizer.json): save one with transformers, and give its folder")
    missing = [kind for kind in ("bos_token", "eos_token") if getattr(tokenizer, kind) is None]
    if missing:
        raise TTLError(
            f"{place} has no {' and no '.join(missing)}, which documents begin and end with: choose another one"
        )
    if len(tokenizer) > 2**16:
        raise TTLError(f"{place} has {len(tokenizer):,} pieces; tokens are stored in 16 bits, for at most {2**16:,}")
    if len(tokenizer) != settings.vocab_size:
        raise TTLError(
            f"{place} has {len(tokenizer):,} pieces, and tokenizer.vocab_size is {settings.vocab_size:,}: "
            f"set tokenizer.vocab_size to {len(tokenizer)}"
        )


def _with_unknown(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, where it forgets its unknown token: a character without a piece would silently be left out.

    transformers' Llama class counts on byte pieces; the published tokenizer has none.
    """
    from transformers import PreTrainedTokenizerFast

    form, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    bytes_have_pieces = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if bytes_have_pieces or not tokenizer.unk_token or getattr(form.model, "unk_token", True):
        return tokenizer
    form.model.unk_token = tokenizer.unk_token
    # another class, since the first would make the model anew when it is loaded
    return PreTrainedTokenizerFast(tokenizer_object=form, **tokenizer.special_tokens_map)


def prepare_import(corpus: Stage, stage: Stage, context: int) -> tuple[Codec, dict]:
    """The imported tokenizer and where it is from.

    SentencePiece, which is faster, encodes where the source has its model and both forms agree on the first
    `parity_documents`; the form that users load is the reference, so otherwise (or where all are to be compared) it
    encodes itself.
    """
    from transformers import AutoTokenizer

    settings, record = stage.run.params.tokenizer, stage.folder / "import.json"
    model = stage.folder / "tokenizer.model"
    if not record.is_file():
        found = import_tokenizer(settings, stage.folder, context)
        compared = 0
        if settings.parity_documents and not settings.tokens and _is_sentencepiece(model):
            codec = Codec(AutoTokenizer.from_pretrained(stage.folder), model.read_bytes())
            texts = (row["text"] for row in documents(corpus, "corpus", "train", ["text"]))
            for batch in batches(islice(texts, settings.parity_documents), PLAIN_CHARACTERS):
                if place := first_difference(codec, batch):
                    print(f"tokenizer: its two forms differ at {place}, so the Hugging Face form encodes")
                    compared = 0
                    break
                compared += len(batch)
        encoder = "SentencePiece" if compared else "Hugging Face"
        write_json(record, {**found, "encoder": encoder, "parity_documents": compared})
    found = read_json(record)
    used = model.read_bytes() if found["encoder"] == "SentencePiece" else None
    return Codec(AutoTokenizer.from_pretrained(stage.folder), used), found


def _is_sentencepiece(path: Path) -> bool:
    try:
        return path.is_file() and bool(spm.SentencePieceProcessor(model_file=str(path)))
    except (OSError, RuntimeError):
        # a file of that name in another format
        return False
