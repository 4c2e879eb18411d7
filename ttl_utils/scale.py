"""The rules of stage 01 inside datatrove (extra `scale`), for corpora that one machine does not finish.

`JudgeDocuments` is a datatrove filter around the same `Judge` that stage 01 calls, so a document fares the same there
and here. Put it between any of datatrove's readers and writers, and run it with any of its executors:

    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    params = load_params({"file": "params/160m.yaml"})
    steps = [
        JsonlReader("raw/", text_key="text"),
        JudgeDocuments(params, "pt-corpus-instruct", exclusion_writer=JsonlWriter("rejected/")),
        JsonlWriter("judged/"),
    ]
    LocalPipelineExecutor(steps, tasks=64, workers=16, logging_dir="logs/").run()
    SlurmPipelineExecutor(steps, tasks=4000, time="08:00:00", partition="cpu", logging_dir="logs/").run()

`RayPipelineExecutor` takes the same steps. Exact and near copies over such a corpus are found by datatrove's own
`ExactDedup*` and `MinhashDedup*` steps, run after this one. The files written then come back as a source
(`files: ["judged/*.jsonl.gz"]`, `columns: [text]`, `origin_column: origin`): stage 01 judges them again, which changes
nothing, and splits, tokenizes and counts as ever.
"""

from __future__ import annotations

from typing import Any

from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.judge import Judge
from ttl_utils.params import Params

try:
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter
except ImportError:
    raise TTLError('datatrove is not installed: pip install "ttl-utils[scale]"') from None


class JudgeDocuments(BaseFilter):
    """Keeps what stage 01 would keep, cleaned and masked; what is rejected has stage 01's reason.

    A document's `metadata` gets `source`, `kind`, `licence` and `side`; its `origin` is read from there.

    Raises:
        ParameterError: the parameters name no such source to learn from.
    """

    name = "TeenyTinyLlama: stage 01"

    def __init__(self, params: Params, source: str, exclusion_writer: Any = None):
        super().__init__(exclusion_writer)
        known = [item.name for item in params.data.active if item.use == "corpus"]
        if source not in known:
            raise ParameterError(f"source {source!r} is none of data.sources with use: corpus ({', '.join(known)})")
        self.data, self.seed, self.source = params.data, params.seed, source
        self.judge: Judge | None = None
        Judge(self.data, self.seed).check()

    def __getstate__(self) -> dict:
        # each task makes its own: compiled patterns and caches stay where they are
        return self.__dict__ | {"judge": None}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self.judge = self.judge or Judge(self.data, self.seed)
        batch = self.judge.judge(self.source, [{"text": doc.text, "origin": doc.metadata.get("origin")}])
        if not batch.rows:
            (reason,) = (key[2] for key in batch.counts if key[0] == "rejected")
            return False, reason
        (row,) = batch.rows
        doc.text = row["text"]
        doc.metadata |= {name: row[name] for name in ("source", "kind", "licence", "side")}
        return True
