"""The committed reference run: what anyone may see of a run of nano, checked, stamped, and quoted in the READMEs.

`python -m ttl_utils.reference` (`make reference`) makes the run, collects it and writes its figures into the READMEs.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat

from ttl_utils.errors import TTLError
from ttl_utils.files import read_json, write_json, write_text
from ttl_utils.params import load_params, project_root
from ttl_utils.provenance import now
from ttl_utils.run import STAGES, Run

SIZE = "nano"
READMES = ("README.md", "README.pt-BR.md")
# what is copied beside the notebooks: no weights, no text
PATTERNS = (
    "metrics.json",
    "run.json",
    "06_carbon_report/report.*",
    "tables/*",
    *(f"figures/*.{kind}" for kind in ("png", "svg", "csv")),
)
# so many words in a row that also stand in a tweet are held for that tweet
SHINGLE = 6
HIDDEN = "[a tweet, not shown]"
_REF = re.compile(r"(<!-- ref:([\w./-]+):(\S*) -->).*?(<!-- /ref -->)")
_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|Users|tmp|private|mnt|work|content)/")


def cells_hash(notebook: Path) -> str:
    """SHA-256 of a notebook's code cells, whatever they put out; parameters that were injected do not count."""
    digest = hashlib.sha256()
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            digest.update(f"{cell.source}\0".encode())
    return digest.hexdigest()


def package_hash() -> str:
    """SHA-256 of the package's sources and the parameter files."""
    root, digest = project_root() or Path(), hashlib.sha256()
    for path in sorted(path for name in ("ttl_utils", "params") for path in (root / name).rglob("*.*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def tweet_runs(run: Run) -> set[tuple[str, ...]]:
    """The run's tweets as runs of words, to find and hide them in what notebooks put out."""
    from ttl_utils import wheels

    found: set[tuple[str, ...]] = set()
    for source in run.params.data.active:
        if source.reader == "dantestocks":
            for row in wheels.read(source, run.params.data, Counter()):
                words = re.findall(r"\w+", row["text"].lower())
                found.update(zip(*(words[start:] for start in range(SHINGLE)), strict=False))
    return found


def spans(text: str, tweets: set[tuple[str, ...]]) -> list[tuple[int, int]]:
    """Where tweets stand in a text, HTML or not."""
    # entities and escapes part words; a table's cell parts texts
    blank = re.sub(r"&#?\w+;|\\[nrtu]", lambda found: " " * len(found[0]), text)
    words = list(re.finditer(r"\w+|</t[dh]>", blank))
    names = [word[0].lower() for word in words]
    found: list[tuple[int, int]] = []
    for start in range(len(words) - SHINGLE + 1):
        if tuple(names[start : start + SHINGLE]) in tweets:
            begin, end = words[start].start(), words[start + SHINGLE - 1].end()
            if found and begin <= found[-1][1]:
                begin = found.pop()[0]
            found.append((begin, end))
    return found


def hide(text: str, tweets: set[tuple[str, ...]]) -> str:
    for begin, end in reversed(spans(text, tweets)):
        text = text[:begin] + HIDDEN + text[end:]
    return text


def clean_notebook(path: Path, tweets: set[tuple[str, ...]], outputs: Path) -> nbformat.NotebookNode:
    """An executed notebook to be seen by anyone: no tweet, no folder of this machine, no clock of each cell."""
    # the longest first: one may lie in another
    temporary = Path(tempfile.gettempdir())
    folders = {
        outputs: "outputs",
        project_root(): ".",
        Path(sys.prefix): "python",
        Path.home(): "~",
        temporary: "temporary",
    }
    named = sorted(((str(folder), name) for folder, name in folders.items() if folder), key=lambda pair: -len(pair[0]))

    def clean(text: str) -> str:
        for folder, name in named:
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", name, text)
        return hide(text, tweets)

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key not in ("papermill", "execution")}
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = clean(output.text)
            for kind, value in output.get("data", {}).items():
                output.data[kind] = clean(value) if kind.startswith("text/") else value
    return notebook


def shown_text(notebook: Path) -> str:
    """What an executed notebook shows as text, in order, without tags."""
    parts = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kinds = [kind for kind in ("text/html", "text/markdown", "text/plain") if kind in data]
            parts.append(output.get("text", data[kinds[0]] if kinds else ""))
    return html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", "\n".join(parts), flags=re.DOTALL))


def problems(folder: Path, tweets: set[tuple[str, ...]]) -> list[str]:
    """What nobody is to see, by file: tweets, folders of the machine, its name."""
    host, found = socket.gethostname(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"):
        text = shown_text(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        # embedded pictures are letters that may spell anything
        text = re.sub(r"base64,[\w+/=\s]+", "", text)
        name = path.relative_to(folder)
        found += [f"{name} shows a tweet: {text[begin:end][:60]!r}" for begin, end in spans(text, tweets)[:1]]
        if match := _PATH.search(text):
            found.append(f"{name} names a folder: {text[match.start() : match.start() + 60]!r}")
        if len(host) > 3 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", text):
            found.append(f"{name} names this machine ({host})")
    return found


def collect(run: Run, target: Path) -> dict:
    """Put what may be seen of a finished run into `target`, whole or not at all, and return its stamp.

    Raises:
        TTLError: a stage is missing, or something would show a tweet or the machine.
    """
    executed = {run.need(name).name: run.folder / "notebooks" / f"{name}.ipynb" for name in STAGES}
    tweets, record = tweet_runs(run), read_json(run.folder / "run.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        partial = Path(scratch, target.name)
        for path in (path for pattern in PATTERNS for path in run.folder.glob(pattern)):
            copy = partial / path.relative_to(run.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for path in executed.values():
            text = nbformat.writes(clean_notebook(path, tweets, run.folder.parent))
            write_text(partial / "notebooks" / path.name, text + "\n")
        if found := problems(partial, tweets):
            raise TTLError("the reference would show what nobody is to see:\n" + "\n".join(found))
        stamp = {
            "made": now(),
            "size": run.params.size,
            **{key: record[key] for key in ("code", "machine", "versions")},
        }
        stamp |= {"package": package_hash(), "notebooks": {name: cells_hash(path) for name, path in executed.items()}}
        stamp["duration_s"] = {
            name: read_json(path)["metadata"]["papermill"]["duration"] for name, path in executed.items()
        }
        write_json(partial / "reference.json", stamp)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    return stamp


def filled(text: str, reference: Path, decimal_comma: bool = False) -> str:
    """The text with every marked figure as the reference has it.

    A mark is `<!-- ref:03_pretraining.train_loss:.2f -->…<!-- /ref -->`: the figure's place in `metrics.json` or, after
    `reference.`, in the stamp (in a list by its number), and its format.
    """
    figures = read_json(reference / "metrics.json") | {"reference": read_json(reference / "reference.json")}

    def put(mark: re.Match) -> str:
        value: Any = figures
        try:
            for key in mark[2].split("."):
                value = value[int(key) if isinstance(value, list) else key]
            shown = format(value, mark[3])
        except (LookupError, TypeError, ValueError) as error:
            raise TTLError(f"{mark[1]}: the reference has no such figure ({error})") from None
        return mark[1] + (shown.translate(str.maketrans(",.", ".,")) if decimal_comma else shown) + mark[4]

    return _REF.sub(put, text)


def main() -> int:
    root = project_root()
    if root is None:
        raise SystemExit("reference: it is made in a checkout of the project")
    outputs, target = root / "outputs" / "reference-run", root / "outputs" / "reference" / SIZE
    begun = outputs / "package.txt"
    # what was interrupted goes on, with the same sources alone
    if not begun.is_file() or begun.read_text() != package_hash():
        shutil.rmtree(outputs, ignore_errors=True)
        write_text(begun, package_hash())
    os.environ["TTL_OUTPUTS"] = str(outputs)
    if code := subprocess.run([sys.executable, "-m", "ttl_utils", "run", SIZE]).returncode:
        return code
    try:
        if begun.read_text() != package_hash():
            raise TTLError("the sources changed while the run was made: make it again")
        collect(Run(load_params({"size": SIZE})), target)
        texts = {root / name: (root / name).read_text(encoding="utf-8") for name in READMES}
        for path, text in {path: filled(text, target, "pt-BR" in path.name) for path, text in texts.items()}.items():
            write_text(path, text)
    except TTLError as error:
        print(f"reference: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(outputs)
    print(f"the reference run stands in {target.relative_to(root)}, and {' and '.join(READMES)} quote it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
