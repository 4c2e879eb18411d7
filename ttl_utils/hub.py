"""Data sets and models of the hub, read over the network; or a local mirror of them where `TTL_MIRROR` names one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ttl_utils import checkpoints
from ttl_utils.checkpoints import WEIGHTS
from ttl_utils.errors import SourceError, reason
from ttl_utils.files import read_json, sha256
from ttl_utils.local_files import Choose, Files, Problem, parquet
from ttl_utils.schema import Source, TextSet

# the branch where the hub keeps its own Parquet copy of a data set: a folder for each configuration
PARQUET_BRANCH = "refs/convert/parquet"
INDEX = f"{WEIGHTS}.index.json"
# of a model: configuration, safetensors weights, tokenizer
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def mirrored(name: str) -> Path | None:
    """The mirror's folder for this hub id, where there is one."""
    if not os.environ.get("TTL_MIRROR"):
        return None
    root = Path(os.environ["TTL_MIRROR"]).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"TTL_MIRROR={os.environ['TTL_MIRROR']}: there is no such folder ({root})")
    return root / name if (root / name).is_dir() else None


def _ask(name: str, revision: str | None, kind: str = "data set", **options: Any) -> Any:
    """What the hub says of a data set or model, asked once: its libraries retry for half a minute before they speak."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    advice = "or set TTL_MIRROR to a folder that holds it as <owner>/<name>"
    where = "" if kind == "data set" else " and may be a folder"
    info = HfApi().dataset_info if kind == "data set" else HfApi().model_info
    try:
        return info(name, revision=revision, timeout=20, **options)
    except GatedRepoError:
        raise SourceError(
            f"{kind} {name!r} is gated: accept its terms on its hub page and set HF_TOKEN in the environment, {advice}"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SourceError(
            f"{kind} {name!r} is not on the hub (ids move: every id is a parameter{where}), {advice}"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{kind} {name!r} has no revision {revision!r} on the hub: leave revision null for the newest, or name one "
            "that its page lists"
        ) from None
    except (OSError, OfflineModeIsEnabled, HTTPError) as error:
        raise SourceError(
            f"{kind} {name!r}: the Hugging Face hub cannot be reached ({reason(error)}). Connect to the network, "
            f"{advice}"
        ) from None


def check(dataset: str | None, revision: str | None = None) -> bool:
    """Whether a mirror stands in for the data set; raises SourceError where neither mirror nor hub has it."""
    if dataset is None:
        return False
    if mirrored(dataset):
        return True
    _ask(dataset, revision)
    return False


def model_folder(name: str, revision: str | None = None) -> str | Path:
    """What `from_pretrained` is given for a model or tokenizer: a folder, its mirror, or the hub id if it can be had.

    Raises:
        SourceError: there is no such folder, or the hub cannot be reached, or has no such model for this user.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(f"model {name!r}: there is no such folder ({folder.absolute()})")
    found = mirrored(name)
    if found is None:
        _ask(name, revision, "model")
    return found or name


@cache
def local_model(name: str, revision: str | None, key: str) -> Path:
    """Where a model's files are: a folder, the mirror's, or the hub's cache, which also serves without the hub.

    `key` is the parameter that names it.

    Raises:
        SourceError: as `model_folder`, and the cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        where = model_folder(name, revision)
        if isinstance(where, str):
            where = snapshot_download(where, revision=revision, allow_patterns=MODEL_FILES)
    except (SourceError, OSError, HTTPError) as error:
        try:
            where = snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            raise SourceError(f"{key}: {error}") from None
    return Path(where)


def commit_of(folder: Path) -> str | None:
    """The commit, where the folder is the hub cache's, which keeps a commit's files in a folder of its name."""
    return folder.name if folder.parent.name == "snapshots" else None


def weight_files(folder: Path, key: str) -> list[Path]:
    """A model folder's safetensors files; raises SourceError where it has none, or not all that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        paths = [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise SourceError(f"{key}: {folder} lacks {', '.join(missing)}, which its {INDEX} names: copy it whole")
        return paths
    inside = [path for name in (".", "checkpoints") for path in checkpoints.list_checkpoints(folder / name)]
    hint = f"Name one of its checkpoints, such as {inside[-1]}" if inside else "Other formats are not read"
    raise SourceError(f"{key}: {folder} holds no {WEIGHTS}. {hint}")


def weight_hashes(folder: Path, key: str) -> dict[str, str]:
    """SHA-256 of each weights file by name; a file is hashed once."""
    return {
        path.name: cached_sha256(path, path.stat().st_mtime_ns, path.stat().st_size)
        for path in weight_files(folder, key)
    }


@cache
def cached_sha256(path: Path, modified_ns: int, size: int) -> str:
    return sha256(path)


def _place(dataset: str, config: str | None, revision: str | None, commit: str | None = None) -> dict:
    """Where `datasets` finds the set: in the mirror's folder, or on the hub at one commit."""
    folder = mirrored(dataset)
    place = {"path": dataset, "revision": commit or revision} if folder is None else {"path": str(folder)}
    # on that branch a configuration is a folder
    return place | ({"data_dir": config} if revision == PARQUET_BRANCH else {"name": config})


@contextlib.contextmanager
def _opening(dataset: str, config: str | None, split: str) -> Iterator[None]:
    """What `datasets` says when a set does not open, as one message with what to do."""
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (ValueError, RuntimeError, OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        if "scripts are no longer supported" in str(error):
            raise SourceError(
                f"data set {dataset!r} carries a loader script, which `datasets` no longer runs: give it `revision: "
                f"{PARQUET_BRANCH}`, the hub's own copy as Parquet"
            ) from None
        raise SourceError(
            f"data set {dataset!r} (config {config}, split {split}) does not open: {reason(error)}"
        ) from error


def load(dataset: str, config: str | None, split: str, revision: str | None = None, streaming: bool = True) -> Any:
    """A `datasets` data set.

    Raises:
        SourceError: the hub cannot be reached, the set is gated or missing, or it has no such split; what to do.
    """
    import datasets
    from huggingface_hub import constants

    place = _place(dataset, config, revision)
    if folder := mirrored(dataset):
        place["cache_dir"] = cache_of(folder)
    elif not constants.HF_HUB_OFFLINE:
        check(dataset, revision)
    try:
        with _opening(dataset, config, split):
            return datasets.load_dataset(**place, split=split, streaming=streaming)
    except SourceError:
        # declared offline, what was loaded before is in the library's cache; of what was not, the hub's state says more
        if not folder and constants.HF_HUB_OFFLINE:
            check(dataset, revision)
        raise


def cache_of(folder: Path) -> str:
    """A cache for each state of a mirror's files: `datasets` alone tells local folders apart by their card only."""
    import datasets

    files = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*.*"))
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE, "mirror", digest))


def _builder(item: Source | TextSet, commit: str | None) -> tuple[Any, list[str]]:
    """What `datasets` knows of a set before it reads any text, and the files of the split."""
    import datasets

    with _opening(item.dataset, item.config, item.split):
        builder = datasets.load_dataset_builder(**_place(item.dataset, item.config, item.revision, commit))
        files = builder.config.data_files or {}
        if item.split not in files:
            raise ValueError(f"it has the splits {', '.join(map(str, files)) or 'none'}")
        return builder, [str(path) for path in files[item.split]]


class Stream:
    """Records of a hub set, over the network as they are needed; no copy is kept on disk.

    Of Parquet, only the columns that `choose` picks are read, by the one reader that takes a large row group in small
    pieces; other formats are left to `datasets`. `state()` is the place after the last record given, at one commit of
    the set: a later Stream goes on exactly there.
    """

    def __init__(self, item: Source | TextSet, choose: Choose, state: dict | None = None):
        self.item, self.mirror = item, mirrored(item.dataset)
        if self.mirror:
            version = _fingerprint(self.mirror)
        else:
            begun = state["version"] if state and not state["version"].startswith("mirror") else item.revision
            version = _ask(item.dataset, begun).sha
        if state and state["version"] != version:
            raise SourceError(
                f"data set {item.dataset!r} is not the one that reading began with (a mirror that changed, or that "
                "took the hub's place): bring that one back, or begin anew with --force"
            )
        self.version = version
        self.row, place = (state["row"], state["records"]) if state else (0, None)
        builder, paths = _builder(item, None if self.mirror else version)
        if builder.info.builder_name == "parquet":
            self.records = Files(paths, lambda path, skip: self._parquet(path, choose, skip), place)
        else:
            data = builder.as_streaming_dataset(split=item.split)
            with _opening(item.dataset, item.config, item.split):
                names = data.column_names or list(next(iter(data), {}))
            choose(names)
            # opened again: a look at the first row counts as reading it
            self.records = builder.as_streaming_dataset(split=item.split)
            if place:
                self.records.load_state_dict(place)

    def _parquet(self, path: str, choose: Choose, skip: int) -> Iterator[dict | Problem]:
        if self.mirror:
            return parquet(path, choose, skip)
        from huggingface_hub import HfFileSystem

        # columns are read in turn: a cache of what comes next in the file would be thrown away each time
        return parquet(HfFileSystem().open(path, cache_type="none"), choose, skip)

    def __iter__(self) -> Iterator[dict | Problem]:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError

        try:
            for record in self.records:
                self.row += 1
                yield record
        except (OSError, HTTPError, ValueError, DatasetsError) as error:
            place = f"data set {self.item.dataset!r}, after row {self.row:,}"
            if self.mirror or isinstance(error, ValueError):
                raise SourceError(f"{place}: a file of it cannot be read ({reason(error)})") from error
            raise SourceError(
                f"{place}: the connection was lost ({reason(error)}). Run again: reading goes on where it stopped"
            ) from error

    def state(self) -> dict:
        records = self.records.state() if isinstance(self.records, Files) else self.records.state_dict()
        return {"version": self.version, "row": self.row, "records": records}


def _fingerprint(folder: Path) -> str:
    """A mirror's files by name and size: what its version is known by."""
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file())
    return f"mirror {hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest()}"


def sizes(item: Source | TextSet) -> tuple[list[tuple[str, int | None]], int | None, int | None]:
    """The files of a set's split (name or path, bytes), and its bytes and rows where its card gives them.

    Nothing but the list of files and the card is read.
    """
    info = None if mirrored(item.dataset) else _ask(item.dataset, item.revision, files_metadata=True)
    builder, paths = _builder(item, info and info.sha)
    card = (builder.info.splits or {}).get(item.split)
    rows, text_bytes = (card.num_examples, card.num_bytes) if card else (None, None)
    if info is None:
        return [(path, Path(path).stat().st_size) for path in paths], text_bytes, rows
    # hf://datasets/<owner>/<name>@<commit>/<file>
    names = [path.split("@", 1)[1].split("/", 1)[1] for path in paths]
    known = {file.rfilename: file.size for file in info.siblings}
    return [(name, known.get(name)) for name in names], text_bytes, rows
