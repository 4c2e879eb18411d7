"""What holds for every notebook and for the package, without running them."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from ttl_utils.run import STAGES
from ttl_utils.schema import PARAMETER_NAMES, SECTIONS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_there_is_a_notebook_for_every_stage() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEveryNotebook:
    def test_is_valid_and_clean(self, path: Path) -> None:
        notebook = read(path)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        assert "widgets" not in notebook.metadata
        assert not any(cell.outputs or cell.execution_count for cell in code_cells(path))

    def test_has_the_shared_first_cell(self, path: Path) -> None:
        first = code_cells(path)[0].source
        assert first == code_cells(NOTEBOOKS[0])[0].source
        assert "TTL_SOURCE" in first and "torch" in first

    def test_has_the_shared_parameters_cell_of_plain_literals(self, path: Path) -> None:
        tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1
        assignments = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(tagged[0].source).body}
        assert tuple(assignments) == PARAMETER_NAMES
        assert assignments == {"size": "nano", **dict.fromkeys(PARAMETER_NAMES[1:5]), **{name: {} for name in SECTIONS}}

    def test_validates_before_anything_else(self, path: Path) -> None:
        third = code_cells(path)[2].source
        assert "load_params(globals())" in third

    def test_begins_with_its_header(self, path: Path) -> None:
        header = read(path).cells[0].source
        assert header.startswith(f"# {path.stem[:2]} · ")
        for label in ("**Goal.**", "**You will learn**", "**Paper.**", "**Needs**", "**Makes**", "**Cost.**"):
            assert label in header, label

    def test_ends_with_the_paper_the_differences_and_the_next(self, path: Path) -> None:
        text = prose(path)
        assert "Our result against the paper" in text
        assert "**What differs and why.**" in text
        assert "metrics.json" in text
        following = NOTEBOOKS[(NOTEBOOKS.index(path) + 1) % len(NOTEBOOKS)].name
        assert f"]({following})" in text.splitlines()[-1]

    def test_links_lead_somewhere(self, path: Path) -> None:
        for target in re.findall(r"\]\(([^)#]+)\)", prose(path)):
            assert (path.parent / target).exists(), target

    def test_cells_are_short_and_explained(self, path: Path) -> None:
        lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
        assert max(lengths) <= 35
        assert sorted(lengths)[len(lengths) // 2] <= 13
        # a code cell follows prose, or one code cell that does
        kinds = [cell.cell_type for cell in read(path).cells]
        assert "code code code code" not in " ".join(kinds)

    def test_is_the_same_for_every_size(self, path: Path) -> None:
        source = "\n".join(cell.source for cell in code_cells(path)[2:])
        assert not re.search(r"""["'](nano|40m|TEST)["']""", source)

    def test_names_no_path_and_no_token(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)
        assert "HF_TOKEN" not in text and "os.environ[" not in text


class TestTheFirstCell:
    source = code_cells(NOTEBOOKS[0])[0].source

    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
        found: list[list[str]] = []

        def run(command: list[str], check: bool) -> None:
            assert check
            found.append([*command, Path(command[command.index("-c") + 1]).read_text()])

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv("TTL_SOURCE", raising=False)
        return found

    def test_does_nothing_where_the_project_is_installed(self, commands: list) -> None:
        exec(self.source, {})
        assert commands == []

    def test_installs_from_the_one_variable_and_keeps_torch(self, commands: list, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        monkeypatch.setenv("TTL_SOURCE", "somewhere")
        exec(self.source, {})
        (command,) = commands
        assert "somewhere" in command and f"torch=={metadata.version('torch')}\n" in command[-1]
        assert not list(tmp_path.iterdir()), "nothing is left behind"

    def test_installs_from_the_checkout_around_it(self, commands: list, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        (tmp_path / "pyproject.toml").touch()
        (tmp_path / "notebooks").mkdir()
        monkeypatch.chdir(tmp_path / "notebooks")
        exec(self.source, {})
        assert ".." in commands[0]

    def test_says_what_to_set(self, commands: list, monkeypatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(RuntimeError, match="TTL_SOURCE"):
            exec(self.source, {})
        assert commands == []


def test_the_package_has_no_branch_for_a_size() -> None:
    for path in (ROOT / "ttl_utils").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                literals = [item.value for item in [node.left, *node.comparators] if isinstance(item, ast.Constant)]
                assert not {"nano", "40m"} & {value for value in literals if isinstance(value, str)}, path


def test_the_package_loads_no_pickle_and_trusts_no_remote_code() -> None:
    for path in (ROOT / "ttl_utils").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in source and "pickle" not in source and "torch.load(" not in source, path


def test_modules_are_small() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "ttl_utils").glob("*.py")
    }
    assert sum(lengths.values()) <= 21200, lengths
    assert max(lengths.values()) <= 600, lengths
