"""A BERT of a few thousand parameters with a tokenizer of its own, as a model folder."""

from __future__ import annotations

from pathlib import Path

WORDS = ["mercado", "sim", "não", "confio", "duvido"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"[]abcdefghijklmnopqrstuvwxyzãáéçSEP", *WORDS]
CONTEXT = 48


def write_encoder(folder: Path, seed: int = 0) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = list(dict.fromkeys([*PIECES, *(f"##{piece}" for piece in PIECES[5:] if len(piece) == 1)]))
    pieces = {piece: index for index, piece in enumerate(words)}
    spelling = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    spelling.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    spelling.post_processor = processors.BertProcessing(("[SEP]", pieces["[SEP]"]), ("[CLS]", pieces["[CLS]"]))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{kind}_token": name for kind, name in names.items()}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=spelling, model_input_names=inputs, **tokens).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        # dropout would be drawn otherwise by others
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForMaskedLM(config).save_pretrained(folder)
