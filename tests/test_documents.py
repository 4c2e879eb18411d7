"""What the documents say exists: links, anchors, commands, keys and files; and both READMEs say the same."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml

from ttl_utils.commands import parser
from ttl_utils.model import count_parameters
from ttl_utils.params import load_params
from ttl_utils.planning import report
from ttl_utils.reference import READMES
from ttl_utils.schema import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
# hosts of public papers, code and models; a link to another is looked at before it is added here
HOSTS = {"arxiv.org", "doi.org", "github.com", "huggingface.co"}


def _documents() -> list[Path]:
    """Markdown files of the project and of the reference run, and notebooks with their executed copies."""
    patterns = ("*.md", "tests/**/*.md", "ttl_utils/**/*.md", "params/**/*.md", "notebooks/*.ipynb")
    patterns += ("outputs/reference/**/*.md", "outputs/reference/*/notebooks/*.ipynb")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


DOCUMENTS = _documents()
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    return CODE.sub("", text)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text)))


def anchors(path: Path) -> set[str]:
    """As GitHub makes them: letters, digits and hyphens of each heading, in lower case."""
    heads = re.findall(r"^#+ (.+)$", prose(text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def problem(path: Path, target: str) -> str | None:
    """What is wrong with a link of this document, or None."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        if parts.scheme != "https" or "<" in target:
            return "no whole https address"
        return None if parts.netloc in HOSTS else f"{parts.netloc} is not among the known hosts"
    place = path.parent / parts.path if parts.path else path
    # an executed copy stands elsewhere, and means what its notebook means
    if not place.exists() and "reference" in path.parts:
        place = ROOT / "notebooks" / parts.path
    if not place.exists():
        return "no such file"
    if parts.fragment and parts.fragment not in anchors(place):
        return f"no such heading; there are {', '.join(sorted(anchors(place)))}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    wrong = {target: problem(path, target) for target in links(text_of(path))}
    assert not {target: why for target, why in wrong.items() if why}


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("no/such.md", "no such file"),
        ("README.md#no-such", "no such heading"),
        ("#no-such", "no such heading"),
        ("http://arxiv.org/abs/1", "https"),
        ("https://example.com/x", "known hosts"),
        ("https://github.com/<owner>/x", "https"),
        ("README.md#your-own-language", None),
        ("https://arxiv.org/abs/2401.16640", None),
        ("notebooks", None),
    ],
)
def test_a_link_that_leads_nowhere_is_found(target: str, part: str | None) -> None:
    found = problem(ROOT / "CONTRIBUTING.md", target)
    assert (found is None) if part is None else part in found


def commands(text: str) -> list[list[str]]:
    """Every command line of the shell blocks, and every `ttl ...` in prose, in words."""
    lines = [line for kind, block in CODE.findall(text) if kind == "sh" for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(r"`(ttl [^`]+)`", prose(text))]
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


TOLD = [*READMES, "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", TOLD)
def test_commands_are_ones_that_we_have(name: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = commands(text_of(ROOT / name))
    assert found
    for words in found:
        while words[0] in ("srun", ".venv/bin/python", "python") or words[0].endswith("/ttl"):
            words = ["ttl", *words[1:]] if words[0].endswith("/ttl") else words[1:]
        if words[0] == "ttl":
            size = words[2] if len(words) > 2 else ""
            parser().parse_args(words[1:])
            assert not size.endswith(".yaml") or size == "my.yaml" or (ROOT / size).is_file(), words
            sets = [words[place + 1].partition("=")[0] for place, word in enumerate(words) if word == "--set"]
            assert all(key in known_keys() for key in sets), words
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "-m" and words[1].startswith("tests."):
            assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), words
        elif words[0] == "-m" and words[1] == "pytest":
            assert all((ROOT / word).exists() for word in words[2:]), words
        else:
            assert words[0] in ("papermill", "accelerate", "torchrun"), words
            given = [word for word in words if re.search(r"\.(yaml|ipynb)$", word) and word != "out.ipynb"]
            assert all((ROOT / word).is_file() for word in given), words
            if "ttl_utils" in words:
                parser().parse_args(words[words.index("ttl_utils") + 1 :])


@cache
def known_keys() -> set[str]:
    """`section.key`, and deeper, of all sizes."""
    flat = [load_params({"size": size}).flat() for size in ("nano", "160m")]
    return {".".join(key.split(".")[:end]) for keys in flat for key in keys for end in (1, 2, 3)}


@pytest.mark.parametrize("name", TOLD)
def test_keys_and_files_in_prose_exist(name: str) -> None:
    text = prose(text_of(ROOT / name))
    spans = re.findall(r"`([^`\n]+)`", text)
    keys = [span for span in spans if re.fullmatch(rf"({'|'.join(SECTIONS)})\.(?!py$)[a-z_]+", span)]
    assert not [key for key in keys if key not in known_keys()]
    paths = [span for span in spans if re.match(r"(params|tests|ttl_utils|notebooks)/", span)]
    assert not [path for path in paths if not (ROOT / path).exists()]
    modules = [span for span in spans if re.fullmatch(r"\w+\.py", span)]
    assert not [module for module in modules if not list(ROOT.glob(f"*/{module}"))]


def test_every_module_has_its_place_in_contributing() -> None:
    text = text_of(ROOT / "CONTRIBUTING.md")
    modules = [path.name for path in (ROOT / "ttl_utils").glob("[!_]*.py")]
    assert not [name for name in modules if f"`{name}`" not in text and not name.startswith("figures_")]


def test_yaml_blocks_are_yaml() -> None:
    for name in TOLD:
        for kind, block in CODE.findall(text_of(ROOT / name)):
            if kind == "yaml":
                assert isinstance(yaml.safe_load(block), list)
            if kind == "sh" and block.startswith("#!"):
                subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@cache
def plan(size: str, gpu: str | None) -> str:
    return report(load_params({"size": size}), gpu=gpu)


class TestBothReadmes:
    english, portuguese = (text_of(ROOT / name) for name in READMES)

    def test_point_at_each_other_at_the_top(self) -> None:
        assert "](README.pt-BR.md)" in self.english.splitlines()[2]
        assert "](README.md)" in self.portuguese.splitlines()[2]

    def test_have_the_same_headings_in_order(self) -> None:
        one, two = (re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (self.english, self.portuguese))
        assert one == two

    def test_have_the_same_code(self) -> None:
        def code(text: str) -> list[tuple[str, str]]:
            return [(kind, re.sub(r"(^|\s)# .*$", "", block, flags=re.MULTILINE)) for kind, block in CODE.findall(text)]

        assert code(self.english) == code(self.portuguese)

    def test_name_the_same_keys_commands_and_links(self) -> None:
        for pattern in (r"`([^`]+)`", r"\]\(([^)\s]+)\)", r"<!-- ref:\S+ -->"):
            one, two = (
                Counter(" ".join(found.split()) for found in re.findall(pattern, prose(text)))
                for text in (self.english, self.portuguese)
            )
            for mutual in ("README.md", "README.pt-BR.md"):
                one.pop(mutual, None), two.pop(mutual, None)
            assert one == two

    def test_have_the_same_numbers(self) -> None:
        def numbers(text: str) -> Counter:
            # without separators: 1,234.5 there is 1.234,5 here
            found = re.findall(r"(?<![\w`/])\d[\d.,]*", re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(text)))
            return Counter(re.sub(r"[.,]", "", number) for number in found)

        assert numbers(self.english) == numbers(self.portuguese)

    @pytest.mark.parametrize(
        ("size", "log", "gpu"), [("160m", "TTL-160m", None), ("460m", "TTL-460m", None), ("40m", "TTL-160m", "T4")]
    )
    def test_quote_the_plan(self, size: str, log: str, gpu: str | None) -> None:
        planned = []
        for line in plan(size, gpu).splitlines():
            if found := re.match(rf" *({log}|Tucano)[^)]*\)+ +[\d.]+ +[\d,]+ +([\d.]+) .* ([\d.]+|-)$", line):
                planned.append([float(value) for value in found.groups()[1:] if value != "-"])
        (log_hours, *log_usd), (tucano_hours, *tucano_usd) = planned
        for text in (self.english, self.portuguese):
            (row,) = re.findall(rf"^\| `{size}` .*$", text, re.MULTILINE)
            hours, usd = ([int(number) for number in re.findall(r"\d+", cell)] for cell in row.split("|")[5:7])
            wanted = [log_hours] if gpu else [log_hours, tucano_hours, *log_usd, *tucano_usd]
            assert [*hours, *usd] == pytest.approx(wanted, abs=0.5), row

    @pytest.mark.parametrize("size", ["nano", "40m", "160m", "460m"])
    def test_quote_the_disk_that_checkpoints_take(self, size: str) -> None:
        params = load_params({"size": size})
        settings = params.pretraining
        # every checkpoint and the final model in fp32; Adam's two moments for those that can be resumed
        kept = math.ceil(settings.max_steps / settings.save_steps) + 1
        each = 4 * count_parameters(params.model, params.tokenizer.vocab_size)
        gigabytes = each * (kept + 2 * settings.resumable_checkpoints) / 1e9
        for text in (self.english, self.portuguese):
            (row,) = re.findall(rf"^\| `{size}` .*$", text, re.MULTILINE)
            quoted = row.split("|")[7].removesuffix(" GB ").strip().replace(",", ".")
            assert float(quoted) == pytest.approx(gigabytes, abs=0.05 if "." in quoted else 0.5), row

    def test_begin_with_a_picture_and_two_commands(self) -> None:
        for text in (self.english, self.portuguese):
            top = "\n".join(text.splitlines()[:24])
            assert re.search(r"!\[[^\]]+\]\(outputs/reference/nano/figures/\w+\.png\)", top)
            assert "make nano" in top and "make test" in top
