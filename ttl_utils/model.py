"""The Llama of a size: configuration, parameter and FLOP counts, and the choice of device, precision and attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ttl_utils.errors import ParameterError
from ttl_utils.schema import Model, Optimisation

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def parameters_by_part(model: Model, vocab_size: int) -> dict[str, int]:
    """Parameters of each part (paper, table 2: 162,417,408 and 468,239,360 with untied embeddings)."""
    hidden, layers = model.hidden_size, model.num_hidden_layers
    key_value = hidden // model.num_attention_heads * model.num_key_value_heads
    return {
        "input embedding": vocab_size * hidden,
        "attention": layers * (2 * hidden * hidden + 2 * hidden * key_value),
        "feed-forward": layers * 3 * hidden * model.intermediate_size,
        "norms": (2 * layers + 1) * hidden,
        "output layer": 0 if model.tie_word_embeddings else vocab_size * hidden,
    }


def count_parameters(model: Model, vocab_size: int) -> int:
    return sum(parameters_by_part(model, vocab_size).values())


def flops_per_token(model: Model, vocab_size: int, block_size: int | None = None) -> dict[str, float]:
    """Training FLOPs per token: the usual convention, 6N + 12 layers x hidden x context, and what is executed.

    The convention counts the input embedding, a look-up, and the masked half of attention.
    """
    count = count_parameters(model, vocab_size)
    # of rows shorter than the context, where they are
    attention = model.num_hidden_layers * model.hidden_size * (block_size or model.max_position_embeddings)
    looked_up = 0 if model.tie_word_embeddings else vocab_size * model.hidden_size
    return {
        "convention": 6.0 * count + 12.0 * attention,
        "executed": 6.0 * (count - looked_up) + 6.0 * attention,
    }


def llama_config(model: Model, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.rms_norm_eps,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(model: Model, tokenizer: PreTrainedTokenizerBase, seed: int, attention: str) -> LlamaForCausalLM:
    """A model with random weights that depend on the seed alone, in float32 on the CPU."""
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(model, tokenizer)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert count == count_parameters(model, len(tokenizer)), f"{count:,} parameters, expected by the formula otherwise"
    return made


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Keep the layers' inputs alone, and compute the rest again in the backward pass (`gradient_checkpointing`)."""
    # its name until transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@dataclass(frozen=True)
class Hardware:
    """What the run uses, each choice with its reason."""

    device: str
    precision: str
    attention: str
    reasons: tuple[str, ...] = field(default=())

    @property
    def mixed_precision(self) -> str:
        return self.precision if self.precision in ("bf16", "fp16") else "no"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that are not trained: 16 bits where it computes in 16."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def choose_hardware(settings: Optimisation) -> Hardware:
    """Resolve `auto`, and refuse what was asked for and cannot be.

    Raises:
        ParameterError: a device, precision or attention that this machine does not have.
    """
    import torch

    device, why_device = _device(settings.device)
    precision, why_precision = _precision(settings.precision, device)
    attention, why_attention = _attention(settings.attention, device, precision)
    # set either way: an earlier stage of this process may have left the other
    torch.set_float32_matmul_precision("high" if precision in ("tf32", "bf16") and device == "cuda" else "highest")
    reasons = (f"device: {device} ({why_device})", f"precision: {precision} ({why_precision})")
    return Hardware(device, precision, attention, (*reasons, f"attention: {attention} ({why_attention})"))


def _device(asked: str) -> tuple[str, str]:
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked != "auto":
        if not present[asked]:
            raise ParameterError(f"device {asked!r}: this machine has none; set it to auto or cpu")
        return asked, "as asked"
    if present["cuda"]:
        return "cuda", torch.cuda.get_device_name()
    return ("mps", "Apple GPU") if present["mps"] else ("cpu", f"no GPU was found; {torch.get_num_threads()} threads")


def _precision(asked: str, device: str) -> tuple[str, str]:
    import torch

    # on a T4 bf16 is emulated, and slow: ask for the real thing
    real_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked != "auto":
        if device != "cuda" and asked in ("tf32", "fp16"):
            raise ParameterError(f"precision {asked!r} needs a CUDA GPU, and the device is {device}; use auto or fp32")
        if device == "cuda" and asked in ("tf32", "bf16") and not real_bf16:
            raise ParameterError(f"precision {asked!r} needs an Ampere GPU or newer; use auto or fp16")
        return asked, "as asked"
    if device == "cuda":
        return ("bf16", "the GPU computes it") if real_bf16 else ("fp16", "the GPU has no bf16 of its own")
    return "fp32", "without an NVIDIA GPU bf16 may be faster or far slower: `ttl search` measures it"


def _attention(asked: str, device: str, precision: str) -> tuple[str, str]:
    import torch

    missing = []
    if device != "cuda":
        missing.append("it needs a CUDA GPU")
    elif torch.cuda.get_device_capability()[0] < 8:
        missing.append("it needs an Ampere GPU or newer")
    if precision not in ("bf16", "fp16"):
        missing.append("it needs bf16 or fp16")
    if find_spec("flash_attn") is None:
        missing.append("flash-attn is not installed")
    if asked == "flash_attention_2" and missing:
        raise ParameterError(f"attention flash_attention_2 cannot be used here: {'; '.join(missing)}. Use auto or sdpa")
    if asked != "auto":
        return asked, "as asked"
    if not missing:
        return "flash_attention_2", "flash-attn is installed and the GPU can"
    return "sdpa", f"PyTorch's own fused attention; not FlashAttention 2: {missing[0]}"
