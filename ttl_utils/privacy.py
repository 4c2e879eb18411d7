"""Personal data in a text, found by its form: masked or dropped by kind, with counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from ttl_utils.schema import PersonalData

KINDS = ("cpf", "email", "telephone", "handle")

# a number stands alone: it is no part of a word, a longer number, a decimal, a date or a path
_ALONE, _ENDS = r"(?<![\w@])(?<![0-9][.,/-])", r"(?![\w@])(?![.,/-][0-9])"
# Brazil's area codes
_AREA = "(?:[14689][1-9]|2[12478]|3[1-578]|5[1345]|7[134579])"
# what any CPF or telephone number holds: most texts are done with after one quick search
_NUMBER = re.compile(r"[0-9](?:[ ().–-]{0,3}[0-9]){7}")
_CPF = re.compile(rf"(?=[0-9]){_ALONE}[0-9]{{3}}(\.?)[0-9]{{3}}\1[0-9]{{3}}-?[0-9]{{2}}{_ENDS}")
_TELEPHONE = re.compile(
    rf"""(?=[0-9(+])(?:
      {_ALONE} (?P<free>0[3589]00[ .-]?[0-9]{{2,3}}[ .-]?[0-9]{{4}})            # 0800 123 4567
    | {_ALONE} (?P<bare>(?:55)?{_AREA}9[0-9]{{8}})                              # 11987654321
    | (?P<area>
        \+55[ .-]? (?: \(0?{_AREA}\) | 0?{_AREA} ) [ .-]?                      # +55 11
      | (?:{_ALONE}55[ ]?)? \( (?:0?[xX]{{2}}|0)? {_AREA} \) [ ]?               # (11), (0xx11)
      | {_ALONE} 0?{_AREA}[ .-]                                                 # 11
      | {_ALONE}
      ) (?P<nine>9[ .-]?)? (?P<first>(?(nine)[0-9]|[2-9])[0-9]{{3}}) (?P<gap>[ .–-]?) (?P<last>[0-9]{{4}})
      (?: (?:[ ]?[/,][ ]?|[ ](?:e|ou)[ ]) 9?(?!20)[2-9][0-9]{{3}}[–-][0-9]{{4}} )*          # … / 3456-7891
    ){_ENDS}""",
    re.VERBOSE,
)
# not our own mask: a masked text stays as it is
_TELEPHONE_WORD = re.compile(
    r"(?<![\w[])(?:tel(?:efone)?s?|fones?|fax|cel(?:ular)?|whats(?:app)?|zap)\W{0,4}$", re.IGNORECASE
)
_EMAIL = re.compile(r"\w[\w.+-]{0,63}+@(?=[\w-][\w.-]*\.[^\W\d_]{2})[\w.-]*[\w-]")
# names of three characters or more, a letter among them ("tod@s", "@s" and "@ 5 reais" are none); and no code:
# a decorator, an annotation, a rule of a style sheet or a package's scope
_HANDLE = re.compile(
    r"(?<![\w.+@＠-])(?:[@＠](?=\w*[^\W\d_])\w{3,}+(?:\.\w+)*+)++"
    r"(?!/|\((?![0-9+])|[^\n@＠]*\{\s*(?:[\n}]|\Z)|\n(?:def|class|async|public|private|protected|static|void)\b)"
)


def is_cpf(digits: str) -> bool:
    """Whether eleven digits are a taxpayer's number: the check digits are right, and not all digits the same."""
    numbers = [int(digit) for digit in digits]
    if len(set(numbers)) == 1:
        return False
    for place in (9, 10):
        total = sum(number * (place + 1 - index) for index, number in enumerate(numbers[:place]))
        if total * 10 % 11 % 10 != numbers[place]:
            return False
    return True


def _is_cpf(match: re.Match) -> bool:
    # an 11-digit number that could also be a mobile's is a CPF by its check digits: one mobile number in 100 has them
    return is_cpf(re.sub("[.-]", "", match[0]))


def _is_telephone(match: re.Match) -> bool:
    if match["free"]:
        return True
    if match["bare"]:
        return len(match["bare"]) != 11 or not is_cpf(match["bare"])
    area, nine, first, last = match["area"], match["nine"], int(match["first"]), int(match["last"])
    if not nine and 0 <= last - first < 100:
        # "(12) 2345-2360" and "11 2014-2016" are pages and years
        return False
    if "(" in area or "+" in area or (match["gap"] in ("-", "–") and (area or nine == "9")):
        return True
    return bool(_TELEPHONE_WORD.search(match.string[max(0, match.start() - 16) : match.start()]))


# in this order: an address may hold what looks like a handle or a number, a handle what looks like a number
_FORMS: dict[str, tuple[re.Pattern, Callable[[re.Match], bool], str]] = {
    "email": (_EMAIL, bool, "[e-mail]"),
    "handle": (_HANDLE, bool, "[usuário]"),
    "cpf": (_CPF, _is_cpf, "[CPF]"),
    "telephone": (_TELEPHONE, _is_telephone, "[telefone]"),
}


def protect(text: str, actions: PersonalData) -> tuple[str, Counter, str | None]:
    """The text with masks, how many of each kind were masked, and the kind for which the text is dropped, or None.

    A text that is dropped comes back as it was, with no counts. A list such as "3456-7890 / 3456-7891" counts once.
    A masked text has nothing left to mask.
    """
    counts: Counter = Counter()
    signs = "@" in text or "＠" in text
    numbers = _NUMBER.search(text) is not None
    present = {"email": signs, "handle": signs, "cpf": numbers, "telephone": numbers}
    masked = text
    for kind, form in _FORMS.items():
        action = getattr(actions, kind)
        if not present[kind] or action == "keep":
            continue
        masked, count = _masked(masked, *form)
        if count and action == "drop":
            return text, Counter(), kind
        counts.update({kind: count} if count else {})
    return masked, counts, None


def _masked(text: str, form: re.Pattern, accept: Callable[[re.Match], bool], mask: str) -> tuple[str, int]:
    count = 0

    def put(match: re.Match) -> str:
        nonlocal count
        accepted = accept(match)
        count += accepted
        return mask if accepted else match[0]

    return form.sub(put, text), count


# of posts: also links and long ids, and every @ before a word
_LINK = re.compile(
    r"(?:https?\b|www\.)[^\s]*|\b(?:[\w-]+\.)+(?:com|net|org|br|ly|co|gl|me|tv|info|pt)(?:\.br)?/[^\s]*",
    re.IGNORECASE,
)
_POST_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_POST_HANDLE = re.compile(r"[@＠]\s?\w+")
_ID = re.compile(r"\b\d{9,}\w?\b")


def mask(text: str) -> str:
    """Put a mask in the place of a post's e-mail addresses, links, handles and long ids."""
    text = _LINK.sub("[link]", _POST_EMAIL.sub("[e-mail]", text))
    return _ID.sub("[id]", _POST_HANDLE.sub("[usuário]", text))
