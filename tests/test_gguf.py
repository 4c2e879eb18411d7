"""GGUF files: read back by transformers, cut into tokens as llama.cpp does it, whole or not at all."""

from __future__ import annotations

import heapq
import re
import shutil

import gguf
import jinja2
import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.finished import finished
from ttl_utils import gguf_files as gf
from ttl_utils.blocks import TokenBlocks
from ttl_utils.conversations import encode
from ttl_utils.errors import DamagedFile, MissingStage, TTLError
from ttl_utils.files import read_json, write_json
from ttl_utils.model import new_model
from ttl_utils.perplexity import perplexity
from ttl_utils.tokenizer import load_tokenizer, train_sentencepiece

torch.set_num_threads(1)
TEXTS = [
    "O preço do café subiu 12% em São Paulo, disse o ministro.",
    "Emojis 🚀🇧🇷👩‍🔬, outras escritas: Привет, 你好.",
    "Digita <s>, </s>, <pad> e <instruction>ordens</instruction> <0x0A>.",
    "linha um\nlinha dois\n\n\tcom tabulação   e   espaços ",
    "  dois espaços no começo",
    "",
]
CHATS = [
    ["Olá, tudo bem?", ""],
    ["  Qual é a capital\ndo Brasil? 🇧🇷 ", "Brasília.", "E a de Portugal?", ""],
    ["", "Não entendi."],
]


def turns(contents):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


@pytest.fixture(scope="module")
def run(tiny, tiny_done, tmp_path_factory):
    return finished(tiny.file, tiny_done.folder, tmp_path_factory.getbasetemp() / "finished")


@pytest.fixture(scope="module")
def paths(run):
    return {tuple(path.stem.split("-")[1:]): path for path in gf.export_gguf(run)}


@pytest.fixture(scope="module")
def models(run):
    folders = {"base": run.folder / "03_pretraining/model", "chat": run.folder / "05_chat/model"}
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tokenizers(run):
    return {
        "base": load_tokenizer(run.folder / "03_pretraining/model"),
        "chat": load_tokenizer(run.folder / "05_chat/model"),
    }


@pytest.fixture(scope="module")
def blocks(run):
    files = [path for path in run.stage("02_tokenizer").files("tokens") if path.name.startswith("test-")]
    return TokenBlocks(files, run.params.model.max_position_embeddings)


def read_back(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


# what the files are


def test_files_have_the_contracts_names_and_nothing_is_left_beside_them(run, paths):
    names = {f"tiny-{model}-{form}.gguf" for model in ("base", "chat") for form in ("f16", "q8_0", "q4_0")}
    assert {path.name for path in paths.values()} == names
    assert names <= {path.name for path in (run.folder / "export").iterdir()}
    assert not list((run.folder / "export").glob(".*"))


def test_the_file_says_what_it_is_and_what_made_it(run, paths):
    fields = gguf.GGUFReader(paths["chat", "q8_0"]).fields
    said = {key: field.contents() for key, field in fields.items() if not key.startswith("tokenizer.ggml.t")}
    manifest = run.stage("05_chat").manifest()
    assert said["general.name"] == "tiny-chat" and said["general.languages"] == ["pt"]
    assert said["general.license"] == "other" and "CC BY-SA 4.0" in said["general.license.name"]
    assert said["ttl.model_sha256"] == manifest["outputs"]["model"]["fingerprint"]
    assert said["ttl.versions.torch"] == manifest["versions"]["torch"]
    assert said["llama.context_length"] == run.params.model.max_position_embeddings
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_norms_are_float32_and_matrices_as_the_name_says(paths):
    for form, kind in (("f16", "F16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")):
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(paths["base", form]).tensors}
        last = kinds.pop("output.weight")
        assert last == ("Q8_0" if form == "q4_0" else kind)
        assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
        assert {kinds[name] for name in kinds if "norm" not in name} == {kind}


# transformers


@pytest.mark.parametrize("name", ["base", "chat"])
def test_f16_read_back_differs_by_the_rounding_of_the_weights_alone(paths, models, blocks, name):
    ids = blocks.block(0).tolist()
    read, wanted = read_back(paths[name, "f16"]), logits_of(models[name], ids)
    assert (logits_of(read, ids) - wanted).abs().max() < 2e-3 * wanted.std()
    own = {key: value.half().float() if value.dim() > 1 else value for key, value in models[name].state_dict().items()}
    for key, value in read.state_dict().items():
        assert torch.equal(value, own[key]), key


def test_q8_0_costs_under_half_a_percent_of_perplexity_and_q4_0_under_five(paths, models, blocks):
    plain = perplexity(models["base"], blocks)["perplexity"]
    # the model has learned: a rounding that broke it would show
    assert plain < 0.7 * models["base"].config.vocab_size
    for form, most in (("q8_0", 0.005), ("q4_0", 0.05)):
        assert abs(perplexity(read_back(paths["base", form]), blocks)["perplexity"] / plain - 1) < most


@pytest.mark.parametrize("name", ["base", "chat"])
def test_the_tokenizer_that_transformers_reads_gives_the_same_ids(paths, tokenizers, name):
    read = AutoTokenizer.from_pretrained(paths[name, "f16"].parent, gguf_file=paths[name, "f16"].name)
    own = tokenizers[name]
    for text in TEXTS:
        for split in (False, True):
            ids = own(text, split_special_tokens=split)["input_ids"]
            assert read(text, split_special_tokens=split)["input_ids"] == ids
        assert read.decode(ids, skip_special_tokens=True) == own.decode(ids, skip_special_tokens=True)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 3)
    if name == "chat":
        for chat in CHATS:
            asked = turns(chat)
            assert read.apply_chat_template(asked) == own.apply_chat_template(asked)


# llama.cpp, as it cuts text: pairs of pieces joined by score, what is left as bytes; in a chat, control tokens first


class LlamaCpp:
    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        self.of = {key.removeprefix("tokenizer."): fields[key].contents() for key in fields if "tokenizer." in key}
        self.tokens, self.scores = self.of["ggml.tokens"], self.of["ggml.scores"]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        kinds = self.of["ggml.token_type"]
        self.control = [t for t, kind in zip(self.tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
        # found in any text, also a user's
        self.always = [t for t, kind in zip(self.tokens, kinds, strict=True) if kind == gguf.TokenType.USER_DEFINED]

    def tokenize(self, text, special):
        found, after_special = [], True
        marks = self.always + (self.control if special else [])
        parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        for part in filter(None, parts):
            if part in marks:
                found.append(self.ids[part])
            else:
                prefix = " " if after_special and self.of["ggml.add_space_prefix"] else ""
                found += self._merged((prefix + part).replace(" ", "\u2581"))
            after_special = part in marks
        return found

    def _merged(self, text):
        parts, after = list(text), list(range(1, len(text) + 1))
        before, queue = list(range(-1, len(text) - 1)), []

        def offer(left):
            right = after[left] if left >= 0 else len(parts)
            if right < len(parts) and (number := self.ids.get(parts[left] + parts[right])) is not None:
                heapq.heappush(queue, (-self.scores[number], left, right, parts[left] + parts[right]))

        for left in range(len(parts)):
            offer(left)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if parts[left] + parts[right] != joined or not parts[left] or not parts[right]:
                continue
            parts[left], parts[right], after[left] = joined, "", after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            offer(before[left])
            offer(left)
        found = []
        for part in filter(None, parts):
            number = self.ids.get(part)
            found += [number] if number is not None else [self.ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        return found

    def chat(self, messages):
        """Rendered with what llama.cpp hands to a template."""
        template = jinja2.Template(self.of["chat_template"])
        return self.tokenize(template.render(messages=messages, bos_token="<s>", eos_token="</s>"), special=True)


@pytest.fixture(scope="module")
def llama(paths):
    return {name: LlamaCpp(paths[name, "f16"]) for name in ("base", "chat")}


@pytest.fixture(scope="module")
def sentencepiece(run):
    return spm.SentencePieceProcessor(model_file=str(run.folder / "02_tokenizer/tokenizer.model"))


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_cuts_text_as_the_training_did(llama, sentencepiece, tokenizers, text):
    for name, reader in llama.items():
        ids = reader.tokenize(text, special=False)
        assert ids == sentencepiece.encode(text)
        # the Hugging Face form alone takes a space at the beginning for its own
        if not text.startswith(" "):
            assert [1, *ids] == tokenizers[name](text, split_special_tokens=True)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"), max_size=40))
def test_llama_cpp_cuts_any_text_as_the_training_did(llama, sentencepiece, text):
    assert llama["chat"].tokenize(text, special=False) == sentencepiece.encode(text)


@pytest.mark.parametrize("chat", CHATS)
def test_llama_cpp_renders_a_chat_to_the_ids_of_the_training(run, llama, tokenizers, chat):
    messages = turns(chat)
    ids = llama["chat"].chat(messages)
    assert ids == tokenizers["chat"].apply_chat_template(messages, return_dict=False)
    example = encode(messages, tokenizers["chat"], run.params.chat, 1000)
    # the end of an answer that is still to be written
    assert ids[: len(example.ids)] == example.ids[: len(ids)]


# models of other shapes, and what goes wrong


@pytest.fixture
def copied(run, tmp_path):
    """The run's stage 03 under another folder, to be spoilt."""
    stage = run.stage("03_pretraining")
    stage.folder = shutil.copytree(stage.folder, tmp_path / "03_pretraining")
    return stage


def write(stage, path, form="f16"):
    with gf.Progress("tensors", None) as progress:
        gf._write(stage, path, form, {"license": "other", "licences": []}, progress)


def test_rows_that_do_not_divide_stay_f16_and_shared_heads_are_read_back(run, copied, tokenizers, tmp_path, capsys):
    odd = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = new_model(run.params.model.model_copy(update=odd), tokenizers["base"], seed=0, attention="sdpa").eval()
    for weights in model.parameters():
        # what F16 holds exactly
        weights.data = weights.data.half().float()
    model.save_pretrained(copied.folder / "model")
    write(copied, tmp_path / "odd.gguf", "q8_0")
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    write(copied, tmp_path / "whole.gguf")
    ids = list(range(4, 40))
    found, wanted = logits_of(read_back(tmp_path / "whole.gguf"), ids), logits_of(model, ids)
    assert (found - wanted).abs().max() < 1e-5 * wanted.std()


def test_a_disk_that_fills_leaves_the_earlier_file_and_no_part(copied, tmp_path, monkeypatch):
    path = tmp_path / "export" / "m.gguf"
    write(copied, path)
    before, real, calls = path.read_bytes(), gguf.quantize, iter(range(5))

    def full(*values):
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*values)

    monkeypatch.setattr(gguf, "quantize", full)
    with pytest.raises(TTLError, match=r"m\.gguf cannot be written .*No space"):
        write(copied, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(copied, tmp_path):
    model = copied.folder / "model" / "tokenizer.model"
    settings = copied.run.params.tokenizer.model_copy(update={"vocab_size": 320})
    model.write_bytes(train_sentencepiece(TEXTS * 3, settings, "unigram"))
    with pytest.raises(TTLError, match="not BPE"):
        write(copied, tmp_path / "m.gguf")
    model.write_bytes(train_sentencepiece(TEXTS * 3, settings))
    with pytest.raises(TTLError, match="different pieces"):
        write(copied, tmp_path / "m.gguf")
    model.unlink()
    with pytest.raises(TTLError, match=r"no tokenizer\.model"):
        write(copied, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_a_control_token_that_pieces_make_up_and_missing_bytes_are_said(copied, tmp_path, capsys):
    path = copied.folder / "model" / "tokenizer.model"
    model = ModelProto.FromString(path.read_bytes())
    write(copied, tmp_path / "m.gguf")
    assert "llama.cpp" not in capsys.readouterr().out
    pieces = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    pieces[0].piece, pieces[1].piece = "<s", ">"
    for piece in model.pieces:
        piece.type = 1 if piece.type == piece.BYTE else piece.type
    path.write_bytes(model.SerializeToString())
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    tokenizer = Spelt([piece.piece for piece in model.pieces])
    gf._add_vocabulary(writer, tokenizer, copied.folder / "model", len(tokenizer))
    said = capsys.readouterr().out
    assert "'<s>' in a text" in said and "no pieces for bytes" in said


class Spelt:
    """A tokenizer of these pieces."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id, chat_template = 1, 2, 3, 0, None

    def __init__(self, pieces):
        self.pieces = pieces

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[number] for number in ids]


def test_positions_of_another_kind_are_refused(copied, tmp_path):
    path = copied.folder / "model" / "config.json"
    write_json(path, read_json(path) | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    with pytest.raises(TTLError, match="plain rotary positions"):
        write(copied, tmp_path / "m.gguf")


def test_the_base_model_alone_where_there_is_no_chat_model_and_nothing_where_there_is_none(tiny_prepared, run, capsys):
    other = tiny_prepared(run="alone")
    with pytest.raises(MissingStage, match="03_pretraining"):
        gf.export_gguf(other)
    shutil.copytree(run.folder / "03_pretraining", other.folder / "03_pretraining")
    assert [path.name for path in gf.export_gguf(other)] == [f"alone-base-{form}.gguf" for form in gf.FORMS]
    assert "05_chat of run 'alone' is not finished" in capsys.readouterr().out
    weights = other.folder / "03_pretraining" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"model\.safetensors is damaged"):
        gf.export_gguf(other)


def test_query_rows_are_put_side_by_side_as_llama_cpp_turns_them():
    rows = np.arange(8.0).reshape(8, 1)
    assert gf._paired(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
