"""Hub sets streamed from a mirror and from a stand-in of the hub; models by name or folder. No test uses a network."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ttl_utils import hub
from ttl_utils.errors import SourceError
from ttl_utils.schema import TextSet

DATASET = "alguem/conjunto"
ROWS = [{"text": f"texto {n}", "lang": "pt", "rest": "x" * n} for n in range(17)]
FIRST, SECOND = "a" * 40, "b" * 40
# whichever HTTP library the hub's client uses
http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])


def item(**changes: object) -> TextSet:
    return TextSet(**{"name": "s", "dataset": DATASET, "split": "train", "columns": ["text"], **changes})


def choose(names: list[str]) -> list[str]:
    assert {"text", "lang"} <= set(names)
    return ["text", "lang"]


def stream(state: dict | None = None, **changes: object) -> hub.Stream:
    return hub.Stream(item(**changes), choose, state)


def write_set(folder: Path, form: str, row_group_size: int = 3) -> Path:
    """Three files of 7, 0 and 10 rows."""
    folder.mkdir(parents=True)
    for number, part in enumerate((ROWS[:7], [], ROWS[7:])):
        path = folder / f"train-{number:05}-of-00003.{form}"
        if form == "parquet":
            schema = pa.Table.from_pylist(ROWS).schema
            pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=row_group_size)
        elif part and form == "csv":
            path.write_text("text,lang,rest\n" + "".join(",".join(row.values()) + "\n" for row in part))
        elif part:
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("the hub was asked"))
    return tmp_path / "mirror" / DATASET


def rows_of(records: list[dict]) -> list[tuple[str, str]]:
    return [(record["text"], record["lang"]) for record in records]


WANTED = rows_of(ROWS)


@pytest.mark.parametrize(
    ("form", "row_group_size"), [("parquet", 1), ("parquet", 3), ("parquet", 100), ("jsonl", 0), ("csv", 0)]
)
def test_a_stream_goes_on_exactly_where_it_stopped(mirror, form, row_group_size):
    write_set(mirror / "data", form, row_group_size)
    assert rows_of(list(stream())) == WANTED
    # `datasets` takes its time to open other formats
    for stop in range(0, len(ROWS) + 1, 1 if form == "parquet" else 4):
        begun = stream()
        records = iter(begun)
        found = [next(records) for _ in range(stop)]
        state = json.loads(json.dumps(begun.state()))
        assert state["row"] == stop
        # a second stop a little later: a state made of a state
        later = stream(state)
        found += [record for _, record in zip(range(2), later, strict=False)]
        assert rows_of(found + list(stream(json.loads(json.dumps(later.state()))))) == WANTED


def test_of_parquet_only_the_chosen_columns_are_read(mirror):
    write_set(mirror / "data", "parquet")
    assert all(set(record) == {"text", "lang"} for record in stream())


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_columns_are_chosen_from_those_of_the_set(mirror, form):
    write_set(mirror / "data", form)
    seen: list[list[str]] = []
    list(hub.Stream(item(), lambda names: seen.append(names) or names))
    assert seen and all(names == ["text", "lang", "rest"] for names in seen)


def test_a_mirror_that_changed_since_is_named(mirror):
    folder = write_set(mirror / "data", "parquet")
    begun = stream()
    next(iter(begun))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train-00001-of-00003.parquet")
    with pytest.raises(SourceError, match="'alguem/conjunto' is not the one that reading began with .*--force"):
        stream(begun.state())


def test_a_broken_file_of_a_mirror_is_named_with_its_place(mirror):
    folder = write_set(mirror / "data", "parquet")
    path = folder / "train-00002-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    found = []
    with pytest.raises(SourceError, match="'alguem/conjunto', after row 7: a file of it cannot be read"):
        for record in stream():
            found.append(record)
    assert rows_of(found) == WANTED[:7]


def test_a_loader_script_has_its_way_round(mirror):
    write_set(mirror, "parquet")
    (mirror / "conjunto.py").write_text("# a loader\n")
    with pytest.raises(SourceError, match="carries a loader script.* `revision: refs/convert/parquet`"):
        stream()
    with pytest.raises(SourceError, match="carries a loader script"):
        hub.load(DATASET, None, "train")


def test_on_the_parquet_branch_a_configuration_is_a_folder(mirror):
    write_set(mirror / "pt" / "train", "parquet")
    other = write_set(mirror / "es" / "train", "parquet")
    pq.write_table(pa.table({"text": ["hola"], "lang": ["es"]}), other / "train-00000-of-00003.parquet")
    assert rows_of(list(stream(config="pt", revision=hub.PARQUET_BRANCH))) == WANTED
    (mirror / "pt" / "train" / "train-00001-of-00003.parquet").unlink()
    assert len(hub.load(DATASET, "pt", "train", hub.PARQUET_BRANCH, streaming=False)) == len(ROWS)


def test_a_split_or_configuration_that_is_not_there_is_named(mirror):
    write_set(mirror / "data", "parquet")
    with pytest.raises(SourceError, match=r"config None, split test\) does not open: it has the splits train"):
        stream(split="test")
    with pytest.raises(SourceError, match=r"config pt, split train\) does not open: .*'pt' not found"):
        stream(config="pt")


# a stand-in of the hub


class Hub:
    """A set of two commits; the connection is lost when no reads are left."""

    def __init__(self, folder: Path):
        self.folder, self.head, self.reads_left = folder, FIRST, -1
        self.asked: list[str | None] = []

    def dataset_info(self, name: str, revision: str | None = None, **_: object) -> SimpleNamespace:
        self.asked.append(revision)
        files = [
            SimpleNamespace(rfilename=f"data/{path.name}", size=path.stat().st_size)
            for path in (self.folder / (revision or self.head)).iterdir()
        ]
        return SimpleNamespace(sha=revision or self.head, siblings=files)

    def builder(self, path: str, name: str | None = None, revision: str | None = None) -> SimpleNamespace:
        if revision is None:
            files = sorted(map(str, Path(path).rglob("*.parquet")))
            return SimpleNamespace(
                config=SimpleNamespace(data_files={"train": files}), info=SimpleNamespace(builder_name="parquet")
            )
        files = sorted((self.folder / revision).iterdir())
        urls = [f"hf://datasets/{path}@{revision}/data/{file.name}" for file in files]
        card = {"train": SimpleNamespace(num_examples=17, num_bytes=1000)} if revision == FIRST else None
        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train": urls}),
            info=SimpleNamespace(builder_name="parquet", splits=card),
        )

    def open(self, url: str, **_: object) -> object:
        commit, name = url.split("@")[1].split("/data/")
        hub_ = self

        class File(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                if hub_.reads_left == 0:
                    raise ConnectionError("connection reset by peer")
                hub_.reads_left -= 1
                return super().read(size)

        return File(self.folder / commit / name)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    write_set(tmp_path / FIRST, "parquet")
    found = Hub(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", lambda _, *names, **options: found.dataset_info(*names, **options))
    monkeypatch.setattr("datasets.load_dataset_builder", found.builder)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: found)
    return found


def test_reading_goes_on_at_the_commit_where_it_began(fake, tmp_path):
    begun = stream()
    records = iter(begun)
    found = [next(records) for _ in range(9)]
    # the set's owner publishes another version
    folder = write_set(tmp_path / SECOND, "parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "train-00000-of-00003.parquet")
    fake.head = SECOND
    assert rows_of(found + list(stream(begun.state()))) == WANTED
    assert fake.asked == [None, FIRST]
    assert len(list(stream())) == 12


def test_a_lost_connection_loses_nothing(fake):
    lost_after = set()
    for reads in range(40):
        fake.reads_left = reads
        begun, found = stream(), []
        try:
            for record in begun:
                found.append(record)
        except SourceError as error:
            assert re.search(r"after row \d+: the connection was lost \(connection reset.*Run again", str(error))
            lost_after.add(len(found))
        fake.reads_left = -1
        assert rows_of(found + list(stream(begun.state()))) == WANTED
    assert {0, 3, 7} <= lost_after < set(range(17))


def test_a_mirror_that_took_the_hubs_place_is_named(fake, monkeypatch, tmp_path):
    state = stream().state()
    write_set(tmp_path / "mirror" / DATASET / "data", "parquet")
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(SourceError, match="not the one that reading began with"):
        stream(state)
    state = stream().state()
    monkeypatch.delenv("TTL_MIRROR")
    with pytest.raises(SourceError, match="not the one that reading began with"):
        stream(state)


def test_sizes_of_a_hub_set_are_those_of_its_files_and_card(fake, tmp_path):
    files, text_bytes, rows = hub.sizes(item())
    wanted = {f"data/{path.name}": path.stat().st_size for path in (tmp_path / FIRST).iterdir()}
    assert dict(files) == wanted and (text_bytes, rows) == (1000, 17)
    (tmp_path / FIRST).rename(tmp_path / SECOND)
    fake.head = SECOND
    assert hub.sizes(item())[1:] == (None, None)


# models


def response(error: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return error("no", response=http.Response(status, request=http.Request("GET", "https://hub.invalid")))


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        (http.ConnectError("no route"), "cannot be reached .*no route.* TTL_MIRROR"),
        (response(HfHubHTTPError, 503), "cannot be reached"),
        (response(GatedRepoError, 403), "is gated: accept its terms .* HF_TOKEN"),
        (response(RepositoryNotFoundError, 404), "is not on the hub .*may be a folder"),
        (response(RevisionNotFoundError, 404), "has no revision 'velha'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_cannot_be_had_is_named(monkeypatch, failure, wanted):
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.delenv("TTL_MIRROR", raising=False)
    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(SourceError, match=f"model 'alguem/modelo'.* {wanted}"):
        hub.model_folder("alguem/modelo", "velha")
    with pytest.raises(SourceError, match="data set 'alguem/modelo'"):
        hub.check("alguem/modelo", "velha")


def test_an_id_of_another_form_is_named(monkeypatch):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    with pytest.raises(SourceError, match="model 'alguem/um modelo' is not on the hub"):
        hub.model_folder("alguem/um modelo")


def test_a_model_is_a_folder_its_mirror_or_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda _, name, revision, timeout: asked.append((name, revision)))
    assert hub.model_folder("alguem/modelo", "main") == "alguem/modelo" and asked == [("alguem/modelo", "main")]
    (tmp_path / "alguem" / "modelo").mkdir(parents=True)
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path))
    assert hub.model_folder("alguem/modelo") == tmp_path / "alguem" / "modelo"
    assert hub.model_folder(str(tmp_path / "alguem")) == tmp_path / "alguem"
    monkeypatch.chdir(tmp_path / "alguem")
    assert hub.model_folder("modelo") == Path("modelo")
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["./modelo", "~/nada/modelo", "/nada/modelo", "outputs/nano/02_tokenizer"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="there is no such folder"):
        hub.model_folder(name)


def test_a_mirror_that_changed_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TTL_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_set(tmp_path / "mirror" / DATASET, "csv") / "train-00000-of-00003.csv"
    assert [row["lang"] for row in hub.load(DATASET, None, "train", streaming=False)] == [row["lang"] for row in ROWS]
    # of the same size, as a label that was put right is
    path.write_text(path.read_text().replace(",pt,", ",en,"))
    assert {row["lang"] for row in hub.load(DATASET, None, "train", streaming=False)} == {"en", "pt"}


def test_a_machine_that_is_declared_offline_reads_what_it_loaded_before(monkeypatch):
    monkeypatch.delenv("TTL_MIRROR", raising=False)
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr("datasets.load_dataset", lambda **options: options["path"])
    assert hub.load(DATASET, None, "train", streaming=False) == DATASET

    def absent(**_):
        raise ConnectionError("not in the cache")

    monkeypatch.setattr("datasets.load_dataset", absent)
    with pytest.raises(SourceError, match="the Hugging Face hub cannot be reached .* or set TTL_MIRROR"):
        hub.load(DATASET, None, "train", streaming=False)
