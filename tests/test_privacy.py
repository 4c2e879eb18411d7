"""Personal data: what is found and what is left alone, masks that stay, and the action of each kind."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttl_utils.privacy import KINDS, is_cpf, mask, protect
from ttl_utils.schema import PersonalData

MASKS = {"cpf": "[CPF]", "email": "[e-mail]", "telephone": "[telefone]", "handle": "[usuário]"}


def actions(**changed: str) -> PersonalData:
    return PersonalData(**{kind: "mask" for kind in KINDS} | changed)


ALL = actions()
KEEP = PersonalData(**{kind: "keep" for kind in KINDS})


def cpf(first: str) -> str:
    """Nine digits with their check digits, worked out as the tax office writes it down."""
    for weights in (range(10, 1, -1), range(11, 1, -1)):
        rest = sum(int(digit) * weight for digit, weight in zip(first, weights, strict=True)) % 11
        first += str(0 if rest < 2 else 11 - rest)
    return first


def dotted(digits: str) -> str:
    return f"{digits[:3]}.{digits[3:6]}.{digits[6:9]}-{digits[9:]}"


NINE = st.integers(0, 10**9 - 1).map("{:09d}".format).filter(lambda digits: len(set(digits)) > 1)


@given(NINE)
def test_check_digits(first):
    whole = cpf(first)
    assert is_cpf(whole)
    assert [last for last in range(100) if is_cpf(f"{first}{last:02d}")] == [int(whole[9:])]


def test_equal_digits_are_no_cpf():
    assert not any(is_cpf(digit * 11) for digit in "0123456789")


@given(NINE, st.sampled_from([dotted, str, lambda digits: f"{digits[:9]}-{digits[9:]}"]))
def test_a_cpf_is_masked_in_every_form(first, form):
    # also where it could be a mobile number: the check digits decide
    assert protect(f"CPF: {form(cpf(first))}, assinado.", ALL) == ("CPF: [CPF], assinado.", Counter(cpf=1), None)


@given(NINE, st.integers(1, 99))
def test_wrong_check_digits_are_no_cpf(first, off):
    wrong = f"{first}{(int(cpf(first)[9:]) + off) % 100:02d}"
    assert protect(f"código {dotted(wrong)}", ALL)[1] == Counter()
    assert protect(f"código {wrong}", ALL)[1]["cpf"] == 0


@pytest.mark.parametrize(
    "number",
    [
        "(11) 98765-4321",
        "(11)98765-4321",
        "(11) 9 8765-4321",
        "(11) 98765 4321",
        "(21) 3456.7890",
        "(0xx21) 3456-7890",
        "(021) 3456-7890",
        "+55 11 98765-4321",
        "+55 (11) 98765-4321",
        "+5511987654321",
        "55 (11) 98765-4321",
        "11 98765-4321",
        "011 3456-7890",
        "11-98765-4321",
        "98765-4321",
        "98765–4321",
        "11987654321",
        "5511987654321",
        "0800 123 4567",
        "0800-1234567",
        "08001234567",
        "0300 123 4567",
        "0800 61 1997",
    ],
)
def test_a_telephone_number_is_masked(number):
    assert protect(f"Ligue {number}.", ALL) == ("Ligue [telefone].", Counter(telephone=1), None)
    assert protect(number, ALL)[0] == "[telefone]"


@pytest.mark.parametrize("word", ["tel. ", "Telefone: ", "FONE ", "fax (", "celular ", "WhatsApp: ", "tels.: "])
@pytest.mark.parametrize("number", ["3456-7890", "3456 7890", "34567890", "11 3456 7890"])
def test_after_a_word_a_shorter_form_is_enough(word, number):
    assert protect(word + number, ALL)[0] == f"{word}[telefone]"
    assert protect(f"hotel {number}", ALL)[0] == f"hotel {number}"


@pytest.mark.parametrize(
    "text",
    [
        "Em 2014 e 2015, de 1998-2002, entre 2010-2014 e em 11 2014-2016.",
        "Brasil (12) 2345-2360, v. 31 2345-2389, p. 3451-3460",
        "a Lei 8.078/90, a Lei nº 11.340/2006, o art. 5º",
        "CEP 01310-100, CEP: 22250-040",
        "processo 0001234-56.2019.8.26.0100",
        "ISBN 978-85-333-0227-3, ISBN 85-359-0277-5, ISSN 2236-1234",
        "CNPJ 12.345.678/0001-95",
        "R$ 1.234.567,89 ou US$ 98.765,43",
        "12/03/2014, 2014-03-12, 12.03.2014 10:45:30",
        "população de 11 987 654 habitantes, 98.765.432",
        "placar de 3-4, 10 a 20, 45%, 3,14159265358",
        "ângulo 0.11987654321, versão 11.98765-4321.2",
        "protocolo 2019123456789, código 123456789012",
        "tabela 1234 5678 9012 3456",
        "rotação de 1200-1500 rpm, década de 1980-1990",
        "(01) 3456-7890 e (23) 98765 4321 não têm código de área",
        "000.000.000-00 e 111.111.111-11",
        "agência 1234-5, conta 98765-4",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert protect(text, ALL) == (text, Counter(), None)


@pytest.mark.parametrize(
    ("text", "wanted", "kind"),
    [
        ("escreva a ana.silva+a@correio.exemplo.com.br.", "escreva a [e-mail].", "email"),
        ("<joao_9@x-y.org>", "<[e-mail]>", "email"),
        ("11987654321@exemplo.com", "[e-mail]", "email"),
        ("veja @fulano_9, ali", "veja [usuário], ali", "handle"),
        ("(@ana.lima)", "([usuário])", "handle"),
        ("＠fulana!", "[usuário]!", "handle"),
        ("exemplo.com/@canal", "exemplo.com/[usuário]", "handle"),
    ],
)
def test_addresses_and_handles_are_masked(text, wanted, kind):
    assert protect(text, ALL) == (wanted, Counter({kind: 1}), None)


@pytest.mark.parametrize(
    "text",
    [
        "3 kg @ 5 reais",
        "tod@s @s alun@s",
        "o símbolo @ separa",
        "=TEXTO(A1; @)",
        "ana@casa, root@localhost",
        "2 unidades @500",
        "3 kg@3.50",
        "@app.route('/inicio')\ndef inicio():",
        "@property\ndef area(self):",
        "@Override\npublic void run()",
        "@media screen and (max-width: 600px) {",
        "@keyframes gira { }",
        "npm install @angular/core",
    ],
)
def test_other_signs_are_left_alone(text):
    assert protect(text, ALL) == (text, Counter(), None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tel. (11) 3456-7890 / 3456-7891 e 93456-7892.", "tel. [telefone]."),
        ("fone 3456-7890, 3456-7891", "fone [telefone]"),
        ("tel. (11) 3456-7890, 2010-2014", "tel. [telefone], 2010-2014"),
        ("@fulano@beltrano", "[usuário]"),
    ],
)
def test_a_list_is_masked_as_one(text, wanted):
    assert protect(text, ALL)[0] == wanted


EXAMPLES = {
    "cpf": dotted(cpf("529982247")),
    "email": "ana@exemplo.com",
    "telephone": "(11) 98765-4321",
    "handle": "@fulano",
}
TEXT = "A: {cpf}; B: {email}; C: {telephone}; D: {handle}; E: {email}."


def test_counts_by_kind():
    masked, counts, dropped = protect(TEXT.format(**EXAMPLES), ALL)
    assert masked == TEXT.format(**MASKS) and dropped is None
    assert counts == {"cpf": 1, "email": 2, "telephone": 1, "handle": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_own_action(kind):
    text = TEXT.format(**EXAMPLES)
    kept, counts, dropped = protect(text, actions(**{kind: "keep"}))
    assert kept == TEXT.format(**MASKS | {kind: EXAMPLES[kind]})
    assert kind not in counts and dropped is None
    # a dropped text comes back as it was
    assert protect(text, actions(**{kind: "drop"})) == (text, Counter(), kind)
    assert protect(EXAMPLES[kind], KEEP) == (EXAMPLES[kind], Counter(), None)
    without = TEXT.format(**EXAMPLES | {kind: "nada"})
    assert protect(without, actions(**{kind: "drop"}))[2] is None


def test_a_kept_cpf_is_not_taken_for_a_telephone_number():
    number = next(n for n in (cpf(f"119{place:06d}") for place in range(100)))
    assert protect(number, ALL)[1] == {"cpf": 1}
    assert protect(number, actions(cpf="keep")) == (number, Counter(), None)


# what one mask could bring into another's reach, or take from it
PIECES = st.sampled_from(
    [*EXAMPLES.values(), cpf("119876543"), "98765-4321", "3456-7890", "0800 123 4567", "11987654321", "+55", "tel", "@"]
    + [*MASKS.values(), "(11)", "11", "2014", ".", ",", "-", "/", " ", "\n", "a", "9", "x@y.z", "@a.b", "(", ")", "{"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@example("(11) 98765-4321 3456-7890")
@example("(11) 98765-4321(11) 98765-4321")
@example("ana@exemplo.com529.982.247-25ana@exemplo.com")
@example("ana@exemplo.com+55ana@exemplo.com")
@example("@fulano9,529.982.247-25")
@example("@fulano(11) 98765-4321")
@example("@fulano\n@fulano")
@settings(max_examples=1000, deadline=None)
def test_a_masked_text_has_nothing_left_to_mask(text):
    masked, counts, _ = protect(text, ALL)
    assert protect(masked, ALL) == (masked, Counter(), None)
    assert (masked == text) == (not counts)
    # nothing is masked but by a mask, and each is counted
    for kind, sign in MASKS.items():
        assert masked.count(sign) == text.count(sign) + counts[kind]


@given(st.text(max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_text_is_masked_once(text):
    assert protect(protect(text, ALL)[0], ALL)[1] == Counter()


@given(st.lists(st.sampled_from(["água", "e", "não,", "disse:", "\n", "(ou)", "-", "fim."]), max_size=60))
def test_text_without_numbers_and_signs_is_untouched(words):
    text = " ".join(words)
    assert protect(text, ALL) == (text, Counter(), None)


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000, "@" * 200_000, "a." * 100_000 + "@", "(11" * 60_000, "9 " * 100_000]
    + ["@fulano" * 30_000, "tel " + "3456-7890 / " * 20_000],
)
def test_time_is_linear_in_odd_texts(text):
    start = time.process_time()
    protect(text, ALL)
    # quadratic time would be minutes
    assert time.process_time() - start < 5


LINKS = st.sampled_from(
    ["http://t.co/{}", "https://exemplo.org/{}?q=1&r=2", "HTTPS://T.CO/{}", "www.bolsa.com.br/{}", "bit.ly/{}"]
)
NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789", min_size=6, max_size=12).map("Qzx".__add__)
SECRETS = st.one_of(
    st.builds(lambda link, name: (link.format(name), name), LINKS, NAMES),
    NAMES.map(lambda name: (f"@{name}", name)),
    NAMES.map(lambda name: (f"＠{name}_", name)),
    NAMES.map(lambda name: (f"{name}.silva+a@correio.exemplo.com.br", name)),
    st.integers(10**8, 10**20).map(lambda number: (str(number), str(number))),
    st.integers(10**17, 10**18).map(lambda number: (f"{number}l", str(number))),
)
PLAIN = st.sampled_from(
    ["PETR4", "3,50", "R$ 10", "#vale5", "hoje:", "(de novo)", "água", "12345678", "e/ou", "17/04/14"]
)
GAPS = st.sampled_from([" ", "\n", " (", ": ", ", ", ' "', " - "])


@given(st.lists(st.tuples(GAPS, st.one_of(SECRETS, PLAIN)), min_size=1, max_size=12))
@settings(max_examples=400, deadline=None)
def test_mask_leaves_no_handle_link_address_or_id(parts):
    text = "".join(gap + (item if isinstance(item, str) else item[0]) for gap, item in parts)
    masked = mask(text)
    for _, item in parts:
        if isinstance(item, tuple):
            assert item[1] not in masked
    assert not re.search(r"[@＠]|https?:|www\.|\d{9}", masked, re.IGNORECASE)
    # words that nobody is known by stay
    for _, item in parts:
        if isinstance(item, str):
            assert item in masked


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("@fulano veja http://t.co/3PJlEQ agora", "[usuário] veja [link] agora"),
        ("RT @fulano: veja http…", "RT [usuário]: veja [link]"),
        ("fale com a.b+c@d.com.br.", "fale com [e-mail]."),
        ("protocolo 123456789, dia 20140417", "protocolo [id], dia 20140417"),
        ("ibovespa a 51.000,00 www.x.com", "ibovespa a 51.000,00 [link]"),
        ("@ fulano (@beltrano_9)", "[usuário] ([usuário])"),
    ],
)
def test_mask_examples(raw, wanted):
    assert mask(raw) == wanted


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_mask_of_a_masked_text_is_the_same(text):
    once = mask(text)
    assert mask(once) == once


@pytest.mark.parametrize("text", ["(11) 91234-5678", "+55 11 91234-5678", "tel: 11 91234-5678"])
def test_mobiles_that_begin_with_91_are_masked(text):
    assert "[telefone]" in protect(text, actions())[0] and "5678" not in protect(text, actions())[0]


def test_a_brace_later_in_the_line_spares_no_handle():
    assert protect("Fale com @maria_silva para mais {detalhes}", actions())[0].startswith("Fale com [usuário] para")
