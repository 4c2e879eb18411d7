"""Parameters: one schema for every size, loaded from `params/<size>.yaml` and overridden by a notebook's cell."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ttl_utils.errors import ParameterError

SECTIONS = ("data", "tokenizer", "model", "pretraining", "evaluation", "chat", "carbon")
PARAMETER_NAMES = ("size", "file", "run", "base", "seed", *SECTIONS)

# a key that may change while a stage is under way or finished: it does not change the stage's result
FREE = {"identity": False}
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def free(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra=FREE, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def identity(self) -> dict:
        """The keys that decide the stage's result, as plain data."""
        kept = {}
        for name, field in type(self).model_fields.items():
            if (field.json_schema_extra or {}).get("identity", True):
                kept[name] = _plain(getattr(self, name))
        return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class Filter(Section):
    """Thresholds of the basic cleaning for one kind of text."""

    min_words: int
    max_words: Positive
    min_mean_word_length: float
    max_mean_word_length: float
    min_letter_words: Share
    max_symbols_per_word: float
    min_stop_words: int


class Source(Section):
    """One place where text comes from: a wheel of the package index, or a data set of the hub."""

    name: str
    use: Literal["corpus", "chat", "downstream"]
    kind: Literal["plain", "instruction"]
    filter: str
    licence: str
    limit: Positive | None = None
    # a wheel, read as a data archive
    package: str | None = None
    version: str | None = None
    sha256: str | None = None
    reader: str | None = None
    # a data set of the hub
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str | None = None
    origin_column: str | None = None
    instruction_pattern: str | None = None

    @model_validator(mode="after")
    def one_origin(self) -> Source:
        wheel, hub = (
            (self.package, self.version, self.sha256, self.reader),
            (self.dataset, self.split, self.column),
        )
        if not (all(wheel) and not any(hub)) and not (all(hub) and not any(wheel)):
            raise ValueError(
                f"source {self.name!r} needs either package, version, sha256 and reader (a wheel) "
                "or dataset, split and column (the hub)"
            )
        return self


class Data(Section):
    sources: list[Source] = Field(min_length=1)
    filters: dict[str, Filter]
    test_share: Share
    passage_sentences: Positive
    instruction_copies: Positive
    shard_mb: Positive = free()

    @model_validator(mode="after")
    def known_filters(self) -> Data:
        for source in self.sources:
            if source.filter not in self.filters:
                known = ", ".join(self.filters)
                raise ValueError(f"source {source.name!r} names filter {source.filter!r}; known filters: {known}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        return self


class Tokenizer(Section):
    vocab_size: Annotated[int, Field(ge=300, le=65_000)]
    train_samples: Positive
    character_coverage: Share
    max_sentence_length: Positive
    split_digits: bool
    append_eos: bool
    efficiency_words: Positive
    parity_documents: Positive | None = free()
    shard_tokens: Positive = free()


class Model(Section):
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Annotated[int, Field(ge=8)]
    rope_theta: float
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool

    @model_validator(mode="after")
    def heads_divide(self) -> Model:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("hidden_size / num_attention_heads must be even: rotary embeddings turn pairs")
        return self


class Optimisation(Section):
    """What the training loop needs, for pretraining and for chat alike."""

    tokens_per_step: Positive
    per_device_train_batch_size: Positive = free()
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["cosine", "linear", "constant"]
    warmup_steps: Annotated[int, Field(ge=0)]
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: float
    weight_decay: Annotated[float, Field(ge=0)]
    decay_norms: bool
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    device: Literal["auto", "cpu", "cuda", "mps"] = free()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = free()
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = free()
    compile: bool = free()
    logging_steps: Positive = free()
    save_steps: Positive = free()
    resumable_checkpoints: Positive = free()


class Pretraining(Optimisation):
    max_steps: Positive
    eval_steps: Positive = free()
    eval_tokens: Positive | None = free()
    prompts: list[str] = free()
    max_new_tokens: Positive = free()


class Task(Section):
    name: str
    num_fewshot: Annotated[int, Field(ge=0)]


class Downstream(Section):
    """A text classification set: either a `use: downstream` source of stage 01, or a set of the hub."""

    name: str
    source: str | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    text: str
    label: str
    max_length: Positive

    @model_validator(mode="after")
    def one_origin(self) -> Downstream:
        if (self.source is None) == (self.dataset is None):
            raise ValueError(f"downstream {self.name!r} needs either source (of stage 01) or dataset (of the hub)")
        if self.dataset is not None and not (self.train_split and self.test_split):
            raise ValueError(f"downstream {self.name!r} needs train_split and test_split")
        return self


class Evaluation(Section):
    harness: list[Task]
    harness_limit: Positive | None
    downstream: list[Downstream]
    downstream_epochs: Positive
    downstream_batch_size: Positive
    downstream_learning_rate: Annotated[float, Field(gt=0)]
    downstream_weight_decay: Annotated[float, Field(ge=0)]
    batch_size: Positive = free()


class Chat(Optimisation):
    user_open: str
    user_close: str
    num_train_epochs: Positive
    prompts: list[str]
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0)]
    top_k: Positive
    top_p: Share
    repetition_penalty: Annotated[float, Field(gt=0)]


class Carbon(Section):
    country_iso_code: Annotated[str, Field(min_length=3, max_length=3)]
    carbon_intensity_g_per_kwh: Annotated[float, Field(gt=0)] | None
    pue: Annotated[float, Field(ge=1)]
    measure_power_s: Annotated[float, Field(gt=0)] = free()


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str
    size: str
    run: str | None
    base: str | None
    seed: int
    data: Data
    tokenizer: Tokenizer
    model: Model
    pretraining: Pretraining
    evaluation: Evaluation
    chat: Chat
    carbon: Carbon

    @model_validator(mode="after")
    def sections_fit(self) -> Parameters:
        context = self.model.max_position_embeddings
        for name in ("pretraining", "chat"):
            section = getattr(self, name)
            micro = section.per_device_train_batch_size * context
            if section.tokens_per_step % micro:
                raise ValueError(
                    f"{name}.tokens_per_step {section.tokens_per_step} is not a multiple of "
                    f"{name}.per_device_train_batch_size x model.max_position_embeddings "
                    f"({section.per_device_train_batch_size} x {context} = {micro})"
                )
        for item in self.evaluation.downstream:
            if item.max_length > context:
                raise ValueError(
                    f"evaluation.downstream {item.name!r}: max_length {item.max_length} is longer than "
                    f"model.max_position_embeddings {context}"
                )
            if item.source and item.source not in [s.name for s in self.data.sources if s.use == "downstream"]:
                raise ValueError(
                    f"evaluation.downstream {item.name!r}: no source of data.sources with use: downstream "
                    f"is named {item.source!r}"
                )
        # the size is the folder's name where no run is named
        for name in ("size", "run", "base"):
            value = getattr(self, name)
            if value is not None and (not value or Path(value).name != value or value.startswith(".")):
                raise ValueError(f"{name} {value!r} is not a plain folder name")
        return self


@dataclass(frozen=True)
class Params:
    """Validated parameters, and where each value came from."""

    values: Parameters
    origins: dict[str, str]
    notes: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "values"), name)

    @property
    def run_name(self) -> str:
        return self.values.run or self.values.size

    def flat(self) -> dict[str, Any]:
        """Every leaf by its dotted name; a list is one leaf."""
        return dict(_leaves(self.values.model_dump()))


def _leaves(tree: Mapping, prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def project_root() -> Path | None:
    """The checkout this package runs from, or None where it is installed alone."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "params").is_dir() and (root / "notebooks").is_dir() else None


def bundled(folder: str) -> Path:
    """`params` or `notebooks`: the checkout's, or the copy that the installed package carries."""
    root = project_root()
    return root / folder if root else Path(str(resources.files("ttl_utils"))) / "bundle" / folder


def sizes() -> list[str]:
    return sorted(path.stem for path in bundled("params").glob("*.yaml"))


def _find(file: str) -> Path:
    path = Path(file)
    candidates = [path] if path.is_absolute() else [Path.cwd() / path, bundled("params").parent / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise ParameterError(f"file: no parameter file {file!r} (looked for {places}). Sizes: {', '.join(sizes())}")


def read_file(file: str) -> dict:
    path = _find(file)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParameterError(f"{file}: expected keys and values, found {type(values).__name__}")
    for name in SECTIONS:
        if name in values and not isinstance(values[name], dict):
            raise ParameterError(f"{name}: expected keys and values in {file}, found {values[name]!r}")
    return values


def load_params(given: Mapping[str, Any]) -> Params:
    """Start from the named file (or the size's), apply what was given, validate.

    Args:
        given: values by parameter name; a section holds only the keys to override. A notebook passes `globals()`.

    Raises:
        ParameterError: naming the key, where it stands, and the nearest valid name.
    """
    notebook = "__builtins__" in given
    if notebook:
        _check_injected(given.get("In", ()))
    else:
        for name in given:
            if name not in PARAMETER_NAMES:
                raise ParameterError(_unknown(name, PARAMETER_NAMES, "among the parameters"))
    overrides = {name: given[name] for name in PARAMETER_NAMES if given.get(name) not in (None, {})}
    if "size" in overrides and not isinstance(overrides["size"], str):
        raise ParameterError(f"size: {overrides['size']!r} is not a text")
    file = overrides.get("file") or f"params/{overrides.get('size', 'nano')}.yaml"
    if not isinstance(file, str):
        raise ParameterError(f"file: {file!r} is not a path")
    if "file" not in overrides and not (bundled("params").parent / file).is_file():
        close = difflib.get_close_matches(overrides["size"], sizes(), 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ParameterError(f"size: there is no size {overrides['size']!r}.{hint} Sizes: {', '.join(sizes())}")
    original = read_file(file)
    values = copy.deepcopy(original)
    if "size" in overrides and overrides["size"] != values.get("size"):
        raise ParameterError(
            f"size: {overrides['size']!r} was asked for, but file {file!r} is of size {values.get('size')!r}: "
            f"set size to {values.get('size')!r} too, or leave file out"
        )
    origins = dict.fromkeys((key for key, _ in _leaves(values)), file)
    notes = _foreign_copy(values, overrides, file)
    for name, value in overrides.items():
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise ParameterError(f"{name}: expected keys and values, got {value!r}")
            values[name] = _merged(values.get(name) or {}, value)
            leaves = _leaves(value, f"{name}.")
        else:
            values[name], leaves = value, [(name, value)]
        origins |= {key: "given" for key, item in leaves if _lookup(original, key) != item}
    values.setdefault("file", file)
    try:
        return Params(Parameters.model_validate(values), origins, notes)
    except ValidationError as error:
        raise ParameterError(_explain(error, file, origins)) from None


def _merged(old: Mapping, new: Mapping) -> dict:
    return {
        **old,
        **{
            key: _merged(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping) else value
            for key, value in new.items()
        },
    }


def _lookup(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _foreign_copy(values: dict, overrides: Mapping, file: str) -> tuple[str, ...]:
    """Tell an edited copy that still names another file: whole sections that differ from the named file's."""
    given = [name for name in SECTIONS if isinstance(overrides.get(name), Mapping)]
    whole = [name for name in given if set(overrides[name]) >= set(values.get(name) or {"?"})]
    foreign = [name for name in whole if overrides[name] != values[name]]
    if "file" not in overrides or not foreign:
        return ()
    advice = f"set `file` in your copy to the copy's own path (it says {file!r})"
    partial = [name for name in given if name not in whole]
    if partial:
        raise ParameterError(
            f"{', '.join(foreign)} came from a file that is not {file!r}, and {', '.join(partial)} from an override: "
            f"the override would fall back to {file!r} for its other keys; {advice}"
        )
    return (f"note: {', '.join(foreign)} came from a file that is not {file!r}; {advice}, so that overrides find it",)


def _check_injected(cells: Any) -> None:
    """A parameter that papermill injected but the notebook does not have is one log line to papermill: stop here."""
    injected = [cell for cell in cells if cell.lstrip().startswith("# Parameters")]
    # the newest one: an executed copy, opened and corrected, keeps the mistyped cell in its history
    for cell in injected[-1:]:
        # a cell that is no Python never ran, so it set nothing
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(cell).body:
                for target in getattr(node, "targets", ()):
                    if isinstance(target, ast.Name) and target.id not in PARAMETER_NAMES:
                        raise ParameterError(_unknown(target.id, PARAMETER_NAMES, "among the notebook's parameters"))


def _unknown(name: str, known: Any, where: str) -> str:
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"{name}: there is no such key {where}; did you mean {close[0]!r}?"
    for section, model in Parameters.model_fields.items():
        if section in SECTIONS and name in model.annotation.model_fields:
            return f"{name}: there is no such key {where}; did you mean {section}: {{{name}: ...}}?"
    return f"{name}: there is no such key {where}; known: {', '.join(known)}"


def _model_at(location: tuple) -> Any:
    """The schema class that holds the last key of a pydantic error location."""
    model: Any = Parameters
    for key in location[:-1]:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation if key in getattr(model, "model_fields", {}) else model
        inner = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        model = inner[0] if inner else annotation
    return model


def _explain(error: ValidationError, file: str, origins: Mapping[str, str]) -> str:
    lines = []
    for item in error.errors():
        location = item["loc"]
        dotted = ".".join(str(key) for key in location)
        where = _place(location, file, origins)
        value = item["input"]
        if item["type"] == "extra_forbidden":
            known = list(getattr(_model_at(location), "model_fields", ()))
            section = f"in section {'.'.join(map(str, location[:-1]))} ({where})" if location[1:] else where
            text = _unknown(str(location[-1]), known, section)
            lines.append(f"{dotted}: " + text.split(": ", 1)[1])
        elif item["type"] == "missing":
            lines.append(f"{dotted}: missing ({where})")
        elif item["type"] == "value_error":
            lines.append(f"{dotted + ': ' if dotted else ''}{item['ctx']['error']} ({where})")
        elif item["type"] in ("int_type", "float_type") and _is_number(value):
            lines.append(
                f"{dotted}: {value!r} ({where}) is a text, not a number. YAML reads 6e-4 as text: "
                f"write {_yaml_number(value)} without quotes"
            )
        else:
            lines.append(f"{dotted}: {value!r} ({where}): {item['msg'][0].lower()}{item['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))


def _place(location: tuple, file: str, origins: Mapping[str, str]) -> str:
    """Where the value stands that an error is about, or which of several were given (a combination)."""
    names = [".".join(map(str, location[:end])) for end in range(len(location), 0, -1)]
    # an item of a list has its list's origin
    origin = next((origins[name] for name in names if name in origins), None)
    inside = f"{names[0]}." if names else ""
    given = [key for key, place in origins.items() if place == "given" and key.startswith(inside) and key != "file"]
    if origin:
        return "as given" if origin == "given" or given else f"in {file}"
    return f"in {file}" + (f" with {', '.join(given)} as given" if given else "")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _yaml_number(text: str) -> str:
    """The number as YAML reads it: with a point and a signed exponent, or whole."""
    number = float(text)
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    shortest = repr(number)
    return shortest.replace("e", ".0e") if "e" in shortest and "." not in shortest else shortest
