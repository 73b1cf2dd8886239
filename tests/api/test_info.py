"""Fingerprints change with what they stand for and with nothing else; TeacherInfo survives the wire."""

from __future__ import annotations

import hashlib
import json

import pytest
from fake_teacher import FakeTeacher
from tinymodels import tiny_tokenizer

from teacher_api import errors, info
from teacher_api.transport import parse_info
from teacher_api.v1 import teacher_pb2 as pb

FACTS = {
    "weights_digest": "w",
    "dtype": "float32",
    "quantisation": "",
    "head_dtype": "float32",
    "scoring_path": "torch",
    "tokenizer_size": 120,
    "engine": "torch",
    "engine_version": "2",
}


def copy_of(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return type(tokenizer).from_pretrained(tmp_path)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    assert info.tokenizer_fingerprint(copy_of(tokenizer, tmp_path)) == info.tokenizer_fingerprint(tokenizer)


def swap_two_tokens(path):
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(data))


def set_in(key, value):
    def change(path):
        data = json.loads(path.read_text())
        data[key] = value
        path.write_text(json.dumps(data))

    return change


CHANGES = {
    "id -> token map": swap_two_tokens,
    "normaliser settings": set_in("normalizer", {"type": "Lowercase"}),
    "pre-tokenizer settings": set_in("pre_tokenizer", {"type": "Whitespace"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_tokenizer_differs_in_that_part(tmp_path, what):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    CHANGES[what](tmp_path / "tokenizer.json")
    changed = type(tokenizer).from_pretrained(tmp_path)
    (one, parts), (other, other_parts) = map(info.tokenizer_fingerprint, (tokenizer, changed))
    assert one != other
    assert info.explain_difference(parts, other_parts).startswith(f"{what} (student ")
    assert ";" not in info.explain_difference(parts, other_parts), "nothing else differs"


def test_another_size_and_another_end(tmp_path):
    _, small = info.tokenizer_fingerprint(tiny_tokenizer(120))
    _, large = info.tokenizer_fingerprint(tiny_tokenizer(130))
    assert "number of tokens (ours 120, theirs 130)" in info.explain_difference(small, large, "ours", "theirs")
    ended = copy_of(tiny_tokenizer(), tmp_path)
    ended.eos_token = ended.convert_ids_to_tokens(7)
    _, parts = info.tokenizer_fingerprint(ended)
    assert info.explain_difference(small, parts).startswith("beginning, end and unknown token ids")


def test_the_padding_token_does_not_matter(tmp_path):
    padded = copy_of(tiny_tokenizer(), tmp_path)
    padded.pad_token = padded.eos_token
    assert info.tokenizer_fingerprint(padded) == info.tokenizer_fingerprint(tiny_tokenizer())


def test_equal_tokenizers_have_nothing_to_explain():
    _, parts = info.tokenizer_fingerprint(tiny_tokenizer())
    assert info.explain_difference(parts, parts) == ""


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_in_the_teacher_fingerprint(fact):
    assert info.teacher_fingerprint(**FACTS) == info.teacher_fingerprint(**FACTS)
    assert info.teacher_fingerprint(**FACTS) != info.teacher_fingerprint(**{**FACTS, fact: "other"})


def test_facts_do_not_run_together():
    a = info.teacher_fingerprint(**{**FACTS, "engine": "ab", "engine_version": "c"})
    assert a != info.teacher_fingerprint(**{**FACTS, "engine": "a", "engine_version": "bc"})


def test_info_survives_the_wire():
    said = FakeTeacher().info
    message = pb.TeacherInfo.FromString(info.to_proto(said).SerializeToString())
    assert info.from_proto(message) == said
    assert json.loads(info.to_json(said))["max_completions"] == said.max_completions


def test_a_sealed_description_is_read_with_or_without_its_seal():
    said = FakeTeacher().info
    data = info.sealed(said)
    assert info.from_proto(parse_info(data)) == said
    assert data[3:19] == hashlib.sha256(data[19:]).digest()[:16]
    assert info.from_proto(parse_info(data[19:])) == said


def test_no_flipped_bit_changes_what_a_teacher_says_of_itself():
    said = FakeTeacher().info
    data, refused = info.sealed(said), 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert info.from_proto(parse_info(bytes(damaged))) == said, bit  # a flip in the seal's own tag
        except errors.CorruptResponse:
            refused += 1
    assert refused >= 8 * len(data) - 24


def test_a_seal_that_does_not_come_first_is_none_of_ours():
    data = info.sealed(FakeTeacher().info)
    with pytest.raises(errors.CorruptResponse, match="checksum is of another one"):
        parse_info(data[19:] + data[:19])


def test_another_version_of_the_contract_is_refused():
    message = info.to_proto(FakeTeacher().info)
    message.api_version = 2
    with pytest.raises(errors.Unsupported, match="version 2 of the contract; this client speaks 1"):
        info.from_proto(message)


@pytest.mark.parametrize("field", ["fingerprint", "tokenizer_size", "max_completions"])
def test_a_description_without_the_necessary_is_refused(field):
    message = info.to_proto(FakeTeacher().info)
    message.ClearField(field)
    with pytest.raises(errors.CorruptResponse) as caught:
        info.from_proto(message)
    assert caught.value.field == field
