"""Continuations of prompts, sampled: each has a seed of its own, and none depends on what it is batched with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ttl_utils.encoding import plain_ids
from ttl_utils.errors import TTLError
from ttl_utils.progress import Progress
from ttl_utils.schema import Generation
from ttl_utils.subject import first_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# stands for the user's words while the template's own tokens are found
MARK = "palavra"


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from the settings' distribution by the row's own random numbers.

    `generate` draws a batch from one stream of random numbers, so that a text would change with its neighbours.
    """

    def __init__(self, settings: Generation, padding: torch.Tensor, numbers: torch.Tensor):
        """`padding`: (rows, longest prompt) bool; `numbers`: (rows, new tokens) float64 in [0, 1)."""
        self.padding, self.numbers, self.top_k = padding, numbers, settings.top_k
        self.penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        longest = self.padding.shape[1]
        if self.penalty.penalty != 1:
            said = input_ids.clone()
            # padding was never said: a token of the row stands in for it
            said[:, :longest] = torch.where(self.padding, said[:, longest - 1 : longest], said[:, :longest])
            scores = self.penalty(said, scores)
        # (rows, top_k), in the order of the vocabulary: two scores as good as equal would change places by rounding
        tokens = scores.topk(min(self.top_k, scores.shape[1])).indices.sort().values
        # on the CPU: not every accelerator has float64
        shares = self.warpers(input_ids, scores.gather(1, tokens)).softmax(-1).cpu().double().cumsum(-1)
        if not shares[:, -1].isfinite().all():
            raise TTLError("the model's scores are not finite numbers: its training diverged, or its files are damaged")
        numbers = self.numbers[:, input_ids.shape[1] - longest, None] * shares[:, -1:]
        places = torch.searchsorted(shares, numbers, right=True).to(tokens.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, places), 0.0)


def sample_seed(seed: int, prompt: str, number: int) -> int:
    """The seed of a prompt's sample: the same wherever the prompt stands among others."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{number}\n{prompt}".encode()).digest()[:4], "big")


def prompt_parts(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> tuple[list[int], list[int], list[int]]:
    """Ids before, of and after the prompt's own words, in which a control token that is typed is text.

    Before a base model's prompt stands what begins a text; around a user's turn stands the tokenizer's chat template,
    up to where the model begins to answer.

    Raises:
        TTLError: the tokenizer has no chat template, or one that does not pass the user's words on; no token at all.
    """
    if not chat:
        before, (words,) = first_ids(tokenizer), plain_ids(tokenizer, [prompt])
        if not before + words:
            raise TTLError(f"prompt {prompt!r} has no token to begin from")
        return before, words, []
    if not tokenizer.chat_template:
        raise TTLError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: it is not a chat model's")
    turn = [{"role": "user", "content": MARK}]
    whole = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    mark, words = plain_ids(tokenizer, [MARK, prompt.strip()])
    places = [place for place in range(len(whole)) if whole[place : place + len(mark)] == mark]
    if len(places) != 1:
        raise TTLError(
            f"the chat template of {tokenizer.name_or_path} does not hold the user's words once, as they are"
        )
    return whole[: places[0]], words, whole[places[0] + len(mark) :]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that close a text: the tokenizer's, and those that the model's folder names."""
    named = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return [token for token in dict.fromkeys(found) if token is not None]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: Generation,
    seed: int,
    chat: bool = False,
    status: Path | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """`settings.samples` continuations of each prompt (a chat model's answers), in the order of the prompts.

    Batches hold prompts of like length, padded on the left. On a CPU the same seed gives the same texts; the batch
    changes none of them but by rounding. Only the settings shape the distribution: what a model's folder says of
    sampling is left aside. A prompt that leaves no room for `max_new_tokens` in the context loses its first tokens.

    Returns:
        rows of prompt, kind ("code" for those of `settings.code_prompts`, else "text"), text (the continuation alone),
        tokens (without the end token), ended (closed by the model itself), seed, cut (tokens that the prompt lost), and
        control (the control tokens within it, which the text leaves out).

    Raises:
        TTLError: the context is too short, the chat template does not serve, or the model's scores are not numbers.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    parts = {prompt: prompt_parts(tokenizer, prompt, chat) for prompt in prompts}
    asked, cut = {}, dict.fromkeys(prompts, 0)
    for prompt, (before, words, after) in parts.items():
        if context is not None:
            room = context - settings.max_new_tokens - len(before) - len(after)
            if room < 1:
                raise TTLError(
                    f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in "
                    f"the context of {context} tokens: a smaller one is needed"
                )
            cut[prompt] = max(0, len(words) - room)
        asked[prompt] = before + words[cut[prompt] :] + after
    if shorter := [prompt for prompt in cut if cut[prompt]]:
        print(
            f"cut at the left, so that {settings.max_new_tokens} new tokens fit the context of {context}: "
            + "; ".join(f"{prompt[:40]!r} by {cut[prompt]} tokens" for prompt in shorter)
        )
    wanted = [(prompt, number) for prompt in asked for number in range(settings.samples)]
    seeds = [sample_seed(seed, prompt, number) for prompt, number in wanted]
    # the longest first: what is too large for memory fails at once
    order = sorted(range(len(wanted)), key=lambda place: -len(asked[wanted[place][0]]))
    ends, made = end_tokens(model, tokenizer), {}
    control = {number: piece.content for number, piece in tokenizer.added_tokens_decoder.items() if piece.special}
    with Progress("texts generated", len(wanted), status) as progress:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            ids = [asked[wanted[place][0]] for place in places]
            found = _continue(model, tokenizer, ids, [seeds[place] for place in places], settings, ends)
            made |= dict(zip(places, found, strict=True))
            progress.update(len(made))
    rows = []
    for place, (prompt, _) in enumerate(wanted):
        new = made[place]
        stop = next((n for n, token in enumerate(new) if token in ends), None)
        text = continuation(tokenizer, asked[prompt], new[:stop])
        rows.append(
            {
                "prompt": prompt,
                "kind": "code" if prompt in settings.code_prompts else "text",
                "text": text.strip() if chat else text,
                "tokens": len(new[:stop]),
                "ended": stop is not None,
                "seed": seeds[place],
                "cut": cut[prompt],
                "control": sorted({control[token] for token in new[:stop] if token in control}),
            }
        )
    return rows


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[int],
    settings: Generation,
    ends: list[int],
) -> list[list[int]]:
    """The new ids of each prompt; after an end token comes padding."""
    longest = max(map(len, prompts))
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(longest, device=model.device) >= longest - lengths[:, None]
    numbers = np.stack([np.random.default_rng(one).random(settings.max_new_tokens) for one in seeds])
    own = model.generation_config
    # a folder may hold penalties and bans of its own, which would be merged with ours
    model.generation_config = GenerationConfig()
    try:
        made = model.generate(
            ids,
            attention_mask=mask.long(),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([Draw(settings, ~mask, torch.from_numpy(numbers))]),
            pad_token_id=pad,
            eos_token_id=ends or None,
        )
    finally:
        model.generation_config = own
    return made[:, longest:].tolist()


def continuation(tokenizer: PreTrainedTokenizerBase, before: list[int], new: list[int]) -> str:
    """The text of the new ids, with the space that a tokenizer drops at a text's beginning."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    first, whole = tokenizer.decode(before, **options), tokenizer.decode(before + new, **options)
    # a character may be cut in two by the prompt's end
    return whole[len(first) :] if whole.startswith(first) else tokenizer.decode(new, **options)
