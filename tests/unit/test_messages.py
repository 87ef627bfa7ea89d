"""Every message that may lie in a frame, frozen; msgpack is the independent decoder.

A line of golden/messages.txt is: module, class, method number (or "-"), bytes of one example.  A released line is never
edited.  A new message needs a new line, which the failing test prints; fields may be appended with defaults.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.inspect import (
    BoolType,
    BytesType,
    EnumType,
    IntType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
    VarTupleType,
)

import blockstore.core.cluster_map
import blockstore.protocol
import metadata.core.schema
import metadata.protocol
import wire.rpc.handshake
from wire.codec import decode, encode
from wire.errors import ProtocolViolation
from wire.message import Message, Request

GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
MODULES = (
    wire.rpc.handshake,
    blockstore.core.cluster_map,
    blockstore.protocol,
    metadata.core.schema,
    metadata.protocol,
)


def message_classes() -> dict[str, type[Message]]:
    """Every concrete message by "module class"."""
    found: dict[str, type[Message]] = {}
    for module in MODULES:
        for name, kind in vars(module).items():
            if not (inspect.isclass(kind) and issubclass(kind, Message)) or kind.__module__ != module.__name__:
                continue
            if issubclass(kind, Request) and not hasattr(kind, "METHOD"):
                continue  # A base class, such as Mutation.
            found[f"{module.__name__} {name}"] = kind
    return found


CLASSES = message_classes()


def example_of(kind: Type, number: int) -> Any:  # noqa: ANN401
    """A value of that type, the same for ever; `number` makes neighbours differ."""
    if isinstance(kind, IntType):
        low = kind.ge if kind.ge is not None else 0
        high = min(bound for bound in (kind.le, kind.lt and kind.lt - 1, low + 5000) if bound is not None)
        return low + number * 97 % (high - low + 1)
    if isinstance(kind, StrType):
        return f"s{number}é"
    if isinstance(kind, BytesType):
        return b"b%d\xff\x00" % number
    if isinstance(kind, BoolType):
        return number % 2 == 1
    if isinstance(kind, EnumType):
        members = list(kind.cls)
        return members[number % len(members)]
    if isinstance(kind, VarTupleType):
        return tuple(example_of(kind.item_type, number + i) for i in range(2))
    if isinstance(kind, TupleType):
        return tuple(example_of(item, number + i) for i, item in enumerate(kind.item_types))
    if isinstance(kind, StructType):
        return example(kind.cls, number)
    assert isinstance(kind, UnionType), f"no example for {kind}"
    return example_of(next(k for k in kind.types if not isinstance(k, msgspec.inspect.NoneType)), number)


def example(kind: type, number: int = 1) -> Any:  # noqa: ANN401
    """One message of a class, every field filled."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, StructType)
    return kind(*(example_of(field.type, number + i) for i, field in enumerate(info.fields)))


def plain(value: Any) -> Any:  # noqa: ANN401
    """A message as the lists and numbers it is on the wire."""
    if isinstance(value, Message):
        return [plain(field) for field in msgspec.structs.astuple(value)]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def repeats(newer: Any, older: Any) -> bool:  # noqa: ANN401
    """Whether two plain messages say the same, but for fields that the newer one, or one in it, has appended."""
    if not isinstance(newer, list) or not isinstance(older, list):
        return bool(newer == older)
    return len(newer) >= len(older) and all(map(repeats, newer, older))


def method_of(kind: type[Message]) -> str:
    return str(kind.METHOD) if issubclass(kind, Request) else "-"


def frozen() -> dict[str, tuple[str, bytes]]:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {f"{module} {name}": (method, bytes.fromhex(data)) for module, name, method, data in lines}


def test_every_message_is_frozen() -> None:
    missing = {
        name: f"{name} {method_of(kind)} {encode(example(kind)).hex()}"
        for name, kind in CLASSES.items()
        if name not in frozen()
    }
    assert not missing, f"add to {GOLDEN}:\n" + "\n".join(missing.values())
    assert set(frozen()) <= set(CLASSES), "a message that was released must stay readable"


@pytest.mark.parametrize("name", CLASSES)
def test_a_message_keeps_its_number_and_its_bytes(name: str) -> None:
    kind = CLASSES[name]
    method, data = frozen()[name]
    assert method_of(kind) == method
    known = msgpack.unpackb(data, strict_map_key=False)
    now = msgpack.unpackb(encode(example(kind)), strict_map_key=False)
    assert now == plain(example(kind))
    old = decode(kind, data)
    assert repeats(plain(old), known), "an old message must decode to what it said"
    if plain(old) == known:
        assert encode(old) == data


@pytest.mark.parametrize("name", CLASSES)
def test_a_reader_skips_fields_it_does_not_know(name: str) -> None:
    kind = CLASSES[name]
    newer = msgpack.packb([*plain(example(kind)), "a field of a later version", [1, 2]])
    assert decode(kind, newer) == example(kind)


@given(st.sampled_from(sorted(CLASSES)), st.binary(max_size=60))
def test_garbage_is_refused_or_is_a_message(name: str, garbage: bytes) -> None:
    try:
        message = decode(CLASSES[name], garbage)
    except ProtocolViolation:
        return
    assert decode(CLASSES[name], encode(message)) == message


@given(st.sampled_from(sorted(CLASSES)), st.data())
def test_a_damaged_message_is_refused_or_is_a_message(name: str, draw: st.DataObject) -> None:
    data = bytearray(frozen()[name][1])
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        message = decode(CLASSES[name], bytes(data[: draw.draw(st.integers(0, len(data)))]))
    except ProtocolViolation:
        return
    assert decode(CLASSES[name], encode(message)) == message
