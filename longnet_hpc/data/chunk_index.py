"""The index of a chunked HDF5 dataset, looked at before HDF5 uses it: with a forged one HDF5 divides by zero, and dies.

Damage by chance never comes so far, since HDF5 compares checksums of its metadata; who means harm computes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["has_sound_index"]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LAYOUT, _CONTINUATION = 8, 16
"""Types of messages in the header of an object."""
_SHARED = 2
"""Flag of a message that lies elsewhere."""
_CHUNKED, _EXTENSIBLE_ARRAY = 2, 4
_AS_HDF5_MAKES_IT = bytes([32, 4, 4, 16, 10])
"""Bits of a position, elements in the index, pointers, elements of a block, bits of a page: HDF5 offers no choice."""
_HEADER = b"EAHD" + bytes([0, 0, 8, 32, 4, 16, 4, 10])
_MOST_BLOCKS = 16
_LONGEST_BLOCK = 1 << 16


def has_sound_index(file: BinaryIO, address: int) -> bool:
    """Return whether the chunks of a dataset are indexed as in any corpus: by an extensible array of usual sizes.

    Parameters
    ----------
    file : binary file
        The HDF5 file, open for reading.
    address : int
        Where the header of the dataset begins, in bytes.
    """
    superblock = _read(file, 0, 20)
    if superblock[:8] != _SIGNATURE or superblock[9:11] != bytes([8, 8]) or superblock[12:] != bytes(8):
        return False  # addresses are of 8 bytes, and count from the beginning of the file
    for kind, message in _messages(file, address):
        if kind == _LAYOUT:
            if len(message) < 5 or message[:2] != bytes([4, _CHUNKED]):
                return False
            at = 5 + message[3] * message[4]  # behind the sizes of a chunk
            rest = message[at : at + 14]
            if len(rest) < 14 or rest[0] != _EXTENSIBLE_ARRAY or rest[1:6] != _AS_HDF5_MAKES_IT:
                return False
            where = int.from_bytes(rest[6:], "little")
            return where == (1 << 64) - 1 or _read(file, where, len(_HEADER)) == _HEADER  # the former if empty
    return False


def _messages(file: BinaryIO, address: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of the messages in the header of an object, of HDF5's second version."""
    start = _read(file, address, 64)
    if len(start) < 64 or start[:5] != b"OHDR\x02":
        return
    flags = start[5]
    at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    blocks = [(address + at + width, int.from_bytes(start[at : at + width], "little"))]
    head = 6 if flags & 4 else 4
    for _ in range(_MOST_BLOCKS):
        if not blocks:
            return
        block = _read(file, *blocks.pop(0))
        at = 0
        while at + head <= len(block):
            size = int.from_bytes(block[at + 1 : at + 3], "little")
            message = block[at + head : at + head + size]
            if block[at] == _CONTINUATION and len(message) == 16:
                where, length = (int.from_bytes(part, "little") for part in (message[:8], message[8:]))
                blocks.append((where + 4, length - 8))  # between a signature and a checksum
            yield block[at], message if not block[at + 3] & _SHARED else b""
            at += head + size


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    if start >= 1 << 62 or not 0 < size <= _LONGEST_BLOCK:
        return b""
    file.seek(start)
    return file.read(size)
