"""Galician text made by code, to try another language: `python -m tests.galego texts/galego` writes it.

The sentences are put together from words; they agree in gender and number and mean little.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


MASCULINE = words(
    "barco río monte camiño peirao mercado libro veciño mestre concello carballo inverno vento queixo forno faro galo "
    "cabalo prado muíño conto teatro bosque gato mariñeiro labrego piñeiro castiñeiro pobo xardín tren pan can mar "
    "luar neno avó irmán amigo carro camposanto cruceiro hórreo saco cesto remo peixe polbo millo trigo viño zoco pano"
)
FEMININE = words(
    "auga praia aldea cidade escola feira festa choiva lareira fonte ponte horta pedra igrexa casa terra ría illa vaca "
    "ovella castaña mazá noite mañá tarde lúa estrela canción viaxe biblioteca lingua nena avoa irmá amiga gaita rede "
    "gaivota cereixa fiestra porta mesa cunca culler leira serra néboa xeada maré area rocha vela muiñeira romaría"
)
ADJECTIVES = words(
    "novo vello branco negro pequeno tranquilo frío fermoso longo estreito claro escuro antigo rico sabio redondo seco "
    "húmido sinxelo bonito amplo fondo alto baixo cheo baleiro limpo lixeiro lento rápido famoso humilde verde quente "
    "alegre doce triste grande forte"
)
TRANSITIVE = words(
    "compr mir lembr pint lev atop gard prepar limp visit debux escoit deix amañ merc cont plant coid procur mostr "
    "arranx abandon celebr"
)
INTRANSITIVE = words("cant camiñ fal traball descans bail naveg nad")
NAMES = words(
    "Sabela Uxía Iria Antía Brais Xurxo Anxo Breixo Lois Rosalía Carme Xoán Noa Martiño Helena Paulo Tareixa Mencía "
    "Roi Icía Xiana Sara Pedro Manuela Ramón Estevo Olalla Mariña Nicolao Xabier"
)
PLACES = words(
    "Santiago Lugo Ourense Vigo Pontevedra Ferrol Cambados Noia Muros Fisterra Ribadeo Viveiro Betanzos Tui Monforte "
    "Sarria Lalín Cedeira Burela Foz Celanova Allariz Padrón Rianxo Camariñas Melide Arzúa Ordes Cangas Redondela"
)
TIMES = words(
    "pola mañá|ao solpor|cada domingo|no outono|durante a festa|despois da choiva|antes do xantar|hai moitos anos|"
    "na primavera|todos os veráns|cando remata o traballo|á beira do mar|sen présa ningunha|co lume aceso",
    "|",
)
LINKS = words("porque|mentres|aínda que|e por iso|cando|de xeito que", "|")
NUMBERS = words(
    "cero un dous tres catro cinco seis sete oito nove dez once doce trece catorce quince dezaseis dezasete"
)


def plural(word: str) -> str:
    if word[-1] in "rz":
        return word[:-1] + ("res" if word[-1] == "r" else "ces")
    return word + "s"


class Writer:
    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def noun(self, preposition: str = "", many: bool | None = None) -> tuple[str, bool]:
        """A noun with its article, contracted with the preposition, and an adjective now and then; whether plural."""
        feminine, many = self.rng.random() < 0.5, self.rng.random() < 0.35 if many is None else many
        word = self.rng.choice(FEMININE if feminine else MASCULINE)
        article = ("a" if feminine else "o") + ("s" if many else "")
        contracted = {"": "", "de": "d", "en": "n", "por": "pol", "con": "c"}
        # "con a" is "coa", "con o" is "co"
        head = (
            "co" + (article if feminine else article[1:]) if preposition == "con" else contracted[preposition] + article
        )
        parts = [head, plural(word) if many else word]
        if self.rng.random() < 0.45:
            adjective = self.rng.choice(ADJECTIVES)
            adjective = adjective[:-1] + "a" if feminine and adjective.endswith("o") else adjective
            parts.append(plural(adjective) if many else adjective)
        return " ".join(parts), many

    def verb(self, stems: list[str], many: bool) -> str:
        endings = ("an", "aron", "aban", "arán") if many else ("a", "ou", "aba", "ará")
        return self.rng.choice(stems) + self.rng.choice(endings)

    def subject(self) -> tuple[str, bool]:
        if self.rng.random() < 0.4:
            return self.rng.choice(NAMES), False
        return self.noun()

    def clause(self) -> str:
        who, many = self.subject()
        if self.rng.random() < 0.6:
            text = f"{who} {self.verb(TRANSITIVE, many)} {self.noun()[0]}"
        else:
            text = f"{who} {self.verb(INTRANSITIVE, many)} {self.noun(self.rng.choice(('en', 'por', 'con')))[0]}"
        if self.rng.random() < 0.4:
            text += f" {self.noun('de')[0]}"
        return text

    def sentence(self) -> str:
        text = self.clause()
        kind = self.rng.randrange(5)
        if kind == 0:
            text += f" en {self.rng.choice(PLACES)}"
        elif kind == 1:
            text += f" {self.rng.choice(TIMES)}"
        elif kind == 2:
            text += f", {self.rng.choice(LINKS)} {self.clause()}"
        elif kind == 3:
            text = f"en {self.rng.choice(PLACES)}, {self.rng.choice(TIMES)}, {text}"
        return text[0].upper() + text[1:] + "."

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(self.rng.randint(3, 6)))

    def exchange(self) -> tuple[str, str]:
        kind = self.rng.randrange(4)
        if kind == 0:
            one, two = self.rng.randrange(1, 9), self.rng.randrange(1, 9)
            return f"Canto son {NUMBERS[one]} máis {NUMBERS[two]}?", f"Son {NUMBERS[one + two]}."
        name, place = self.rng.choice(NAMES), self.rng.choice(PLACES)
        if kind == 1:
            what, many = self.noun()
            return f"Onde {'están' if many else 'está'} {what}?", f"Preto {self.noun('de')[0]}, en {place}."
        if kind == 2:
            verb = self.rng.choice(TRANSITIVE)
            return f"Que {verb}ou {name} en {place}?", f"{name} {verb}ou {self.noun()[0]} e mais {self.noun()[0]}."
        return f"Cóntame algo {self.noun('de')[0]} de {place}.", f"{self.sentence()} {self.sentence()}"


def write_galego(folder: Path, paragraphs: int = 6000, conversations: int = 1500, seed: int = 0) -> None:
    """`prosa.txt`, a document between blank lines, and `conversas.jsonl`, of one exchange or two."""
    writer = Writer(seed)
    folder.mkdir(parents=True, exist_ok=True)
    prose = "\n\n".join(writer.paragraph() for _ in range(paragraphs))
    (folder / "prosa.txt").write_text(prose + "\n", encoding="utf-8")
    with (folder / "conversas.jsonl").open("w", encoding="utf-8") as file:
        for number in range(conversations):
            turns = [text for _ in range(1 + number % 2) for text in writer.exchange()]
            roles = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
            file.write(json.dumps({"conversations": roles}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_galego(Path(sys.argv[1]))
