"""Continuations that hang on nothing but their seed, measures of known values, and the report that is kept."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.test_toxicity import TOXIC, build, save
from ttl_utils import code_words, sampling
from ttl_utils import conversations as ch
from ttl_utils import generation as gen
from ttl_utils import text_measures as tm
from ttl_utils.errors import DamagedFile, MissingStage, ParameterError, TTLError
from ttl_utils.files import read_json
from ttl_utils.model import new_model
from ttl_utils.params import load_params
from ttl_utils.sampling import generate
from ttl_utils.schema import Generation, Toxicity
from ttl_utils.tokenizer import load_tokenizer

torch.set_num_threads(1)
CHAT = load_params({}).chat
CONTEXT = 64
PROMPTS = ["O mercado", "A bacia de rocha que o poço mostra em março", "café", "Qual é o preço do açúcar?"]
CODE = ["def soma(a, b):", "import numpy as"]


def chosen(**changed) -> Generation:
    values = {"prompts": PROMPTS, "code_prompts": CODE, "samples": 2, "max_new_tokens": 12, "temperature": 1.0}
    values |= {"top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "toxicity": None}
    return Generation(**values | changed)


@pytest.fixture(scope="module")
def tokenizer(tiny_done):
    return load_tokenizer(tiny_done.folder / "02_tokenizer")


@pytest.fixture(scope="module")
def asker(tiny_done):
    return ch.prepare_chat_tokenizer(load_tokenizer(tiny_done.folder / "02_tokenizer"), CHAT)


def made(shape, tokenizer, **changed):
    # weights larger than usual, so that what was said before matters
    shape = shape.model_copy(update={"initializer_range": 0.3, "max_position_embeddings": CONTEXT} | changed)
    return new_model(shape, tokenizer, seed=0, attention="sdpa").eval()


@pytest.fixture(scope="module")
def model(tiny_done, tokenizer):
    return made(tiny_done.params.model, tokenizer)


@pytest.fixture(scope="module")
def answerer(tiny_done, asker):
    return made(tiny_done.params.model, asker)


def scripted(tokenizer, follows: dict[int, int], default: int):
    """A model whose next token hangs on the last one alone: layers that add nothing, and a head that is a table."""
    size = len(tokenizer)
    shape = load_params({}).model.model_copy(
        update={"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        | {"num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
    )
    model = new_model(shape, tokenizer, seed=0, attention="sdpa").eval()
    table = torch.zeros(size, size)
    for token in range(size):
        table[follows.get(token, default), token] = 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table)
    return model


# sampling


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(model, tokenizer):
    first, again, other = (generate(model, tokenizer, PROMPTS, chosen(), seed) for seed in (1, 1, 2))
    assert first == again
    assert [row["text"] for row in first] != [row["text"] for row in other]
    assert len({row["seed"] for row in first}) == len(first) == 2 * len(PROMPTS)
    # the space between prompt and text is the text's
    assert any(row["text"].startswith(" ") for row in first)
    # samples of one prompt differ, and come prompt by prompt
    assert all(first[n]["text"] != first[n + 1]["text"] for n in range(0, len(first), 2))
    assert [row["prompt"] for row in first] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert first[0].keys() == {"prompt", "kind", "text", "tokens", "ended", "seed", "cut", "control"}


@pytest.mark.parametrize("changed", [{"top_k": 1}, {}, {"repetition_penalty": 1.8, "top_p": 0.9}])
def test_a_text_hangs_on_no_other_prompt_of_its_batch(model, tokenizer, changed):
    settings = chosen(**changed)
    alone = [row for prompt in PROMPTS for row in generate(model, tokenizer, [prompt], settings, 7, batch_size=1)]
    for size in (2, 3, 64):
        assert generate(model, tokenizer, PROMPTS, settings, 7, batch_size=size) == alone
    backwards = generate(model, tokenizer, PROMPTS[::-1], settings, 7)
    assert sorted(backwards, key=lambda row: row["seed"]) == sorted(alone, key=lambda row: row["seed"])


def test_greedy_texts_are_those_of_transformers(model, tokenizer):
    for row in generate(model, tokenizer, PROMPTS, chosen(top_k=1), 0):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        whole = tokenizer.decode(plain[0], skip_special_tokens=True)
        assert row["prompt"] + row["text"] == whole


def test_tokens_are_drawn_by_their_probability(tokenizer):
    settings = chosen(temperature=0.5, top_k=3)
    scores = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2, 1e-9]))
    numbers = torch.from_numpy(np.random.default_rng(0).random((20_000, 1)))
    draw = sampling.Draw(settings, torch.zeros(20_000, 1, dtype=torch.bool), numbers)
    left = draw(torch.zeros(20_000, 1, dtype=torch.long), scores.expand(20_000, -1).clone())
    assert bool((left.isfinite().sum(1) == 1).all())
    found = np.bincount(left.argmax(1), minlength=5) / 20_000
    # squares at temperature 0.5, of the three likeliest
    expected = np.array([0, 16, 9, 4, 0]) / 29
    np.testing.assert_allclose(found, expected, atol=0.012)
    assert found[0] == found[4] == 0


def test_rounding_turns_no_draw_between_scores_as_good_as_equal():
    numbers = torch.from_numpy(np.random.default_rng(0).random((500, 1)))
    scores = torch.tensor([1.0, 2.0, 2.0, 0.5]).expand(500, -1)
    found = []
    for change in ([0, 1e-6, 0, 0], [0, 0, 1e-6, 0]):
        draw = sampling.Draw(chosen(), torch.zeros(500, 1, dtype=torch.bool), numbers)
        found.append(draw(torch.zeros(500, 1, dtype=torch.long), scores + torch.tensor(change)).argmax(1))
    assert torch.equal(*found)


def test_what_the_models_folder_says_of_sampling_is_left_aside(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, chosen(), 3)
    own = model.generation_config
    try:
        model.generation_config = type(own)(no_repeat_ngram_size=1, repetition_penalty=2.0, suppress_tokens=[5, 6, 7])
        assert generate(model, tokenizer, PROMPTS, chosen(), 3) == expected
        assert model.generation_config.no_repeat_ngram_size == 1
    finally:
        model.generation_config = own


@pytest.fixture(scope="module")
def chain(tokenizer):
    """A scripted model: "café" is followed by three tokens and the end, all others by themselves for ever."""
    words = {word: tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in ("café", "rio", "preço")}
    others = tokenizer("bacia", add_special_tokens=False)["input_ids"][0]
    follows = {words["café"]: words["rio"], words["rio"]: words["preço"], words["preço"]: others}
    follows[others] = tokenizer.eos_token_id
    loop = tokenizer("gás", add_special_tokens=False)["input_ids"][-1]
    assert len({*follows, loop}) == 5
    return scripted(tokenizer, follows | {loop: loop}, loop), [words["rio"], words["preço"], others]


def test_texts_end_where_the_model_ends_them(chain, tokenizer):
    model, ids = chain
    settings = chosen(prompts=["O café", "O gás"], code_prompts=[], samples=3, temperature=0.01)
    rows = generate(model, tokenizer, settings.prompts, settings, 0)
    closed, endless = rows[:3], rows[3:]
    assert [(row["ended"], row["tokens"]) for row in closed] == [(True, 3)] * 3
    assert closed[0]["text"].strip() == tokenizer.decode(ids).strip()
    assert [(row["ended"], row["tokens"]) for row in endless] == [(False, 12)] * 3
    figures = gen.measured(rows, [""] * 6, settings, 0)["figures"]
    assert figures["ended"]["value"] == 0.5 and figures["tokens"]["value"] == 7.5
    assert figures["verbosity"]["value"] == pytest.approx((0.25 + 1) / 2)
    # the end as the last token of all is an end
    assert generate(model, tokenizer, ["O café"], chosen(max_new_tokens=4, temperature=0.01), 0)[0]["ended"]
    assert not generate(model, tokenizer, ["O café"], chosen(max_new_tokens=3, temperature=0.01), 0)[0]["ended"]


def test_an_end_that_the_models_folder_or_the_tokenizer_alone_names_is_one(chain, tokenizer):
    model, ids = chain
    own = model.generation_config
    try:
        model.generation_config = type(own)(eos_token_id=[tokenizer.eos_token_id, ids[1]])
        (row,) = generate(model, tokenizer, ["O café"], chosen(samples=1, temperature=0.01), 0)
        assert row["ended"] and row["tokens"] == 1
        model.generation_config = type(own)()
        (row,) = generate(model, tokenizer, ["O café"], chosen(samples=1, temperature=0.01), 0)
        assert row["ended"] and row["tokens"] == 3
    finally:
        model.generation_config = own


@pytest.mark.parametrize("typed", ["</s>", "<s>", "<pad>", "<instruction>", "</instruction>"])
def test_a_control_token_in_a_prompt_is_text(asker, typed):
    prompt = f"antes {typed} depois"
    control = {*asker.all_special_ids, *asker.convert_tokens_to_ids([CHAT.user_open, CHAT.user_close])}
    assert control.isdisjoint(sampling.prompt_parts(asker, prompt, chat=False)[1])
    assert control.isdisjoint(sampling.prompt_parts(asker, prompt, chat=True)[1])


@pytest.mark.parametrize("prompt", [*PROMPTS, "  com espaços ", "12 reais\n\nou 13?", "um </s> escrito"])
def test_a_users_turn_goes_through_the_chat_template(asker, prompt):
    turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    expected = ch.encode(turn, asker, CHAT, 1000).ids[:-1]
    assert sum(sampling.prompt_parts(asker, prompt, chat=True), []) == expected


def test_answers_are_samples_of_a_turn(answerer, asker):
    rows = generate(answerer, asker, PROMPTS, chosen(top_k=1), 0, chat=True, batch_size=3)
    for row in rows:
        turn = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": ""}]
        ids = torch.tensor([ch.encode(turn, asker, CHAT, CONTEXT).ids[:-1]])
        plain = answerer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row["text"] == asker.decode(plain[0, ids.shape[1] :], skip_special_tokens=True).strip()
    # the words differ from what follows the same prompt as plain text
    assert rows[0]["text"] != generate(answerer, asker, PROMPTS[:1], chosen(top_k=1), 0)[0]["text"].strip()


def test_a_model_without_a_template_is_no_chat_model(model, tokenizer):
    with pytest.raises(TTLError, match="no chat template"):
        generate(model, tokenizer, PROMPTS, chosen(), 0, chat=True)
    deaf = load_tokenizer(tokenizer.name_or_path)
    deaf.chat_template = "{{ bos_token }}olá"
    with pytest.raises(TTLError, match="does not hold the user's words"):
        sampling.prompt_parts(deaf, "Olá", chat=True)


def test_a_long_prompt_loses_its_first_tokens_and_it_is_said(model, tokenizer, capsys):
    long = "o mercado mostra que a empresa compra " * 20
    rows = generate(model, tokenizer, [long, "café"], chosen(), 0)
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    room = CONTEXT - 12 - 1
    assert rows[0]["cut"] == len(ids) - room and rows[2]["cut"] == 0
    said = capsys.readouterr().out
    assert f"by {len(ids) - room} tokens" in said and "context of 64" in said and "café" not in said
    # what is left is what a prompt of the last tokens alone would give
    bos = [tokenizer.bos_token_id]
    kept = torch.tensor([bos + ids[-room:]])
    greedy = model.generate(kept, attention_mask=torch.ones_like(kept), max_new_tokens=12, do_sample=False)
    row = generate(model, tokenizer, [long], chosen(top_k=1), 0)[0]
    assert row["text"] == sampling.continuation(tokenizer, kept[0].tolist(), greedy[0, CONTEXT - 12 :].tolist())
    with pytest.raises(TTLError, match="max_new_tokens 63 leaves no room .* 64 tokens"):
        generate(model, tokenizer, ["café"], chosen(max_new_tokens=63), 0)


def test_a_template_is_kept_when_a_long_turn_is_cut(answerer, asker):
    before, words, after = sampling.prompt_parts(asker, "o mercado mostra " * 40, chat=True)
    (row,) = generate(answerer, asker, ["o mercado mostra " * 40], chosen(samples=1), 0, chat=True)
    assert row["cut"] == len(words) - (CONTEXT - 12 - len(before) - len(after)) > 0


def test_a_model_of_no_numbers_is_named(tiny_done, tokenizer):
    model = made(tiny_done.params.model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(TTLError, match="not finite numbers"):
        generate(model, tokenizer, PROMPTS, chosen(), 0)


def test_an_unknown_failure_is_not_swallowed(model, tokenizer, monkeypatch):
    own = model.generation_config
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPTS, chosen(), 0)
    assert model.generation_config is own


def test_spaces_and_lines_of_code_are_kept(tokenizer):
    before = [tokenizer.bos_token_id, *tokenizer("def f(a):", add_special_tokens=False)["input_ids"]]
    whole = tokenizer("def f(a):\n    return a", add_special_tokens=False)["input_ids"]
    new = whole[len(before) - 1 :]
    assert sampling.continuation(tokenizer, before, new) == "\n    return a"
    one = tokenizer("O mercado", add_special_tokens=False)["input_ids"]
    two = tokenizer("O mercado compra", add_special_tokens=False)["input_ids"]
    assert sampling.continuation(tokenizer, one, two[len(one) :]) == " compra"
    assert sampling.continuation(tokenizer, one, []) == ""


# measures of known values


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("um dois três", None),
        ("um dois três quatro", 0.0),
        ("a b c d e f g h", 0.0),
        ("a b c d a b c d", 0.2),  # five 4-grams, the last as the first
        ("A a a a A a a", 0.75),  # four, all the same
        ("A a, A a, A a,", 3 / 6),  # nine words and marks: six, of three kinds
        ("", None),
    ],
)
def test_repeated_4_grams(text, share):
    assert tm.repeated_share(tm.words_of(text)) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("", 0),
        ("um", 0),
        ("um dois três", 0),
        ("um um", 2),
        ("a b a", 0),  # no whole second unit
        ("a b a b", 4),
        ("x a b a b a y", 5),
        ("x a b c a b c y y", 6),
        ("a a b a a b a a c", 8),
        ("sim. sim. sim. não", 6),
    ],
)
def test_the_longest_loop(text, longest):
    assert tm.longest_loop(tm.words_of(text)) == longest


@given(st.lists(st.sampled_from("abc"), max_size=14))
@examples(max_examples=60, deadline=None)
def test_loops_are_those_of_the_plain_definition(words):
    def loops(start: int, stop: int) -> bool:
        part = words[start:stop]
        return any(part[n:] == part[:-n] for n in range(1, len(part) // 2 + 1))

    spans = [(start, stop) for start in range(len(words)) for stop in range(start + 2, len(words) + 1)]
    assert tm.longest_loop(words) == max((stop - start for start, stop in spans if loops(start, stop)), default=0)


def test_distinct_n_over_all_texts():
    groups = [[["a", "b", "a", "b"], ["a", "c"]], [["a", "b"], []], [[]]]
    ones, twos = tm.distinct_counts(groups, 1), tm.distinct_counts(groups, 2)
    # a, b, c of eight words; ab, ba, ac of five pairs
    assert ones.sum(0).tolist() == [3, 8] and twos.sum(0).tolist() == [3, 5]
    # "a" and "b" stand in two groups: half for each
    assert ones[:, 0].tolist() == [2.0, 1.0, 0.0]
    assert tm.distinct_counts([], 1).shape == (0, 2)


@given(st.lists(st.lists(st.lists(st.sampled_from("abcd"), max_size=9), max_size=4), max_size=5), st.integers(1, 3))
@examples(max_examples=60, deadline=None)
def test_distinct_n_is_that_of_all_texts_together(groups, size):
    grams = [gram for group in groups for words in group for gram in tm.ngrams(words, size)]
    assert tm.distinct_counts(groups, size).sum(0).tolist() == pytest.approx([len(set(grams)), len(grams)])


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(0, 2**16))
@examples(max_examples=60, deadline=None)
def test_passages_are_of_the_same_length_and_from_different_places(lengths, seed):
    rng = random.Random(seed)
    texts = [" ".join(f"w{n}x{k}" for k in range(rng.randint(0, 30))) for n in range(6)]
    found = tm.passages(texts, lengths)
    sizes = [len(tm.words_of(text)) for text in found]
    assert len(found) == len(lengths) and all(size <= length for size, length in zip(sizes, lengths, strict=True))
    words = [word for text in found for word in tm.words_of(text)]
    assert len(set(words)) == len(words)
    if sum(length > 0 for length in lengths) <= sum(len(text.split()) >= 12 for text in texts):
        assert sizes == lengths


def test_passages_run_out():
    assert tm.passages(["a b c", "d e"], [2, 9, 4, 1]) == ["", "a b c", "d e", ""]
    assert tm.passages([], [3]) == [""]
    assert tm.passages(["Um dois, três."], [3]) == ["Um dois,"]


def rows_of(texts: dict[str, list[str]], kind: str = "text") -> list[dict]:
    return [
        {"prompt": prompt, "kind": kind, "text": text, "tokens": 4, "ended": False, "seed": hash((prompt, n)), "cut": 0}
        for prompt, found in texts.items()
        for n, text in enumerate(found)
    ]


def test_figures_stand_beside_human_text_and_have_intervals():
    loops = {f"p{n}": ["sim " * 8 if n % 2 else "um dois três quatro cinco seis sete oito"] for n in range(8)}
    human = [f"cada palavra desta frase é outra {n} {n + 1}" for n in range(8)]
    figures = gen.measured(rows_of(loops), human, chosen(), seed=0)["figures"]
    found = figures["repetition"]
    assert found["value"] == pytest.approx(0.4) and found["held_out"] == 0
    assert 0 <= found["low"] < 0.4 < found["high"] <= 0.8
    assert figures["loop"]["value"] == pytest.approx(0.5) and figures["loop"]["held_out"] == 0
    assert figures["distinct_1"]["value"] == pytest.approx(9 / 64)
    assert figures["distinct_1"]["held_out"] == pytest.approx(15 / 64)
    low, high = figures["distinct_1"]["low"], figures["distinct_1"]["high"]
    assert low < figures["distinct_1"]["value"] < high
    # what all prompts agree on has no spread; what was not asked for has no value
    assert figures["words"] == {"value": 8.0, "low": None, "high": None, "held_out": None}
    assert figures["code"]["value"] is figures["toxic"]["value"] is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        parts = np.stack([rng.binomial(4, 0.3, 40), np.full(40, 4)], axis=1).astype(float)
        found = gen.interval(parts, trial)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99
    assert gen.interval(np.zeros((0, 2)), 0) == gen.interval(np.zeros((3, 2)), 0)
    assert gen.interval(np.array([[1.0, 4.0]]), 0) == {"value": 0.25, "low": None, "high": None}


def test_empty_texts_and_no_prompts_count_nothing():
    found = gen.measured(rows_of({"a": ["", " "]}), ["", ""], chosen(), 0)["figures"]
    assert found["repetition"]["value"] is found["loop"]["value"] is found["distinct_1"]["value"] is None
    assert found["words"]["value"] == 0
    nothing = gen.measured([], [], chosen(), 0)
    assert all(row["value"] is None for row in nothing["figures"].values()) and nothing["samples"] == []


# code words

CODE_LINES = [row["example"].replace("\\n", "\n") for row in code_words.table()] + [
    "    para cada item em lista.itens:\n        x",
    "Para i em intervalo(10):",
    "para chave, valor em dados.items():",
    "enquanto (i <= n && j > 0) {",
    "se nome == 'Ana':",
    'se __name__ == "__main__":',
    "} senão se (x > 3) {",
    "senao:\n    x = 1",
    "    retornar soma",
    "retornar self.x",
    "retornar [1, 2, 3]",
    "retorna f(x) * 2;",
    "Importar numpy como np",
    "importar os, sys",
    "importar java.util.Scanner;",
    "do sklearn importar svm",
    "from torch importar nn",
    ">>> imprimir('Olá')",
    'imprimir("a soma é", a + b)',
    "    ativo = verdadeiro;",
    "retornar Falso",
    "função quadrado(x) {\n  return x * x;\n}",
    "var f = função(x) {",
    "def soma(a, b): retornar a + b",
    "if (x > 0) { retornar x; }",
    "importação de numpy como np",
    "importação java.util.List;",
    "    Retorno 0;",
    "    Retorno s.trim();",
    "public int f() { enquanto (x < 3) x = x + 1; }",
]
# lines that no keyword stands in, however much they look like it
PROSE = [
    "Para os alunos em geral, o curso é gratuito.",
    "para mulheres em idade fértil: consulte o médico",
    "Para Maria em São Paulo:",
    "se possível, retorne amanhã.",
    "se possível:",
    "Se x é maior que zero, então y também é.",
    "se quiser (e puder), venha.",
    "Enquanto isso, em Brasília:",
    "enquanto (segundo ele) chovia",
    "Senão, vejamos: o preço subiu.",
    "senão: o que fazer?",
    "ou seja, não há problema: tudo certo.",
    "retornar ao trabalho depois das férias",
    "retornar para casa",
    "retorna a soma de dois números",
    "Retornar o valor da variável.",
    "retornar já",
    "retorne amanhã às 10:30",
    "importar carros e peças",
    "importar produtos da China",
    "Importar dados como texto é fácil.",
    "importar carros",
    "de onde importar carros usados?",
    "imprimir (em papel) e assinar",
    "Imprimir documentos custa caro.",
    "A resposta é verdadeiro ou falso?",
    "(verdadeiro)",
    "função f(x) é contínua em todo o intervalo.",
    "definir metas (anuais): o primeiro passo",
    "classe média: a que mais cresceu",
    "A classe C, por exemplo.",
    "público em geral",
    "públicos e privados",
    "novo carro (usado)",
    "com ele (o ministro) como líder",
    "tente: não custa nada",
    "exceto: domingos e feriados",
    "e, ou, não, em",
    "escolha (bem) o seu candidato",
    "continuar a ler",
    "    quebrar o galho",
    "como fazer para importar numpy? perguntou ele",
    "O comando importar numpy não existe.",
    "caso 1: paciente de 40 anos",
    "nulo",
    "Importação CSV",
    "Importação de carros",
    "retorno de férias",
    "O retorno foi de 3%.",
    "Se x == 0: número de oito bytes",
    "Se o campo tiver o sinal (=) marcado: nada muda",
    "Se a célula está vazia, a função retorna Verdadeiro, senão retorna Falso.",
    "PAR(48) retorna VERDADEIRO",
    "Fonte: IBGE (2010); se houver, cite.",
]
# code whose keywords are English, whatever stands in its names, strings and comments
ENGLISH = [
    "for i in range(10):\n    print(i)",
    "# para i em range(10):\nfor i in range(10):\n    pass",
    "x = 1  # se x > 0: retornar x",
    'print("para i em range(10):")',
    '"""\nse x > 0:\n    retornar x\n"""\nx = 1',
    "// enquanto (x < 10) {\nwhile (x < 10) {\n  x++;\n}",
    "/* se (x > 0) {\n retornar x; */\nreturn x;",
    "def imprimir(x):\n    print(x)\n\nimprimir(3)",
    "class Pessoa:\n    def __init__(self, nome):\n        self.nome = nome",
    "import numpy as np\nmedia = np.mean(valores)",
    "para = 3\nse = para + 1",
    "soma = calcular_soma(a, b)\nreturn soma",
    "if nome == 'se x > 0:':\n    nova = nome",
    "var nome = 'importar torch';\nconsole.log(nome);",
    "#include <stdio.h>\nint main() {\n  return 0;\n}",
    "enquanto = True\nwhile enquanto:\n    enquanto = False",
]


@pytest.mark.parametrize("row", code_words.table(), ids=lambda row: f"{row['keyword']}-{row['example'][:20]}")
def test_each_pattern_finds_its_example(row):
    example = row["example"].replace("\\n", "\n")
    pattern = code_words.patterns()[code_words.table().index(row)][1]
    found = pattern.search(code_words.without_words(example))
    assert found and found["word"].lower() in code_words.translated_words(example.lower())


def test_keywords_in_portuguese_are_found():
    missed = [line for line in CODE_LINES if not code_words.translated_words(line)]
    assert missed == []
    assert code_words.translated_words("se x > 0:\n    retornar x\nsenão:\n    imprimir(x)\n") == [
        *("se", "retornar", "senão", "imprimir")
    ]


def test_prose_and_english_code_are_not_counted():
    wrong = {text: found for text in PROSE + ENGLISH if (found := code_words.translated_words(text))}
    assert wrong == {}


def test_prose_in_lines_and_with_capitals_is_not_counted():
    rng = random.Random(0)
    for _ in range(300):
        lines = [rng.choice(PROSE) for _ in range(rng.randint(1, 6))]
        text = "\n".join(line[0].upper() + line[1:] if rng.random() < 0.3 else line for line in lines)
        assert code_words.translated_words(text, rng.choice(["", "O Brasil é um país ", "def soma(a, b):\n"])) == []


def test_held_out_like_text_holds_no_code(tiny_done):
    from ttl_utils.corpus import documents

    texts = [row["text"] for row in documents(tiny_done.need("01_data"), "corpus", "test", ["text"])]
    assert texts and not any(code_words.translated_words(text) for text in texts)


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        ("def soma(a, b):", "\n    retornar a + b", ["retornar"]),
        ("def soma(a, b):", " retornar a + b", ["retornar"]),
        ("def soma(a, b):", "\n    return a + b", []),
        ("for i in range(10):", "\n    imprimir(i)", ["imprimir"]),
        ("for i in range(10):", " imprimir(i)", ["imprimir"]),
        ("import numpy as", " np\nimportar pandas as pd", ["importar"]),
        ("if (x > 0) {", " retornar x;\n} senão {", ["retornar", "senão"]),
        # the prompt's own words are not the model's
        ("importar torch", "\nx = 1", []),
        ("para i em range(3):", "\n    print(i)", []),
    ],
)
def test_only_the_continuation_counts(prompt, text, words):
    assert code_words.translated_words(text, prompt) == words


@pytest.mark.parametrize(
    ("prompt", "text", "code"),
    [
        ("def soma(a, b):", "\n    return a + b", True),
        ("def soma(a, b):", "\n    retornar a + b\n", True),
        ("import numpy as", " np", True),
        ("import numpy as", " np\nx = np.ar", True),
        ("import numpy as", " np\nfrom", True),
        ("for i in range(10):", "\n    print(i)\n    tot", True),
        ("if (x > 0) {", " y = 1; }", True),
        ("if (x > 0) {", "\n  y++;\n}", True),
        ("def soma(a, b):", " o mercado mostra que a empresa", False),
        ("import numpy as", " empresas do setor de petróleo.", False),
        ("for i in range(10):", "", False),
        ("if (x > 0) {", " é uma condição", False),
        ("", "A função soma dois números.", False),
        ("", "Sim", False),
        ("", "42", False),
        ("", "Claro! Veja:\n\ndef soma(a, b):\n    return a + b", True),
        ("", "importar torch", True),
    ],
)
def test_what_still_looks_like_code(prompt, text, code):
    assert code_words.looks_like_code(text, prompt) is code


@given(st.lists(st.sampled_from(["se", "para", "x", "(", ")", "[", "]", "{", ":", ">", "=", " ", "\n", '"', "#", "e"])))
@examples(max_examples=200, deadline=2000)
def test_any_text_is_read_and_every_character_stays_in_its_place(parts):
    text = "".join(parts)
    quiet = code_words.without_words(text)
    assert len(quiet) == len(text) and quiet.count("\n") == text.count("\n")
    assert all(word in text for word in code_words.translated_words(text))
    code_words.looks_like_code(text)


def test_figures_of_code_stand_apart():
    rows = rows_of(
        {"def soma(a, b):": [" retornar a + b", "\n    return a"], "import numpy as": [" o mercado é"]}, "code"
    )
    found = gen.measured(rows, [], chosen(), 0)
    figures = found["figures"]
    assert figures["code"]["value"] == pytest.approx(2 / 3) and figures["translated"]["value"] == pytest.approx(1 / 3)
    assert figures["translated_of_code"]["value"] == 0.5
    assert [row["code_words"] for row in found["samples"]] == [["retornar"], [], []]
    assert figures["repetition"]["value"] is figures["ended"]["value"] is None
    # an answer begins anew: the question before it makes it no code
    assert gen.measured(rows_of({"x =": [" 1"]}, "code"), [], chosen(), 0)["figures"]["code"]["value"] == 1
    assert gen.measured(rows_of({"x =": [" 1"]}, "code"), [], chosen(), 0, chat=True)["figures"]["code"]["value"] == 0


# toxicity and the report


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return str(save(build(), tmp_path_factory.mktemp("classifier")))


def toxic(model: str, **changed) -> dict:
    return {"model": model, "threshold": 0.0, "max_length": 24, "batch_size": 4} | changed


def test_texts_below_the_threshold_are_toxic_and_not_shown(classifier):
    from ttl_utils.toxicity import load

    settings = chosen(toxicity=Toxicity(**toxic(classifier)))
    rows = rows_of({"insulto": ["o mercado abre cedo .", TOXIC], "rio": ["a chuva .", " "]})
    found = gen.measured(rows, ["o rio .", "a ponte .", "os dias .", ""], settings, 0, scorer=load(settings.toxicity))
    # the prompt is not read, and an empty text counts for nothing
    assert [row["toxic"] for row in found["samples"]] == [False, True, False, None]
    assert found["figures"]["toxic"]["value"] == pytest.approx(1 / 3) and found["figures"]["toxic"]["held_out"] == 0
    assert found["figures"]["toxicity_score"]["held_out"] > found["figures"]["toxicity_score"]["value"]
    assert found["toxicity"]["status"] == "done"
    table = gen.samples_table(found, 10)
    assert TOXIC not in set(table.text) and "1 of 4 texts" in table.text.iloc[-1]
    assert TOXIC in [row["text"] for row in found["samples"]]


def test_samples_are_chosen_by_rule():
    texts = {"a": ["um dois três quatro", "sim " * 9], "b": ["a b c d a b c d"], "c": ["x y z w v"], "d": [""]}
    report = gen.measured(rows_of(texts), [""] * 5, chosen(), 0)
    table = gen.samples_table(report, 4)
    assert list(table.columns) == ["chosen as", "prompt", "text", "tokens", "ended", "repetition"]
    assert list(table["chosen as"]) == ["most repetitive", "median repetition", *["first of its prompt"] * 2]
    assert list(table.text) == ["sim " * 9, "um dois três quatro", "a b c d a b c d", "x y z w v"]
    assert len(gen.samples_table(report, 1)) == 1 and len(gen.samples_table(report, 99)) == 5
    assert gen.samples_table({}, 3).empty and gen.generation_table({}).empty


@pytest.fixture
def evaluated(tiny_prepared, no_energy, tokenizer):
    """`make(**generation)`: a run whose stages 03 and 04 stand as far as the report reads them."""
    from ttl_utils.checkpoints import save_model_folder

    def make(**generation):
        settings = chosen(samples=1, max_new_tokens=8).model_dump() | generation
        run = tiny_prepared(evaluation={"generation": settings})
        for name in ("03_pretraining", "04_evaluation"):
            stage = run.stage(name)
            if stage.finished:
                continue
            words = load_tokenizer(run.need("02_tokenizer").folder)
            outputs = {}
            if name != "04_evaluation":
                model = made(run.params.model, words)
                outputs = {"model": save_model_folder(model, words, stage.folder / "model")}
            if name == "03_pretraining":
                (stage.folder / "metrics.jsonl").write_text("{}\n")
                outputs["curve"] = [stage.folder / "metrics.jsonl"]
            with stage.work():
                stage.finish({"first": 1}, outputs)
        return run

    return make


@pytest.fixture
def count(monkeypatch):
    """How often texts were sampled."""
    calls = []

    def counted(*values, **options):
        calls.append(values)
        return generate(*values, **options)

    monkeypatch.setattr(gen, "generate", counted)
    return calls


def test_the_report_is_kept_and_read_back(evaluated, count, monkeypatch):
    run = evaluated()
    first = gen.generation_report(run)
    monkeypatch.setattr(gen, "measured", lambda *_: 1 / 0)
    path = run.folder / "04_evaluation" / "reports" / "generation.json"
    assert read_json(path) == first and gen.generation_report(run) == first and len(count) == 1
    assert len(first["samples"]) == len(PROMPTS) + len(CODE)
    assert first["toxicity"] == {
        "status": "not run",
        "reason": "evaluation.generation.toxicity is null: no classifier is named",
    }
    assert (
        0 < first["figures"]["distinct_2"]["held_out"] <= 1 and first["figures"]["repetition"]["held_out"] is not None
    )
    metrics = run.stage("04_evaluation").metrics()
    assert metrics["first"] == 1 and metrics["generation"]["repetition"] == first["figures"]["repetition"]
    # the texts are the report's alone
    assert not any(row["text"] in str(metrics) for row in first["samples"] if len(row["text"]) > 8)
    table = gen.generation_table(first)
    assert list(table.columns) == ["measure", "value", "95% interval", "held-out text", "what it means"]
    assert len(table) == len(first["figures"]) and "not run" in table.set_index("measure")["what it means"]["toxic"]
    path.write_text("{")
    with pytest.raises(DamagedFile, match="generation.json is damaged"):
        gen.generation_report(run)


def test_it_is_measured_anew_when_settings_or_weights_change(evaluated, count):
    gen.generation_report(evaluated())
    longer = gen.generation_report(evaluated(max_new_tokens=9))
    assert len(count) == 2 and max(row["tokens"] for row in longer["samples"]) == 9
    run = evaluated(max_new_tokens=9)
    model = made(run.params.model, load_tokenizer(run.need("02_tokenizer").folder), initializer_range=0.2)
    model.save_pretrained(run.folder / "03_pretraining" / "model")
    again = gen.generation_report(run)
    assert len(count) == 3 and again["key"]["texts"]["weights"] != longer["key"]["texts"]["weights"]


def test_a_classifier_that_cannot_be_had_is_not_run_and_asked_for_again(evaluated, count, tmp_path, classifier):
    later = tmp_path / "later"
    run = evaluated(toxicity=toxic(str(later)))
    first = gen.generation_report(run)
    assert first["toxicity"]["status"] == "not run" and "no such folder" in first["toxicity"]["reason"]
    assert first["figures"]["toxic"]["value"] is None and first["figures"]["repetition"]["value"] is not None
    assert gen.generation_report(run) == first
    save(build(), later)
    second = gen.generation_report(run)
    # the texts are the same ones
    assert len(count) == 1 and [row["text"] for row in second["samples"]] == [row["text"] for row in first["samples"]]
    assert second["toxicity"] == {"status": "done", "threshold": 0.0} and second["figures"]["toxic"]["value"] == 0
    # another threshold needs no other texts, and without a classifier nothing is left of it
    strict = gen.generation_report(evaluated(toxicity=toxic(str(later), threshold=100.0)))
    assert strict["figures"]["toxic"]["value"] == 1 and len(gen.samples_table(strict, 9)) == 1
    without = gen.generation_report(evaluated())
    assert without["figures"]["toxic"]["value"] is None and not any("toxic" in row for row in without["samples"])
    assert len(count) == 1


def test_a_wrong_parameter_is_named_before_any_work(evaluated, count, classifier):
    with pytest.raises(ParameterError, match="max_length 25"):
        gen.generation_report(evaluated(toxicity=toxic(classifier, max_length=25)))
    assert count == []


def test_null_measures_nothing(tiny_run, tiny_prepared, count):
    assert gen.generation_report(tiny_run(evaluation={"generation": None})) == {}
    assert count == []
    with pytest.raises(MissingStage, match="04_evaluation"):
        gen.generation_report(tiny_prepared())
