"""Tensors to a safetensors file as they come: one at a time, hashed while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
# written and hashed at a time: what was just copied is still in the processor's cache when it is hashed
_PIECE = 1 << 20


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """A safetensors file, byte for byte as the library's, and its SHA-256; the bytes have reached the disk.

    The library's own function wants all tensors on the CPU at once, and the file must be read again to be hashed.
    """
    # larger types first, so that all are aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]

        put(memoryview(struct.pack("<Q", len(text)) + text))
        for name in order:
            put(memoryview(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy()))
        os.fsync(file.fileno())
    return digest.hexdigest()
