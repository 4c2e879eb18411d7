"""A run's folders: stages with an identity, reuse, manifests, metrics and provenance."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ttl_utils.errors import DamagedFile, MissingStage, ParameterError, StageConflict, TTLError
from ttl_utils.files import read_json, sha256, write_json
from ttl_utils.named_models import CHAT_BASE, INITIAL, NAMES, fingerprint, named
from ttl_utils.params import Params, project_root
from ttl_utils.provenance import code_version, machine, now, versions


@dataclass(frozen=True)
class Definition:
    """What a stage's result depends on: parameter sections, and named outputs of earlier stages."""

    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    # a report of what the energy ledger holds: made anew when the ledger has grown, the old one kept aside
    report: bool = False


STAGES = {
    "01_data": Definition(("data",), ()),
    "02_tokenizer": Definition(("tokenizer",), ("01_data/corpus",)),
    "03_pretraining": Definition(("model", "pretraining"), ("02_tokenizer/tokenizer", "02_tokenizer/tokens")),
    "04_evaluation": Definition(
        ("evaluation",),
        ("01_data/corpus", "01_data/downstream", "02_tokenizer/tokens", "03_pretraining/model"),
    ),
    "05_chat": Definition(("chat",), ("01_data/chat", "03_pretraining/model")),
    "06_carbon_report": Definition(("carbon",), ("03_pretraining/curve",), report=True),
}


def outputs_folder() -> Path:
    """`TTL_OUTPUTS`, or `outputs/` of the checkout, or of the working folder where there is no checkout."""
    if os.environ.get("TTL_OUTPUTS"):
        return Path(os.environ["TTL_OUTPUTS"]).expanduser().resolve()
    return (project_root() or Path.cwd()) / "outputs"


def known_runs(folder: Path, *holding: str) -> list[str]:
    """Names of the runs in a folder of runs that hold one of these; `reference/nano` is one too."""
    places = [(mark.count("/"), path) for mark in holding for at in ("*/", "*/*/") for path in folder.glob(at + mark)]
    return sorted({path.parents[deep].relative_to(folder).as_posix() for deep, path in places})


class Run:
    """One folder of outputs, made from one set of parameters."""

    def __init__(self, params: Params, _base: bool = False):
        self.params = params
        self.name = params.base if _base else params.run_name
        self.folder = outputs_folder() / self.name
        self._base = _base
        if params.base and not (outputs_folder() / params.base).is_dir():
            raise ParameterError(f"base {params.base!r}: there is no such run in {outputs_folder()}")

    def stage(self, name: str) -> Stage:
        return Stage(self, name)

    def stages(self) -> list[Stage]:
        return [self.stage(name) for name in STAGES]

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    def need(self, name: str) -> Stage:
        """The stage, finished and whole; otherwise an error that says which command makes it."""
        stage = self.stage(name)
        if not stage.finished:
            raise MissingStage(
                f"{name} of run {self.name!r} is not finished ({stage.folder}): make it with "
                f"`ttl run {self._command()} --to {name[:2]}` (with the same --set, if any), or run "
                f"notebooks/{name}.ipynb first"
            )
        return stage

    def _command(self) -> str:
        size, file, base = self.params.size, self.params.file, self.params.base
        command = size if file == f"params/{size}.yaml" else file
        command += "" if self.name == size else f" --run {self.name}"
        return command + (f" --base {base}" if base and base != self.name else "")

    def ledger_rows(self) -> dict[str, list[dict]]:
        """Rows by the run that spent the energy: this one, and those whose stages it uses; a report's own are not."""
        # here: a command that asks for no report need not wait for pandas
        from ttl_utils.ledger import read_ledger

        own = read_ledger(self.folder / "energy.jsonl")
        found = {self.name: [row for row in own if not STAGES.get(row["stage"], STAGES["01_data"]).report]}
        # a report is left out by its name: to ask whether it is a base's would ask for these rows
        for stage in (self.stage(name) for name, definition in STAGES.items() if not definition.report):
            if stage.from_base:
                ledger = stage.folder.parent / "energy.jsonl"
                # the number: a search of stage 03 has a name of its own
                rows = [row for row in read_ledger(ledger) if row["stage"][:2] == stage.name[:2]]
                found.setdefault(ledger.parent.name, []).extend(rows)
        return found

    def gather_metrics(self) -> dict:
        """`metrics.json` of the run: every finished stage's figures under its name."""
        gathered = {}
        for stage in self.stages():
            if stage.finished and (stage.folder / "metrics.json").is_file():
                gathered[stage.name] = read_json(stage.folder / "metrics.json")
        write_json(self.folder / "metrics.json", gathered)
        return gathered

    def record(self) -> None:
        """`run.json`: code, versions, machine, parameters, and the manifests' times."""
        stages = {}
        for stage in self.stages():
            if stage.finished:
                manifest = stage.manifest()
                stages[stage.name] = {key: manifest[key] for key in ("started", "finished", "code")}
                stages[stage.name]["folder"] = os.path.relpath(stage.folder, self.folder)
        write_json(
            self.folder / "run.json",
            {
                "run": self.name,
                "code": code_version(),
                "versions": versions(),
                "machine": machine(),
                "parameters": self.params.values.model_dump(),
                "stages": stages,
            },
        )


class Stage:
    """One folder of a run. It is finished when its `manifest.json` stands, which is written last."""

    def __init__(self, run: Run, name: str):
        self.run, self.name, self.definition = run, name, STAGES[name]
        self.folder = run.folder / name
        self.from_base = False
        if run.params.base and not run._base and run.params.base != run.name and not self._started(self.folder):
            other = Run(run.params, _base=True).stage(name)
            if other.finished and other.manifest()["identity"] == self.identity():
                self.folder, self.from_base = other.folder, True

    @staticmethod
    def _started(folder: Path) -> bool:
        return (folder / "manifest.json").is_file() or (folder / "stage.json").is_file()

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def begun(self) -> str:
        """When the work in this folder began (ISO time, UTC); now, where it has not."""
        path = self.folder / "stage.json"
        return read_json(path)["started"] if path.is_file() else now()

    def manifest(self) -> dict:
        return read_json(self.folder / "manifest.json")

    def metrics(self) -> dict:
        return read_json(self.folder / "metrics.json")

    def identity(self) -> dict:
        """What decides the result: the seed, parameters, and the fingerprints of the inputs."""
        params = self.run.params
        identity: dict[str, Any] = {"seed": params.seed}
        for section in self.definition.sections:
            identity[section] = getattr(params, section).identity()
        for name in self.inputs():
            stage, group = name.split("/")
            source = self.run.stage(stage)
            identity[f"input {name}"] = source.manifest()["outputs"][group]["fingerprint"] if source.finished else None
        if self.definition.report:
            identity["input energy"] = self.run_ledger_fingerprint()
        for key in self._named_models():
            identity[NAMES[key]] = fingerprint(params, key, self._recorded().get(NAMES[key]))
            # stage 03's model would have decided it
            identity |= {"context": params.model.max_position_embeddings} if key == CHAT_BASE else {}
        return json.loads(json.dumps(identity))

    def inputs(self) -> tuple[str, ...]:
        """Outputs of earlier stages; a model that the parameters name takes the place of the run's own."""
        replaced = {"02_tokenizer/tokens", "03_pretraining/model"} if set(self._named_models()) - {INITIAL} else set()
        return tuple(name for name in self.definition.inputs if name not in replaced)

    def _named_models(self) -> list[str]:
        """Keys of this stage's sections that name a model."""
        known = [key for key in NAMES if key.partition(".")[0] in self.definition.sections]
        return [key for key in known if named(self.run.params, key)[0] is not None]

    def _recorded(self) -> dict:
        """The identity with which the work in this folder began; {} where it has not."""
        path = self.folder / "stage.json"
        return read_json(path)["identity"] if path.is_file() else {}

    def run_ledger_fingerprint(self) -> str:
        """Of what the ledgers hold for the report: all but its own energy."""
        rows = sorted(json.dumps(row) for rows in self.run.ledger_rows().values() for row in rows)
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def check(self) -> str:
        """'finished', 'begun' or 'new'; raises StageConflict where the folder holds work of another identity."""
        state = "finished" if self.finished else "begun" if self._started(self.folder) else "new"
        if state == "new":
            return state
        path = self.folder / ("manifest.json" if self.finished else "stage.json")
        difference = _difference(read_json(path)["identity"], self.identity())
        if not difference:
            return state
        if self.definition.report:
            self.set_aside()
            return "new"
        raise StageConflict(
            f"{self.name} of run {self.run.name!r} was {'made' if state == 'finished' else 'begun'} otherwise "
            f"({self.folder}):\n"
            + "\n".join(f"  {line}" for line in difference)
            + f"\nGive this run another name (`run`), or move the old work aside with "
            f"`ttl run {self.run._command()} --from {self.name[:2]} --force` (with the same --set, if any)"
        )

    def set_aside(self) -> Path | None:
        """Move the folder to `<stage>.old-N`; nothing is thrown away, and a base's folder stays where it is."""
        if self.from_base or not self.folder.exists():
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.name}.old-{number}")).exists():
            number += 1
        with self._alone():
            shutil.move(self.folder, aside)
        print(f"{self.name}: the earlier folder is kept as {aside.name}")
        return aside

    def reuse(self) -> bool:
        """True, with a line that says so, when the stage is finished and its identity fits."""
        if self.check() != "finished":
            return False
        manifest = self.manifest()
        where = f" of run {self.folder.parent.name!r}" if self.from_base else ""
        commit = (manifest["code"] or {}).get("commit")
        other = commit != code_version()["commit"]
        code = f", made by other code ({(commit or 'unknown')[:10]})" if other else ""
        print(f"{self.name}{where}: finished {manifest['finished']}, reused{code}")
        return True

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.run.folder / ".locks" / f"{self.name}.lock")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the stage's lock, which this object may hold already; another holder is an error, never a wait."""
        try:
            Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise TTLError(
                f"cannot write in {self.run.folder} ({error.strerror}): set TTL_OUTPUTS to a folder that you may "
                "write in"
            ) from None
        except Timeout:
            raise StageConflict(
                f"{self.name} of run {self.run.name!r} is being made by another process ({self.folder}): "
                "wait for it to end, or give this run another name (`run`)"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def work(self) -> Iterator[Any]:
        """Hold the stage's folder while it is made: inputs checked, one process at a time, identity written first.

        Yields the energy tracker, whose ledger is `energy.jsonl` of the run.
        """
        if os.environ.get("RANK", "0") != "0":
            # the first process of a distributed run holds the folder; each machine's first one holds its meter
            with self.measuring() as energy:
                yield energy
            return
        inputs = [(self.run.need(stage), group) for stage, _, group in (name.partition("/") for name in self.inputs())]
        with self._alone():
            state = self.check()
            if state == "finished":
                raise StageConflict(f"{self.name} of run {self.run.name!r} was finished by another process just now")
            # before the meter: its session is this folder's; and reading the inputs costs energy too
            begun = now()
            try:
                with self.measuring() as energy:
                    for stage, group in inputs:
                        stage.verify(group)
                    if state == "begun":
                        print(f"{self.name}: begun {read_json(self.folder / 'stage.json')['started']}, going on")
                    else:
                        self.folder.mkdir(parents=True, exist_ok=True)
                        write_json(
                            self.folder / "stage.json",
                            {"identity": self.identity(), "started": begun, "code": code_version()},
                        )
                    yield energy
            except Exception as error:
                if isinstance(error, TTLError) or not _disk_full(error):
                    raise
                place = getattr(error, "filename", None) or self.folder
                raise TTLError(
                    f"{self.name}: the disk is full while writing {place}; finished work is kept: "
                    "free some space, or set TTL_OUTPUTS to another disk, and run again"
                ) from error

    def finish(self, metrics: dict, outputs: dict[str, Iterable[Path]]) -> None:
        """Write the figures, then the manifest with a hash of every file that later stages read."""
        write_json(self.folder / "metrics.json", metrics)
        groups = {}
        for group, paths in outputs.items():
            files = {}
            for path in sorted(paths):
                files[path.relative_to(self.folder).as_posix()] = {
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
            digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            groups[group] = {"fingerprint": digest, "files": files}
        begun = read_json(self.folder / "stage.json")
        manifest = {
            "stage": self.name,
            "run": self.run.name,
            "identity": begun["identity"],
            "code": code_version(),
            "versions": versions(),
            "started": begun["started"],
            "finished": now(),
            "outputs": groups,
        }
        write_json(self.folder / "manifest.json", manifest)
        (self.folder / "status.json").unlink(missing_ok=True)
        self.run.gather_metrics()
        self.run.record()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Any]:
        """Energy of work on this stage; of a finished one too: reports that are asked for later. Yields the tracker."""
        from ttl_utils.carbon import track

        with track(self.run.folder / "energy.jsonl", self.name, self.run.params.carbon) as energy:
            yield energy

    def add_metrics(self, **more: Any) -> None:
        """Figures of a finished stage that were measured after it."""
        write_json(self.folder / "metrics.json", self.metrics() | more)
        self.run.gather_metrics()

    def files(self, group: str) -> list[Path]:
        return [self.folder / name for name in self.manifest()["outputs"][group]["files"]]

    def verify(self, group: str) -> list[Path]:
        """The group's files, each with the bytes that were written."""
        for name, expected in self.manifest()["outputs"][group]["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != expected["bytes"] or sha256(path) != expected["sha256"]:
                state = "missing" if found is None else "damaged"
                raise DamagedFile(
                    f"{path} is {state}: it is not what {self.name} wrote. Restore it from a copy, or make the stage "
                    f"again: delete {self.folder} and run `ttl run {self.run._command()} --from {self.name[:2]}`"
                )
        return self.files(group)


def _disk_full(error: Exception) -> bool:
    # safetensors and SQLite have errors of their own, without an errno
    texts = ("No space left on device", "Disk quota exceeded", "disk is full")
    return getattr(error, "errno", None) == errno.ENOSPC or any(text in str(error) for text in texts)


def _difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines 'key: old -> new' for every leaf that differs."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        left, right = old.get(key), new.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            lines += _difference(left, right, f"{prefix}{key}.")
        elif isinstance(left, list) and isinstance(right, list):
            lines += _difference(dict(enumerate(left)), dict(enumerate(right)), f"{prefix}{key}.")
        else:
            shown = (str(left)[:70], str(right)[:70])
            lines.append(f"{prefix}{key}: {shown[0]} -> {shown[1]}")
    return lines
