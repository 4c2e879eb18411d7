"""Log-likelihoods for lm-evaluation-harness: its own values, with no token computed twice (paper, section 4.1)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from torch.nn.functional import linear
from transformers import DynamicCache, LlamaForCausalLM

from ttl_utils.errors import TTLError
from ttl_utils.loss import CHUNK

# of a pass: with more, each token is compared with ever more that it does not follow; with fewer, processors idle
TOKENS_PER_PASS = {"cpu": 384, "cuda": 4096}
PAIRS_AT_ONCE = 512


@dataclass(frozen=True)
class Tree:
    """Token sequences in which every different beginning is one node, depth first."""

    tokens: np.ndarray  # (nodes,)
    depths: np.ndarray  # (nodes,): a token's position in its sequences
    ends: np.ndarray  # (nodes,): the first later node that does not go on from this one


def grow(sequences: Sequence[np.ndarray], counts: Sequence[int]) -> tuple[Tree, list[np.ndarray]]:
    """The tree of these sequences, and the nodes that the last `counts` tokens of each are."""
    # big end first, bytes sort as their numbers do: what begins alike comes together
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    tokens, depths, lasts = [], [], [np.empty(0, np.int64)] * len(sequences)
    ends = np.empty(sum(map(len, sequences)), np.int64)
    size, path, before = 0, np.empty(0, np.int64), np.empty(0, np.int32)
    for number in sorted(range(len(sequences)), key=keys.__getitem__):
        sequence = sequences[number]
        shared = min(len(before), len(sequence))
        differing = np.flatnonzero(before[:shared] != sequence[:shared])
        shared = int(differing[0]) if len(differing) else shared
        ends[path[shared:]] = size
        tokens.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(size, size + len(sequence) - shared)])
        size, before = size + len(sequence) - shared, sequence
        lasts[number] = path[len(path) - counts[number] :].copy()
    ends[path] = size
    return Tree(np.concatenate(tokens), np.concatenate(depths), ends[:size].copy()), lasts


class Scorer(HFLM):
    """lm-eval's view of a model in memory; the tokenizer decides whether a text begins with BOS, as in training.

    `loglikelihood` gives what HFLM gives, in any order of the requests and for any number of tokens in a pass: tokens
    encoded the same way, the beginning cut off what is too long, the softmax in float32. What requests share at their
    beginning (the question of its choices, the worked examples of all questions) is computed once: a pass takes the
    next `tokens_per_pass` nodes of the tree of all requests as one row without padding, each attending to those that
    it goes on from; their keys and values are kept from pass to pass. Models other than Llama are left to HFLM.

    Raises:
        TTLError: the tokenizer ends every text with EOS, which cuts a token off each choice.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, tokens_per_pass: int | None = None):
        if tokenizer("Resposta:")["input_ids"][-1] == tokenizer.eos_token_id:
            raise TTLError(
                "evaluation: the tokenizer ends every text with its EOS token, which spoils the scores of "
                "choices: load it with add_eos_token=False."
            )
        # a copy, because lm-eval adds a pad token if there is none
        own = copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, softmax_dtype=torch.float32)
        most = TOKENS_PER_PASS.get(self.device.type, 1024)
        self.tokens_per_pass = tokens_per_pass or min(most, batch_size * self.max_length)
        # the texts, (prompt, continuation) or (prompt,), of the requests that lost their beginning
        self.truncated: set[tuple[str, ...]] = set()
        self.on_progress: Callable[[float], None] = lambda share: None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Nats, whether greedy decoding says the same) of each request's continuation after its prompt."""
        pairs = [request.args for request in requests]
        encoded = []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            encoded += self._encode_pairs(pairs[start : start + PAIRS_AT_ONCE])
        for pair, (_, prompt, continuation) in zip(pairs, encoded, strict=True):
            if not len(continuation):
                raise TTLError(f"evaluation: {pair[1]!r} after {pair[0][-80:]!r} leaves no token of its own to score")
            if len(prompt) + len(continuation) > self.max_length + 1:
                self.truncated.add(pair)
        return self._loglikelihood_tokens(encoded, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """HFLM's, the prompts that lose their beginning to make room for the answer noted.

        Raises:
            TTLError: the answer alone may take the whole context.
        """
        for prompt, options in (request.args for request in requests):
            answer = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if answer >= self.max_length:
                raise TTLError(
                    f"evaluation: answers of {answer} tokens leave no room for a question in {self.max_length}"
                )
            if len(self.tok_encode(prompt)) > self.max_length - answer:
                self.truncated.add((prompt,))
        return super().generate_until(requests, disable_tqdm=True)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[None, np.ndarray, np.ndarray]]:
        """HFLM encodes prompt and whole of each choice, one by one: here each different text once, all together."""
        texts = [text for prompt, rest in pairs if prompt for text in (prompt.rstrip(), prompt + rest)]
        found = self._encode(texts)
        alone = self._encode([rest for prompt, rest in pairs if not prompt], add_special_tokens=False)
        bos, encoded = np.array([self.prefix_token_id], np.int32), []
        for prompt, rest in pairs:
            # spaces at a prompt's end are the continuation's, as its first token may begin with one
            before = found[prompt.rstrip()] if prompt else bos[:0]
            # what is left of the whole, whose beginning may be other tokens than the prompt's
            after = (found[prompt + rest] if prompt else alone[rest])[len(before) :]
            if not len(before):
                # what stands for a text's beginning, so that there is something to predict the first token from
                before, after = bos, after[1:] if len(after) and after[0] == bos[0] else after
            encoded.append((None, before, after))
        return encoded

    def _encode(self, texts: Sequence[str], **options: bool) -> dict[str, np.ndarray]:
        found, bos = {}, self.tokenizer.decode(self.prefix_token_id)
        for begins, more in ((False, {}), (True, {"add_special_tokens": False})):
            part = [text for text in dict.fromkeys(texts) if has_bos_prefix(text, bos) == begins]
            if part:
                ids = self.tokenizer(part, return_attention_mask=False, **(options | more))["input_ids"]
                found |= zip(part, (np.array(row, np.int32) for row in ids), strict=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not isinstance(self.model, LlamaForCausalLM):
            lists = [(text, *(np.asarray(ids).tolist() for ids in parts)) for text, *parts in requests]
            return super()._loglikelihood_tokens(lists, disable_tqdm, override_bs)
        return self._score([(np.concatenate(parts), len(parts[1])) for _, *parts in requests])

    @torch.no_grad()
    def _score(self, requests: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of the last tokens, as many as said, of each sequence."""
        # the last token is only predicted: one more than the context fits
        wholes = [whole[-(self.max_length + 1) :].astype(np.int32) for whole, _ in requests]
        counts = [min(count, len(whole) - 1) for whole, (_, count) in zip(wholes, requests, strict=True)]
        tree, nodes = grow([whole[:-1] for whole in wholes], counts)
        at, number = np.concatenate(nodes), np.repeat(np.arange(len(requests)), counts)
        order = np.argsort(at, kind="stable")
        at, number = at[order], number[order]
        target = np.concatenate([whole[len(whole) - n :] for whole, n in zip(wholes, counts, strict=True)])[order]
        nats, likeliest = np.empty(len(at)), np.empty(len(at), bool)
        output, step = self._output_layer(), max(1, CHUNK // self.model.config.vocab_size)
        with self._masked_attention():
            for first, hidden in self._passes(tree):
                here = slice(*np.searchsorted(at, (first, first + len(hidden))))
                nats[here], likeliest[here] = _predictions(output, hidden, at[here] - first, target[here], step)
                self.on_progress((first + len(hidden)) / len(tree.tokens))
        sums = np.bincount(number, nats, len(requests))
        missed = np.bincount(number, ~likeliest, len(requests))
        return [(float(value), not misses) for value, misses in zip(sums, missed, strict=True)]

    def _passes(self, tree: Tree) -> Iterator[tuple[int, torch.Tensor]]:
        """(First node, last hidden states (nodes, hidden)) of each pass through the layers."""
        dtype, cache, columns = self.model.dtype, DynamicCache(), np.empty(0, np.int64)
        for first in range(0, len(tree.tokens), self.tokens_per_pass):
            stop = min(first + self.tokens_per_pass, len(tree.tokens))
            rows = torch.arange(first, stop, device=self.device)[:, None]
            # the nodes whose keys and values the layers see: those kept, then this pass's
            columns = np.concatenate([columns, np.arange(first, stop)])
            ends = torch.from_numpy(tree.ends[columns]).to(self.device)
            seen = (torch.from_numpy(columns).to(self.device) <= rows) & (rows < ends)
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)
            hidden = self.model.model(
                input_ids=torch.from_numpy(tree.tokens[None, first:stop]).long().to(self.device),
                position_ids=torch.from_numpy(tree.depths[None, first:stop]).to(self.device),
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[0]
            yield first, hidden
            # the next node goes on from these
            kept = np.flatnonzero(tree.ends[columns] > stop)
            columns, index = columns[kept], torch.from_numpy(kept).to(self.device)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)

    def _output_layer(self) -> Callable[[torch.Tensor], torch.Tensor]:
        head = self.model.lm_head
        if isinstance(head, torch.nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16):
            # logits in 16 bits would make choices equal that are not
            weight = head.weight.float()
            return lambda hidden: linear(hidden.float(), weight)
        return head

    @contextlib.contextmanager
    def _masked_attention(self) -> Iterator[None]:
        """FlashAttention takes no mask of one's own."""
        usual = self.model.config._attn_implementation
        if usual in ("sdpa", "eager"):
            yield
            return
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)


def _predictions(
    output: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, at: np.ndarray, target: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each `target` after the state in row `at` (ascending), and whether it is the likeliest.

    No more than `step` states' logits are held.
    """
    nats, likeliest = np.empty(len(at)), np.empty(len(at), bool)
    states, which = np.unique(at, return_inverse=True)
    for start in range(0, len(states), step):
        here = slice(*np.searchsorted(which, (start, start + step)))
        rows = torch.from_numpy(states[start : start + step]).to(hidden.device)
        row, column = (torch.from_numpy(x).long().to(hidden.device) for x in (which[here] - start, target[here]))
        log_probs = output(hidden[rows]).float().log_softmax(-1)  # (states, vocab)
        nats[here] = log_probs[row, column].cpu()
        likeliest[here] = (log_probs.argmax(-1)[row] == column).cpu()
    return nats, likeliest
