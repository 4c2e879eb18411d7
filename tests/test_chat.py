"""What is learned of a conversation, how conversations are packed without leaks, and the stage."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import chat as ch
from ttl_utils.errors import TTLError
from ttl_utils.files import read_json
from ttl_utils.loss import IGNORED, summed_loss
from ttl_utils.model import Hardware, new_model
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.records import read_records
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CHAT = load_params({}).chat
CONTEXT = 64


def turns(*contents):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


@pytest.fixture(scope="module")
def plain(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return ch.prepare_chat_tokenizer(load_tokenizer(tiny_done.folder / "02_tokenizer"), CHAT)


@pytest.fixture(scope="module")
def model(tiny_done, tokenizer):
    # weights larger than usual, so that attention matters
    shape = tiny_done.params.model.model_copy(update={"initializer_range": 0.3, "max_position_embeddings": CONTEXT})
    return new_model(shape, tokenizer, seed=0, attention="sdpa").eval()


@pytest.fixture(scope="module")
def examples(tokenizer):
    words = ["mercado", "empresa", "bacia", "rocha", "preço", "café", "rio"]
    made = []
    for number in range(7):
        question, reply = " ".join(words[: number % 4 + 1]), " ".join(words[number % 3 : number % 3 + 2])
        made.append(ch.encode(turns(question, reply), tokenizer, CHAT, CONTEXT))
    return made


# encoding


CONVERSATIONS = [
    turns("Olá", "Oi, tudo bem?"),
    turns("Qual é o preço?", "São 30 metros.", "E do café?", "Não sei!\n\nTalvez 12."),
    turns("  com espaços  ", "\numa linha\n"),
    turns("12 reais", "😀 não"),
    turns("", "sim"),
    turns("sim", ""),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_assistants_words_and_end_tokens_are_learned(tokenizer, messages):
    found = ch.encode(messages, tokenizer, CHAT, 1000)
    assert len(found.ids) == len(found.labels)
    assert all(label in (IGNORED, token) for token, label in zip(found.ids, found.labels, strict=True))
    learned = [label for label in found.labels if label != IGNORED]
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    parts, part = [], []
    for token in learned:
        if token == tokenizer.eos_token_id:
            parts.append(tokenizer.decode(part).strip())
            part = []
        else:
            part.append(token)
    assert parts == answers
    assert part == []
    # all that is not learned: the beginning, and the user's turns between their tokens
    rest = [token for token, label in zip(found.ids, found.labels, strict=True) if label == IGNORED]
    opened, closed = tokenizer.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close])
    assert rest[0] == tokenizer.bos_token_id
    assert rest.count(opened) == rest.count(closed) == len(messages) // 2
    said = tokenizer.decode(rest[1:]).split(CHAT.user_close)[:-1]
    questions = [message["content"].strip() for message in messages if message["role"] == "user"]
    assert [text.removeprefix(CHAT.user_open).strip() for text in said] == questions


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_gives_the_same_ids(tokenizer, tmp_path, messages):
    expected = ch.encode(messages, tokenizer, CHAT, 1000).ids
    assert tokenizer.apply_chat_template(messages)["input_ids"] == expected
    # as whoever opens the folder gets it; and up to where the model begins to answer
    tokenizer.save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    assert opened.apply_chat_template(messages)["input_ids"] == expected
    asked = opened.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert expected[: len(asked)] == asked
    assert asked[-1] == opened.convert_tokens_to_ids(CHAT.user_close)


@pytest.mark.parametrize("typed", ["</s>", "<s>", "<pad>", "<unk>", "<instruction>", "</instruction>", "<0x0A>"])
def test_a_control_token_that_is_typed_is_text(tokenizer, typed):
    # <unk> and <0x0A> are pieces of SentencePiece too: written out, they are letters
    text = f"antes {typed} depois{typed}"
    found = ch.encode(turns(text, text), tokenizer, CHAT, 1000)
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    control |= set(tokenizer.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close]))
    places = [token for token in found.ids if token in control]
    opened, closed = tokenizer.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close])
    assert places == [tokenizer.bos_token_id, opened, closed, tokenizer.eos_token_id]
    assert tokenizer.decode([label for label in found.labels[:-1] if label != IGNORED]).strip() == text


def test_what_does_not_fit_is_cut_and_told(tokenizer):
    messages = turns("Qual é o preço do café?", "O café custa 30 reais no mercado.")
    whole = ch.encode(messages, tokenizer, CHAT, 1000)
    for context in range(2, len(whole.ids) + 2):
        found = ch.encode(messages, tokenizer, CHAT, context)
        if found is None:
            assert all(label == IGNORED for label in whole.labels[:context])
            continue
        assert (found.ids, found.labels) == (whole.ids[:context], whole.labels[:context])
        assert found.cut == (context < len(whole.ids))


def test_conversations_are_counted(monkeypatch, tokenizer, tiny_done):
    messages = turns("Qual é o preço do café?", "O café custa 30 reais.")
    length = len(ch.encode(messages, tokenizer, CHAT, 1000).ids)
    rows = [messages, turns("Olá", "Oi"), turns("Olá", "Oi " * length), turns("sim " * length, "Oi")]
    monkeypatch.setattr(ch, "documents", lambda *_: [{"messages": messages} for messages in rows])
    params = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=length), chat=CHAT)
    run = SimpleNamespace(params=params, need=lambda name: None)
    examples, counts = ch.load_examples(run, tokenizer, "train")
    # the first fills the context to the last token, and is not cut
    assert [len(example.ids) == length for example in examples] == [True, False, True]
    assert counts == {"conversations": 4, "nothing learned fits the context": 1, "cut at the context": 1}
    monkeypatch.setattr(ch, "documents", lambda *_: [])
    with pytest.raises(TTLError, match="no conversation for chat"):
        ch.load_examples(run, tokenizer, "train")


# packing


@settings(max_examples=200)
@given(st.data(), st.integers(1, 40))
def test_packing_keeps_all_once_within_the_rows(data, context):
    lengths = data.draw(st.lists(st.integers(1, context), max_size=60))
    rows = ch.pack(lengths, context)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= context for row in rows)
    # no two rows would fit in one
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > context
    assert ch.pack(iter(lengths), context) == rows


def test_packing_by_hand():
    assert ch.pack([3, 5, 2, 8, 2], 10) == [[3, 2], [1, 0, 4]]


def test_packed_conversations_do_not_see_each_other(model, tokenizer, examples):
    rows = [[0, 1, 2], [3, 4]]
    inputs = ch.collate(examples, rows, CONTEXT, tokenizer.pad_token_id)
    other = replace(examples[1], ids=[(token + 7) % 400 + 4 for token in examples[1].ids])
    changed = ch.collate([examples[0], other, *examples[2:]], rows, CONTEXT, tokenizer.pad_token_id)

    def logits(batch, restart=True):
        positions = batch["position_ids"] if restart else torch.arange(CONTEXT).expand(len(rows), CONTEXT)
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).logits

    one, two = logits(inputs), logits(changed)
    start, stop = len(examples[0].ids), len(examples[0].ids) + len(examples[1].ids)
    assert not torch.equal(one[0, start:stop], two[0, start:stop])
    untouched = [(one[0, :start], two[0, :start]), (one[0, stop:], two[0, stop:]), (one[1], two[1])]
    assert all(torch.equal(a, b) for a, b in untouched)
    # the control: positions that run on leak into what comes after
    one, two = logits(inputs, restart=False), logits(changed, restart=False)
    assert torch.equal(one[0, :start], two[0, :start])
    assert not torch.equal(one[0, stop:], two[0, stop:])


def test_a_packed_conversation_is_predicted_as_alone(model, tokenizer, examples):
    inputs = ch.collate(examples, [[0, 1, 2]], CONTEXT, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([example.ids])).logits[0] for example in examples[:3]])
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_no_label_crosses_from_one_conversation_to_the_next(tokenizer, examples):
    # an answer from the first token on, as no conversation has: its first label is still no target
    all_learned = [replace(example, labels=list(example.ids)) for example in examples]
    inputs = ch.collate(all_learned, [[0, 1, 2], []], CONTEXT, tokenizer.pad_token_id)
    starts = (inputs["position_ids"] == 0).nonzero()
    assert [tuple(place) for place in starts.tolist()][-1] == (1, 0)
    assert all(inputs["labels"][row, place] == IGNORED for row, place in starts.tolist())
    learned = sum(len(example.ids) - 1 for example in all_learned[:3])
    assert (inputs["labels"] != IGNORED).sum() == learned
    # padding: a document of its own, nothing learned
    end = sum(len(example.ids) for example in examples[:3])
    assert (inputs["input_ids"][0, end:] == tokenizer.pad_token_id).all()
    assert inputs["position_ids"][0, end:].tolist() == list(range(CONTEXT - end))


def test_the_answer_loss_is_that_of_each_alone(model, tokenizer, examples):
    nats, count = 0.0, 0
    for example in examples:
        batch = {"input_ids": torch.tensor([example.ids]), "labels": torch.tensor([example.labels])}
        with torch.no_grad():
            nats += summed_loss(model, batch).item()
        count += sum(label != IGNORED for label in example.labels)
    found = ch.answer_loss(model, examples, CONTEXT, tokenizer.pad_token_id)
    assert found == pytest.approx(nats / count, rel=1e-5)
    # more rows than one pass takes
    assert ch.answer_loss(model, examples * 12, CONTEXT, tokenizer.pad_token_id) == pytest.approx(found, rel=1e-5)


# steps


def alone(rank=0, processes=1):
    return SimpleNamespace(process_index=rank, num_processes=processes)


def test_an_epochs_steps_hold_every_conversation_once(tokenizer, examples):
    asked = CHAT.model_copy(
        update={"tokens_per_step": 2 * CONTEXT, "per_device_train_batch_size": 1, "num_train_epochs": 3}
    )
    many = examples * 3
    rows = len(ch.pack([len(example.ids) for example in many], CONTEXT))
    assert rows % 2 == 1
    get_step, steps = ch.packed_steps(many, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
    per_epoch = -(-rows // 2)
    assert steps == 3 * per_epoch
    learned = sum(sum(label != IGNORED for label in example.labels) for example in many)
    orders = []
    for epoch in range(3):
        found = [get_step(step, alone()) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        # the short last step is filled: all steps do the same work, and its targets are its own
        assert all([len(batch["labels"]) for batch in step.micro_batches] == [1, 1] for step in found)
        assert sum(step.targets for step in found) == learned
        for step in found:
            assert step.targets == sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in step.micro_batches)
        kept = [batch["input_ids"] for step in found for batch in step.micro_batches]
        filled = [ids for ids in kept if (ids == tokenizer.pad_token_id).all()]
        assert len(filled) == 1
        orders.append(torch.cat(kept).tolist())
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    again, _ = ch.packed_steps(many, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
    assert torch.equal(again(1, alone()).micro_batches[0]["labels"], get_step(1, alone()).micro_batches[0]["labels"])


def test_processes_share_a_step_and_its_targets(tokenizer, examples):
    asked = CHAT.model_copy(update={"tokens_per_step": 4 * CONTEXT, "per_device_train_batch_size": 1})
    get_step, _ = ch.packed_steps(examples, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
    whole, shared = get_step(0, alone()), [get_step(0, alone(rank, 2)) for rank in range(2)]
    assert [len(step.micro_batches) for step in (whole, *shared)] == [4, 2, 2]
    assert whole.targets == shared[0].targets == shared[1].targets
    found = [batch["input_ids"].tolist() for step in shared for batch in step.micro_batches]
    assert sorted(found) == sorted(batch["input_ids"].tolist() for batch in whole.micro_batches)


# the model


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old(tiny_done, plain, tied):
    shape = tiny_done.params.model.model_copy(update={"tie_word_embeddings": tied})
    model = new_model(shape, plain, seed=0, attention="sdpa")
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    old = [layer.weight.detach().clone() for layer in layers]
    size = len(plain)
    ids = torch.tensor([[1, 20, 30, 40]])
    before = model(input_ids=ids).logits
    ch.grow_embeddings(model, size + 2)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer, weights in zip(layers, old, strict=True):
        assert torch.equal(layer.weight[:size], weights)
        torch.testing.assert_close(layer.weight[size:], weights.mean(0).expand(2, -1))
    assert (layers[0].weight is layers[1].weight) == tied
    assert model.config.vocab_size == size + 2
    torch.testing.assert_close(model(input_ids=ids).logits[..., :size], before)
    ch.grow_embeddings(model, size + 2)
    assert model.get_input_embeddings().weight.shape[0] == size + 2


def test_an_answer_depends_on_the_seed_alone(model, tokenizer):
    asked = CHAT.model_copy(update={"max_new_tokens": 6, "temperature": 1.0})
    one = ch.answer(model, tokenizer, "O mercado", asked, seed=1)
    torch.rand(3)
    assert ch.answer(model, tokenizer, "O mercado", asked, seed=1) == one
    assert ch.answer(model, tokenizer, "O mercado", asked, seed=2)["answer"] != one["answer"]


def test_an_answer_ends_where_the_model_ends_it(model, tokenizer, monkeypatch):
    asked = CHAT.model_copy(update={"max_new_tokens": 5})
    words = tokenizer("sim", add_special_tokens=False).input_ids
    for made, ended in (([*words, tokenizer.eos_token_id], True), (words, False)):
        monkeypatch.setattr(model, "generate", lambda ids, made=made, **_: torch.tensor([ids[0].tolist() + made]))
        assert ch.answer(model, tokenizer, "Olá", asked, seed=0) == {"prompt": "Olá", "answer": "sim", "ended": ended}


def test_a_question_near_the_context_is_answered_and_one_beyond_is_refused(model, tokenizer):
    for count in range(40, CONTEXT):
        question = "7" * count
        if ch.encode(turns(question, ""), tokenizer, CHAT, CONTEXT) is None:
            with pytest.raises(TTLError, match=f"longer than the context of {CONTEXT} tokens"):
                ch.answer(model, tokenizer, question, CHAT, seed=0)
            break
        ch.answer(model, tokenizer, question, CHAT, seed=0)
    else:
        pytest.fail("no question was too long")


# the stage


@pytest.fixture
def trained(tiny_prepared, no_energy):
    run = tiny_prepared(chat={"num_train_epochs": 2, "learning_rate": 0.01}, pretraining={"max_steps": 4})
    pretrain(run)
    return run


def test_the_stage_learns_to_answer(trained, capsys):
    stage = ch.fine_tune_chat(trained)
    metrics = stage.metrics()
    assert metrics["validation_loss_after"] < metrics["validation_loss_before"]
    assert 0 <= metrics["padding_share"] < metrics["padding_share_unpacked"] < 1
    assert metrics["useful_tokens_per_second"] < metrics["tokens_per_second"]
    assert metrics["training"]["conversations"] > 50
    answers = read_json(stage.folder / "answers.json")
    prompts = trained.params.chat.prompts
    assert [row["prompt"] for row in answers["before"]] == [row["prompt"] for row in answers["after"]] == prompts

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = stage.folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == trained.params.tokenizer.vocab_size + 2
    assert (folder / "tokenizer.model").is_file()
    held_out, _ = ch.load_examples(trained, tokenizer, "test")
    context = trained.params.model.max_position_embeddings
    loss = ch.answer_loss(model.eval(), held_out, context, tokenizer.pad_token_id)
    assert loss == pytest.approx(metrics["validation_loss_after"], rel=1e-5)
    records = [row for row in read_records(stage.folder / "metrics.jsonl") if "validation_loss" in row]
    # once an epoch, and before the first step
    assert [row["step"] for row in records] == [0, metrics["steps"] // 2, metrics["steps"]]
    assert records[0]["perplexity"] == pytest.approx(math.exp(metrics["validation_loss_before"]), rel=1e-3)
    assert ch.fine_tune_chat(trained).metrics() == metrics
    assert "reused" in capsys.readouterr().out


def test_flash_attention_is_not_used_on_packed_rows(trained, monkeypatch, capsys):
    flash = Hardware("cpu", "bf16", "flash_attention_2", ("device: cpu", "precision: bf16", "attention: flash"))
    monkeypatch.setattr(ch, "choose_hardware", lambda settings: flash)
    seen = []

    def load(folder, hardware, dtype):
        seen.append(hardware.attention)
        raise KeyboardInterrupt

    monkeypatch.setattr(ch, "load_model", load)
    with pytest.raises(KeyboardInterrupt):
        ch.fine_tune_chat(trained)
    assert seen == ["sdpa"]
    assert "attention: sdpa (FlashAttention 2 would mix" in capsys.readouterr().out
