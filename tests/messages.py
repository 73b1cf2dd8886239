"""Arbitrary protobuf messages for hypothesis, from their descriptors alone: what a caller could send who knows the
contract's types and nothing of its rules. Numbers are small, usual or extreme."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

MOST_REPEATED = 6
DEEPEST = 3
EXTREMES = {32: (1 << 31, 1 << 32), 64: (1 << 63, 1 << 64)}


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    """Messages of this type; fields are set or left out."""
    kind = GetMessageClass(descriptor)
    fields = {
        field.name: _values(field, depth)
        for field in descriptor.fields
        if field.message_type is None or depth < DEEPEST
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = messages(field.message_type, depth + 1) if field.message_type is not None else _scalar(field)
    return st.lists(one, max_size=MOST_REPEATED) if field.is_repeated else one


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64):
        half, _ = EXTREMES[32 if field.cpp_type == kinds.CPPTYPE_INT32 else 64]
        return st.one_of(st.integers(-2, 9), st.integers(-half, half - 1))
    if field.cpp_type in (kinds.CPPTYPE_UINT32, kinds.CPPTYPE_UINT64):
        _, whole = EXTREMES[32 if field.cpp_type == kinds.CPPTYPE_UINT32 else 64]
        return st.one_of(st.integers(0, 9), st.integers(0, whole - 1))
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        width = 32 if field.cpp_type == kinds.CPPTYPE_FLOAT else 64
        return st.one_of(st.sampled_from([0.0, 1.0, 2.0, 30.0]), st.floats(width=width))
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        return st.one_of(st.sampled_from([value.number for value in field.enum_type.values]), st.integers(0, 99))
    if field.type == kinds.TYPE_BYTES:
        return st.one_of(st.binary(max_size=64), st.lists(st.integers(0, 600), max_size=8).map(_packed))
    assert field.type == kinds.TYPE_STRING, f"{field.full_name}: a type this module does not know"
    return st.one_of(st.sampled_from(["", "c0", "c1"]), st.text(max_size=20))


def _packed(ids: list[int]) -> bytes:
    """Token ids as arrays carry them."""
    return b"".join(number.to_bytes(4, "little") for number in ids)
