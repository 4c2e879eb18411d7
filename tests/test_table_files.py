"""Tables for people (Markdown, HTML, LaTeX) and for machines (CSV)."""

from __future__ import annotations

import io
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttl_utils import table_files
from ttl_utils.errors import TTLError

TABLE = pd.DataFrame(
    {
        "stage": ["a_b & 5% of x|y", "<s> *two*"],
        "energy (kWh)": [1234.567, 0.0001234567],
        "tokens": [162_417_408, 512],
        "year": [2019, 2024],
        "paper": [None, 2.5],
    }
)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]


def test_markdown_is_readable_and_aligned():
    head, sides, first, second = rows_of(table_files.markdown(TABLE))
    assert head == list(TABLE.columns)
    assert sides == [":---", "---:", "---:", "---:", "---:"]
    assert first == ["a_b & 5% of x\\|y", "1235", "162,417,408", "2019", "–"]
    assert second == ["\\<s> \\*two\\*", "0.000123", "512", "2024", "2.50"]


def test_portuguese_swaps_comma_and_dot_in_numbers_alone():
    frame = pd.DataFrame({"n": [1_234_567.5, 0.25, math.nan], "text": ["1.5, as printed", "", ""]})
    rows = rows_of(table_files.markdown(frame, "pt"))
    assert [row[0] for row in rows[2:]] == ["1.234.568", "0,25", "–"]
    assert rows[2][1] == "1.5, as printed"


def test_a_column_of_whole_numbers_with_a_gap_has_no_decimals():
    assert [row[0] for row in rows_of(table_files.markdown(pd.DataFrame({"n": [3.0, None, 12.0]})))[2:]] == [
        "3",
        "–",
        "12",
    ]


def test_text_beside_numbers_stands_to_the_left():
    frame = pd.DataFrame({"value": [1, "cosine"], "flag": [True, False]})
    assert rows_of(table_files.markdown(frame))[1:] == [[":---", ":---"], ["1", "True"], ["cosine", "False"]]


def test_html_escapes_and_aligns():
    text = table_files.html(TABLE)
    assert "a_b &amp; 5% of x|y" in text and "&lt;s&gt; *two*" in text and "<s>" not in text
    assert '<td style="text-align:right">162,417,408</td>' in text


def test_latex_is_booktabs_with_everything_escaped(tmp_path):
    text = table_files.latex(TABLE, "100% of it_all", "tab:x")
    assert r"\caption{100\% of it\_all}" in text and r"\begin{tabular}{lrrrr}" in text
    assert r"a\_b \& 5\% of x\textbar{}y & 1235 & 162,417,408 & 2019 & \textendash{} \\" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


def test_latex_keeps_a_minus_and_the_hyphens_of_a_command():
    text = table_files.latex(pd.DataFrame({"n": [-1.5, 2.0], "how": ["`ttl run --to 03`", "-v"]}), "x", "tab:x")
    assert r"$-$1.50 & \texttt{ttl run -{}-to 03} \\" in text and "2.00 & -v" in text
    assert r"a \textasciigrave{} alone" in table_files.latex(pd.DataFrame({"how": ["a ` alone"]}), "x", "tab:x")


def test_saved_in_three_forms_and_the_csv_reads_back(tmp_path):
    table_files.save(tmp_path / "tables", "energy", TABLE, "Energy", "pt")
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["energy.csv", "energy.md", "energy.tex"]
    read = pd.read_csv(tmp_path / "tables" / "energy.csv")
    pd.testing.assert_frame_equal(read, TABLE, check_dtype=False)
    assert (tmp_path / "tables" / "energy.md").read_text().startswith("Energia\n\n| etapa | energia (kWh) |")
    assert r"\label{tab:energy}" in (tmp_path / "tables" / "energy.tex").read_text()


def test_the_csv_is_the_data_and_its_names_do_not_move_with_it(tmp_path):
    for kwh in (1.5, 2e-5):
        frame = pd.DataFrame({"energy_kwh": [kwh], "intensity_g_per_kwh": [1000 * 0.1 * 3 * 1.218256666666667]})
        table_files.save(tmp_path, "x", frame, "Energy")
        assert (tmp_path / "x.csv").read_text() == f"energy_kwh,intensity_g_per_kwh\n{kwh:g},365.477\n"
        assert f"energy ({'kWh' if kwh > 1 else 'mWh'})" in (tmp_path / "x.md").read_text()


def test_a_page_needs_no_other_file(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"picture")
    page = table_files.html_page("A < B", "# Head\n\n![curve](<a b.png>)\n\n" + table_files.markdown(TABLE), tmp_path)
    assert "<title>A &lt; B</title>" in page and "<h1>Head</h1>" in page and "<table>" in page
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in page and "a b.png" not in page and "a%20b" not in page


def test_a_page_with_an_image_that_is_not_there_says_which(tmp_path):
    with pytest.raises(TTLError, match="gone.png"):
        table_files.html_page("x", "![curve](gone.png)", tmp_path)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.floats(allow_nan=True, allow_infinity=True))
def test_any_text_and_number_keeps_the_tables_shape(texts, number):
    frame = pd.DataFrame({"text": texts, "number": number})
    lines = table_files.latex(frame, "x", "tab:x").splitlines()
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    assert len(body) == len(texts)
    assert all(len(line.replace("\\&", "").split(" & ")) == 2 and line.endswith("\\\\") for line in body)
    assert table_files.html(frame).count("<tr>") == len(texts) + 1


@given(st.floats(min_value=-1e12, max_value=1e12))
def test_shown_numbers_are_near_the_number_in_both_languages(value):
    for language, strip in (
        ("en", lambda text: text.replace(",", "")),
        ("pt", lambda text: text.replace(".", "").replace(",", ".")),
    ):
        shown = rows_of(table_files.markdown(pd.DataFrame({"n": [value, 0.5]}), language))[2][0]
        assert float(strip(shown)) == pytest.approx(value, rel=6e-3, abs=1e-300)
    text = pd.DataFrame({"n": [value]}).to_csv(index=False)
    assert pd.read_csv(io.StringIO(text))["n"][0] == pytest.approx(value, rel=1e-15)
