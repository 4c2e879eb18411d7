"""What is fine-tuned: a model folder with its tokenizer, or an encoder baseline of table 5 where it can be had."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ttl_utils import hub
from ttl_utils.errors import SourceError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.downstream_baselines"


@dataclass(frozen=True)
class Origin:
    """A model to fine-tune. `weights`: what its weights and tokenizer are known by; `encoder`: not a decoder."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    encoder: bool
    context: int
    vocab_size: int
    weights: dict[str, str]


def not_run(reason: str) -> dict[str, str]:
    return {"status": "not run", "reason": reason}


def find_origin(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, encoder: bool = False) -> Origin:
    """A model folder with its tokenizer.

    Raises:
        SourceError: it holds no safetensors weights (other formats can run code), or its tokenizer is of the slow kind.
    """
    from transformers import AutoConfig

    weights = hub.weight_hashes(folder, f"model {name!r}")
    if not tokenizer.is_fast:
        raise SourceError(f"model {name!r}: its tokenizer has no tokenizer.json, or nothing that one can be made from")
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        # one of the model's own: a new one would have no row
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    spelling = json.loads(tokenizer.backend_tokenizer.to_str())
    # left there by whoever used it last
    spelling |= {"truncation": None, "padding": None}
    known = [spelling, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    weights["tokenizer"] = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    config = AutoConfig.from_pretrained(folder).get_text_config()
    # some architectures have no table of positions
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return Origin(name, folder, tokenizer, encoder, context, config.vocab_size, weights)


def find_baseline(name: str) -> Origin | dict[str, str]:
    """A model by hub id or folder, or the row that says why it is not run."""
    from transformers import AutoTokenizer

    try:
        folder = hub.local_model(name, None, KEY)
        if not any(folder.glob("*.safetensors")):
            return not_run(
                f"{KEY}: {name!r} has no safetensors weights, and other formats, which can run code, are not read: "
                "save it as safetensors in a folder, and name that folder"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # a decoder is fed as ours is
        return find_origin(name, folder, tokenizer, encoder=tokenizer.mask_token_id is not None)
    except SourceError as error:
        return not_run(str(error))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return not_run(f"{KEY}: {name!r} does not open: {reason(error)}")
