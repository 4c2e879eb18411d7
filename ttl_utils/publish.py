"""A run's models on the Hugging Face hub: a folder each, with card and GGUF files, that is shown before it is sent."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pandas as pd

from ttl_utils.checkpoints import swap
from ttl_utils.errors import TTLError
from ttl_utils.files import write_text
from ttl_utils.gguf_files import NotForGGUF, export_gguf, models_of
from ttl_utils.hub import reason
from ttl_utils.memorisation import memorisation
from ttl_utils.model_card import licence_text, model_card
from ttl_utils.run import Run, Stage

# the hub's own rule for each half of OWNER/NAME, with room for "-Chat"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,90}")


def publish(run: Run, repository: str | None, *, dry_run: bool = False) -> list[Path]:
    """Stage `export/hub-{base,chat}/` and send them as OWNER/NAME and OWNER/NAME-Chat; returns the folders.

    A new repository is private: who owns it opens it on its page, when the card was read. A dry run needs no name, no
    token and no network.

    Raises:
        MissingStage: there is no finished model.
        TTLError: no repository's name, no token, or a hub that refuses or cannot be reached.
    """
    if repository is not None and not REPOSITORY.fullmatch(repository):
        raise TTLError(f"--repository {repository!r}: give it as OWNER/NAME, of letters, digits, `-`, `_` and `.`")
    token = os.environ.get("HF_TOKEN")
    if not dry_run and not repository:
        raise TTLError("--to hub needs --repository OWNER/NAME, or --dry-run to see what would be sent")
    if not dry_run and not token:
        raise TTLError(
            "no token: set HF_TOKEN to one that may write (made in your settings on the hub), or use --dry-run"
        )
    folders = {}
    for name, stage in models_of(run).items():
        target = repository and repository + ("-Chat" if name == "chat" else "")
        try:
            gguf = export_gguf(run, {name: stage})
        except NotForGGUF as error:
            print(f"no GGUF files: {error}")
            gguf = []
        folders[name] = _stage(run, name, stage, target, gguf)
        shown = pd.DataFrame(
            [(path.name, path.stat().st_size / 1e6) for path in sorted(folders[name].iterdir())], columns=["file", "MB"]
        )
        print(f"{target or '(no repository yet)'}: {folders[name]}")
        print(shown.to_string(index=False, float_format="{:,.3f}".format), end="\n\n")
        if not dry_run:
            _send(folders[name], target, token)
    if dry_run:
        print("dry run: nothing was sent; read the cards (README.md) first")
    return list(folders.values())


def _stage(run: Run, name: str, stage: Stage, repository: str | None, gguf: list[Path]) -> Path:
    """The folder as it will be sent, whole or not at all: the model's files by hard link, and what says what it is."""
    final = run.folder / "export" / f"hub-{name}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sheet = run.stage("01_data").folder / "data_sheet.md"
    files = [*stage.verify("model"), *gguf, *([sheet] if sheet.is_file() else [])]
    try:
        for path in files:
            _link(path, partial / path.name)
        memorised = memorisation(run, name, stage)
        names = [path.name for path in files]
        write_text(partial / "README.md", model_card(run, name, stage, repository, memorised, names))
        write_text(partial / "LICENSE.md", f"# Licence\n\n{licence_text(run, name)}\n")
        swap(final, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # a file system without hard links, or another disk
        shutil.copyfile(source, target)


def _send(folder: Path, repository: str, token: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Files of {folder.name}")
    except HfHubHTTPError as error:
        raise TTLError(
            f"{repository}: the hub refused ({reason(error)}). Check that HF_TOKEN may write there, then run again: "
            "what was sent is not sent twice"
        ) from None
    except (OSError, HTTPError) as error:
        raise TTLError(f"{repository}: the hub cannot be reached ({reason(error)}). Connect, and run again") from None
    print(f"sent: {sent.commit_url}")
