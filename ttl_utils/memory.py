"""Memory of a training step by part, against what a GPU has."""

from __future__ import annotations

import pandas as pd

from ttl_utils.model import parameters_by_part
from ttl_utils.params import Params
from ttl_utils.schema import Model

GIB = 2**30
# of a card's memory; the rest goes to the driver, error correction and fragmentation (an assumption)
USABLE = 0.9


def activation_bytes(model: Model, seq: int, precision: str, attention: str, checkpointing: bool) -> int:
    """Bytes per token that the layers, in their lean form, keep for the backward pass; the loss is apart.

    Counted over what autograd saves; its test compares it with that.
    """
    hidden, layers = model.hidden_size, model.num_hidden_layers
    key_value = hidden // model.num_attention_heads * model.num_key_value_heads
    half = precision in ("bf16", "fp16")
    size = 2 if half else 4
    # inputs of q, k, v, output, gate and up: autocast gives each a copy of its own, in fp32 they share three
    inputs = (6 if half else 3) * hidden * size
    heads, scores = (hidden + 2 * key_value) * size, 0
    if attention == "eager":
        heads, scores = 3 * hidden * size, (6 if half else 4) * model.num_attention_heads * seq
    # the two norms keep their input, in fp32 whatever the precision; the feed-forward part its gate and its up
    layer = 2 * 4 * hidden + inputs + heads + scores + 2 * model.intermediate_size * size
    return (layers * 4 * hidden + layer if checkpointing else layers * layer) + 2 * 4 * hidden


def loss_bytes(model: Model, tokens: int, vocab_size: int, precision: str) -> int:
    """Bytes of the chunked loss: a chunk's logits twice, and the gradients of its input and of the output layer."""
    from ttl_utils.loss import CHUNK

    logits = min(tokens, max(1, CHUNK // vocab_size)) * vocab_size
    return (10 if precision in ("bf16", "fp16") else 8) * logits + 4 * model.hidden_size * (tokens + vocab_size)


def whole_logits_bytes(tokens: int, vocab_size: int) -> int:
    """What the logits would take if they were not computed in chunks: log-probabilities and two gradients, in fp32."""
    return 12 * tokens * vocab_size


def memory_by_part(params: Params, precision: str, rows: int | None = None) -> dict[str, float]:
    """Bytes that a training step needs at most, by part; `rows` of the micro-batch replace the file's.

    Gradients stand whole beside the activations: so it is in every micro-batch but a step's first. Steps of small
    models on a CPU (fp32) took 0.91 to 1.05 of the sum; on a GPU it is not measured.
    """
    settings, model, vocab_size = params.pretraining, params.model, params.tokenizer.vocab_size
    tokens = (rows or settings.per_device_train_batch_size) * block(params)
    parts = parameters_by_part(model, vocab_size)
    count = sum(parts.values())
    layers = activation_bytes(model, block(params), precision, settings.attention, settings.gradient_checkpointing)
    # the copies that autocast keeps until they have had their gradients: of q, k, v, output, gate and up
    copied = parts["attention"] + parts["feed-forward"] * 2 / 3 if precision in ("bf16", "fp16") else 0
    return {
        "weights": 4.0 * count,
        "16-bit copies of weights": 2.0 * copied,
        "gradients": 4.0 * count,
        "optimizer": 8.0 * count,
        "activations": float(tokens * layers),
        "loss, logits in chunks": float(loss_bytes(model, tokens, vocab_size, precision)),
    }


def needed(params: Params, precision: str, rows: int | None = None) -> float:
    """GiB of a training step, all parts together."""
    return sum(memory_by_part(params, precision, rows).values()) / GIB


def block(params: Params) -> int:
    return params.pretraining.block_size or params.model.max_position_embeddings


def precision_of(params: Params, gpu: pd.Series) -> str | None:
    """The precision the run takes on this GPU; None where the GPU has not the one asked for."""
    asked = params.pretraining.precision
    if asked == "auto":
        return "bf16" if gpu.bf16 > 0 else "fp16"
    return asked if gpu[asked] > 0 else None


def rows_that_fit(params: Params, gpu: pd.Series) -> int:
    """The largest micro-batch, in rows, that divides a step's tokens and fits in the GPU's memory; 0: none."""
    step, precision = params.pretraining.tokens_per_step // block(params), precision_of(params, gpu)
    if precision is None:
        return 0
    divisors = (rows for rows in range(step, 0, -1) if step % rows == 0)
    return next((rows for rows in divisors if needed(params, precision, rows) <= USABLE * gpu.memory_gib), 0)


def memory_table(params: Params, gpu: pd.Series) -> pd.DataFrame:
    """GiB by part at the file's micro-batch, with the logits as they are computed and as they would be whole."""
    parts = memory_by_part(params, precision_of(params, gpu) or "fp32")
    whole = whole_logits_bytes(
        params.pretraining.per_device_train_batch_size * block(params), params.tokenizer.vocab_size
    )
    rows = [(part, size / GIB) for part, size in parts.items() if size]
    rows += [("in all", sum(parts.values()) / GIB), ("logits alone, were they not in chunks", whole / GIB)]
    return pd.DataFrame(rows, columns=["part", "GiB"])
