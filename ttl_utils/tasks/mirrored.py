"""An lm-eval task whose data come from the mirror or the hub, and are looked at before a question is asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from lm_eval.api.task import ConfigurableTask

from ttl_utils.errors import SourceError, TTLError
from ttl_utils.hub import PARQUET_BRANCH, cache_of, check, mirrored

HERE = Path(__file__).parent

# of lm-eval's own task files, what ours say under `metadata`: what the prompt reads (a label: which values it can
# have), what is scored, and how this differs from what was published
OPTIONAL = "optional"
ENGLISH = "the words of the prompt around the question (Question, Answer) are English, as in both harnesses"
PACKAGED = {
    "arc_pt": {
        "columns": dict.fromkeys(["instruction", *(f"option_{x}" for x in "abcd")])
        | {"option_e": OPTIONAL, "answer": list("ABCDE")},
        "scoring": "text of the choice, per character",
        "differs": [
            ENGLISH,
            "lm-eval takes brackets out of questions and choices; the fork that the authors ran does not",
            "which examples are drawn follows our seed",
        ],
    },
    "hellaswag_pt": {
        "columns": dict.fromkeys(["activity_label", "ctx_a", "ctx_b", "endings"]) | {"label": list("0123")},
        "scoring": "text of the choice, per character",
        "differs": [],
    },
    "m_mmlu_pt": {
        "columns": dict.fromkeys(["instruction", *(f"option_{x}" for x in "abcd")]) | {"answer": list("ABCD")},
        "scoring": "letter",
        "differs": [
            ENGLISH,
            "the examples are the first of the hub's train split for every question; the English leaderboard takes "
            "those of the question's own subject",
        ],
    },
    "truthfulqa_pt_mc2": {
        "columns": dict.fromkeys(["question", "mc1_targets_choices", "mc2_targets_choices", "mc2_targets_labels"]),
        "scoring": "probability of all true answers together",
        "differs": ["zero-shot, but six worked examples in English stand in the prompt, as in the fork"],
    },
}


class Unreachable(SourceError):
    """Data that cannot be had now; `task` is as far as it came."""

    def __init__(self, message: str, task: MirroredTask):
        super().__init__(message)
        self.task = task


def data_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises when the hub, or a data set on it, is out of reach (offline, gated, absent)."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # the first base is the root of the http library's errors, which a time-out in a download raises as is
    http = HfHubHTTPError.__bases__[0]
    found = (DatasetNotFoundError, DataFilesNotFoundError, EmptyDatasetError)
    return (ConnectionError, http, LocalEntryNotFoundError, *found)


class MirroredTask(ConfigurableTask):
    """`from_mirror`, `revision` (the hub's commit) and `notes` (the file's `metadata`) beside what lm-eval gives."""

    def __init__(self, config: dict):
        self.revision: str | None = None
        self.from_mirror, self.seed = False, 0
        self.written: dict[tuple[str, int], Any] = {}
        # `class` named this class, and is no key of a task
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    @property
    def notes(self) -> dict:
        return PACKAGED.get(self.config.task) or self.config.metadata or {}

    @property
    def splits(self) -> dict[str, str]:
        """The split that is evaluated, and the one that worked examples come from."""
        task = self.config
        evaluated = task.test_split or task.validation_split
        return {
            "evaluated": evaluated,
            "examples": self.fewshot_cfg.split or task.training_split or task.validation_split or evaluated,
        }

    def download(self, dataset_kwargs: dict | None = None, **_: Any) -> None:
        """Load the data; raises Unreachable, or TTLError where they are not what the task's file expects."""
        if self.config.custom_dataset:
            return super().download(dataset_kwargs)
        dataset, options = self.config.dataset_path, dict(dataset_kwargs or {})
        folder = mirrored(dataset)
        self.from_mirror = folder is not None
        if dataset == "json" and not options:
            options = {"data_files": {self.config.test_split: str(HERE / f"{self.config.task}.jsonl")}}
        options.pop("trust_remote_code", None)
        if folder:
            options["cache_dir"] = cache_of(folder)
        try:
            # asked once: `datasets` goes on trying for half a minute. Declared offline, it looks into its cache
            if not constants.HF_HUB_OFFLINE and "/" in dataset and not Path(dataset).exists():
                check(dataset)
            self.dataset = self._load(str(folder or dataset), options)
        except (*data_errors(), SourceError) as error:
            raise Unreachable(self._why(error), self) from None
        self._look()
        # hf://datasets/<owner>/<name>@<commit>/<file>
        sums = self.dataset[self.splits["evaluated"]].info.download_checksums or {}
        self.revision = next((path.split("@")[1].split("/")[0] for path in sums if path.startswith("hf://")), None)

    def _why(self, error: Exception) -> str:
        if isinstance(error, SourceError):
            return str(error)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return (
            f"data set {self.config.dataset_path!r} cannot be had ({said}): connect to the network, or set TTL_MIRROR "
            "to a folder that holds it as <owner>/<name>"
        )

    def _load(self, path: str, options: dict) -> Any:
        config = self.config.dataset_name
        try:
            return datasets.load_dataset(path, config, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # the hub's own copy as Parquet, where a configuration is a folder
            return datasets.load_dataset(path, data_dir=config, revision=PARQUET_BRANCH)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            said = " ".join(str(error.__cause__ or error).split())
            raise TTLError(f"data set {path!r} does not open: {said}") from error

    def _look(self) -> None:
        """Raises TTLError for a split, column or label that the task cannot work with."""
        where = f"data set {self.config.dataset_path!r}"
        for split in dict.fromkeys(self.splits.values()):
            if split not in self.dataset:
                raise TTLError(f"{where} has no split {split!r}: it has {', '.join(self.dataset)}")
            rows = self.dataset[split]
            annulled = rows["nullified"][:] if "nullified" in rows.column_names else [False] * len(rows)
            for column, allowed in (self.notes.get("columns") or {}).items():
                # where another split has the column, `datasets` fills it with nothing
                held = column in rows.column_names and rows.data.column(column).null_count < len(rows)
                if column not in rows.column_names or not (held or allowed == OPTIONAL):
                    known = ", ".join(rows.column_names)
                    raise TTLError(f"{where}, split {split!r}, has no column {column!r} with values: it has {known}")
                for row, value in enumerate(rows[column][:] if isinstance(allowed, list) else []):
                    if value not in allowed and not annulled[row]:
                        raise TTLError(
                            f"{where}, split {split!r}, row {row}: column {column!r} holds {value!r}, which is none "
                            f"of {', '.join(map(repr, allowed))}"
                        )

    # lm-eval compiles a template at every use, for every worked example before every question anew: what an example
    # reads is kept (a template is given for those only, and the sampler holds their rows for good)
    def doc_to_text(self, doc: dict, doc_to_text: Any = None) -> Any:
        return self._once("text", super().doc_to_text, doc, doc_to_text)

    def doc_to_target(self, doc: dict, doc_to_target: Any = None) -> Any:
        return self._once("target", super().doc_to_target, doc, doc_to_target)

    def doc_to_choice(self, doc: dict, doc_to_choice: Any = None) -> Any:
        return self._once("choice", super().doc_to_choice, doc, doc_to_choice)

    def _once(self, what: str, write: Any, doc: dict, template: Any) -> Any:
        if template is None:
            return write(doc)
        key = what, id(doc)
        if key not in self.written:
            self.written[key] = write(doc, template)
        return self.written[key]

    def content(self) -> str:
        """A hash of the rows that are read: the same for the same data, wherever they lie."""
        found = hashlib.sha256()
        for split in dict.fromkeys(self.splits.values()):
            for row in self.dataset[split].data.table.to_pylist():
                found.update(json.dumps(row, sort_keys=True, default=str).encode())
        return found.hexdigest()

    def build_all_requests(self, **options: Any) -> None:
        # the same examples for every model, however often the task has run before
        self.set_fewshot_seed(self.seed)
        super().build_all_requests(**options)
