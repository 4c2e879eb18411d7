"""Log-likelihoods are lm-eval's own on every request, and no token is computed twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ttl_utils import scoring
from ttl_utils.errors import TTLError
from ttl_utils.scoring import Scorer, grow

CONTEXT = 24
Pairs = Sequence[tuple[str, str]]


def byte_tokenizer(template: str = "<s> $A", merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A token per byte, so that lengths can be counted by hand, but for what `merges` join."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    special = [("<s>", 1), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_model(context: int = 512, **options: Any) -> LlamaForCausalLM:
    """Its initialisation is wide: predictions then depend strongly on every token before, BOS included."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 264, "max_position_embeddings": context, "initializer_range": 0.3}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape | options))).eval()


def requests(pairs: Pairs) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def expected(model: Any, tokenizer: Any, pairs: Pairs) -> list[tuple[float, bool]]:
    """lm-eval's own, one request at a time."""
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), softmax_dtype=torch.float32)
    return theirs.loglikelihood(requests(pairs), disable_tqdm=True)


def same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


MODEL = tiny_model(CONTEXT)
MERGES = (("a", "b"), ("Ġ", "a"), ("ab", "ab"), ("Ġ", "Ġ"))
TOKENIZERS = {
    "bos": byte_tokenizer(),
    "no bos": byte_tokenizer("$A"),
    # pieces that join a prompt's end with a continuation's beginning
    "merges": byte_tokenizer(merges=MERGES),
}
PIECE = st.text("ab ç\n", max_size=12)


@st.composite
def some_pairs(draw: st.DrawFn) -> Pairs:
    """Prompts that begin alike, or are empty, or too long; continuations of one token and more, some twice."""
    beginnings = draw(st.lists(PIECE, min_size=1, max_size=3))
    endings = draw(st.lists(PIECE.filter(bool), min_size=1, max_size=4))
    pairs = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = "".join(draw(st.sampled_from(beginnings)) for _ in range(draw(st.integers(0, 3))))
        # blanks alone, which lm-eval cannot take without BOS, have a test of their own
        pairs.append((prompt if prompt.strip() else "", draw(st.sampled_from(endings))))
    return pairs


@settings(max_examples=60, deadline=None)
@given(some_pairs(), st.sampled_from(sorted(TOKENIZERS)), st.integers(1, 40))
def test_log_likelihoods_are_those_of_lm_eval(pairs: Pairs, name: str, tokens_per_pass: int):
    tokenizer = TOKENIZERS[name]
    lm = Scorer(MODEL, tokenizer, batch_size=4, tokens_per_pass=tokens_per_pass)
    try:
        wanted = expected(MODEL, tokenizer, pairs)
    except AssertionError:
        # a merge took all of a continuation into its prompt
        with pytest.raises(TTLError, match="no token of its own"):
            lm.loglikelihood(requests(pairs))
        return
    same(lm.loglikelihood(requests(pairs)), wanted)


EXAMPLES = "Pergunta: dois e dois?\nResposta: quatro\n\nPergunta: a capital?\nResposta: Lisboa\n\n"
QUESTIONS = [f"{EXAMPLES}Pergunta: {text}?\nResposta:" for text in ("mais um", "e agora", "mais dois")]
CHOICES = [" sim", " não", " nem sim nem não", " x"]
SHARED = [(question, choice) for question in QUESTIONS for choice in CHOICES]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}, {"num_key_value_heads": 2}], ids=str)
def test_shared_beginnings_in_any_order(options: dict, batch_size: int):
    model = tiny_model(**options)
    wanted = expected(model, TOKENIZERS["bos"], SHARED)
    order = np.random.default_rng(batch_size).permutation(len(SHARED))
    lm = Scorer(model, TOKENIZERS["bos"], batch_size, tokens_per_pass=None if batch_size == 16 else 16 * batch_size)
    found = lm.loglikelihood(requests([SHARED[i] for i in order]))
    same(found, [wanted[i] for i in order])
    assert model.config._attn_implementation == options.get("attn_implementation", "sdpa")


def test_attention_that_takes_no_mask_is_replaced_for_the_time():
    model = tiny_model(attn_implementation="flex_attention")
    found = Scorer(model, TOKENIZERS["bos"], 4).loglikelihood(requests(SHARED))
    same(found, expected(tiny_model(), TOKENIZERS["bos"], SHARED))
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("tokens_per_pass", [7, 100, 4096])
def test_no_token_is_computed_twice(tokens_per_pass: int):
    model, tokenizer = tiny_model(), TOKENIZERS["bos"]
    computed, predicted = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].numel()))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: predicted.append(inputs[0].shape[:-1].numel()))
    lm = Scorer(model, tokenizer, 16, tokens_per_pass)
    lm.loglikelihood(requests(SHARED))
    beginnings, before = set(), set()
    for prompt, choice in SHARED:
        ids = tuple(tokenizer(prompt + choice)["input_ids"])
        beginnings |= {ids[:end] for end in range(1, len(ids))}
        before |= {ids[:end] for end in range(len(tokenizer(prompt)["input_ids"]), len(ids))}
    naive = sum(len(tokenizer(prompt + choice)["input_ids"]) - 1 for prompt, choice in SHARED)
    assert sum(computed) == len(beginnings) < naive / 4
    # logits only where something is predicted, once where several choices are
    assert sum(predicted) == len(before)
    # no padding, and no pass larger than said
    assert max(computed) <= tokens_per_pass


def test_logits_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model, rows = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(scoring, "CHUNK", 3 * model.config.vocab_size)
    same(
        Scorer(model, TOKENIZERS["bos"], 16).loglikelihood(requests(SHARED)),
        expected(tiny_model(), TOKENIZERS["bos"], SHARED),
    )
    assert max(rows) == 3


def test_what_is_too_long_loses_its_beginning_and_is_counted():
    lm = Scorer(MODEL, TOKENIZERS["bos"], 4)
    fits, cut = ("a" * (CONTEXT - 1), "b"), ("a" * CONTEXT, "b")
    longer = ("ab", "b" * (CONTEXT + 5))
    found = lm.loglikelihood(requests([fits, cut, longer]))
    same(found[:2], expected(MODEL, TOKENIZERS["bos"], [fits, cut]))
    assert lm.truncated == {cut, longer}
    # of a continuation that alone is too long, what fits: lm-eval stops there
    ids = torch.full((1, CONTEXT + 1), TOKENIZERS["bos"]("b")["input_ids"][1])
    with torch.no_grad():
        nats = MODEL(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
    assert found[2][0] == pytest.approx(float(nats), abs=1e-4)


def test_a_blank_prompt_without_bos_is_an_empty_one():
    lm = Scorer(MODEL, TOKENIZERS["no bos"], 4)
    blank, empty = lm.loglikelihood(requests([("  ", "ab"), ("", "  ab")]))
    assert blank == empty


def test_a_literal_bos_is_not_doubled():
    pairs = [("<s>ab", "ab"), ("ab", "ab"), ("", "<s>ab")]
    found = Scorer(MODEL, TOKENIZERS["bos"], 4).loglikelihood(requests(pairs))
    same(found, expected(MODEL, TOKENIZERS["bos"], pairs))
    assert found[0] == found[1]


def test_rolling_log_likelihood_is_lm_evals():
    texts = [SimpleNamespace(args=("ab çab " * n,)) for n in (1, 4, 9)]
    theirs = HFLM(pretrained=MODEL, tokenizer=byte_tokenizer(), batch_size=2)
    ours = Scorer(MODEL, byte_tokenizer(), batch_size=2)
    wanted = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(wanted, abs=1e-4)


def test_what_is_written_is_lm_evals_and_lost_beginnings_are_counted():
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [SimpleNamespace(args=(text, options)) for text in ("ab", "ab ça", "b" * (CONTEXT - 6))]
    theirs = HFLM(pretrained=MODEL, tokenizer=byte_tokenizer(), batch_size=1)
    ours = Scorer(MODEL, byte_tokenizer(), batch_size=1)
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
    assert ours.truncated == {("b" * (CONTEXT - 6),)}
    long = SimpleNamespace(args=("ab", options | {"max_gen_toks": CONTEXT}))
    with pytest.raises(TTLError, match=f"{CONTEXT} tokens leave no room"):
        ours.generate_until([long])


def test_another_kind_of_model_is_left_to_lm_eval():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2)).eval()
    pairs = [("ab", " ab"), ("ab", "b"), ("", "ab"), ("a" * CONTEXT, "b")]
    lm = Scorer(model, TOKENIZERS["bos"], 3)
    same(lm.loglikelihood(requests(pairs)), expected(model, TOKENIZERS["bos"], pairs))
    assert lm.truncated == {pairs[-1]}


def test_choices_do_not_tie_in_16_bits():
    model, tokenizer = tiny_model(), TOKENIZERS["bos"]
    letters = [("Resposta:", chr(code)) for code in range(ord("!"), ord("~"))]
    exact = np.array([value for value, _ in expected(model, tokenizer, letters)])
    model.to(torch.bfloat16)
    theirs = [value for value, _ in expected(model, tokenizer, letters)]
    ours = [value for value, _ in Scorer(model, tokenizer, 4).loglikelihood(requests(letters))]
    assert len(set(theirs)) < len(letters)
    assert len(set(ours)) == len(letters)
    assert np.abs(ours - exact).mean() < np.abs(theirs - exact).mean() * 1.1
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tokenizer_that_appends_eos_is_refused():
    with pytest.raises(TTLError, match="add_eos_token"):
        Scorer(MODEL, byte_tokenizer("<s> $A </s>"), 4)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_the_tree_has_a_node_for_every_different_beginning(rows: list[list[int]]):
    sequences = [np.array(row, np.int32) for row in rows]
    tree, nodes = grow(sequences, [len(row) for row in rows])
    beginnings = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    assert len(tree.tokens) == len(beginnings)
    for row, path in zip(rows, nodes, strict=True):
        assert tree.tokens[path].tolist() == row
        assert tree.depths[path].tolist() == list(range(len(row)))
        last = path[-1]
        # a node follows those whose ends lie behind it, and no other
        assert np.flatnonzero((np.arange(len(tree.ends)) <= last) & (last < tree.ends)).tolist() == path.tolist()
