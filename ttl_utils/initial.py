"""What a run begins from: random weights, or what `pretraining.init_from` names."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttl_utils import checkpoints, hub
from ttl_utils.checkpoints import OPTIMIZER, RANDOM
from ttl_utils.errors import DamagedFile, ParameterError, SourceError, reason
from ttl_utils.files import read_json
from ttl_utils.model import llama_config, new_model
from ttl_utils.named_models import INITIAL

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from ttl_utils.run import Run

# of a configuration: what must be the same for weights to mean the same
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Start:
    """A model to train; `checkpoint` is another run's to go on from, with its optimizer, step and order.

    `origin`: what `init_from` was, or None for random weights.
    """

    model: LlamaForCausalLM
    checkpoint: Path | None = None
    origin: dict | None = None


def lineage(run: Run) -> dict:
    """What a checkpoint says of how it was trained, for a run that goes on from it: schedule, and training data."""
    settings, tokens = run.params.pretraining, run.need("02_tokenizer").manifest()["outputs"]["tokens"]
    block_size = settings.block_size or run.params.model.max_position_embeddings
    schedule = settings.identity() | {"seed": run.params.pretraining_seed, "block_size": block_size}
    return {"schedule": schedule, "data": tokens["fingerprint"]}


def starting_point(run: Run, tokenizer: PreTrainedTokenizerBase, attention: str) -> Start:
    """The model that stage 03 begins with, as `init_from` and `init_schedule` say.

    new: its weights alone, from step 0. same: its step, optimizer and data order go on, by the schedule it was
    trained with. longer: so, by one of more steps. A run that has checkpoints goes on from its own.

    Raises:
        SourceError: the source cannot be had, or is not a model, or not one of our checkpoints.
        ParameterError: it is of another shape, tokenizer, schedule or data than this run.
    """
    settings, model = run.params.pretraining, run.params.model
    own = checkpoints.list_checkpoints(run.stage("03_pretraining").folder / "checkpoints")
    if settings.init_from is None or (own and settings.resume_from_checkpoint != 0):
        return Start(new_model(model, tokenizer, run.params.pretraining_seed, attention), origin=_recorded(own))
    folder = hub.local_model(settings.init_from, settings.init_revision, INITIAL)
    weights, place = hub.weight_files(folder, INITIAL), f"{INITIAL} {settings.init_from!r}"
    _check_fits(folder, place, run, tokenizer)
    origin = {"init_from": settings.init_from, "init_schedule": settings.init_schedule}
    origin |= {"commit": hub.commit_of(folder), "step": 0}
    if settings.init_schedule == "new":
        text = "its weights, from step 0"
    else:
        origin["step"] = _check_goes_on(folder, place, run)
        text = f"step {origin['step']:,} with its optimizer, schedule {settings.init_schedule}"
    if (folder / "checkpoint.json").is_file():
        _check_whole(folder, place)
    made = _load(folder, place, run, tokenizer, attention)
    print(f"{place}: {text} ({', '.join(path.name for path in weights)})")
    return Start(made, None if settings.init_schedule == "new" else folder, origin)


def _recorded(own: list[Path]) -> dict | None:
    """What a run's own checkpoints say of its beginning."""
    for path in own:
        # a damaged one is for the run to set aside
        with contextlib.suppress(OSError, DamagedFile):
            return read_json(path / "state.json").get("initial_weights")
    return None


def _check_fits(folder: Path, place: str, run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """Shape and vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig

    found = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if found.get("model_type") != "llama":
        raise SourceError(f"{place} is not a Llama (model_type {found.get('model_type')!r} in its config.json)")
    theirs = LlamaConfig.from_pretrained(folder).to_dict()
    ours = llama_config(run.params.model, tokenizer).to_dict()
    differing = [f"{key} {theirs.get(key)} (here {ours.get(key)})" for key in SHAPE if theirs.get(key) != ours.get(key)]
    if differing:
        raise ParameterError(f"{place} is of another shape than the section model: {', '.join(differing)}")
    advice = "begin from a model of this tokenizer, or set tokenizer.source to the model's and make stage 02 anew"
    if theirs["vocab_size"] != len(tokenizer):
        raise ParameterError(
            f"{place} has rows for {theirs['vocab_size']:,} pieces, the tokenizer {len(tokenizer):,}: {advice}"
        )
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file():
        known = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if known.get(piece) != number:
                raise ParameterError(
                    f"{place} has another tokenizer: piece {piece!r} is {known.get(piece)} there and {number} here: "
                    + advice
                )


def _check_whole(folder: Path, place: str) -> None:
    try:
        checkpoints.check(folder)
    except DamagedFile as error:
        raise SourceError(f"{place}: {error}. Name another checkpoint") from None


def _check_goes_on(folder: Path, place: str, run: Run) -> int:
    """Whether this run goes on as the checkpoint would have; returns its step."""
    kind = run.params.pretraining.init_schedule
    missing = [name for name in (OPTIMIZER, RANDOM, "state.json", "checkpoint.json") if not (folder / name).is_file()]
    if missing:
        own = checkpoints.resumable(folder.parent / "checkpoints")
        hint = f"name one of {folder.parent / 'checkpoints'}, such as {own[-1].name}" if own else "name one that has"
        raise SourceError(
            f"{place} has no {missing[0]}, so init_schedule {kind!r} cannot go on from it: {hint}, "
            "or set init_schedule to new"
        )
    state, now = read_json(folder / "state.json"), lineage(run)
    if "schedule" not in state:
        raise SourceError(f"{place} does not say what it was trained with: set init_schedule to new")
    if state["data"] != now["data"]:
        raise ParameterError(
            f"{place} was trained on other tokens than this run's stage 02 holds, and init_schedule {kind!r} goes on "
            "in the same order: set it to new"
        )
    then, ours = dict(state["schedule"]), dict(now["schedule"])
    before, steps = then.pop("max_steps"), ours.pop("max_steps")
    differing = [
        f"{key} {then.get(key)} (here {ours.get(key)})" for key in {**then, **ours} if then.get(key) != ours.get(key)
    ]
    if kind == "same" and steps != before:
        differing.append(f"max_steps {before} (here {steps}; for more steps set init_schedule to longer)")
    if differing:
        raise ParameterError(f"{place} was trained otherwise, and init_schedule is {kind!r}: {', '.join(differing)}")
    if kind == "longer" and steps <= before:
        raise ParameterError(
            f"{place}: init_schedule 'longer' needs max_steps above its own {before}, and it is {steps}"
        )
    if state["step"] >= steps:
        raise ParameterError(f"{place} is at its last step, {steps}: set init_schedule to longer, with more max_steps")
    return state["step"]


def _load(folder: Path, place: str, run: Run, tokenizer: PreTrainedTokenizerBase, attention: str) -> LlamaForCausalLM:
    """Its weights, in float32, under this run's configuration; every one of them, and none besides."""
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig, LlamaForCausalLM

    config = llama_config(run.params.model, tokenizer)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention, "use_safetensors": True}
    try:
        made, info = LlamaForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"{place} does not open as a Llama: {reason(error)}") from error
    wrong = sorted(str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind])
    if wrong:
        raise SourceError(f"{place} does not hold just the weights of a Llama: {', '.join(wrong[:3])} do not fit")
    for weights in made.parameters():
        # they are views of the file, which would stay mapped while they are trained
        weights.data = weights.data.clone()
    made.generation_config = GenerationConfig.from_model_config(config)
    return made
