"""Local files as a source: every kind, every fault, and a place to go on from."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttl_utils import local_files
from ttl_utils.errors import SourceError
from ttl_utils.local_files import LocalFiles, Problem
from ttl_utils.schema import TextSet

ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text_set(*files: object, **changes: object) -> TextSet:
    return TextSet(name="meus textos", files=[str(file) for file in files], **changes)


def read(*files: object, state: dict | None = None, **changes: object) -> list:
    return list(LocalFiles(text_set(*files, **changes), lambda names: names, state))


def texts(*files: object, **changes: object) -> list:
    return [record["text"] if isinstance(record, dict) else record for record in read(*files, **changes)]


def write(path: Path, data: bytes) -> Path:
    """Plain, or compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in local_files.COMPRESSIONS:
        with pa.CompressedOutputStream(str(path), local_files.COMPRESSIONS[path.suffix]) as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


def write_parquet(path: Path, rows: list[dict], **options: object) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# kinds


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_json_lines(tmp_path, name, ending):
    rows = [{"text": "A maré subiu.\n\nE desceu."}, {"text": "ção", "n": 3}, {"text": None}]
    data = "\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows))
    assert read(write(tmp_path / (name + ending), data.encode())) == rows


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("documents", "wanted"),
    [
        ("file", ["Um barco.\nUma vela.\n\n \nUm cais."]),
        ("line", ["Um barco.", "Uma vela.", "Um cais."]),
        ("blank line", ["Um barco.\nUma vela.", "Um cais."]),
    ],
)
def test_text(tmp_path, documents, wanted, ending):
    path = write(tmp_path / f"a.txt{ending}", b"Um barco.\nUma vela.\n\n \nUm cais.\n")
    assert texts(path, text_documents=documents) == wanted


def test_windows_text_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffcafé\r\nchá\r\n".encode())
    assert texts(path, text_documents="line") == ["café", "chá"]


def test_an_empty_text_file_is_one_empty_document_and_no_line(tmp_path):
    path = write(tmp_path / "a.txt", b"")
    assert texts(path) == [""] and texts(path, text_documents="line") == []
    assert read(write(tmp_path / "b.jsonl", b"")) == []


def test_parquet_reads_only_the_columns_that_are_chosen(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "um", "x": 1}, {"text": "dois", "x": 2}])
    assert list(LocalFiles(text_set(path), lambda names: names[:1])) == [{"text": "um"}, {"text": "dois"}]


def test_patterns_are_sorted_each_file_once_in_the_working_folder_or_the_project(tmp_path, monkeypatch):
    for name in ("b/2.txt", "b/1.txt", "a/3.txt", "a/x.bin", "c/d/5.txt"):
        write(tmp_path / name, name.encode())
    (tmp_path / "a" / "folder.txt").mkdir()
    monkeypatch.setattr(local_files, "project_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path / "b")
    assert texts("1.txt", "*.txt", tmp_path / "a" / "*.txt") == ["a/3.txt", "b/1.txt", "b/2.txt"]
    assert texts("a/*.txt") == ["a/3.txt"]
    assert texts("../**/[135].txt") == ["a/3.txt", "b/1.txt", "c/d/5.txt"]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path, monkeypatch):
    write(tmp_path / "[x]" / "1.txt", b"um")
    monkeypatch.chdir(tmp_path / "[x]")
    assert texts("*.txt") == ["um"]


# faults


def test_no_such_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"'meus textos': no file fits 'nada\*.txt' \(looked in .*"):
        read("nada*.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a.docx", "a.parquet.gz"])
def test_an_unknown_kind_is_named(tmp_path, name):
    with pytest.raises(SourceError, match=rf"{name}: of an unknown kind; known: .parquet, .jsonl"):
        read(write(tmp_path / name, b"x"))


def test_bad_lines_are_problems_in_their_place(tmp_path):
    lines = [b'{"text": "um"}', b"{nada", b"[1]", b'{"text": "\xff"}', b'"so texto"', b'{"text": "dois"}']
    lines += [b"[" * 100_000, b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": ' + b"9" * 5000 + b"}"]
    found = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    wanted = ["um", "not JSON", "not JSON", "not UTF-8", "not JSON", "dois", "not JSON", "not UTF-8", "😀", "not JSON"]
    assert [record.reason if isinstance(record, Problem) else record["text"] for record in found] == wanted
    assert found[3].size == len(lines[3]) + 1 and found[6].size == 100_001


def test_text_that_is_not_utf8_is_a_problem(tmp_path):
    path = write(tmp_path / "a.txt", b"um\n\xe7\xe3o\ntr\xc3\xaas\n")
    assert texts(path, text_documents="line") == ["um", Problem("not UTF-8", 4), "três"]
    assert texts(path) == [Problem("not UTF-8", 13)]


def test_parquet_that_is_not_utf8_is_a_problem_of_its_row(tmp_path):
    column = pa.array([b"um", b"\xff\xfe", "três".encode()]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = texts(tmp_path / "a.parquet")
    assert found[0] == "um" and found[1].reason == "not UTF-8" and found[2] == "três"


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("name", "documents"), [("a.txt", "file"), ("a.txt", "line"), ("a.jsonl", "file")])
def test_a_document_above_the_cap_is_passed_over_and_never_held(tmp_path, monkeypatch, name, documents, ending):
    monkeypatch.setattr(local_files, "LIMIT", 2**16)
    long = b"a" * 2**24
    lines = [b"um", long, b"tres"] if name == "a.txt" else [b'{"text":"um"}', long, b'{"text":"tres"}']
    path = write(tmp_path / (name + ending), b"\n".join(lines))
    del lines, long
    tracemalloc.start()
    found = texts(path, text_documents=documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    if (name, documents) == ("a.txt", "file"):
        assert found == [Problem("larger than 64 MB", 2**24 + 8)]
    else:
        assert found == ["um", Problem("larger than 64 MB", 2**24 + 1), "tres"]


def test_a_block_of_many_lines_above_the_cap_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "LIMIT", 2**16)
    path = write(tmp_path / "a.txt", b"um\n\n" + (b"a" * 99 + b"\n") * 100_000 + b"\ntres\n")
    tracemalloc.start()
    found = texts(path, text_documents="blank line")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["um", Problem("larger than 64 MB", 10**7), "tres"] and peak < 2**21


@given(sizes=st.lists(st.integers(0, 30), max_size=12), limit=st.integers(1, 20))
@ANY
def test_what_is_above_the_cap_in_lines_and_blocks(tmp_path, sizes, limit):
    path = write(tmp_path / "a.txt", b"".join(b"a" * size + b"\n" for size in sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "LIMIT", limit)
        lines, blocks = texts(path, text_documents="line"), texts(path, text_documents="blank line")
    assert [line.size - 1 if isinstance(line, Problem) else len(line) for line in lines] == [n for n in sizes if n]
    assert [isinstance(line, Problem) for line in lines] == [n > limit for n in sizes if n]
    # a block's line ends count
    wanted, block = [], 0
    for size in [*sizes, 0]:
        if size:
            block += size + 1
        elif block:
            wanted.append((block, block > limit))
            block = 0
    # the last line end is not part of a text
    found = [(b.size, True) if isinstance(b, Problem) else (len(b) + 1, False) for b in blocks]
    assert found == wanted


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
def test_a_cut_file_is_named_after_what_came_before_it(tmp_path, name, ending):
    write(tmp_path / "a.txt", b"zero")
    lines = [json.dumps({"text": f"linha {n} {n * 7919 % 1009}"}) for n in range(40_000)]
    path = write(tmp_path / (name + ending), "\n".join(lines).encode())
    path.write_bytes(path.read_bytes()[:-9])
    reader = LocalFiles(text_set(tmp_path / "*", text_documents="line"), lambda names: names)
    found = []
    with pytest.raises(SourceError, match=rf"{path.name} cannot be read after document ([\d,]+) \(Truncated") as caught:
        for record in reader:
            found.append(record["text"])
    assert found[0] == "zero" and len(found) > 20_000
    assert f"document {len(found) - 1:,} " in str(caught.value)
    assert reader.state()["row"] == len(found) - 1


def test_a_cut_in_the_first_lines_loses_none_before_it(tmp_path):
    """Those are looked at for the columns before any is given."""
    lines = [json.dumps({"text": hashlib.shake_128(str(n).encode()).hexdigest(2000)}) for n in range(600)]
    path = write(tmp_path / "a.jsonl.gz", "\n".join(lines).encode())
    path.write_bytes(path.read_bytes()[:-9])
    found = []
    with pytest.raises(SourceError, match="cannot be read after document"):
        for record in LocalFiles(text_set(path), lambda names: names):
            found.append(json.dumps(record))
    assert len(found) > 300 and found == lines[: len(found)]


@pytest.mark.parametrize("harm", ["footer", "middle", "cut"])
def test_a_broken_parquet_is_named_after_what_came_before_it(tmp_path, harm):
    write(tmp_path / "0.txt", b"zero")
    rows = [{"text": f"{n} " + "pedra " * (n % 50)} for n in range(1000)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=100, **options)
    data = bytearray(path.read_bytes())
    if harm == "middle":
        # not in the first row groups, and of the text itself
        chunk = pq.read_metadata(path).row_group(5).column(0)
        end = chunk.data_page_offset + chunk.total_compressed_size
        data[end - 120 : end - 100] = bytes(20)
    else:
        data = data[: len(data) // 2] if harm == "cut" else data[:-8] + b"12345678"
    path.write_bytes(data)
    found = []
    with pytest.raises(SourceError, match=r"a.parquet cannot be read after document (\d+) \(") as caught:
        for record in LocalFiles(text_set(tmp_path / "*"), lambda names: names):
            found.append(record)
    assert len(found) == (501 if harm == "middle" else 1)
    assert f"document {len(found) - 1} " in str(caught.value)


@pytest.mark.parametrize("data", [b"[\n1,\n2\n]", b'[{"text": "um"}]', b"texto puro\n"])
def test_json_that_is_not_lines_is_named(tmp_path, data):
    with pytest.raises(SourceError, match="a.json: none of its first lines is a JSON object"):
        read(write(tmp_path / "a.json", data))


def test_the_columns_of_json_lines_are_those_of_its_first_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"b": 2, "a": 3}\n')
    seen: list[list[str]] = []
    list(LocalFiles(text_set(path), lambda names: seen.append(names) or names))
    assert seen == [["a", "b"]]


# places to go on from


def shelf(folder: Path, row_group_size: int) -> list:
    """A file of every kind, with problems among its records."""
    rows = [{"text": f"linha {n}"} for n in range(7)]
    write_parquet(folder / "a.parquet", rows, row_group_size=row_group_size)
    lines = [json.dumps(row).encode() for row in rows]
    write(folder / "b.jsonl", b"\n".join([*lines[:3], b"", b"{", *lines[3:]]))
    write(folder / "c.jsonl.zst", b"\n".join(lines))
    write(folder / "d.txt.gz", b"um\ndois\n\xff\n\nquatro")
    write(folder / "e.txt", b"")
    return [folder / "*"]


@given(
    row_group_size=st.integers(1, 9), batch=st.integers(1, 5), documents=st.sampled_from(("file", "line")), x=st.data()
)
@ANY
def test_reading_goes_on_exactly_where_it_stopped(tmp_path, row_group_size, batch, documents, x):
    files = shelf(tmp_path, row_group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "BATCH_ROWS", batch)
        whole = read(*files, text_documents=documents)
        # in three sittings
        stops = sorted(x.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2)))
        state, found = None, []
        for stop in stops:
            reader = LocalFiles(text_set(*files, text_documents=documents), lambda names: names, state)
            records = iter(reader)
            found += [next(records) for _ in range(stop - len(found))]
            state = json.loads(json.dumps(reader.state()))
        assert found + read(*files, text_documents=documents, state=state) == whole


def add_file(folder: Path) -> None:
    write(folder / "z.txt", b"mais")


def grow_file(folder: Path) -> None:
    with (folder / "b.jsonl").open("ab") as file:
        file.write(b"\n{}")


def rename_file(folder: Path) -> None:
    (folder / "b.jsonl").rename(folder / "bb.jsonl")


@pytest.mark.parametrize("change", [add_file, grow_file, rename_file])
def test_files_that_changed_since_are_named(tmp_path, change: Callable):
    files = shelf(tmp_path, 3)
    state = LocalFiles(text_set(*files), lambda names: names).state()
    change(tmp_path)
    with pytest.raises(
        SourceError, match=r"'meus textos': its files changed since reading began \(then 5 of .*--force"
    ):
        read(*files, state=state)


def test_a_large_row_group_is_read_in_small_pieces(tmp_path):
    """One row group, as pandas writes it: never held whole."""
    rows = [{"text": f"{n} " + "abc" * 3000} for n in range(4000)]
    path = write_parquet(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False)
    assert pq.read_metadata(path).num_row_groups == 1
    del rows
    reader = iter(LocalFiles(text_set(path), lambda names: names))
    before, peak = pa.total_allocated_bytes(), 0
    for _ in reader:
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 0.75 * path.stat().st_size


def test_sizes_come_from_footers_and_names(tmp_path):
    rows = [{"text": "pedra " * 100 + str(n), "x": "y" * 1000} for n in range(50)]
    path = write_parquet(tmp_path / "a.parquet", rows, use_dictionary=False)
    text_bytes, documents, basis = local_files.size(path, lambda names: ["text"])
    assert documents == 50 and basis == "Parquet footers"
    assert text_bytes == pytest.approx(sum(len(row["text"]) for row in rows), rel=0.1)
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(b"a" * 100))
    size = path.with_suffix(".txt.gz").stat().st_size
    assert local_files.size(path.with_suffix(".txt.gz"), lambda names: names)[:2] == (3 * size, None)
