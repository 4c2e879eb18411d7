"""Parameters: loaded from `params/<size>.yaml`, overridden by a notebook's cell, and validated with kind messages."""

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
from typing import Any

import yaml
from pydantic import ValidationError

from ttl_utils.errors import ParameterError
from ttl_utils.schema import PARAMETER_NAMES, SECTIONS, Parameters


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

    @property
    def pretraining_seed(self) -> int:
        """The seed of weights and data order: the run's, where the section names none."""
        seed = self.values.pretraining.seed
        return self.values.seed if seed is None else seed

    def flat(self) -> dict[str, Any]:
        """Every leaf by its dotted name; a list is one leaf."""
        return dict(leaves(self.values.model_dump()))


def leaves(tree: Mapping, prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
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
    original, origins = _on_its_size(read_file(file), file)
    values = copy.deepcopy(original)
    if "size" in overrides and overrides["size"] != values.get("size"):
        raise ParameterError(
            f"size: {overrides['size']!r} was asked for, but file {file!r} is of size {values.get('size')!r}: "
            f"set size to {values.get('size')!r} too, or leave file out"
        )
    notes = _foreign_copy(values, overrides, file)
    for name, value in overrides.items():
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise ParameterError(f"{name}: expected keys and values, got {value!r}")
            values[name] = _merged(values.get(name) or {}, value)
            given_leaves = leaves(value, f"{name}.")
        else:
            values[name], given_leaves = value, [(name, value)]
        origins |= {key: "given" for key, item in given_leaves if _lookup(original, key) != item}
    values.setdefault("file", file)
    try:
        found = Parameters.model_validate(values)
    except ValidationError as error:
        raise ParameterError(_explain(error, file, origins)) from None
    # a key that stands nowhere has the schema's value
    return Params(found, {key: origins.get(key, "default") for key, _ in leaves(found.model_dump())}, notes)


def _on_its_size(values: dict, file: str) -> tuple[dict, dict[str, str]]:
    """A file's values, those of its size for what it leaves out, and where each stands."""
    origins = {key: file for key, _ in leaves(values)}
    size = values.get("size")
    if size not in sizes() or file == f"params/{size}.yaml":
        return values, origins
    below = read_file(str(bundled("params") / f"{size}.yaml")) | {"file": file}
    merged = _merged(below, values)
    if filters := (values.get("data") or {}).get("filters"):
        # a filter is taken as it is: a rule that it does not name is off
        merged["data"]["filters"] = below["data"]["filters"] | filters
    return merged, {key: f"params/{size}.yaml" for key, _ in leaves(below)} | origins


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
