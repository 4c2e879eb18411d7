"""Stage 01's rules inside datatrove: the same verdicts, whatever the number of tasks."""

from __future__ import annotations

import gzip
import json

import pytest

from ttl_utils.errors import ParameterError
from ttl_utils.judge import Judge
from ttl_utils.params import load_params

datatrove = pytest.importorskip("datatrove", reason='datatrove is not installed (pip install "ttl-utils[scale]")')

TEXTS = [
    f"A {n}ª estação da cidade fica perto do rio e recebe visitantes que vêm de longe para ver o museu e o parque."
    for n in range(40)
]
OTHERS = ["", "curto", "12 34 56 78 90 11 22 33 44 55 66", "fale com ana@exemplo.com.br " + TEXTS[0]]


def read(folder) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl.gz"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


@pytest.fixture
def params(tiny):
    source = {"name": "mine", "use": "corpus", "kind": "plain", "filter": "prose", "licence": "CC BY 4.0"}
    sources = [{**source, "files": ["raw/*.jsonl"], "columns": ["text"]}]
    return load_params({"file": tiny.file, "data": {"sources": sources}, "evaluation": {"downstream": []}})


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_verdicts_are_those_of_stage_01(params, tmp_path, tasks):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    from ttl_utils.scale import JudgeDocuments

    texts = TEXTS + OTHERS
    (tmp_path / "raw").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text, "id": str(n)}) for n, text in enumerate(texts) if n % 4 == number]
        (tmp_path / "raw" / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    steps = [
        JsonlReader(str(tmp_path / "raw")),
        JudgeDocuments(params, "mine", JsonlWriter(str(tmp_path / "rejected"))),
        JsonlWriter(str(tmp_path / "judged")),
    ]
    LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(tmp_path / "logs")).run()

    # datatrove's readers pass over empty texts by themselves
    judge, kept, reasons = Judge(params.data, params.seed), {}, []
    for text in filter(None, texts):
        batch = judge.judge("mine", [{"text": text}])
        kept |= {row["text"]: (row["side"], row["licence"]) for row in batch.rows}
        reasons += [key[2] for key in batch.counts if key[0] == "rejected"]
    found = {row["text"]: (row["metadata"]["side"], row["metadata"]["licence"]) for row in read(tmp_path / "judged")}
    assert found == kept and any("[e-mail]" in text for text in found)
    assert sorted(row["metadata"]["filter_reason"] for row in read(tmp_path / "rejected")) == sorted(reasons)
    assert len(reasons) == 2


def test_a_source_that_is_not_one_is_named(params):
    from ttl_utils.scale import JudgeDocuments

    with pytest.raises(ParameterError, match="'other' is none of data.sources .*mine"):
        JudgeDocuments(params, "other")
