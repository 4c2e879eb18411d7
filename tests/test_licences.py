"""Licences: all that the project names are known, in any spelling; a mix is never better than its worst part."""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ttl_utils import paper
from ttl_utils.licences import MODEL_USES, combined, look_up, permissive

ROWS = list(
    csv.DictReader(files("ttl_utils").joinpath("published", "licences.csv").read_text(encoding="utf-8").splitlines())
)
NAMES = [row["licence"] for row in ROWS]
UNKNOWN = "not a licence known here"


def named_in_parameters() -> set[str]:
    names = set()
    for path in Path(__file__).parents[1].joinpath("params").glob("*.yaml"):
        for source in yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["sources"]:
            names |= {item["licence"] for item in (source, *source.get("origins", []))}
    return names


def test_the_table_is_whole():
    for row in ROWS:
        assert row["model_use"] in MODEL_USES and row["note"], row
        assert {row["attribution"], row["share_alike"]} <= {"yes", "no"}, row
        # no two rows are spellings of one another
        assert look_up(row["licence"]).licence == row["licence"]


def test_every_licence_the_project_names_is_known():
    names = named_in_parameters() | set(paper.table("corpus_sources")["licence"])
    assert len(names) > 8
    assert {name for name in names if look_up(name).note == UNKNOWN} == set()


@pytest.mark.parametrize(
    ("licence", "model_use", "attribution", "share_alike"),
    [
        ("CC0 1.0", "free", False, False),
        ("CC BY 4.0", "free", True, False),
        ("CC BY-SA 4.0", "free", True, True),
        ("ODC-By (OSCAR part CC0 1.0)", "free", True, False),
        ("Apache-2.0", "free", True, False),
        ("BSD-3-Clause", "free", True, False),
        ("MPL-2.0", "free", True, True),
        ("CC BY-NC 4.0", "non-commercial", True, False),
        ("CC BY-NC-SA 4.0", "non-commercial", True, True),
        ("CC BY-NC-ND 4.0", "restricted", True, False),
        ("Llama 2 Community License", "restricted", True, False),
        ("Common Crawl terms of use", "unclear", False, False),
        ("other (mixed; see DATA_NOTICE.md)", "unclear", True, False),
        ("a licence of one's own", "unclear", True, False),
        ("", "unclear", True, False),
    ],
)
def test_what_a_licence_allows(licence, model_use, attribution, share_alike):
    found = look_up(licence)
    assert (found.model_use, found.attribution, found.share_alike) == (model_use, attribution, share_alike)
    assert permissive(licence) == (model_use == "free")


@pytest.mark.parametrize(
    ("spelt", "licence"),
    [
        ("Apache License, Version 2.0", "Apache 2.0"),
        ("apache-2.0", "Apache 2.0"),
        ("cc-by-sa-3.0", "CC BY-SA 3.0"),
        ("CC BY-SA 4.0 International", "CC BY-SA 4.0"),
        ("odc-by", "ODC-By"),
        ("cc0-1.0", "CC0 1.0"),
        ("The MIT License", "MIT"),
        ("llama2", "Llama 2 Community License"),
        ("Llama 2 licence", "Llama 2 Community License"),
        ("bsd 3 clause", "BSD-3-Clause"),
    ],
)
def test_spellings(spelt, licence):
    assert look_up(spelt).licence == licence


@given(
    st.sampled_from(NAMES),
    st.sampled_from([str.upper, str.lower, str.title]),
    st.sampled_from(["-", " ", "_"]),
    st.sampled_from(["", " (part of it)", " (a; b (c))", "  "]),
)
def test_case_hyphens_and_remarks_change_nothing(name, case, hyphen, remark):
    assert look_up(case(name).replace("-", hyphen) + remark).licence == name


@pytest.mark.parametrize("near", ["CC BY-NC", "CC BY 5.0", "Apache", "MIT or Apache-2.0", "not CC0", "(CC0) mostly"])
def test_a_name_that_only_looks_like_a_licence_is_unclear(near):
    assert not permissive(near)


@given(st.lists(st.sampled_from([*NAMES, "own terms"]), max_size=6))
def test_combined_is_as_bad_as_its_worst_part(names):
    whole = combined(names)
    parts = [look_up(name) for name in names]
    assert whole["model_use"] == (max((p.model_use for p in parts), key=MODEL_USES.index) if parts else "unclear")
    assert whole["attribution"] == any(part.attribution for part in parts)
    assert whole["share_alike"] == any(part.share_alike for part in parts)
    assert [row["licence"] for row in whole["obstacles"]] == sorted({name for name in names if not permissive(name)})
    assert all(row["licence"] in whole["summary"] for row in whole["obstacles"])
    assert whole["summary"].endswith("not legal advice.")
    assert whole == combined(reversed(names))


def test_the_papers_own_mix_is_not_free():
    whole = combined(paper.table("corpus_sources")["licence"])
    assert whole["model_use"] == "restricted" and whole["attribution"] and whole["share_alike"]
    assert {row["licence"] for row in whole["obstacles"]} == {
        "CC BY-NC 4.0",
        "CC BY-NC-ND 4.0",
        "Common Crawl terms of use",
        "Llama 2 Community License",
    }


@pytest.mark.parametrize("licence", ["MIT (non-commercial use only)", "CC BY 4.0 (academic use only)"])
def test_a_remark_that_limits_the_use_is_not_free(licence):
    assert not permissive(licence)
