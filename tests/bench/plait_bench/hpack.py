"""Just enough HPACK (RFC 7541) for a load generator: fields without indexing out, and grpc-status found in what comes in.

We announce a dynamic table of size 0, so every block that comes stands for itself and can be read without state.
"""

from __future__ import annotations

from typing import Final

_HUFFMAN: Final = {  # RFC 7541 appendix B, the letters of "grpc-status" and the digits: (code, bits)
    "a": (0x3, 5), "c": (0x4, 5), "s": (0x8, 5), "t": (0x9, 5), "-": (0x16, 6), "g": (0x26, 6), "p": (0x2B, 6), "r": (0x2C, 6), "u": (0x2D, 6),
    "0": (0x0, 5), "1": (0x1, 5), "2": (0x2, 5), "3": (0x19, 6), "4": (0x1A, 6), "5": (0x1B, 6), "6": (0x1C, 6), "7": (0x1D, 6), "8": (0x1E, 6), "9": (0x1F, 6),
}  # fmt: skip
_STATIC_SIZE: Final = 61


def huffman(text: str) -> bytes:
    """Encode text made of the few characters we know."""
    value = bits = 0
    for character in text:
        code, length = _HUFFMAN[character]
        value, bits = value << length | code, bits + length
    padding = -bits % 8
    return (value << padding | (1 << padding) - 1).to_bytes((bits + padding) // 8, "big")


_NAME: Final = b"grpc-status"
_CODED_NAME: Final = huffman("grpc-status")
_CODED_VALUES: Final = {huffman(str(code)): code for code in range(17)}
_PLAIN: Final = b"\x0bgrpc-status\x01"  # cannot be part of a value: those hold no control characters


def integer(value: int, prefix_bits: int, flags: int = 0) -> bytes:
    """Encode an integer (section 5.1)."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([flags | value])
    out = bytearray([flags | most])
    value -= most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def read_integer(data: bytes, at: int, prefix_bits: int) -> tuple[int, int]:
    """Decode an integer; return it and where the next thing starts."""
    most = (1 << prefix_bits) - 1
    value = data[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = data[at]
        at += 1
        value += (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def field(name: str | int, value: str) -> bytes:
    """Encode one header field, literal without indexing; `name` may be an index of the static table."""
    if isinstance(name, int):
        return integer(name, 4) + _string(value)
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return integer(len(raw), 7) + raw


def grpc_status(block: bytes) -> int | None:
    """Return the value of grpc-status in a header block, None where there is none. Raises ValueError, IndexError on what we cannot read."""
    at = block.find(_PLAIN)
    if at >= 0:
        return block[at + len(_PLAIN)] - 48
    at = 0
    while at < len(block):
        byte = block[at]
        if byte & 0x80:
            index, at = read_integer(block, at, 7)
            _check_static(index)
            continue
        if byte & 0xE0 == 0x20:
            _, at = read_integer(block, at, 5)
            continue
        index, at = read_integer(block, at, 6 if byte & 0x40 else 4)
        _check_static(index)
        coded_name, name, at = (False, b"", at) if index else _read_string(block, at)
        coded, value, at = _read_string(block, at)
        if name == (_CODED_NAME if coded_name else _NAME):
            return _CODED_VALUES[value] if coded else int(value)
    return None


def _read_string(block: bytes, at: int) -> tuple[bool, bytes, int]:
    coded = block[at] >= 0x80
    length, at = read_integer(block, at, 7)
    if at + length > len(block):
        raise ValueError("a string is longer than its block")
    return coded, block[at : at + length], at + length


def _check_static(index: int) -> None:
    if index > _STATIC_SIZE:
        raise ValueError(f"index {index} is of a dynamic table, although we announced none")
