"""The language check: Portuguese against its neighbours, short and odd texts, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils.errors import ParameterError
from ttl_utils.language import PIECE, check, probability

PORTUGUESE = [
    "A feira do bairro abre cedo, e os vizinhos chegam com sacolas de pano.",
    "O rio encheu depois da chuva, e ninguém conseguiu atravessar a ponte.",
    "Ela guardou as cartas numa caixa de madeira que o avô tinha feito.",
    "O conselho aprovou a obra, mas o dinheiro só sai em março.",
    "Os pescadores voltaram sem peixe e disseram que o mar estava bravo.",
    "Meu irmão consertou a bicicleta com um pedaço de arame.",
    "Esta função devolve o número de linhas da planilha escolhida.",
    # Portugal's
    "O autocarro avariou e ficámos à espera na paragem até o sol se pôr.",
    "Apanhámos o comboio das sete e chegámos ao Porto a tempo do almoço.",
]
OTHERS = {
    "es": [
        "El mercado del barrio abre temprano y los vecinos llegan con bolsas de tela.",
        "Todavía no sabemos cuándo van a empezar las clases el próximo año.",
        "Mi hermano arregló la bicicleta con un trozo de alambre.",
        "Esta función devuelve el número de filas de la hoja elegida.",
    ],
    "gl": [
        "A feira do barrio abre cedo e os veciños chegan con bolsas de tea.",
        "Aínda non sabemos cando van comezar as clases o vindeiro ano.",
        "O meu irmán arranxou a bicicleta cun anaco de arame.",
        "Esta función devolve o número de filas da folla escollida.",
    ],
    "it": [
        "Il fiume è cresciuto dopo la pioggia e nessuno ha potuto attraversare il ponte.",
        "Mio fratello ha riparato la bicicletta con un pezzo di filo di ferro.",
    ],
    "en": [
        "The market in our street opens early, and the neighbours come with cloth bags.",
        "My brother mended the bicycle with a piece of wire.",
    ],
}


@pytest.mark.parametrize("text", PORTUGUESE)
def test_portuguese_is_portuguese(text):
    assert probability(text, "pt") > 0.6


@pytest.mark.parametrize(("code", "text"), [(code, text) for code, texts in OTHERS.items() for text in texts])
def test_a_neighbour_is_not(code, text):
    assert probability(text, "pt") < 0.3
    assert probability(text, code) > 0.5


@pytest.mark.parametrize("text", ["", " ", "\n\n", "123 45,6 % ...", "🚀🚀", "…—«»", "\x00", "_" * 5000])
def test_no_letter_is_no_language(text):
    assert probability(text, "pt") == 0.0


@given(st.text(max_size=400))
@settings(max_examples=150, deadline=None)
def test_any_text_has_a_probability(text):
    assert 0.0 <= probability(text, "pt") <= 1.0
    assert probability(text, "pt") == probability(text, "pt")


def test_a_long_text_is_judged_at_its_start_middle_and_end():
    portuguese, english = " ".join(PORTUGUESE), " ".join(OTHERS["en"] * 6)
    assert min(len(portuguese), len(english)) > 3 * PIECE - 60
    assert probability(portuguese * 40, "pt") > 0.99
    # a Portuguese head, and English for the rest
    assert probability(portuguese[: 2 * PIECE] + english * 20, "pt") < 0.1
    # what lies between the pieces is not read
    gap = "x" * 20 * PIECE
    assert probability(portuguese[:PIECE] + gap + portuguese[:PIECE] + gap + portuguese[:PIECE], "pt") > 0.99


def test_an_unknown_language_is_named_with_the_known_ones():
    check("pt")
    check("gl")
    for code in ("xx", "por", "PT", "zxx", ""):
        with pytest.raises(ParameterError, match=r"data\.language.* es, .* pt, "):
            check(code)


def test_the_same_figures_in_another_process_and_nothing_is_printed():
    texts = [PORTUGUESE[0], OTHERS["gl"][0]]
    code = f"from ttl_utils.language import probability\nprint([probability(t, 'pt').hex() for t in {texts!r}])"
    expected = f"{[probability(text, 'pt').hex() for text in texts]}\n"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
        )
        assert (done.stdout, done.stderr) == (expected, "")
