"""CBOR items of a stream, one by one: what is in a state, in the one form that it may have.

Sans-IO. Sizes, counts and depth are known good before anything is decoded, so that no input makes
the decoder allocate more, or recurse deeper, than these limits.
"""

from __future__ import annotations

from typing import Any

import cbor2

from .errors import StateError

#: Bytes of one chunk of internal state.
MAX_CHUNK = 1 << 20
#: Bytes of one section, encoded.
MAX_SECTION = 1 << 20
#: Values in one section, all levels together.
MAX_VALUES = 100_000
#: Arrays and maps inside each other.
MAX_DEPTH = 16

NULL = b"\xf6"

_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(2, 8)
_SHORT = 24  # the first argument that does not fit into the initial byte
_BOOL_OR_NULL = (20, 21, 22)
# Additional information → bytes of the argument, and the smallest that needs so many.
_WIDTHS = {24: (1, _SHORT), 25: (2, 1 << 8), 26: (4, 1 << 16), 27: (8, 1 << 32)}


def invalid(what: str) -> StateError:
    """The error for a stream or state that breaks the format."""
    return StateError(
        f"not a valid device state: {what}", "take another copy, or save the device again"
    )


def encode(value: object) -> bytes:
    """One item in its deterministic form (RFC 8949, section 4.2.1).

    Text is the only kind of map key that we write, so the older ordering rule (section 4.2.3),
    which is cbor2's, gives the same order.

    Raises:
        StateError: it has something that a state may not have, or exceeds the limits.
    """
    try:
        raw = cbor2.dumps(value, canonical=True)
    except (cbor2.CBOREncodeError, UnicodeError, RecursionError) as error:
        raise invalid(str(error).partition("\n")[0]) from None
    check = Items()
    check.feed(raw)
    if check.take() != raw:
        raise invalid("it has more than one item where one belongs")
    return raw


def decode(raw: bytes) -> Any:
    """The value of an item that ``Items.take`` gave.

    Raises:
        StateError: text that is no UTF-8, map keys that repeat or are out of order.
    """
    try:
        value = cbor2.loads(raw)
        same = cbor2.dumps(value, canonical=True) == raw
    except (cbor2.CBORError, ValueError) as error:
        raise invalid(f"an item can't be decoded ({str(error).partition(chr(10))[0]})") from None
    if not same:
        raise invalid("map keys repeat or are out of order")
    return value


def chunk_head(size: int) -> bytes:
    """What stands before the ``size`` bytes of a chunk."""
    if size < _SHORT:
        return bytes([_BYTES << 5 | size])
    info = next(i for i, (width, _) in _WIDTHS.items() if size < 1 << (8 * width))
    return bytes([_BYTES << 5 | info]) + size.to_bytes(_WIDTHS[info][0], "big")


def chunk_data(raw: bytes) -> bytes:
    """The bytes of an item that is a chunk.

    Raises:
        StateError: it is not, or is empty.
    """
    kind, info = raw[0] >> 5, raw[0] & 31
    if kind != _BYTES or not info:
        raise invalid("something else stands where internal state belongs")
    return raw[1 + _WIDTHS.get(info, (0, 0))[0] :]


class Items:
    """Cuts a stream into items. ``feed`` it bytes, then ``take`` until there is no whole one."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._restart()

    def _restart(self) -> None:
        self._at = 0  # what is before was looked at
        self._values = 0
        # Values that are still to come in each open array or map, and whether it is a map.
        self._open: list[tuple[int, bool]] = []

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    @property
    def waiting(self) -> int:
        """Bytes that no item was made of yet."""
        return len(self._buffer)

    def take(self) -> bytes | None:
        """The next item, or ``None`` until more was fed.

        Raises:
            StateError: the next item is too large, or of a kind that no state has.
        """
        while self._value():
            if not self._open:
                raw = bytes(memoryview(self._buffer)[: self._at])
                del self._buffer[: self._at]
                self._restart()
                return raw
        return None

    def _value(self) -> bool:
        """Step over one value's head, and its bytes; false if they are not all there yet."""
        head = self._head()
        if head is None:
            return False
        major, argument, end = head
        inner = 0
        if major in (_BYTES, _TEXT):
            end += argument
        elif major in (_ARRAY, _MAP):
            inner = argument * (2 if major == _MAP else 1)
        limit = MAX_CHUNK + 5 if major == _BYTES and not self._open else MAX_SECTION
        # Every value inside takes a byte at least.
        if end + inner > limit or self._values + inner > MAX_VALUES:
            raise invalid(f"an item is larger than {limit} bytes or {MAX_VALUES} values")
        if len(self._buffer) < end:
            return False
        self._at = end
        self._values += 1
        self._count(inner, major == _MAP)
        return True

    def _head(self) -> tuple[int, int, int] | None:
        """Major type, argument, and where the head ends; ``None`` if it is not all there."""
        if self._at >= len(self._buffer):
            return None
        major, info = self._buffer[self._at] >> 5, self._buffer[self._at] & 31
        if major == _TAG or (major == _SIMPLE and info not in _BOOL_OR_NULL):
            raise invalid("tags, floating point and undefined values have no place in it")
        if self._open and self._open[-1][1] and not self._open[-1][0] % 2 and major != _TEXT:
            raise invalid("a map key is no text")
        start = self._at + 1
        if info < _SHORT:
            return major, info, start
        if info not in _WIDTHS:
            raise invalid("an item has an indefinite length")
        width, smallest = _WIDTHS[info]
        if len(self._buffer) < start + width:
            return None
        argument = int.from_bytes(self._buffer[start : start + width], "big")
        if argument < smallest:
            raise invalid("a number is not in its shortest form")
        return major, argument, start + width

    def _count(self, inner: int, is_map: bool) -> None:
        if self._open:
            left, outer_is_map = self._open[-1]
            self._open[-1] = (left - 1, outer_is_map)
        if inner:
            if len(self._open) == MAX_DEPTH:
                raise invalid(f"more than {MAX_DEPTH} arrays and maps are inside each other")
            self._open.append((inner, is_map))
        while self._open and not self._open[-1][0]:
            self._open.pop()
