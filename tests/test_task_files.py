"""Benchmarks: chance for a model that knows nothing, 100 for one that knows, and no question holds its answer."""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ttl_utils import task_files
from ttl_utils.errors import SourceError, TTLError
from ttl_utils.params import load_params
from ttl_utils.task_files import OWN_TASKS, Opened, Wanted, open_task, score, wanted
from ttl_utils.tasks import answers, mirrored

DOCUMENTS = 180
PROTOCOLS = wanted(SimpleNamespace(protocols=["paper", "leaderboard"], harness=[], checkpoint_tasks=[]))
TASKS = {item.key: item for item in [*PROTOCOLS, *(Wanted(name, name, None, None) for name in OWN_TASKS)]}
# each setting once
TWICE = ["leaderboard/arc_pt", "leaderboard/truthfulqa_pt_mc2", "ttl_mmlu_pt_text"]
ONCE = [key for key in TASKS if key not in TWICE]
RANKED = [key for key in ONCE if key != "ttl_assin2_sts"]
F1 = ["ttl_assin2_rte", "ttl_faquad_nli", "ttl_hatebr", "ttl_pt_hate_speech", "ttl_tweetsentbr"]


# ---- data in the hub's schemas


class Maker:
    """Rows of noise; every question has a word of its own. `turn` moves every right answer of the evaluated rows."""

    def __init__(self, turn: int = 0):
        self.random, self.turn, self.count = random.Random(0), turn, 0

    def text(self, words: int = 4) -> str:
        self.count += 1
        return " ".join(self.random.choices(["casa", "rio", "mar", "lua", "pão", "luz"], k=words)) + f" q{self.count}q"

    def place(self, number: int, choices: int, turns: bool) -> int:
        return (number + (self.turn if turns else 0)) % choices

    def exam(self, name: str, number: int, letters: str, turns: bool) -> dict:
        choices = {"text": [self.text(2) for _ in letters], "label": list(letters)}
        answer = letters[self.place(number, len(letters), turns)]
        return {"id": name, "question": self.text(), "choices": choices, "answerKey": answer, "nullified": False}

    def exams(self, shots: list[str], letters: tuple[str, ...]) -> list[dict]:
        kinds = len(letters)
        rows = [self.exam(f"x_{i}", i // kinds, letters[i % kinds], True) for i in range(DOCUMENTS)]
        annulled = [self.exam("annulled", 0, letters[0], False) | {"answerKey": None, "nullified": True}]
        # the worked examples stand among the questions, in another order
        return (
            rows[:9]
            + [self.exam(name, i, letters[0], False) for i, name in enumerate(sorted(shots))]
            + annulled
            + rows[9:]
        )

    def rows(self, numbers, turns: bool, choices: int, label, **columns) -> list[dict]:
        made = [{name: make(number) for name, make in columns.items()} for number in numbers]
        return [row | label(self.place(i, choices, turns)) for i, row in enumerate(made)]

    def mirror(self) -> dict[tuple[str, str], dict[str, list[dict]]]:
        """{(data set, configuration): {split: rows}}"""
        text, tested = (lambda _: self.text()), range(DOCUMENTS)
        option = {f"option_{x}": lambda _: self.text(2) for x in "abcd"}
        letter, endings = (lambda i: {"answer": "ABCD"[i]}), lambda _: [self.text(2) for _ in range(4)]
        positive = {"sentence": text}

        def assin2(i):
            return {"entailment_judgment": i, "relatedness_score": 1.0 + self.random.randrange(41) / 10}

        def sentiment(i):
            return {"label": ["Positive", "Neutral", "Negative"][i]}

        def both(ids, make, turns=False):
            return self.rows(ids, turns, 2, make, idx=lambda i: i, **positive)

        def label(i):
            return {"label": i}

        def split(shots, make):
            return {"train": both(shots, make), "test": both(tested, make, True)}

        pair = {"sentence_pair_id": lambda i: i, "premise": text, "hypothesis": text}
        arc = {"id": str, "instruction": text, **option, "option_e": lambda i: None if i % 3 else self.text(2)}
        swag = {"activity_label": text, "ctx_a": text, "ctx_b": text, "endings": endings}
        truth = {"question": text, "mc1_targets_choices": endings, "mc2_targets_choices": endings}

        def truths(i):
            return {"mc2_targets_labels": [1, i, 0, 0] if not self.turn else [0, i, 0, 1]}

        faquad = {"question": text, "answer": text}
        return {
            ("eduagarcia/enem_challenge", "default"): {"train": self.exams(answers.ENEM, ("ABCDE",))},
            ("eduagarcia-temp/BLUEX_without_images", "default"): {
                "train": self.exams(answers.BLUEX, ("ABCDE", "ABCD"))
            },
            ("eduagarcia/oab_exams", "default"): {"train": self.exams(answers.OAB, ("ABCD",))},
            ("nilc-nlp/assin2", "default"): {
                "train": self.rows(sorted(answers.ASSIN2), False, 2, assin2, **pair),
                "test": self.rows(tested, True, 2, assin2, **pair),
            },
            ("ruanchaves/faquad-nli", "default"): {
                "train": self.rows(range(2919), False, 2, label, **faquad),
                "test": self.rows(tested, True, 2, label, **faquad),
            },
            ("eduagarcia/portuguese_benchmark", "HateBR_offensive_binary"): split(sorted(answers.HATEBR), label),
            ("eduagarcia/portuguese_benchmark", "Portuguese_Hate_Speech_binary"): split(answers.HATE_SPEECH, label),
            ("eduagarcia-temp/tweetsentbr", "default"): {
                "train": self.rows(range(30), False, 3, sentiment, **positive),
                "test": self.rows(tested, True, 3, sentiment, **positive),
            },
            ("alexandrainst/m_arc", "pt"): {
                "train": self.rows(range(60), False, 4, letter, **arc),
                "validation": self.rows(range(5), False, 4, letter, **arc),
                "test": self.rows(tested, True, 4, letter, **arc),
            },
            ("alexandrainst/m_hellaswag", "pt"): {
                "val": self.rows(tested, True, 4, lambda i: {"label": str(i)}, **swag)
            },
            ("alexandrainst/m_mmlu", "pt"): {
                "train": self.rows(range(30), False, 4, letter, instruction=text, **option),
                "test": self.rows(tested, True, 4, letter, instruction=text, **option),
            },
            ("alexandrainst/m_truthfulqa", "pt"): {"val": self.rows(tested, False, 2, truths, **truth)},
        }


def write_mirror(root: Path, sets: dict) -> Path:
    cards: dict[str, list] = {}
    for (name, config), splits in sets.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{config}-{split}.parquet")
        files = [{"split": split, "path": f"{config}-{split}.parquet"} for split in splits]
        cards.setdefault(name, []).append({"config_name": config, "data_files": files})
    for name, configs in cards.items():
        (root / name / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    def refuse(*_, **__):
        raise AssertionError("no network in tests")

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.delenv("TTL_MIRROR", raising=False)
        yield


@pytest.fixture(scope="module")
def sets() -> dict:
    return Maker().mirror()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, sets) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"), sets)


@pytest.fixture(scope="module")
def opened(mirror):
    """`opened(key)`: the task over the mirror, opened once."""

    @functools.cache
    def open_once(key: str) -> Opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TTL_MIRROR", str(mirror))
            return open_task(TASKS[key], seed=42)

    return open_once


def changed(tmp_path, monkeypatch, sets, name: str, config: str, split: str, change) -> None:
    """A mirror of one data set whose rows of a split are changed."""
    splits = dict(sets[name, config])
    splits[split] = change([dict(row) for row in splits[split]])
    if not splits[split]:
        del splits[split]
    monkeypatch.setenv("TTL_MIRROR", str(write_mirror(tmp_path / "changed", {(name, config): splits})))


# ---- models


class Fake(LM):
    """`prefers(document, place, text)`: whether that choice is liked; `writes(document)`: the generated text."""

    def __init__(self, prefers=None, writes=None):
        super().__init__()
        self.prefers, self.writes = prefers, writes

    def loglikelihood(self, requests):
        return [(0.0 if self.prefers(r.doc, r.idx, r.args[1].removeprefix(" ")) else -50.0, False) for r in requests]

    def generate_until(self, requests):
        return [self.writes(r.doc) for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def run(opened: Opened, lm: LM, limit: int | None = None) -> dict:
    # one example: what models of the test see is the question
    opened.task.set_config(key="num_fewshot", value=min(1, opened.about["num_fewshot"]))
    found = lm_eval.evaluate(lm, {"tasks": {"x": opened.task}}, limit=limit, bootstrap_iters=100)
    row = score(opened, found["samples"]["x"], found["results"]["x"])
    json.dumps(row)
    return row | {"acc": found["results"]["x"].get("acc,none")}


def ask(opened: Opened, limit: int | None = None) -> list[tuple[int, tuple]]:
    """(document, request) of the first documents, with the task's own number of examples."""
    opened.task.set_config(key="num_fewshot", value=opened.about["num_fewshot"])
    opened.task.build_all_requests(limit=limit)
    return [(i.doc_id, i.args) for i in opened.task.instances]


def truth(doc: dict) -> str:
    """The right answer's text, from the columns of the data."""
    if "endings" in doc:
        return doc["endings"][int(doc["label"])]
    if "topic" in doc:
        return dict(zip(doc["choices"]["label"], doc["choices"]["text"], strict=True))[doc["answerKey"]]
    if "answerKey" in doc or "label" in doc:
        words = {"Positive": "Positivo", "Neutral": "Neutro", "Negative": "Negativo", 0: "Não", 1: "Sim"}
        return doc["answerKey"] if "answerKey" in doc else words[doc["label"]]
    return ["Não", "Sim"][doc["entailment_judgment"]]


def right(key: str):
    """`prefers` of a model that knows."""

    def prefers(doc, place, text):
        if "mc2_targets_labels" in doc:
            return doc["mc2_targets_labels"][place] == 1
        if "instruction" in doc:
            return text == (doc["answer"] if key == "leaderboard/m_mmlu_pt" else doc[f"option_{doc['answer'].lower()}"])
        return text == truth(doc)

    return prefers


@pytest.fixture(scope="module")
def untrained() -> HFLM:
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # a wide initialisation: what it prefers then depends on the text before
    config = LlamaConfig(vocab_size=260, max_position_embeddings=128, initializer_range=1.0, **shape)
    return HFLM(pretrained=LlamaForCausalLM(config), tokenizer=tokenizer, batch_size=64, device="cpu")


# ---- what the tasks score


@pytest.mark.parametrize("key", RANKED)
def test_an_untrained_model_scores_at_chance(opened, untrained, key):
    row = run(opened(key), untrained)
    if row["metric"] == "f1_macro":
        # one that always says the same lies below chance by macro F1, and at chance by accuracy
        assert row["value"] <= row["chance"] + 3 * row["stderr"]
        choices = 3 if key == "ttl_tweetsentbr" else 2
        assert abs(row["acc"] - 1 / choices) <= 3 * (1 / DOCUMENTS) ** 0.5 / 2
    else:
        assert 0 < row["stderr"] < 0.1
        assert abs(row["value"] - row["chance"]) <= 3 * row["stderr"]


@pytest.mark.parametrize("key", ONCE)
def test_a_model_that_prefers_the_right_answer_scores_100(opened, key):
    found = opened(key)
    row = run(found, Fake(right(key), lambda doc: f" {doc['relatedness_score']:.1f}"), limit=50)
    assert row["value"] == pytest.approx(1.0) and (row["stderr"] or 0) < 1e-6


@pytest.mark.parametrize("key", RANKED)
def test_a_model_that_prefers_a_wrong_answer_scores_0(opened, key):
    found = opened(key)
    prefers = right(key)
    assert run(found, Fake(lambda *choice: not prefers(*choice)), limit=50)["value"] == pytest.approx(0.0)


@pytest.mark.parametrize("key", RANKED)
def test_one_answer_to_everything_scores_the_constant(opened, key):
    found = opened(key)
    # not a multiple of the number of choices: labels are uneven
    least = min(len(found.task.doc_to_choice(doc)) for doc in found.task.eval_docs)
    values = [run(found, Fake(lambda _, place, text, at=at: place == at), limit=33) for at in range(least)]
    expected = None if "truthfulqa" in key else max(row["value"] for row in values)
    assert values[0]["constant_answer"] == expected


def test_constant_and_chance_of_uneven_labels(opened, tmp_path, monkeypatch, sets):
    changed(
        tmp_path, monkeypatch, sets, "ruanchaves/faquad-nli", "default", "test",
        lambda rows: [row | {"label": int(i % 10 == 0)} for i, row in enumerate(rows)],
    )  # fmt: skip
    found = open_task(TASKS["ttl_faquad_nli"], 42)
    row = run(found, Fake(lambda _, place, text: place == 0))
    gold = [i % 10 == 0 for i in range(DOCUMENTS)]
    assert row["value"] == row["constant_answer"] == pytest.approx(f1_score(gold, [False] * DOCUMENTS, average="macro"))
    even = np.random.default_rng(0).integers(0, 2, (400, DOCUMENTS))
    assert row["chance"] == pytest.approx(np.mean([f1_score(gold, x, average="macro") for x in even]), abs=0.01)


def test_shares_of_chance(opened):
    chance = {key: run(opened(key), Fake(lambda *_: True), limit=30)["chance"] for key in RANKED}
    # every third question of ARC has a fifth choice, every second of BLUEX only four
    assert chance["paper/arc_pt"] == pytest.approx((2 / 4 + 1 / 5) / 3)
    assert chance["ttl_bluex"] == pytest.approx((1 / 4 + 1 / 5) / 2)
    assert (chance["ttl_enem"], chance["ttl_oab_exams"]) == pytest.approx((1 / 5, 1 / 4))
    # one or two of four answers are true
    assert chance["paper/truthfulqa_pt_mc2"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert chance["ttl_tweetsentbr"] == pytest.approx(1 / 3)


def test_similarity_is_read_from_what_is_written(opened):
    found = opened("ttl_assin2_sts")
    docs = list(found.task.eval_docs)
    noise = dict(zip([doc["premise"] for doc in docs], np.random.default_rng(0).normal(0, 1, DOCUMENTS), strict=True))
    written = {doc["premise"]: f" {max(doc['relatedness_score'] + noise[doc['premise']], 0):.2f}." for doc in docs}
    row = run(found, Fake(writes=lambda doc: written[doc["premise"]]))
    pairs = np.array([(doc["relatedness_score"], answers.number(written[doc["premise"]])) for doc in docs])
    assert row["value"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    drawn = np.random.default_rng(1).integers(0, DOCUMENTS, (1000, DOCUMENTS))
    assert row["stderr"] == pytest.approx(np.std([np.corrcoef(pairs[i].T)[0, 1] for i in drawn]), rel=0.15)
    assert (row["chance"], row["constant_answer"], row["metric"]) == (None, None, "pearson")
    same = run(found, Fake(writes=lambda _: "não sei"))
    assert (same["value"], same["stderr"]) == (0.0, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [(" 3,5", 3.5), ("4.2\n", 4.2), ("nota 2 de 5", 2), ("0,3", 1), ("35", 5), ("", 5), ("nenhuma", 5), ("-3,0", 3)],
)
def test_numbers(text, value):
    assert answers.number(text) == value


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_f1_is_that_of_the_labels_that_are_right_somewhere(pairs):
    gold, predicted = zip(*pairs, strict=True)
    expected = f1_score(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert answers.f1_macro(pairs) == pytest.approx(expected)


def test_stderr_of_macro_f1_is_the_spread_over_drawn_documents(opened):
    found = opened("ttl_tweetsentbr")
    order = {doc["sentence"]: i for i, doc in enumerate(found.task.eval_docs)}

    def half(doc, place, text):
        # right in two of three documents
        return text == (truth(doc) if order[doc["sentence"]] // 3 % 3 else "Negativo")

    row = run(found, Fake(half))
    docs = list(found.task.eval_docs)
    gold = np.array([found.task.doc_to_target(doc) for doc in docs])
    said = np.array(
        [next(i for i, text in enumerate(found.task.doc_to_choice(doc)) if half(doc, i, text)) for doc in docs]
    )
    assert 0.4 < row["value"] < 0.95
    assert row["value"] == pytest.approx(f1_score(gold, said, average="macro"))
    drawn = np.random.default_rng(1).integers(0, DOCUMENTS, (200, DOCUMENTS))
    spread = np.std([f1_score(gold[i], said[i], average="macro") for i in drawn])
    assert row["stderr"] == pytest.approx(spread, rel=0.2)
    assert run(found, Fake(half)) == row


# ---- what the tasks ask


@functools.cache
def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split() if word[0] == word[-1] == "q" and word[1:-1].isdigit())


@pytest.mark.parametrize("key", ONCE)
def test_no_worked_example_is_the_tested_document(opened, key):
    found = opened(key)
    prompts = {document: args[0] for document, args in ask(found, limit=20)}
    shots = found.about["num_fewshot"]
    for number, doc in zip(prompts, found.task.eval_docs, strict=False):
        question = found.task.doc_to_text(doc)
        assert prompts[number].endswith(question)
        before = prompts[number].removesuffix(question)
        # every text has a word of its own
        assert not set(_words(question)) & set(_words(before))
        if key != "ttl_smoke_pt":
            assert ("q" in before and bool(_words(before))) == (shots > 0) or "truthfulqa" in key
    texts = map(found.task.doc_to_text, found.task.eval_docs)
    starts = {prompt.removesuffix(text) for prompt, text in zip(prompts.values(), texts, strict=False)}
    assert (len(starts) == 1) == (found.about["examples"] != "drawn")


@pytest.mark.parametrize("key", [key for key in ONCE if key != "ttl_smoke_pt"])
def test_the_right_answer_is_not_in_the_question(opened, turned, key):
    """Data that differ in nothing but which answer is right ask the same questions with the same choices."""
    asked = []
    for found in turned(key):
        found.task.set_config(key="num_fewshot", value=0)
        found.task.build_all_requests()
        asked.append([(i.doc_id, i.args if key != "ttl_assin2_sts" else i.args[0]) for i in found.task.instances])
    assert asked[0] == asked[1]


@pytest.fixture(scope="module")
def turned(mirror, tmp_path_factory):
    """`turned(key)`: the task twice, over data whose evaluated rows have other right answers."""
    other = write_mirror(tmp_path_factory.mktemp("turned"), Maker(turn=1).mirror())

    def both(key: str) -> list[Opened]:
        with pytest.MonkeyPatch.context() as patch:
            found = []
            for root in (mirror, other):
                patch.setenv("TTL_MIRROR", str(root))
                found.append(open_task(TASKS[key], seed=42))
        first, second = (list(one.task.eval_docs) for one in found)
        assert first != second and len(first) == len(second)
        return found

    return both


def shot(rows: list[dict], column: str, values: list) -> list[dict]:
    return [next(row for row in rows if row[column] == value) for value in values]


def test_prompts_are_the_reference_harness_own(opened, sets):
    """Built by hand: description, examples in their fixed order, question; an answer after a space."""

    def exam(row):
        options = "".join(
            f"{label}. {text}\n" for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        )
        return f"{row['question']}\nAlternativas:\n{options.strip()}\nResposta correta:"

    def first(key):
        return [args for _, args in ask(opened(key), limit=1)]

    rows = sets["eduagarcia/enem_challenge", "default"]["train"]
    shots = [
        f"Pergunta:\n{exam(row)} {row['answerKey']}\n\n" for row in shot(rows, "id", ["2022_21", "2022_88", "2022_143"])
    ]
    description = (
        "As perguntas a seguir são questões de múltipla escolha do Exame Nacional do Ensino Médio (ENEM), selecione a "
        'única alternativa correta e responda apenas com as letras "A", "B", "C", "D" ou "E".\n\n'
    )
    prompt = description + "".join(shots) + f"Pergunta:\n{exam(rows[0])}"
    assert first("ttl_enem") == [(prompt, f" {letter}") for letter in "ABCDE"]

    rows = sets["eduagarcia/oab_exams", "default"]["train"]
    assert first("ttl_oab_exams")[0][0].endswith(f"\n\nQuestão:\n{exam(rows[0])}")

    train, test = (sets["nilc-nlp/assin2", "default"][split] for split in ("train", "test"))
    ids = [1, 3251, 2, 3252, 3, 4, 5, 6, 3253, 7, 3254, 3255, 3256, 8, 9]

    def entails(row):
        return (
            f"Premissa: {row['premise']}\nHipótese: {row['hypothesis']}\n"
            "Pergunta: A hipótese pode ser inferida pela premissa? Sim ou Não?\nResposta:"
        )

    shots = [
        f"{entails(row)} {['Não', 'Sim'][row['entailment_judgment']]}\n\n"
        for row in shot(train, "sentence_pair_id", ids)
    ]
    description = (
        "Abaixo estão pares de premissa e hipótese. Para cada par, indique se a hipótese pode ser inferida a partir da "
        'premissa, responda apenas com "Sim" ou "Não".\n\n'
    )
    assert first("ttl_assin2_rte") == [
        (description + "".join(shots) + entails(test[0]), f" {x}") for x in ("Não", "Sim")
    ]

    def alike(row):
        return (
            f"Frase 1: {row['premise']}\nFrase 2: {row['hypothesis']}\n"
            "Pergunta: Quão similares são as duas frases? Dê uma pontuação entre 1,0 a 5,0.\nResposta:"
        )

    shots = [
        f"{alike(row)} {row['relatedness_score']:.1f}\n\n".replace(".", ",").replace("5,0,", "5,0.")
        for row in shot(train, "sentence_pair_id", ids)
    ]
    [(prompt, options)] = first("ttl_assin2_sts")
    assert prompt.endswith("\n\n" + "".join(shots) + alike(test[0])) and options["until"] == ["\n\n"]

    rows = sets["ruanchaves/faquad-nli", "default"]["train"]
    example = "Pergunta: {question}\nResposta: {answer}\nA resposta dada satisfaz à pergunta? Sim ou Não? "
    shots = [example.format(**rows[i]) + ["Não", "Sim"][rows[i]["label"]] for i in (1893, 949, 663)]
    assert "\n\n".join(shots) in first("ttl_faquad_nli")[0][0]

    mmlu = sets["alexandrainst/m_mmlu", "pt"]["test"][0]
    options = "".join(f"{x}. {mmlu[f'option_{x.lower()}']}\n" for x in "ABCD")
    asked = first("paper/m_mmlu_pt")
    assert asked[0][0].endswith(f"\n\nQuestion: {mmlu['instruction']}\nChoices:\n{options}Answer:")
    assert [text for _, text in asked] == [f" {mmlu[f'option_{x}']}" for x in "abcd"]
    assert [text for _, text in first("leaderboard/m_mmlu_pt")] == [f" {x}" for x in "ABCD"]


def test_counts_and_what_is_said_of_each(opened):
    for key in TASKS:
        about = opened(key).about
        json.dumps(about)
        assert opened(key).reason is None and about["scoring"] and isinstance(about["differs"], list)
        assert about["from_mirror"] == (key != "ttl_smoke_pt")
        # neither the worked examples nor the annulled question are asked
        assert len(opened(key).task.eval_docs) == (48 if key == "ttl_smoke_pt" else DOCUMENTS)
    shots = {key: opened(key).about["num_fewshot"] for key in TASKS}
    assert [shots[f"paper/{x}"] for x in ("arc_pt", "hellaswag_pt", "m_mmlu_pt", "truthfulqa_pt_mc2")] == [25, 0, 25, 0]
    assert [shots[f"leaderboard/{x}"] for x in ("arc_pt", "hellaswag_pt", "m_mmlu_pt", "truthfulqa_pt_mc2")] == [
        25,
        10,
        5,
        0,
    ]
    assert [shots[f"ttl_{x}"] for x in ("enem", "bluex", "oab_exams", "assin2_rte", "assin2_sts")] == [3, 3, 3, 15, 15]
    assert [shots[f"ttl_{x}"] for x in ("faquad_nli", "hatebr", "pt_hate_speech", "tweetsentbr")] == [15, 25, 25, 25]
    metrics = {key: opened(key).about["metric"] for key in TASKS}
    assert {key for key, metric in metrics.items() if metric == "f1_macro"} == set(F1)
    assert [metrics[f"paper/{x}"] for x in ("arc_pt", "hellaswag_pt", "m_mmlu_pt", "truthfulqa_pt_mc2")] == [
        "acc_norm",
        "acc_norm",
        "acc",
        "mc2",
    ]
    assert "evaluated one" in opened("leaderboard/hellaswag_pt").about["differs"][-1]
    assert opened("paper/hellaswag_pt").about["differs"] == []


def test_every_run_of_a_task_draws_the_same_examples(opened):
    asked = []
    for limit in (5, 9, 5):
        asked.append([args for document, args in ask(opened("paper/arc_pt"), limit) if document < 5])
    assert asked[0] == asked[1] == asked[2]


def test_fingerprint_follows_what_is_asked_and_the_data_not_their_place(mirror, tmp_path, monkeypatch, sets):
    monkeypatch.setenv("TTL_MIRROR", str(shutil.copytree(mirror, tmp_path / "moved")))
    item = TASKS["ttl_enem"]
    one = open_task(item, 42).fingerprint
    monkeypatch.setenv("TTL_MIRROR", str(mirror))
    assert open_task(item, 42).fingerprint == one
    assert open_task(item, 43).fingerprint != one
    assert open_task(Wanted("ttl_enem", "ttl_enem", 2, None), 42).fingerprint != one
    assert open_task(TASKS["ttl_oab_exams"], 42).fingerprint != one

    def another(rows):
        return [*rows[:-1], rows[-1] | {"question": "outra"}]

    changed(tmp_path, monkeypatch, sets, "eduagarcia/enem_challenge", "default", "train", another)
    assert open_task(item, 42).fingerprint != one


# ---- which tasks


def settings(harness=(), protocols=(), checkpoint_tasks=()):
    tasks = [SimpleNamespace(name=name, num_fewshot=None) for name in harness]
    return SimpleNamespace(harness=tasks, protocols=list(protocols), checkpoint_tasks=list(checkpoint_tasks))


def test_protocols_come_first_and_every_size_names_known_tasks():
    keys = [item.key for item in wanted(load_params({"file": "params/160m.yaml"}).evaluation)]
    assert keys[:4] == ["paper/arc_pt", "paper/hellaswag_pt", "paper/m_mmlu_pt", "paper/truthfulqa_pt_mc2"]
    assert keys[4:8] == [key.replace("paper", "leaderboard") for key in keys[:4]]
    assert set(keys[8:]) >= {"ttl_enem", "ttl_assin2_sts"}
    for size in ("nano", "40m", "460m"):
        assert wanted(load_params({"file": f"params/{size}.yaml"}).evaluation)


def test_unknown_and_repeated_names(monkeypatch):
    # looking through all of lm-eval's tasks takes 10 seconds
    index = task_files._index("okapi")
    monkeypatch.setattr(task_files, "_index", lambda _: index)
    with pytest.raises(TTLError, match=r"'arcpt'.*arc_pt"):
        wanted(settings(["arcpt"]))
    with pytest.raises(TTLError, match=r"'ttl_enen'.*ttl_enem"):
        wanted(settings(["ttl_enen"]))
    with pytest.raises(TTLError, match=r"'m_mmlu'.*groups"):
        wanted(settings(["m_mmlu"]))
    with pytest.raises(TTLError, match="'ttl_enem' is named twice"):
        wanted(settings(["ttl_enem", "ttl_bluex", "ttl_enem"]))
    with pytest.raises(TTLError, match=r"checkpoint_tasks: 'arc_pt'.*paper/arc_pt"):
        wanted(settings(["ttl_enem"], ["paper"], ["arc_pt"]))
    assert len(wanted(settings(["arc_pt"], ["paper"], ["arc_pt", "paper/arc_pt"]))) == 5


# ---- data that fail


@pytest.mark.parametrize("key", [key for key in ONCE if key != "ttl_smoke_pt"])
def test_data_out_of_reach_give_a_reason(key, monkeypatch, tmp_path):
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
    found = open_task(TASKS[key], 42)
    assert found.task is None and found.fingerprint == ""
    assert found.about["dataset"] in found.reason and "TTL_MIRROR" in found.reason and "\n" not in found.reason
    assert found.about["num_fewshot"] is not None and found.about["from_mirror"] is False


def test_the_hub_is_asked_once_where_it_is_not_declared_offline(monkeypatch):
    def silent(name):
        raise SourceError(f"data set {name!r}: the hub cannot be reached")

    monkeypatch.setattr(mirrored.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(mirrored, "check", silent)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked again"))
    assert open_task(TASKS["ttl_enem"], 42).reason == "data set 'eduagarcia/enem_challenge': the hub cannot be reached"


def test_a_bug_is_not_taken_for_missing_data(mirror, monkeypatch):
    monkeypatch.setenv("TTL_MIRROR", str(mirror))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_task(TASKS["ttl_enem"], 42)


def test_a_set_with_a_loader_script_is_read_from_the_hubs_parquet(mirror, monkeypatch):
    real, asked = datasets.load_dataset, []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found portuguese_benchmark.py")
        return real(str(mirror / path), options["data_dir"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = open_task(TASKS["ttl_hatebr"], 42)
    assert len(found.task.eval_docs) == DOCUMENTS
    assert asked[1] == (
        "eduagarcia/portuguese_benchmark",
        None,
        {"data_dir": "HateBR_offensive_binary", "revision": "refs/convert/parquet"},
    )


ENEM = ("eduagarcia/enem_challenge", "default", "train")
ASSIN2 = ("nilc-nlp/assin2", "default")
ARC = ("alexandrainst/m_arc", "pt", "test")


def without(column: str):
    return lambda rows: [{key: value for key, value in row.items() if key != column} for row in rows]


def last(**columns):
    return lambda rows: [*rows[:-1], rows[-1] | columns]


@pytest.mark.parametrize(
    ("key", "place", "change", "said"),
    [
        ("ttl_enem", ENEM, without("answerKey"), r"ttl_enem.*enem_challenge.*'train'.*no column 'answerKey'.*question"),
        ("ttl_enem", ENEM, last(answerKey="F"), r"ttl_enem.*row 183.*'answerKey' holds 'F'.*'E'"),
        ("ttl_enem", ENEM, last(answerKey=None), r"'answerKey' holds None"),
        ("ttl_enem", ENEM, lambda rows: [row for row in rows if row["id"] != "2022_88"], r"ttl_enem.*id '2022_88'"),
        ("ttl_assin2_rte", (*ASSIN2, "test"), last(entailment_judgment=2), r"'entailment_judgment' holds 2.*0, 1"),
        ("ttl_assin2_rte", (*ASSIN2, "train"), last(entailment_judgment=-1), r"'train', row 49.*holds -1"),
        ("ttl_assin2_rte", (*ASSIN2, "train"), lambda rows: [], r"ttl_assin2_rte.*no split 'train': it has test"),
        ("ttl_assin2_sts", (*ASSIN2, "test"), without("premise"), r"ttl_assin2_sts.*no column 'premise'"),
        ("ttl_tweetsentbr", ("eduagarcia-temp/tweetsentbr", "default", "test"), last(label="positive"), r"'positive'"),
        ("ttl_tweetsentbr", ("eduagarcia-temp/tweetsentbr", "default", "train"), lambda rows: rows[:9], r"25 .*give 9"),
        ("ttl_faquad_nli", ("ruanchaves/faquad-nli", "default", "train"), lambda rows: rows[:99], r"faquad.*99 rows"),
        ("paper/arc_pt", ARC, without("instruction"), r"arc_pt.*'instruction'"),
        ("paper/arc_pt", ARC, last(answer="1"), r"arc_pt.*'answer' holds '1'"),
        (
            "leaderboard/hellaswag_pt",
            ("alexandrainst/m_hellaswag", "pt", "val"),
            lambda rows: rows[:10],
            r"10 .*give 9",
        ),
        ("leaderboard/m_mmlu_pt", ("alexandrainst/m_mmlu", "pt", "test"), last(answer="E"), r"'answer' holds 'E'"),
    ],
)
def test_data_that_do_not_fit_the_task_are_named(tmp_path, monkeypatch, sets, key, place, change, said):
    changed(tmp_path, monkeypatch, sets, *place, change)
    with pytest.raises(TTLError, match=said):
        open_task(TASKS[key], 42)


def test_an_answer_that_is_none_of_its_own_questions_choices_is_named(tmp_path, monkeypatch, sets):
    changed(
        tmp_path, monkeypatch, sets, "eduagarcia-temp/BLUEX_without_images", "default", "train", last(answerKey="E")
    )
    with pytest.raises(TTLError, match=r"'x_179'.*'answerKey' holds 'E'.*A, B, C, D"):
        open_task(TASKS["ttl_bluex"], 42)


def test_a_damaged_file_and_an_absent_configuration_are_named(mirror, tmp_path, monkeypatch):
    root = shutil.copytree(mirror, tmp_path / "damaged")
    monkeypatch.setenv("TTL_MIRROR", str(root))
    (root / "nilc-nlp/assin2/default-test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TTLError, match=r"ttl_assin2_rte.*does not open"):
        open_task(TASKS["ttl_assin2_rte"], 42)
    (root / "alexandrainst/m_arc/README.md").write_text(
        "---\nconfigs:\n- config_name: es\n  data_files: pt-test.parquet\n---\n", encoding="utf-8"
    )
    with pytest.raises(TTLError, match=r"arc_pt.*'pt' not found.*es"):
        open_task(TASKS["paper/arc_pt"], 42)
