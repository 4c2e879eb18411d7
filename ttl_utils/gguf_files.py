"""GGUF files of the base and the chat model, which llama.cpp and transformers open: F16, Q8_0 and Q4_0."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from safetensors import safe_open

from ttl_utils.errors import TTLError, reason
from ttl_utils.files import read_json
from ttl_utils.hub import weight_files
from ttl_utils.model_card import licence_of
from ttl_utils.progress import Progress
from ttl_utils.run import Run, Stage
from ttl_utils.tokenizer import load_tokenizer

# what matrices become, and the form's number in the format
FORMS = {
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
OUTPUT = "output.weight"


class NotForGGUF(TTLError):
    """A model or tokenizer that a GGUF file cannot hold."""


def export_gguf(run: Run, models: dict[str, Stage] | None = None) -> list[Path]:
    """Write `export/<run>-{base,chat}-{f16,q8_0,q4_0}.gguf`, each whole or not at all; returns the files.

    Raises:
        MissingStage: stage 03 is not finished.
        NotForGGUF: llama.cpp could not give what the model and its tokenizer give.
        TTLError: the disk is full.
    """
    models, paths = models or models_of(run), []
    for stage in models.values():
        stage.verify("model")
    with Progress("GGUF files: tensors", None) as progress:
        for name, stage in models.items():
            for form in FORMS:
                paths.append(run.folder / "export" / f"{run.name}-{name}-{form}.gguf")
                _write(stage, paths[-1], form, licence_of(run, name), progress)
    return paths


def models_of(run: Run) -> dict[str, Stage]:
    """The finished stages that hold the base and the chat model; says so where there is one of them."""
    stages = {name: run.stage(stage) for name, stage in (("base", "03_pretraining"), ("chat", "05_chat"))}
    models = {name: stage for name, stage in stages.items() if stage.finished}
    if not models:
        run.need("03_pretraining")
    for name in stages.keys() - models.keys():
        print(f"{stages[name].name} of run {run.name!r} is not finished: no {name} model is exported")
    return models


def _write(stage: Stage, path: Path, form: str, licence: dict[str, Any], progress: Progress) -> None:
    """One file; one tensor is in memory at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    folder = stage.folder / "model"
    config, tokenizer = read_json(folder / "config.json"), load_tokenizer(folder)
    kind, number = FORMS[form]
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_about(writer, path.stem.removesuffix(f"-{form}"), stage, licence)
    _add_shape(writer, config, folder)
    _add_vocabulary(writer, tokenizer, folder, config["vocab_size"])
    places = _places(folder, config["num_hidden_layers"])
    kinds = {place: _kind(place, shape, kind) for place, (_, _, shape) in places.items()}
    for place, (_, _, shape) in places.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[place]]
        writer.add_tensor_info(place, shape, np.dtype(np.float32), math.prod(shape) // block * size, kinds[place])
    if odd := [place for place, chosen in kinds.items() if chosen == Kind.F16 != kind]:
        print(f"{path.name}: F16 where rows are no multiple of 32: {', '.join(odd)}")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, (file, name, _) in places.items():
            with safe_open(file, "pt") as tensors:
                values = tensors.get_tensor(name).float().numpy()
            if place.endswith(("attn_q.weight", "attn_k.weight")):
                values = _paired(values, config["num_attention_heads" if "attn_q" in place else "num_key_value_heads"])
            writer.write_tensor_data(gguf.quantize(values, kinds[place]))
            progress.update(progress.done + 1, path.name)
        writer.close()
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise TTLError(f"{path} cannot be written ({reason(error)}): free some space, or move TTL_OUTPUTS") from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _places(folder: Path, layers: int) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """For each name in the GGUF file: the file of the tensor, its name there, its shape."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    places = {}
    for file in weight_files(folder, f"{folder}"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                place = names.get_name(name, try_suffixes=(".weight",))
                if place is None:
                    raise NotForGGUF(f"{file}: GGUF's Llama has no place for {name}, so this model cannot be exported")
                places[place] = (file, name, tuple(tensors.get_slice(name).get_shape()))
    return places


def _kind(place: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """Vectors stay F32; the last matrix is Q8_0 at least, as llama.cpp gives it more bits than the others."""
    if len(shape) == 1:
        return Kind.F32
    if place == OUTPUT and kind == Kind.Q4_0:
        kind = Kind.Q8_0
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _paired(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key in llama.cpp's order: it turns neighbouring pairs, transformers the two halves of a head."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_about(writer: gguf.GGUFWriter, name: str, stage: Stage, licence: dict[str, Any]) -> None:
    manifest = stage.manifest()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_languages([stage.run.params.data.language])
    writer.add_license(licence["license"])
    writer.add_license_name(", ".join(licence["licences"]))
    writer.add_string("ttl.commit", (manifest["code"] or {}).get("commit") or "unknown")
    writer.add_string("ttl.finished", manifest["finished"])
    writer.add_string("ttl.model_sha256", manifest["outputs"]["model"]["fingerprint"])
    for package, version in manifest["versions"].items():
        writer.add_string(f"ttl.versions.{package}", version)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], folder: Path) -> None:
    rope = config["rope_parameters"]
    if config["model_type"] != "llama" or rope["rope_type"] != "default":
        raise NotForGGUF(f"{folder}: only a Llama with plain rotary positions is exported, not {config['model_type']}")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, folder: Path, vocab_size: int) -> None:
    """SentencePiece's pieces with their scores, by which llama.cpp merges; tokens added later are control tokens.

    Control, not user-defined: llama.cpp would find the latter also in what a user types.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    if not (folder / "tokenizer.model").is_file():
        raise NotForGGUF(
            f"{folder} has no tokenizer.model: only a SentencePiece tokenizer goes into a GGUF file. Export with "
            "--to hub, or take a tokenizer that has one (tokenizer.source)"
        )
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise NotForGGUF(
            f"{folder / 'tokenizer.model'} is not BPE: llama.cpp would cut words otherwise than training did"
        )
    # both formats number the kinds of pieces alike
    rows = [(piece.piece, piece.score, TokenType(piece.type)) for piece in model.pieces]
    found = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if found[: len(rows)] != [row[0] for row in rows]:
        raise NotForGGUF(f"{folder}: tokenizer.model and tokenizer.json hold different pieces; export needs them alike")
    rows += [(token, 0.0, TokenType.CONTROL) for token in found[len(rows) :]]
    normal = {token for token, _, kind in rows if kind == TokenType.NORMAL}
    for token in (token for token, _, kind in rows if kind in (TokenType.CONTROL, TokenType.BYTE)):
        if any(token[:cut] in normal and token[cut:] in normal for cut in range(1, len(token))):
            print(f"llama.cpp will take {token!r} in a text for the token of that name, as two pieces make it up")
    if not any(kind == TokenType.BYTE for _, _, kind in rows):
        print("the tokenizer has no pieces for bytes: llama.cpp fails on a character that is not in its vocabulary")
    # rows of the embedding that no piece stands for
    rows += [(f"[PAD{number}]", 0.0, TokenType.UNUSED) for number in range(len(rows), vocab_size)]
    tokens, scores, types = zip(*rows, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    if tokenizer.chat_template:
        controls = [token for token, _, kind in rows if kind == TokenType.CONTROL]
        writer.add_chat_template(_template(tokenizer.chat_template, controls))


def _template(template: str, controls: list[str]) -> str:
    """The chat template for both readers, id for id.

    llama.cpp puts a space before every stretch of text, also after a control token, where transformers puts none and
    the template writes it itself. transformers alone gives a template `pad_token`: without it the spaces go.
    """
    cut = "".join(f".replace({token + ' '!r}, {token!r})" for token in controls)
    return f"{{% set chat %}}{template}{{% endset %}}{{{{ chat if pad_token is defined else chat{cut} }}}}"
