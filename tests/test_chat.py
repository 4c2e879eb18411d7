"""What is learned of a conversation, how conversations are packed without leaks, and the stage."""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils import chat as ch
from ttl_utils import chat_answers as ca
from ttl_utils import conversations as cv
from ttl_utils.document_attention import documents_apart
from ttl_utils.errors import StageConflict, TTLError
from ttl_utils.files import read_json, sha256, write_json
from ttl_utils.lean import make_lean
from ttl_utils.loss import IGNORED, Learner, summed_loss
from ttl_utils.model import Hardware, new_model
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.records import read_records
from ttl_utils.tokenizer import load_tokenizer

# two threads that wait for each other cost more than such small matrices
torch.set_num_threads(1)
CHAT = load_params({}).chat
CONTEXT = 64
ROW = {"prompt": "Olá", "kind": "text", "text": "Oi.", "tokens": 2, "ended": True, "seed": 0, "cut": 0, "control": []}
ROWS = [ROW | {"fault": ""}]


def turns(*contents):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


@pytest.fixture(scope="module")
def plain(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return cv.prepare_chat_tokenizer(load_tokenizer(tiny_done.folder / "02_tokenizer"), CHAT)


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
        made.append(cv.encode(turns(question, reply), tokenizer, CHAT, CONTEXT))
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
    found = cv.encode(messages, tokenizer, CHAT, 1000)
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
    expected = cv.encode(messages, tokenizer, CHAT, 1000).ids
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
    found = cv.encode(turns(text, text), tokenizer, CHAT, 1000)
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    control |= set(tokenizer.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close]))
    places = [token for token in found.ids if token in control]
    opened, closed = tokenizer.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close])
    assert places == [tokenizer.bos_token_id, opened, closed, tokenizer.eos_token_id]
    assert tokenizer.decode([label for label in found.labels[:-1] if label != IGNORED]).strip() == text


def test_of_a_conversation_that_is_too_long_whole_turns_are_kept(tokenizer):
    messages = turns("Qual é o preço?", "São 30 reais.", "E do café?", "Não sei, talvez 12.", "Obrigado.")
    whole = cv.encode(messages, tokenizer, CHAT, 1000)
    ends = [place + 1 for place, token in enumerate(whole.ids) if token == tokenizer.eos_token_id]
    asked = whole.ids.index(tokenizer.convert_tokens_to_ids(CHAT.user_close)) + 1
    for context in range(2, len(whole.ids) + 2):
        found = cv.encode(messages, tokenizer, CHAT, context)
        fits = [end for end in ends if end <= context]
        length = len(whole.ids) if context >= len(whole.ids) else fits[-1] if fits else context
        if not fits and context <= asked:
            assert found is None
            continue
        assert (found.ids, found.labels) == (whole.ids[:length], whole.labels[:length])
        assert found.lost == ("" if length == len(whole.ids) else cv.LATER if fits else cv.CUT)
        # an end token is learned where the answer really ends
        assert (found.labels[-1] == tokenizer.eos_token_id) == (length in ends)


def test_conversations_are_counted(monkeypatch, tokenizer):
    messages = turns("Qual é o preço do café?", "O café custa 30 reais.")
    length = len(cv.encode(messages, tokenizer, CHAT, 1000).ids)
    rows = [messages, turns("Olá", "Oi"), turns("Olá", "Oi " * length), turns("sim " * length, "Oi"), turns("Olá")]
    rows.append(turns("Olá", "Oi", "E agora?", "sim " * length))
    monkeypatch.setattr(cv, "documents", lambda *_: [{"messages": messages} for messages in rows])
    params = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=length), chat=CHAT)
    run = SimpleNamespace(params=params, need=lambda name: None)
    examples, counts = cv.load_examples(run, tokenizer, "train")
    # the first fills the context to the last token, and is whole
    assert [len(example.ids) == length for example in examples] == [True, False, True, False]
    assert examples[3].ids == examples[1].ids
    assert counts == {"conversations": 6, cv.LATER: 1, cv.CUT: 1, cv.NO_ROOM: 2}
    monkeypatch.setattr(cv, "documents", lambda *_: [{"messages": turns("sim " * length, "Oi")}])
    with pytest.raises(TTLError, match="no conversation for chat .*1 read, 1 with no room for an answer"):
        cv.load_examples(run, tokenizer, "train")


def test_a_tokenizer_that_the_template_does_not_suit_is_refused(tiny_done):
    from tokenizers.pre_tokenizers import ByteLevel

    mine = load_tokenizer(tiny_done.folder / "02_tokenizer")
    mine.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    with pytest.raises(TTLError, match="the chat template does not suit its tokenizer"):
        cv.prepare_chat_tokenizer(mine, CHAT)
    mine.eos_token = None
    with pytest.raises(TTLError, match="no eos_token"):
        cv.prepare_chat_tokenizer(mine, CHAT)


# packing


@settings(max_examples=200)
@given(st.data(), st.integers(1, 40))
def test_packing_keeps_all_once_within_the_rows(data, context):
    lengths = data.draw(st.lists(st.integers(1, context), max_size=60))
    rows = cv.pack(lengths, context)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= context for row in rows)
    # no two rows would fit in one
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > context
    assert cv.pack(iter(lengths), context) == rows


def test_packing_by_hand():
    assert cv.pack([3, 5, 2, 8, 2], 10) == [[3, 2], [1, 0, 4]]


@pytest.fixture(params=["by document, as trained", "with a mask"])
def packed_model(model, request):
    with documents_apart(model) if "document" in request.param else contextlib.nullcontext():
        yield model


def test_packed_conversations_do_not_see_each_other(packed_model, tokenizer, examples):
    model, rows = packed_model, [[0, 1, 2], [3, 4]]
    inputs = cv.collate(examples, rows, CONTEXT, tokenizer.pad_token_id)
    other = replace(examples[1], ids=[(token + 7) % 400 + 4 for token in examples[1].ids])
    changed = cv.collate([examples[0], other, *examples[2:]], rows, CONTEXT, tokenizer.pad_token_id)

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


def test_a_packed_conversation_is_predicted_as_alone(packed_model, tokenizer, examples):
    model = packed_model
    inputs = cv.collate(examples, [[0, 1, 2]], CONTEXT, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([example.ids])).logits[0] for example in examples[:3]])
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_no_label_crosses_from_one_conversation_to_the_next(tokenizer, examples):
    # an answer from the first token on, as no conversation has: its first label is still no target
    all_learned = [replace(example, labels=list(example.ids)) for example in examples]
    inputs = cv.collate(all_learned, [[0, 1, 2], []], CONTEXT, tokenizer.pad_token_id)
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


def test_padded_is_the_authors_way(model, tokenizer, examples):
    pad = tokenizer.pad_token_id
    assert cv.rows_of(examples, CONTEXT, faithful=True) == [[n] for n in range(7)]
    made = cv.collate(examples, [[0], [4], []], CONTEXT, pad, faithful=True)
    # a row is one text, and all of it is learned; but for a row that only fills a step
    assert set(made) == {"input_ids", "labels"}
    assert torch.equal(made["labels"][:2], made["input_ids"][:2]) and (made["labels"][2] == IGNORED).all()
    for row, example in zip(made["input_ids"].tolist(), (examples[0], examples[4]), strict=False):
        assert row == example.ids + [pad] * (CONTEXT - len(example.ids))


def test_attention_by_document_gives_the_gradients_of_a_mask(model, tokenizer, examples):
    batch = cv.collate(examples, [[0, 1, 2], [3, 4]], CONTEXT, tokenizer.pad_token_id)
    weights, found = model.model.layers[0].self_attn.k_proj.weight, []
    for way in (contextlib.nullcontext(), documents_apart(model)):
        with way:
            (gradient,) = torch.autograd.grad(summed_loss(model, batch), weights)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


# steps


def alone(rank=0, processes=1):
    return SimpleNamespace(process_index=rank, num_processes=processes)


def test_an_epochs_steps_hold_every_conversation_once(tokenizer, examples):
    asked = CHAT.model_copy(
        update={"tokens_per_step": 2 * CONTEXT, "per_device_train_batch_size": 1, "num_train_epochs": 3}
    )
    many = examples * 3
    rows = len(cv.pack([len(example.ids) for example in many], CONTEXT))
    assert rows % 2 == 1
    get_step, per_epoch = ch.chat_steps(many, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
    assert per_epoch == -(-rows // 2)
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
    again, _ = ch.chat_steps(many, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
    assert torch.equal(again(1, alone()).micro_batches[0]["labels"], get_step(1, alone()).micro_batches[0]["labels"])


def test_processes_share_a_step_and_its_targets(tokenizer, examples):
    asked = CHAT.model_copy(update={"tokens_per_step": 4 * CONTEXT, "per_device_train_batch_size": 1})
    get_step, _ = ch.chat_steps(examples, asked, CONTEXT, tokenizer.pad_token_id, seed=0)
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
    ch.grow_embeddings(model, size, size + 2)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer, weights in zip(layers, old, strict=True):
        assert torch.equal(layer.weight[:size], weights)
        torch.testing.assert_close(layer.weight[size:], weights.mean(0).expand(2, -1))
    assert (layers[0].weight is layers[1].weight) == tied
    assert model.config.vocab_size == size + 2
    torch.testing.assert_close(model(input_ids=ids).logits[..., :size], before)
    # a model that has them already keeps what it learned
    with torch.no_grad():
        layers[0].weight[size:] = 5.0
    ch.grow_embeddings(model, size + 2, size + 2)
    assert (model.get_input_embeddings().weight[size:] == 5).all() and len(layers[0].weight) == size + 2
    # rows that the tokenizer had no use for until now
    ch.grow_embeddings(model, size, size + 2)
    torch.testing.assert_close(layers[0].weight[size:], layers[0].weight[:size].mean(0).expand(2, -1))


# the stage


@pytest.fixture
def trained(tiny_prepared, no_energy):
    run = tiny_prepared(chat={"num_train_epochs": 2, "learning_rate": 0.01}, pretraining={"max_steps": 4})
    pretrain(run)
    return run


def test_the_stage_learns_to_answer(trained, capsys):
    stage = ch.fine_tune_chat(trained)
    said = capsys.readouterr().out
    metrics = stage.metrics()
    assert metrics["validation_loss_after"] < metrics["validation_loss_before"]
    assert 0 <= metrics["padding_share"] < metrics["padding_share_unpacked"] < 1
    assert metrics["useful_tokens_per_second"] < metrics["tokens_per_second"]
    assert metrics["training"]["conversations"] > 50
    assert metrics["base"] == {"name": trained.name, "origin": "this run", "revision": None}
    answers = read_json(stage.folder / "answers.json")
    settings = trained.params.chat
    expected = [prompt for prompt in settings.prompts for _ in range(settings.samples)]
    assert [row["prompt"] for row in answers["before"]] == [row["prompt"] for row in answers["after"]] == expected
    assert [row["seed"] for row in answers["before"]] == [row["seed"] for row in answers["after"]]
    assert [row["text"] for row in answers["before"]] != [row["text"] for row in answers["after"]]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = stage.folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == trained.params.tokenizer.vocab_size + 2
    assert (folder / "tokenizer.model").is_file() and tokenizer.chat_template == cv.chat_template(settings)
    held_out, _ = cv.load_examples(trained, tokenizer, "test")
    context = trained.params.model.max_position_embeddings
    loss = ch.answer_loss(model.eval(), held_out, context, tokenizer.pad_token_id)
    assert loss == pytest.approx(metrics["validation_loss_after"], rel=1e-5)
    records = [row for row in read_records(stage.folder / "metrics.jsonl") if "validation_loss" in row]
    # before the first step, and at each epoch's end, the last one too, though its last step is short
    examples, _ = cv.load_examples(trained, tokenizer, "train")
    rows, per_step = len(cv.rows_of(examples, context)), settings.tokens_per_step // context
    per_epoch = -(-rows // per_step)
    assert rows % per_step, "the last step is short"
    assert [(row["step"], row["epoch"]) for row in records] == [(0, 0), (per_epoch, 1), (2 * per_epoch, 2)]
    assert metrics["steps"] == 2 * per_epoch
    assert f"packed into {rows} rows of {context} tokens, {per_step} a step: 2 epochs are {2 * per_epoch} steps" in said
    assert metrics["validation_loss_by_epoch"] == [row["validation_loss"] for row in records[1:]]
    assert records[0]["perplexity"] == pytest.approx(math.exp(metrics["validation_loss_before"]), rel=1e-3)
    # the answers that were measured come from the model that was saved
    again = ca.answers(model, tokenizer, settings, trained.params.seed)
    assert [row["text"] for row in again] == [row["text"] for row in answers["after"]]
    assert ch.fine_tune_chat(trained).metrics() == metrics
    assert "reused" in capsys.readouterr().out


def test_a_stage_that_stopped_goes_on_to_the_same_weights(trained, monkeypatch, tiny_run):
    whole = sha256(ch.fine_tune_chat(trained).folder / "model" / "model.safetensors")
    trained.stage("05_chat").set_aside()

    def stop(records):
        if records[-1]["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ch.fine_tune_chat(trained, on_record=stop)
    stage = ch.fine_tune_chat(trained)
    records = read_records(stage.folder / "metrics.jsonl")
    assert [row["epoch"] for row in records if "validation_loss" in row] == [0, 1, 2]
    assert sha256(stage.folder / "model" / "model.safetensors") == whole


def test_what_is_trained_keeps_conversations_apart(trained, monkeypatch):
    """The model, attention and batches of the stage itself: a change of one conversation moves no other's loss."""
    found = {}

    def train(model, tokenizer, get_step, loop):
        for step in range(loop.max_steps):
            for batch in get_step(step, alone()).micro_batches:
                for row in range(len(batch["labels"])):
                    one = {key: value[row : row + 1] for key, value in batch.items()}
                    begins = (one["position_ids"][0] == 0).nonzero().flatten().tolist()
                    if len(begins) > 2 and "row" not in found:
                        found.update(row=one, begins=begins)
        one, (first, second, *_) = found["row"], found["begins"]
        changed = {key: value.clone() for key, value in one.items()}
        changed["input_ids"][0, first:second] = 7
        only = {key: value.clone() for key, value in one.items()}
        only["labels"][0, :second] = changed["labels"][0, :second] = IGNORED
        model = make_lean(model).train()
        found["attention"] = model.config._attn_implementation
        found["losses"] = [Learner(model)(**batch).item() for batch in (only, changed)]
        leaking = {key: value for key, value in changed.items() if key != "position_ids"}
        found["leaking"] = Learner(model)(**leaking).item()
        raise KeyboardInterrupt

    monkeypatch.setattr(ch, "train", train)
    with pytest.raises(KeyboardInterrupt):
        ch.fine_tune_chat(trained)
    assert found["attention"] == "by_document"
    assert found["losses"][0] == found["losses"][1] != found["leaking"]


def test_a_validation_loss_that_turns_up_is_told(capsys):
    losses = [5.0, 4.0, 4.5, 4.2, 3.9]
    for epoch, loss in enumerate(losses):
        ch.tell_turn(losses[:epoch], epoch, loss)
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("epoch 2: the validation loss, 4.5000, is above that of epoch 1, 4.0000")
    assert two.startswith("epoch 3: the validation loss, 4.2000, is above that of epoch 1, 4.0000")


def test_the_stage_says_that_it_learns_by_heart(trained, monkeypatch, capsys):
    losses = iter((3.0, 2.0, 2.5))
    monkeypatch.setattr(ch, "answer_loss", lambda *_: next(losses))
    monkeypatch.setattr(ch, "answers", lambda *_: ROWS)
    metrics = ch.fine_tune_chat(trained).metrics()
    assert "epoch 2: the validation loss, 2.5000, is above that of epoch 1" in capsys.readouterr().out
    assert (metrics["best_epoch"], metrics["validation_loss_after"]) == (1, 2.5)


def test_the_plan_tells_steps_and_a_warm_up_that_is_too_long(examples):
    asked = CHAT.model_copy(update={"tokens_per_step": CONTEXT, "num_train_epochs": 2, "warmup_steps": 2})
    rows = len(cv.rows_of(examples, CONTEXT))
    text = ch.plan(examples, asked, CONTEXT)
    assert f"7 conversations packed into {rows} rows of 64 tokens, 1 a step" in text and "(14 if padded)" in text
    assert "rises to the end" not in text
    text = ch.plan(examples, asked.model_copy(update={"warmup_steps": 4 * rows}), CONTEXT)
    assert "to 50% of its peak" in text
    assert "padded into 7 rows" in ch.plan(examples, asked.model_copy(update={"faithful": True}), CONTEXT)


def test_the_authors_way_is_measured_on_answers_too(trained, tiny_prepared, monkeypatch):
    settings = {"num_train_epochs": 1, "learning_rate": 0.01, "faithful": True}
    run = tiny_prepared(run="padded", base=trained.name, pretraining={"max_steps": 4}, chat=settings)
    monkeypatch.setattr(ch, "answers", lambda *_: ROWS)
    metrics = ch.fine_tune_chat(run).metrics()
    per_step = run.params.chat.tokens_per_step // run.params.model.max_position_embeddings
    assert metrics["steps"] == -(-metrics["training"]["conversations"] // per_step)
    assert metrics["padding_share"] == metrics["padding_share_unpacked"] > 0.3
    assert metrics["useful_tokens_per_second"] < 0.7 * metrics["tokens_per_second"]
    packed = ch.fine_tune_chat(trained).metrics()
    # the same weights on the same answers
    assert metrics["validation_loss_before"] == packed["validation_loss_before"]
    assert metrics["learned_tokens"] == packed["learned_tokens"]


def test_a_named_model_is_begun_from(trained, tiny_prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(ch, "answers", lambda *_: ROWS)
    own = ch.fine_tune_chat(trained).metrics()
    there = shutil.copytree(trained.folder / "03_pretraining" / "model", tmp_path / "there")
    settings = {"num_train_epochs": 2, "learning_rate": 0.01, "base_model": str(there)}
    run = tiny_prepared(run="named", chat=settings)
    stage = ch.fine_tune_chat(run)
    # stage 03 is not needed
    assert not (run.folder / "03_pretraining").exists()
    metrics = stage.metrics()
    assert metrics["base"] == {"name": str(there), "origin": "folder", "revision": None}
    assert metrics["validation_loss_by_epoch"] == own["validation_loss_by_epoch"]
    # its place is no part of the identity; its weights are
    moved = there.rename(tmp_path / "moved")
    again = tiny_prepared(run="named", chat=settings | {"base_model": str(moved)})
    assert ch.fine_tune_chat(again).metrics() == metrics
    changed = shutil.copytree(stage.folder / "model", tmp_path / "tuned")
    with pytest.raises(StageConflict, match="base weights"):
        ch.fine_tune_chat(tiny_prepared(run="named", chat=settings | {"base_model": str(changed)}))
    # a chat model may go on from itself: its tokens' rows stay
    further = tiny_prepared(run="further", chat=settings | {"base_model": str(changed), "num_train_epochs": 1})
    found = ch.fine_tune_chat(further).metrics()
    assert found["validation_loss_before"] == pytest.approx(metrics["validation_loss_after"], abs=1e-5)


def test_a_named_model_that_cannot_serve_is_told(tiny_prepared, trained, tmp_path):
    there = shutil.copytree(trained.folder / "03_pretraining" / "model", tmp_path / "there")
    config = read_json(there / "config.json")
    run = tiny_prepared(run="named", chat={"base_model": str(there)})
    write_json(there / "config.json", config | {"max_position_embeddings": 32})
    with pytest.raises(TTLError, match="64 tokens at once, and .* reads 32"):
        ch.fine_tune_chat(run)
    write_json(there / "config.json", config | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    with pytest.raises(TTLError, match="is a mistral: name a Llama"):
        ch.fine_tune_chat(tiny_prepared(run="other", chat={"base_model": str(there)}))
    with pytest.raises(TTLError, match=r"chat.base_model.*there is no such folder"):
        ch.fine_tune_chat(tiny_prepared(run="gone", chat={"base_model": str(tmp_path / "gone")}))


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
