"""README.md of a published model: what it is, what it was made of and what was measured (text: `model_card.md`).

Each figure comes from the run's files; what was not measured says so.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import safe_open

from ttl_utils import licences, tables
from ttl_utils.chat_answers import measures_table
from ttl_utils.files import read_json
from ttl_utils.hub import mirrored, weight_files
from ttl_utils.ledger import PARTS, read_ledger, stage_totals
from ttl_utils.memorisation import sentence
from ttl_utils.run import STAGES
from ttl_utils.score_tables import scores
from ttl_utils.table_files import markdown

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from ttl_utils.run import Run, Stage

# the hub's names for licences: ours in small letters with hyphens
HUB_LICENCES = re.compile(r"cc-by(-nc)?(-sa|-nd)?-[234]\.0|cc0-1\.0|odc-by|apache-2\.0|mit|bsd-[23]-clause|mpl-2\.0")
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TRAINED = ("steps", "tokens", "epochs", "tokens_per_second", "duration_s", "device", "precision", "attention")
_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
_WHEN = ("before", "after")
_NOT_COMPARABLE = " has none of the paper's configurations: the results are **not comparable with the paper**."
_SPENT = ("energy_kwh", "measured_kwh", "modelled_kwh", "emissions_kg", "duration_s")


def licence_of(run: Run, name: str) -> dict[str, Any]:
    """The hub's `license`, the licences of the texts that the model learned from, and what they allow together.

    One licence alone is passed on; several are `other`. What others made (a model, tokens) has terms not known here.
    """
    params, found = run.params, set()
    made_by_others = {"base model": params.chat.base_model if name == "chat" else None}
    if not made_by_others["base model"]:
        made_by_others |= {"initial model": params.pretraining.init_from}
        made_by_others |= {"tokens": params.tokenizer.tokens and params.tokenizer.tokens.dataset}
        rows = run.need("02_tokenizer").metrics()["tokens_by_licence"]
        found |= {row["licence"] for row in rows if row["tokens"]}
    found |= {f"terms of the {what} {_short(other)}" for what, other in made_by_others.items() if other}
    if name == "chat":
        reports = [report for report in run.need("01_data").metrics()["sources"] if report["use"] == "chat"]
        found |= {
            licence for report in reports if report["documents_kept"] for licence in report["licence_characters_in"]
        }
    names = sorted(found)
    slug = re.sub(r"\s+", "-", names[0].lower()) if len(names) == 1 else ""
    known = slug if HUB_LICENCES.fullmatch(slug) else "other"
    return {"license": known, "licences": names, "allowed": licences.combined(names)["summary"]}


def licence_text(run: Run, name: str) -> str:
    """Each licence and what they allow together, in Markdown."""
    about = licence_of(run, name)
    rows = [(one, licences.look_up(one).model_use, licences.look_up(one).note) for one in about["licences"]]
    table = markdown(pd.DataFrame(rows, columns=["licence of texts", "use of a model", "note"]))
    named = [f"{source.name} ({source.dataset or source.package or 'files'})" for source in _sources(run, name)]
    return f"{about['allowed']}\n\n{table}\n\nSources: {', '.join(named)}."


def _short(name: str) -> str:
    """A hub id as it is, a folder without the folders of this machine above it, a run's by run and stage."""
    parts = Path(name).parts
    stage = next((place for place, part in enumerate(parts) if place and part in STAGES), None)
    return name if hub_id(name) else Path(name).name if stage is None else "/".join(parts[stage - 1 : stage + 1])


def hub_id(name: str) -> bool:
    return not Path(name).expanduser().exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _sources(run: Run, name: str) -> list[Any]:
    """What the model learned from, tokens and models of others aside."""
    own = not (run.params.tokenizer.tokens or (name == "chat" and run.params.chat.base_model))
    uses = ["corpus"] * own + ["chat"] * (name == "chat")
    return [source for source in run.params.data.active if source.use in uses]


def _tokens(run: Run, name: str) -> str | None:
    """The tokenized set of others that the model learned from."""
    tokens = None if name == "chat" and run.params.chat.base_model else run.params.tokenizer.tokens
    return tokens and tokens.dataset


def model_card(run: Run, name: str, stage: Stage, repository: str | None, memorised: dict, names: list[str]) -> str:
    """The card with its front matter; `repository` as OWNER/NAME where it is known, `names` of the files beside it."""
    config, figures, manifest = read_json(stage.folder / "model" / "config.json"), stage.metrics(), stage.manifest()
    machine = read_json(stage.folder.parent / "run.json")["machine"]
    hardware = f"{figures.get('device', 'device not recorded')}; {machine['processor']}, {machine['cores']} cores"
    spent = _spent(stage)
    rows, results = (_base_results if name == "base" else _chat_results)(run)
    gguf = next((file for file in names if file.endswith("f16.gguf")), None)
    data = _card_data(run, name, repository, spent, hardware, rows, gguf)
    chat = run.params.chat
    sampling = chat if name == "chat" else run.params.evaluation.generation or chat
    settings = manifest["identity"]["pretraining" if name == "base" else "chat"]
    size = None if name == "chat" and chat.base_model else tables.is_paper_configuration(run)
    shown = {key: config[key] for key in (*_SHAPE, "max_position_embeddings", "vocab_size")}
    shown |= {key: value for key, value in settings.items() if value is not None}
    shown |= {key: figures[key] for key in _TRAINED if key in figures}
    made = dict(manifest["code"] or {"commit": "unknown"}) | {"finished": manifest["finished"]}
    made["SHA-256 of the model's files"] = manifest["outputs"]["model"]["fingerprint"]
    made["machine"] = f"{machine['system']}; {hardware}; {machine['memory_gib']} GiB of memory"
    values = {
        "title": data.model_name,
        "kind": "language model" if name == "base" else "chat model",
        "parameters": f"{_parameters(stage.folder / 'model'):,}",
        "context": f"{config['max_position_embeddings']:,}",
        "comparable": ("It" if name == "base" else "Its base model")
        + (f" has the configuration of the paper's {size}." if size else _NOT_COMPARABLE),
        "place": repository or ".",
        "data": _data(run, name),
        "training": _table(shown),
        "results": results,
        "memorised": sentence(memorised),
        "energy": _energy(run, name, spent),
        "language": run.params.data.language,
        "licence": licence_text(run, name),
        "provenance": _table(made | manifest["versions"]),
        **{key: getattr(sampling, key) for key in _SAMPLING},
        **_use(run, name, gguf),
    }
    text = files("ttl_utils").joinpath("model_card.md").read_text(encoding="utf-8")
    return f"---\n{data.to_yaml()}\n---\n{Template(text).substitute(values)}"


def _spent(stage: Stage) -> dict[str, Any]:
    """What making the stage took: not what an earlier folder of it did, nor what was asked of the finished one."""
    rows = read_ledger(stage.folder.parent / "energy.jsonl")
    begun = {row["session"]: row["time"] for row in reversed(rows)}
    # each session writes a row as it begins
    first, last = (datetime.fromisoformat(time) for time in (stage.begun(), stage.manifest()["finished"]))
    kept = [
        row
        for row in rows
        if row["stage"] != stage.name or first <= datetime.fromisoformat(begun[row["session"]]) <= last
    ]
    totals = stage_totals(kept)
    spent = next(iter(totals[totals.stage == stage.name].to_dict("records")), {})
    if spent:
        spent["methods"] = "; ".join(f"{part}: {spent[f'{part}_method']}" for part in PARTS)
        spent["grid"] = f"{spent['country_iso_code']}, {spent['intensity_g_per_kwh']:.1f} g/kWh, as configured"
    return spent


def _parameters(folder: Path) -> int:
    count = 0
    for file in weight_files(folder, f"{folder}"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _use(run: Run, name: str, gguf: str | None) -> dict[str, str]:
    """A first question to the model, for transformers and, where there is a file, for llama.cpp."""
    prompt = run.params.chat.prompts[-1] if name == "chat" else run.params.pretraining.prompts[0]
    text, ask = json.dumps(prompt, ensure_ascii=False), 'inputs = tokenizer({}, return_tensors="pt")'
    if name == "chat":
        ask = 'messages = [{{"role": "user", "content": {}}}]\n'
        ask += 'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)'
    # llama-cli alone no longer continues a text
    program, flags = ("llama-cli", "--jinja -st") if name == "chat" else ("llama-completion", "-no-cnv")
    command = (
        f"With llama.cpp (`f16`; `q8_0` and `q4_0` are smaller, and a little worse):\n\n"
        f"```sh\n{program} -m {gguf} {flags} -p {shlex.quote(prompt)}\n```"
    )
    return {"ask": ask.format(text), "command": command if gguf else "No GGUF file was made, for llama.cpp."}


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:,.6g}" if isinstance(value, float) else str(value) if isinstance(value, bool) else f"{value:,}"


def _table(values: dict[str, Any]) -> str:
    rows = [
        (key.replace("_", " "), value if isinstance(value, str) else _number(value)) for key, value in values.items()
    ]
    return markdown(pd.DataFrame(rows, columns=["what", "value"]))


def _chat_results(run: Run) -> tuple[list[tuple], str]:
    """Rows (task, data set, split, metric, value) for the hub, and what there is to read."""
    metrics = run.stage("05_chat").metrics()
    losses = {f"validation_loss_{when}": metrics[f"validation_loss_{when}"] for when in _WHEN}
    found = math.exp(losses["validation_loss_after"])
    text = "Answers of held-out conversations, before and after fine-tuning (loss in nats a token):\n\n"
    rows = [("held-out conversations", f"{run.name}-held-out-conversations", "test", "perplexity", found)]
    text += _table(losses | {"perplexity": found})
    if "answers_after" not in metrics:
        # a stage that older code made
        return rows, text
    answered = f"{len(run.params.chat.prompts)} prompts, {run.params.chat.samples} answers to each"
    return rows, f"{text}\n\nThe form of its answers ({answered}):\n\n{markdown(measures_table(metrics))}"


def _base_results(run: Run) -> tuple[list[tuple], str]:
    stage = run.stage("04_evaluation")
    scored = stage.metrics() if stage.finished else {}
    # stage 04 may have judged another model
    scored = scored if scored.get("origin") == "this run" else {}
    plain = {key: scored.get(key) for key in ("perplexity", "bits_per_byte")}
    rows = [("held-out text", f"{run.name}-held-out-text", "test", key, found) for key, found in plain.items() if found]
    rows += [
        (key, row["dataset"] or row["task"], row["split"], row["metric"], row["value"])
        for key, row in scored.get("harness", {}).items()
        if row["status"] == "done"
    ]
    table = scores(scored) if scored else ()
    said = f"in percent, beside what a constant answer (or chance) scores.\n\n{markdown(table)}" if len(table) else ""
    return rows, f"Of held-out text:\n\n{_table(plain)}\n\nBenchmarks: {said or 'not measured.'}"


def _data(run: Run, name: str) -> str:
    figures, filters = run.need("01_data").metrics(), {source.name: source.filter for source in _sources(run, name)}
    reports = [report for report in figures["sources"] if report["source"] in filters]
    columns = ["source", "use", "kind", "licence", "documents_in", "documents_kept", "characters_kept", "version"]
    table = pd.DataFrame(reports, columns=columns).dropna(axis="columns", how="all")
    rejected = sum(sum(report["rejected"].values()) for report in reports)
    said = [
        markdown(table.rename(columns=lambda key: key.replace("_", " "))),
        f"Filters ({', '.join(sorted(set(filters.values())))}) rejected {rejected:,} documents; the reasons, what was "
        "masked of personal data, and the lengths stand in `data_sheet.md`. Held out from training: "
        f"{figures['held_out_texts']:,} texts.",
    ]
    if not filters:
        said = []
    if name == "chat" and run.params.chat.base_model:
        said.append(f"The base model, {_short(run.params.chat.base_model)}, learned from other texts before.")
    local = [report["source"] for report in reports if report["from_mirror"]]
    if tokens := _tokens(run, name):
        said.append(f"Pretrained on the tokens of {tokens}.")
        local += [tokens] * bool(mirrored(tokens))
    if local:
        said.append(f"Read from a local mirror, which may not hold the published set: {', '.join(local)}.")
    return "\n\n".join(said)


def _energy(run: Run, name: str, spent: dict) -> str:
    if not spent:
        return "Not measured."
    what = "Pretraining alone" if name == "base" else "Fine-tuning alone, without the base model's pretraining"
    report = run.stage("06_carbon_report")
    whole = {f"{key} of the whole run": report.metrics()[key] if report.finished else None for key in _SPENT[::3]}
    table = _table({key: spent[key] for key in _SPENT} | whole)
    return f"{what}. Measured or modelled: {spent['methods']}. Grid: {spent['grid']}.\n\n{table}"


def _card_data(
    run: Run, name: str, repository: str | None, spent: dict, hardware: str, results: list[tuple], gguf: str | None
) -> ModelCardData:
    """The hub's fields, with what was measured alone."""
    from huggingface_hub import EvalResult, ModelCardData

    licence, more = licence_of(run, name)["license"], {}
    if licence == "other":
        more = {"license_name": "terms-of-the-training-texts", "license_link": "LICENSE.md"}
    if spent:
        more["co2_eq_emissions"] = {
            # in grams, as the hub wants them
            "emissions": round(1000 * spent["emissions_kg"], 6),
            "source": f"CodeCarbon ({spent['methods']})",
            "training_type": "pre-training" if name == "base" else "fine-tuning",
            "geographical_location": spent["grid"],
            "hardware_used": hardware,
        }
    # a mirror may hold something else under the same name
    local = {report["source"] for report in run.need("01_data").metrics()["sources"] if report["from_mirror"]}
    datasets = [source.dataset for source in _sources(run, name) if source.name not in local]
    if (tokens := _tokens(run, name)) and not mirrored(tokens):
        datasets.append(tokens)
    base = run.params.chat.base_model or (repository or "").removesuffix("-Chat")
    if name == "chat" and hub_id(base):
        more["base_model"] = base
    return ModelCardData(
        language=run.params.data.language,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", *["gguf"] * bool(gguf), *["conversational"] * (name == "chat")],
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        model_name=(repository or f"{run.name}-{name}").split("/")[-1],
        eval_results=[
            EvalResult("text-generation", place, task, metric, round(value, 6), dataset_split=split)
            for task, place, split, metric, value in results
        ]
        or None,
        **more,
    )
