"""Exact and near duplicates: against sets, brute-force Jaccard and the S-curve; at any cut into parts and buckets."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import sentence
from ttl_utils import duplicates
from ttl_utils.duplicates import EXACT, KEPT, NEAR, band_hashes, found_probability, mark
from ttl_utils.errors import DamagedFile
from ttl_utils.schema import NearDuplicates
from ttl_utils.words import ngram_hashes, word_codes

FINEWEB = NearDuplicates(ngram=5, bands=14, rows=8)


def write_parts(folder: Path, digests: np.ndarray, bands: np.ndarray, cuts: list[int]) -> list[Path]:
    """The arrays cut before these documents into parts, as they stand beside them."""
    edges = [0, *sorted(cuts), len(digests)]
    parts = [folder / f"{number:05}" for number in range(len(edges) - 1)]
    for part, (start, stop) in zip(parts, itertools.pairwise(edges), strict=True):
        np.save(f"{part}.digests.npy", digests[start:stop])
        np.save(f"{part}.bands.npy", bands[:, start:stop])
    return parts


def arrays(texts: list[str], parameters: NearDuplicates = FINEWEB) -> tuple[np.ndarray, np.ndarray]:
    hashed = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    digests = np.frombuffer(hashed, np.uint64).reshape(-1, 2)
    bands = [band_hashes(word_codes(text), parameters) for text in texts]
    return digests, np.array(bands, np.uint64).reshape(-1, parameters.bands).T


def marked(digests: np.ndarray, bands: np.ndarray, cuts: list[int] | None = None, **options: int) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        parts = write_parts(Path(folder), digests, bands, cuts or [])
        marks = np.load(mark(parts, Path(folder) / "found", **options))
        # nothing is left but the result
        assert [path.name for path in (Path(folder) / "found").iterdir()] == ["duplicates.npy"]
    assert marks.dtype == np.uint8
    return marks.tolist()


def reference(digests: np.ndarray, bands: np.ndarray) -> list[int]:
    """The definition, with Python's sets: clusters grow until none has a band's hash in common with another."""
    seen: set[bytes] = set()
    marks: list[int] = []
    clusters: list[tuple[set[tuple[int, int]], list[int]]] = []
    for number, key in enumerate(digests):
        marks.append(EXACT if key.tobytes() in seen else KEPT)
        seen.add(key.tobytes())
        keys = {(band, int(value)) for band, value in enumerate(bands[:, number]) if value}
        if marks[-1] == KEPT and keys:
            near = [cluster for cluster in clusters if cluster[0] & keys]
            clusters = [cluster for cluster in clusters if not cluster[0] & keys]
            members = sorted([number, *(member for cluster in near for member in cluster[1])])
            clusters.append((keys.union(*(cluster[0] for cluster in near)), members))
    for _, members in clusters:
        for member in members[1:]:
            marks[member] = NEAR
    return marks


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few values, so that they often agree; with high bits that fall into any bucket. 0 in all bands: no part."""
    documents, bands = draw(st.integers(0, 40)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.integers(1, 40))
    values = rng.integers(1, 2**64, spread, dtype=np.uint64)
    digests = values[rng.integers(0, spread, (documents, 2))]
    keys = values[rng.integers(0, spread, (bands, documents))]
    keys[:, rng.random(documents) < 0.2] = 0
    return digests, keys


@settings(max_examples=150, deadline=None)
@given(corpora(), st.lists(st.integers(0, 40), max_size=5), st.sampled_from([1, 2, 7, 2**21]))
def test_marks_are_the_definitions_whatever_the_parts_and_buckets(
    corpus: tuple[np.ndarray, np.ndarray], cuts: list[int], bucket_documents: int
) -> None:
    cuts = [min(cut, len(corpus[0])) for cut in cuts]
    assert marked(*corpus, cuts, bucket_documents=bucket_documents) == reference(*corpus)


def test_a_key_that_all_share_and_long_chains() -> None:
    documents = 3000
    digests = np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2)
    # each document agrees with the next alone, in one of two bands, and in an order that hides it
    chain = np.random.default_rng(0).permutation(documents)
    bands = np.zeros((2, documents), np.uint64)
    bands[0, chain] = np.arange(documents) // 2 + 1
    bands[1, chain] = (np.arange(documents) + 1) // 2 + 1
    assert marked(digests, bands, bucket_documents=64) == [KEPT] + [NEAR] * (documents - 1)
    bands = np.full((1, documents), 7, np.uint64)
    assert marked(digests, bands, bucket_documents=64) == [KEPT] + [NEAR] * (documents - 1)
    assert marked(np.full_like(digests, 7), bands, bucket_documents=64) == [KEPT] + [EXACT] * (documents - 1)


def test_digests_differ_where_one_half_does() -> None:
    digests = np.array([[1, 1], [1, 2], [2, 1], [1, 1], [1, 2]], np.uint64)
    assert marked(digests, np.zeros((1, 5), np.uint64)) == [KEPT, KEPT, KEPT, EXACT, EXACT]


def test_an_exact_duplicate_joins_no_cluster() -> None:
    # 2 is a copy of 0 and would join 1 with 0, were it asked
    digests = np.array([[1, 1], [2, 2], [1, 1]], np.uint64)
    bands = np.array([[5, 6, 5], [8, 9, 9]], np.uint64)
    assert marked(digests, bands) == [KEPT, KEPT, EXACT]


def text_of(rng: random.Random, count: int) -> list[str]:
    # words of their own beside the sentences, so that two texts share no five words by chance
    return [word for _ in range(count) for word in (*sentence(rng).split()[:4], f"palavra{rng.randrange(10**6)}")]


def shingles(words: list[str], ngram: int) -> set[int]:
    return set(ngram_hashes(word_codes(" ".join(words)), ngram).tolist())


def jaccard(one: list[str], two: list[str], ngram: int) -> float:
    left, right = shingles(one, ngram), shingles(two, ngram)
    return len(left & right) / len(left | right)


def test_near_copies_are_found_and_unlike_texts_are_not() -> None:
    rng = random.Random(3)
    texts, expected = [], []
    for number in range(120):
        words = text_of(rng, 80)
        copy = list(words)
        # far above the threshold (about 0.72), far below it, and not alike at all
        for place in rng.sample(range(len(words)), (2, 60, len(words))[number % 3]):
            copy[place] = f"troca{rng.randrange(10**6)}"
        similarity = jaccard(words, copy, FINEWEB.ngram)
        assert similarity > 0.93 if number % 3 == 0 else similarity < 0.35
        texts += [" ".join(words), " ".join(copy)]
        expected += [KEPT, NEAR if number % 3 == 0 else KEPT]
    assert marked(*arrays(texts), [50, 51]) == expected


@pytest.mark.parametrize("changes", [4, 8, 12, 18])
def test_the_share_found_follows_the_s_curve(changes: int) -> None:
    rng = random.Random(changes)
    pairs, found, expected, variance = 400, 0, 0.0, 0.0
    for _ in range(pairs):
        words = text_of(rng, 40)
        copy = list(words)
        for place in rng.sample(range(len(words)), changes):
            copy[place] = f"troca{rng.randrange(10**9)}"
        probability = found_probability(jaccard(words, copy, FINEWEB.ngram), FINEWEB)
        one, two = (band_hashes(word_codes(" ".join(text)), FINEWEB) for text in (words, copy))
        found += bool((one == two).any())
        expected += probability
        variance += probability * (1 - probability)
    # four standard deviations of a sum of independent finds
    assert abs(found - expected) < 4 * math.sqrt(variance) + 1


def test_found_probability_at_known_points() -> None:
    assert found_probability(0.0, FINEWEB) == 0 and found_probability(1.0, FINEWEB) == 1
    # FineWeb's own figures for 14 bands of 8 (Penedo et al. 2024)
    curve = found_probability(np.array([0.7, 0.75, 0.8, 0.85]), FINEWEB)
    assert np.allclose(curve, [0.56, 0.77, 0.92, 0.988], atol=0.01)


def plain_band_hashes(shingles: list[int], parameters: NearDuplicates) -> list[int]:
    """As documented, with Python's whole numbers: splitmix64, odd multipliers, minima modulo 2^32."""
    minima = []
    for number in range(1, parameters.bands * parameters.rows + 1):
        state = number * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        multiplier = (state ^ state >> 31) >> 32 | 1
        minima.append(min((shingle >> 32 | 1) * multiplier % 2**32 for shingle in shingles))
    bands = np.array(minima, np.uint64).reshape(parameters.bands, parameters.rows)
    return [int(ngram_hashes(band, parameters.rows)[0]) for band in bands]


@pytest.mark.parametrize("words", [5, 6, 40, 3000])
def test_band_hashes_are_those_of_the_documentation(words: int) -> None:
    codes = np.random.default_rng(words).integers(0, 2**32, words, dtype=np.uint64)
    for parameters in (FINEWEB, NearDuplicates(ngram=2, bands=3, rows=1), NearDuplicates(ngram=5, bands=1, rows=5)):
        expected = plain_band_hashes(ngram_hashes(codes, parameters.ngram).tolist(), parameters)
        assert band_hashes(codes, parameters).tolist() == expected


def test_a_band_that_hashes_to_0_takes_part() -> None:
    with patch.object(duplicates, "ngram_hashes", lambda codes, _: np.zeros(len(codes), np.uint64)):
        assert band_hashes(np.arange(9, dtype=np.uint64), FINEWEB).tolist() == [1] * FINEWEB.bands


def test_texts_too_short_take_no_part() -> None:
    assert not band_hashes(word_codes("um dois três quatro"), FINEWEB).any()
    assert band_hashes(word_codes("um dois três quatro cinco"), FINEWEB).all()
    texts = ["um dois três", "Um, dois, três!", "um dois três"]
    assert marked(*arrays(texts)) == [KEPT, KEPT, EXACT]


def test_no_documents_and_empty_parts(tmp_path: Path) -> None:
    assert np.load(mark([], tmp_path / "none")).shape == (0,)
    nothing = np.empty((0, 2), np.uint64), np.empty((3, 0), np.uint64)
    assert marked(*nothing, [0, 0]) == []
    digests = np.array([[1, 1], [1, 1]], np.uint64)
    assert marked(digests, np.zeros((3, 2), np.uint64), [0, 0, 1, 1, 2, 2]) == [KEPT, EXACT]
    # a list of no bands has no second dimension
    np.save(tmp_path / "empty.digests.npy", np.empty((0, 2), np.uint64))
    np.save(tmp_path / "empty.bands.npy", np.array([], np.uint64))
    assert np.load(mark([tmp_path / "empty.json"], tmp_path)).shape == (0,)


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, *arrays(["um texto", "outro texto", "um texto"]), [1])
    told: list[tuple[int, int]] = []
    mark(parts, tmp_path, lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1] == (3 * 15, 3 * 15) and len(told) == 2 * 15


@pytest.mark.parametrize("kind", ["digests", "bands"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "shape", "type"])
def test_a_damaged_array_is_named_and_nothing_is_written(tmp_path: Path, kind: str, damage: str) -> None:
    parts = write_parts(tmp_path, *arrays(["um texto", "outro texto", "um texto"]), [1])
    path = tmp_path / f"00001.{kind}.npy"
    if damage == "missing":
        path.unlink()
    elif damage in ("cut", "empty", "text"):
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-8], "empty": b"", "text": b"nada"}[damage])
    else:
        array = np.load(path)
        np.save(path, array[:, :1] if damage == "shape" else array.astype(np.int64))
    with pytest.raises(DamagedFile, match=f"00001.{kind}.npy is (missing|damaged)"):
        mark(parts, tmp_path / "found")
    assert not (tmp_path / "found" / "duplicates.npy").exists()


def test_parts_with_different_bands_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, *arrays(["um texto", "outro texto"]), [1])
    np.save(tmp_path / "00001.bands.npy", np.zeros((3, 1), np.uint64))
    with pytest.raises(DamagedFile, match="differ in bands"):
        mark(parts, tmp_path)


def test_what_a_killed_process_left_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["um texto", "outro texto", "um texto"]
    parts = write_parts(tmp_path, *arrays(texts), [1])
    (tmp_path / ".duplicates").mkdir()
    (tmp_path / ".duplicates" / "bucket-0").write_bytes(b"sobra")
    assert np.load(mark(parts, tmp_path)).tolist() == [KEPT, KEPT, EXACT]
    # stopped at the last moment: the earlier result still stands, whole
    monkeypatch.setattr(duplicates, "_write_marks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mark(parts[:1], tmp_path)
    assert len(np.load(tmp_path / "duplicates.npy")) == 3 and not (tmp_path / ".duplicates").exists()
