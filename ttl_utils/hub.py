"""Data sets of the hub, streamed; or a local mirror of them where `TTL_MIRROR` names one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttl_utils.errors import SourceError


def mirrored(dataset: str) -> Path | None:
    """The mirror's folder for this hub id, where there is one."""
    if not os.environ.get("TTL_MIRROR"):
        return None
    root = Path(os.environ["TTL_MIRROR"]).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"TTL_MIRROR={os.environ['TTL_MIRROR']}: there is no such folder ({root})")
    return root / dataset if (root / dataset).is_dir() else None


def load(dataset: str, config: str | None, split: str, revision: str | None = None, streaming: bool = True) -> Any:
    """A `datasets` data set.

    Raises:
        SourceError: the hub cannot be reached, the set is gated or missing, or it has no such split; what to do.
    """
    import datasets
    from huggingface_hub.errors import HTTPError

    check(dataset, revision)
    folder = mirrored(dataset)
    try:
        if folder is not None:
            return datasets.load_dataset(str(folder), config, split=split, streaming=streaming)
        return datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=streaming)
    except (ValueError, RuntimeError, OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"data set {dataset!r} (config {config}, split {split}) does not open: {reason}") from error


def check(dataset: str | None, revision: str | None = None) -> bool:
    """Whether a mirror stands in for the data set; raises SourceError where neither mirror nor hub has it.

    One quick question: `load_dataset` itself would retry for half a minute before it says anything.
    """
    if dataset is None or mirrored(dataset):
        return dataset is not None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    advice = "or set TTL_MIRROR to a folder that holds it as <owner>/<name>"
    try:
        HfApi().dataset_info(dataset, revision=revision, timeout=20)
    except GatedRepoError:
        raise SourceError(
            f"data set {dataset!r} is gated: accept its terms on its hub page and set HF_TOKEN in the environment, "
            f"{advice}"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"data set {dataset!r} is not on the hub (ids move: every id is a parameter under data.sources), {advice}"
        ) from None
    except (OSError, OfflineModeIsEnabled, HTTPError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(
            f"data set {dataset!r}: the Hugging Face hub cannot be reached ({reason}). Connect to the network, {advice}"
        ) from None
    return False


def rows(dataset: Any, columns: dict[str, str]) -> Iterator[dict]:
    """Rows with our names for the set's columns; a missing column, or a network that is lost, is named."""
    from huggingface_hub.errors import HTTPError

    reading = iter(dataset)
    while True:
        try:
            row = next(reading)
        except StopIteration:
            return
        except (OSError, HTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(
                f"the data set stopped in the middle ({reason}): run again, and it is read from its beginning"
            ) from error
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise SourceError(f"the data set has no column {missing[0]!r}; it has {', '.join(row)}")
        yield {ours: row[column] for ours, column in columns.items()}
