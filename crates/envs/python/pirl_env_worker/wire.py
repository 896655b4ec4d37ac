"""Frames between env worker and engine, with the bytes, limits and checks of the Rust crate `wire`.

A frame is `b"PIRL"`, wire version u16, zero u16, payload length u32 (all little-endian), then a MessagePack map. The map has one
key, the message's name. Arrays are maps of dtype (`f32`, `u8`), shape and row-major little-endian bytes.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

#: Version of the messages; both ends must agree.
WIRE_VERSION = 4
MAX_FRAME_BYTES = 256 << 20
HEADER = struct.Struct("<4sHHI")
MAGIC = b"PIRL"

_DTYPES = {"f32": np.dtype("<f4"), "u8": np.dtype("u1")}


class WireError(Exception):
    """Reason why a frame cannot be decoded or encoded. `fatal`: the peer is not an engine of this release."""

    def __init__(self, text: str, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


def encode(name: str, body: Any) -> bytes:
    """Returns the frame of the message `name`. Raises `WireError` for a frame that is too long."""
    payload = msgpack.packb({name: body}, use_single_float=True, use_bin_type=True)
    if HEADER.size + len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {HEADER.size + len(payload)} bytes, at most {MAX_FRAME_BYTES} are sent")
    return HEADER.pack(MAGIC, WIRE_VERSION, 0, len(payload)) + payload


def decode(frame: bytes) -> tuple[str, Any]:
    """Returns (name, checked body) of a message from the engine. Raises `WireError`."""
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(frame)} bytes, at most {MAX_FRAME_BYTES} are accepted")
    if len(frame) < HEADER.size:
        raise WireError(f"frame of {len(frame)} bytes is shorter than the header of {HEADER.size} bytes")
    magic, version, _, length = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise WireError("frame does not begin with `PIRL`: the peer speaks another protocol", fatal=True)
    if version != WIRE_VERSION:
        raise WireError(f"frame has wire version {version}, expected {WIRE_VERSION}: both ends must be the same release", fatal=True)
    if length != len(frame) - HEADER.size:
        raise WireError(f"frame announces {length} payload bytes and carries {len(frame) - HEADER.size}")
    try:
        payload = msgpack.unpackb(memoryview(frame)[HEADER.size :], strict_map_key=True)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"payload is no MessagePack: {type(error).__name__} {error}".rstrip()) from error
    name, body = _variant(payload, "message", _FROM_ENGINE)
    return name, body


def array(values: np.ndarray) -> dict[str, Any]:
    """Returns a float32 or uint8 array in its wire form. Raises `WireError` for another type."""
    dtype = next((name for name, dtype in _DTYPES.items() if dtype == values.dtype), None)
    if dtype is None:
        raise WireError(f"an array of type `{values.dtype}` cannot be sent, expected float32 or uint8")
    return {"dtype": dtype, "shape": list(values.shape), "data": np.ascontiguousarray(values).tobytes()}


# Checks of received values. Each check takes a value and its path in the message, and returns the checked value.


def _fail(where: str, expected: str, found: Any) -> WireError:
    return WireError(f"`{where}`: expected {expected}, found {str(found)[:80]!r}")


def _unsigned(bits: int):
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise _fail(where, f"an unsigned {bits}-bit number", value)
        return value

    return check


def _bool(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _fail(where, "true or false", value)
    return value


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        raise _fail(where, "a text", value)
    return value


def _list(check):
    def inner(value: Any, where: str) -> list:
        if type(value) is not list:
            raise _fail(where, "a list", value)
        return [check(item, f"{where}[{index}]") for index, item in enumerate(value)]

    return inner


def _optional(check):
    return lambda value, where: None if value is None else check(value, where)


def _struct(**fields):
    def check(value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise _fail(where, "a map", value)
        for key in value:
            if key not in fields:
                raise _fail(where, f"fields {', '.join(f'`{f}`' for f in fields)}", key)
        return {name: field(value.get(name), f"{where}.{name}") for name, field in fields.items()}

    return check


def _variant(value: Any, where: str, variants: dict[str, Any]) -> tuple[str, Any]:
    if type(value) is not dict or len(value) != 1:
        raise _fail(where, "a map with one key", value)
    (name, body), = value.items()
    if name not in variants:
        raise _fail(where, f"one of {', '.join(f'`{v}`' for v in variants)}", name)
    return name, variants[name](body, name)


def _array(value: Any, where: str) -> np.ndarray:
    fields = _struct(dtype=_text, shape=_list(_unsigned(32)), data=lambda v, w: v)(value, where)
    if fields["dtype"] not in _DTYPES:
        raise _fail(f"{where}.dtype", "`f32` or `u8`", fields["dtype"])
    if type(fields["data"]) is not bytes:
        raise _fail(f"{where}.data", "bytes", type(fields["data"]).__name__)
    dtype = _DTYPES[fields["dtype"]]
    size = dtype.itemsize
    for extent in fields["shape"]:
        size *= extent
    if size != len(fields["data"]):
        raise _fail(where, f"the {size} bytes of shape {fields['shape']}", f"{len(fields['data'])} bytes")
    return np.frombuffer(fields["data"], dtype).reshape(fields["shape"])


_RESET = _struct(
    seed=_unsigned(64),
    env=_unsigned(32),
    episode=_unsigned(64),
    reset_state=_optional(_unsigned(64)),
    task=_optional(_unsigned(32)),
    group=_optional(_unsigned(32)),
    video=_bool,
)


def _command(value: Any, where: str) -> tuple[str, Any]:
    return _variant(value, where, {"reset": _RESET, "act": _array})


_FROM_ENGINE = {
    "welcome": _struct(version=_unsigned(64), action_chunk=_unsigned(32), env_action_dim=_unsigned(32), cameras=_list(_text)),
    "commands": _list(_struct(slot=_unsigned(32), command=_command)),
    "refused": _struct(request=_optional(_unsigned(64)), retry=_bool, reason=_text),
}
