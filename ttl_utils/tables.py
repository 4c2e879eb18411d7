"""Tables that notebooks show: parameters with the paper's values beside them, versions, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ttl_utils import paper
from ttl_utils.params import Params
from ttl_utils.provenance import code_version, machine, versions
from ttl_utils.run import Run

if TYPE_CHECKING:
    from IPython.display import HTML

_OPTIMIZER = ("learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon")
_TABLE_3 = ("tokens_per_step", *_OPTIMIZER, "weight_decay", "max_grad_norm")
# the keys whose values in our files for the published sizes are the paper's; a section alone means all of its keys
PUBLISHED = {
    "size",
    "model",
    *(f"tokenizer.{name}" for name in ("vocab_size", "train_samples", "efficiency_words")),
    *(f"pretraining.{name}" for name in (*_TABLE_3, "max_steps", "eval_steps", "save_steps", "gradient_checkpointing")),
    "pretraining.per_device_train_batch_size",
    *(f"evaluation.downstream_{name}" for name in ("epochs", "batch_size", "learning_rate", "weight_decay")),
    *(f"chat.{name}" for name in (*_TABLE_3, "user_open", "user_close", "num_train_epochs")),
    *(f"carbon.{name}" for name in ("country_iso_code", "carbon_intensity_g_per_kwh", "pue")),
}
# where our files hold a choice of ours, what the paper did
PAPER_DIFFERS = {
    "pretraining.decay_norms": "true, in effect",
    "pretraining.precision": "bf16, tf32",
    "pretraining.attention": "flash_attention_2",
    "pretraining.eval_tokens": "about 1% of the data",
    "tokenizer.append_eos": "false",
    "tokenizer.train_characters": "no limit known",
    "pretraining.isolate_documents": "false",
    "data.test_share": "about 1%",
    "chat.faithful": "true",
}


def _paper_value(key: str, size: str, values: dict[str, Any]) -> str:
    section = key.split(".")[0]
    # only the larger model was fine-tuned to chat
    if section == "chat" and size != "460m":
        return ""
    return _short(values[key]) if key in PUBLISHED or section in PUBLISHED else PAPER_DIFFERS.get(key, "")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def parameters(params: Params, *sections: str) -> HTML:
    """The resolved values of these sections, the paper's beside them, and where each of ours came from."""
    published = {size: paper.params_of(size).flat() for size in paper.SIZES}
    rows = []
    for key, value in params.flat().items():
        if key.split(".")[0] not in sections or key.startswith("data.filters."):
            continue
        row = {"parameter": key, "value": _short(value)}
        row |= {f"paper, {size}": _paper_value(key, size, values) for size, values in published.items()}
        rows.append({**row, "from": params.origins.get(key, params.origins.get(key.split(".")[0], ""))})
    return paper.style(pd.DataFrame(rows))


def environment(run: Run) -> str:
    """What the numbers of this notebook were made with, in a few lines."""
    code, found = code_version(), machine()
    commit = (code["commit"] or "no git checkout")[:12] + ("" if code["clean"] in (True, None) else ", with changes")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"run {run.name!r} in {run.folder.name}/; code {commit}; Python {found['python']}\n"
        f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB; {found['system']}\n{packages}"
    )


def is_paper_configuration(run: Run) -> str | None:
    """The published size whose configuration and data these are, or None: then nothing of ours compares with it."""
    data = run.stage("01_data")
    return paper.configuration(run.params.values.model_dump(), data.metrics()["sources"] if data.finished else ())[0]


def verdict_of(run: Run) -> str:
    """For figures that no tolerance judges: a run of another configuration is not comparable."""
    return "not comparable" if is_paper_configuration(run) is None else "for comparison"


def against_paper(run: Run, ours: dict[str, Any], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Our figures beside the published ones with a verdict; a verdict needs the paper's own configuration."""
    size = is_paper_configuration(run)
    return paper.compare(ours, size or run.params.size, size is not None, metrics, run.params.carbon.pue)


def conflicts(*topics: str) -> HTML:
    """Where the published material contradicts itself on these topics: both figures, smoothed over by nobody."""
    return paper.style(paper.contradictions(*topics))
