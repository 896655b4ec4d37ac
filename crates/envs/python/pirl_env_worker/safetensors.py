"""Writer of safetensors files (8-byte header length, JSON header, tensor bytes) that needs only numpy."""

from __future__ import annotations

import json
import os
import pathlib
import struct

import numpy as np

DTYPES = {"uint8": "U8", "int64": "I64", "float32": "F32"}


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray], meta: dict) -> None:
    """Writes `tensors` (uint8, int64 or float32) and `meta` as JSON text under the single metadata key "meta".

    The function writes a temporary file in the same folder, then syncs and renames the file. A reader therefore finds the old
    file or the whole new file. Tensors are ordered by type, widest first, then by name. The header is padded to 8 bytes, so that every
    tensor is aligned.
    """
    path = pathlib.Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict = {"__metadata__": {"meta": json.dumps(meta, sort_keys=True)}}
    offset = 0
    for name in order:
        array = tensors[name]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(beside, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                array = np.ascontiguousarray(tensors[name])
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
