"""How weights are held for inference: 32 or 16 bits, dynamic int8 on a CPU, torchao's int8 and int4 on a GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import Linear, Module

from ttl_utils.decoding import best_seconds
from ttl_utils.errors import TTLError
from ttl_utils.model import Hardware

# of the rows that one scale of int4 stands for; torchao's default
INT4_GROUP = 128
# below this share of fp32's rate 16 bits are not measured: a turn would take minutes
SLOWEST = 0.1


@dataclass(frozen=True)
class Way:
    """How the weights are held: `make` gives the model that is measured, from one in fp32 on the CPU.

    `precision` is that of the products. `compiled`: a static cache and a compiled step (CUDA graphs), in the place of
    a cache that grows and plain PyTorch.
    """

    name: str
    precision: str
    make: Callable[[Any], Any]
    compiled: bool = False


def ways(hardware: Hardware) -> list[Way]:
    """Those that are measured on this device, the plainest first: it is what the others are compared with."""
    if hardware.device == "cpu":
        return [Way("fp32", "fp32", lambda model: model), Way("int8 dynamic", "int8", int8), Way("bf16", "bf16", _bf16)]
    moved = partial(_moved, hardware.device)
    if hardware.device != "cuda":
        return [Way(name, name, partial(moved, name)) for name in ("fp32", "fp16")]
    full = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    named = {
        f"int{bits} weights": (lambda model, bits=bits: torchao_weights(moved(half, model), bits)) for bits in (8, 4)
    }
    return [
        *(Way(name, name, partial(moved, name)) for name in (full, half)),
        *(
            Way(f"{name}, static cache, compiled", half, make, compiled=True)
            # torchao's products are in 16 bits
            for name, make in ({half: partial(moved, half)} | named).items()
        ),
    ]


def _moved(device: str, precision: str, model: Any) -> Any:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    made = copy.deepcopy(model).to(device)
    # the weights alone: the angles of positions keep their 32 bits, as where a model is loaded in 16
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def _bf16(model: Any) -> Any:
    """The model in bf16 on the CPU.

    Raises:
        TTLError: this CPU computes with it at a rate that nobody would wait for; both rates are named.
    """
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.full((256, 256), 0.5, dtype=dtype)
        rates.append(2 * 256**3 / best_seconds(partial(torch.mm, one, one), 0.05) / 1e9)
    if rates[1] < SLOWEST * rates[0]:
        raise TTLError(f"a product in bf16 runs at {rates[1]:.1f} GFLOP/s on this CPU, one in fp32 at {rates[0]:.0f}")
    return _moved("cpu", "bf16", model)


class Int8Linear(Module):
    """A linear layer in int8, for inference on a CPU: weights packed once, inputs rounded as they come.

    A weight's scale is its row's largest absolute value / 127, and its zero is 0. An input has one scale for all that
    is passed at once, so rows of a batch hang together a little. `state_dict` holds `weight` (out, in) int8, `scale`
    (out,) fp32, and the bias in fp32.
    """

    def __init__(self, linear: Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach()
        # a row of zeros has any scale
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
        self.packed = _packed(weight, scale, linear.bias)
        self.reduce_range = _overflows()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(hidden, self.packed, self.reduce_range)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        whole, bias = torch.ops.quantized.linear_unpack(self.packed)
        destination[prefix + "weight"] = whole.int_repr()
        destination[prefix + "scale"] = whole.q_per_channel_scales().float()
        if bias is not None:
            destination[prefix + "bias"] = bias

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *_: Any) -> None:
        weight, scale = state_dict[prefix + "weight"], state_dict[prefix + "scale"]
        self.packed = _packed(weight * scale[:, None], scale, state_dict.get(prefix + "bias"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _packed(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        # tensors of these types are to go from PyTorch; products of plain int8 tensors take 1.6 times as long today
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
        whole = torch.quantize_per_channel(weight, scale.double(), zeros, axis=0, dtype=torch.qint8)
        return torch.ops.quantized.linear_prepack(whole, None if bias is None else bias.detach())


@cache
def _overflows() -> bool:
    """Whether pairs of products leave 16 bits here, as on x86 without VNNI: then inputs have 7 bits in place of 8."""
    packed = _packed(torch.ones(1, 64), torch.ones(1) / 127, None)
    return abs(torch.ops.quantized.linear_dynamic(torch.ones(1, 64), packed, False).item() - 64) > 1


def int8(model: Module) -> Module:
    """A copy whose linear layers are `Int8Linear`; all else (embedding, norms) is shared with the model.

    Raises:
        TTLError: a model that is not in fp32 on the CPU.
    """
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            found = f"{parameter.dtype} on {parameter.device}".removeprefix("torch.")
            raise TTLError(f"dynamic int8 is made of a model in float32 on the CPU; this one is {found}: load it so")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    for name, module in list(made.named_modules()):
        if type(module) is Linear:
            made.set_submodule(name, Int8Linear(module))
    return made


def torchao_weights(model: Module, bits: int) -> Module:
    """The model, in place, with linear weights of 8 bits (a scale a row) or 4 (a scale every 128) by torchao.

    Raises:
        TTLError: torchao is not installed. What else torchao does not support is its own error.
    """
    if find_spec("torchao") is None:
        raise TTLError("torchao is not installed: pip install torchao")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if bits == 8:
        config = Int8WeightOnlyConfig()
    else:
        # the one layout of int4 that an A100 has a kernel for
        config = Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d")
    quantize_(model, config)
    return model


def weight_bytes(module: Module) -> int:
    """Bytes of the weights as they are held and saved; a tensor that two layers share counts once."""
    # objects, all alive: two layers that share a tensor have the same
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(_bytes(tensor) for tensor in tensors.values())


def step_bytes(model: Any) -> int:
    """Bytes of the weights that a step of decoding reads: all but the input embedding, of which it takes a row."""
    embedding = model.get_input_embeddings().weight
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    return weight_bytes(model) - (0 if tied else _bytes(embedding))


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache for each token of each row."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * dtype.itemsize


def _bytes(tensor: torch.Tensor) -> int:
    # torchao's tensors are made of several
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
