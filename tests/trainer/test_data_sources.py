"""Every kind of source gives the records that were written to it, and says in one line what is wrong with it."""

from __future__ import annotations

import csv
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tinymodels import tiny_tokenizer

from student_trainer.data import DataConfig, DataError, load_prompts, sources

RECORDS = [
    {"question": "2 + 2 = ?", "answer": "4"},
    {"question": 'the "fox", over\r\nthe dog\n', "answer": "a, b"},
    {"question": "ünïcode {braces} \u2028 and tabs\t.", "answer": "é"},
]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS))


def write_wrapped_json(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": RECORDS}))


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(RECORDS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", write_json),
        ("b.json", write_wrapped_json),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
    ],
)
def test_files_give_back_what_was_written(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    config = DataConfig(source=str(tmp_path / name))
    assert [dict(record) for _, record in sources.read(config)] == RECORDS
    prompts = load_prompts(config, tiny_tokenizer(300)).all()
    assert [p.text for p in prompts] == [r["question"] for r in RECORDS]
    assert [p.answer for p in prompts] == [r["answer"] for r in RECORDS]
    assert [p.index for p in prompts] == [0, 1, 2]


def test_text_files_have_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\n  second, with { braces }\n \nthird \x0b\u2028 still third".encode())
    got = list(sources.read(DataConfig(source=str(path))))
    assert [r["text"] for _, r in got] == ["first", "  second, with { braces }", "third \x0b\u2028 still third"]
    assert [where.rsplit(":", 1)[1] for where, _ in got] == ["1", "3", "5"]


class Own:
    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(RECORDS)


class NotMappings:
    def __iter__(self) -> Iterator[str]:
        return iter(["a"])


class NotIterable:
    pass


NOT_CALLABLE = 3


@pytest.mark.parametrize(("option", "value"), [("split", "test"), ("subset", "main")])
@pytest.mark.parametrize("source", ["file", f"{__name__}:Own"])
def test_only_a_dataset_of_the_hub_has_splits_and_subsets(source: str, option: str, value: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl")
    source = source if ":" in source else str(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=rf"data\.{option}: got '{value}' with data\.source .*, expected none"):
        sources.read(DataConfig(source=source, **{option: value}))


def test_a_class_of_ones_own_is_a_source() -> None:
    got = [dict(record) for _, record in sources.read(DataConfig(source=f"{__name__}:Own"))]
    assert got == RECORDS


def test_a_class_is_found_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts_of_mine.py").write_text("def Cls():\n    return [{'question': 'the fox'}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])  # as a console script has it
    assert [dict(r) for _, r in sources.read(DataConfig(source="prompts_of_mine:Cls"))] == [{"question": "the fox"}]


def test_a_dataset_on_the_hub_is_asked_for_by_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str | None, str, bool]] = []

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, subset, split, streaming))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = list(sources.read(DataConfig(source="org/name", subset="main", split="train[:3]")))
    assert asked == [("org/name", "main", "train[:3]", False)]
    assert [r for _, r in got] == RECORDS
    assert [where for where, _ in got] == ["org/name[0]", "org/name[1]", "org/name[2]"]


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("not on the hub\nnor in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        list(sources.read(DataConfig(source="org/name")))
    assert str(caught.value) == (
        "data.source org/name (subset None, split train): DatasetNotFoundError: not on the hub"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "a"}\n{"question": }', "a.jsonl:2: not JSON: Expecting value at column 14"),
        ("a.jsonl", b'{"question": "a"}\n[1]', "a.jsonl:2: expected an object with named fields; got list"),
        ("a.jsonl", b'{"question": "a", "question": "b"}', "a.jsonl:1: field 'question' is there twice"),
        ("a.jsonl", b'{"question": "\xff"}', "a.jsonl:1: not UTF-8 text: invalid start byte at byte 14 of the line"),
        ("a.json", b'[{"question": "a"},\n nope]', "a.json: not JSON: Expecting value at line 2 column 2"),
        ("a.json", b'{"a": [], "b": []}', "expected an array of objects; got an object with fields a, b"),
        ("a.json", b"3", "a.json: expected an array of objects; got int"),
        ("a.json", b'[{"question": "a"}, "b"]', "a.json[1]: expected an object with named fields; got str"),
        ("a.csv", b"question,answer\na\n", "a.csv:2: 1 fields; the header has 2"),
        ("a.csv", b"question,question\na,b\n", "a.csv:1: column 'question' is there twice"),
        ("a.csv", b'question,answer\n"a"b,c\n', "a.csv:2: ',' expected after '\"'"),
        ("a.parquet", b"not parquet at all", "a.parquet: not a Parquet file: Parquet magic bytes not found"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1: JSON that is nested too deeply to be read"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "a.jsonl:1: Exceeds the limit (4300 digits)"),
        ("a.jsonl", b'{"question": "a\\ud83d"}', "a.jsonl:1: the text has '\\ud83d', half of a character"),
        ("a.txt", b" \n\n", "a.txt: no prompts in it"),
        ("a.jsonl", b"", "a.jsonl: no prompts in it"),
        ("a.csv", b"", "a.csv: no prompts in it"),
        ("a.csv", b"question\n", "a.csv: no prompts in it"),
        ("a.json", b"[]", "a.json: no prompts in it"),
        ("a.xml", b"<a/>", "a.xml: unknown kind of file; expected one of .txt, .jsonl, .json, .parquet, .csv"),
        ("b.jsonl", b'{"body": "a", "n": 1}', "none of the usual question fields"),
        ("b.jsonl", b'{"body": "a", "n": 1}', "it has body, n. Set data.question_key"),
        ("b.jsonl", b'{"question": 3}', "b.jsonl:1: field 'question' is int; expected text"),
        ("b.jsonl", b'{"question": null}', "b.jsonl:1: field 'question' is NoneType; expected text"),
        ("b.jsonl", b'{"question": "  "}', "b.jsonl:1: field 'question' is empty"),
        ("b.jsonl", b'{"question": ["a"]}', "is list; expected text; a list of messages goes in data.prompt_key"),
        ("b.jsonl", b'{"question": "a"}\n{"text": "a"}', "b.jsonl:2: no field 'question'; it has text"),
        ("b.jsonl", b'{"question": [1]}', "b.jsonl:1: field 'question' is list; expected text"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(source=str(path)), tiny_tokenizer())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source is not set"),
        ("nowhere/prompts.jsonl", "data.source nowhere/prompts.jsonl: no such file"),
        ("prompts", "no such file, and neither a hub dataset id `org/name` nor `package.module:Class`"),
        ("./some/dir/here", "no such file, and neither"),
        ("no_such_module_here:Cls", "No module named 'no_such_module_here'; is it on PYTHONPATH?"),
        (":Cls", "data.source :Cls: Empty module name; expected package.module:Class"),
        (f"{__name__}:Nothing", f"module {__name__} has no Nothing"),
        (f"{__name__}:NOT_CALLABLE", "expected a class or function; got int"),
        (f"{__name__}:NotIterable", "NotIterable is not iterable; expected an iterable of mappings"),
        (f"{__name__}:NotMappings", "NotMappings[0]: expected an object with named fields; got str"),
    ],
)
def test_what_is_wrong_with_a_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(source=source), tiny_tokenizer())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_a_text_file_imports_no_data_libraries(tmp_path: Path) -> None:
    import subprocess

    path = tmp_path / "p.txt"
    path.write_text("a\n")
    code = (
        "import sys; from student_trainer.data import DataConfig, sources; "
        f"assert list(sources.read(DataConfig(source={str(path)!r}))); "
        "print([m for m in ('datasets', 'pyarrow', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_damaged_page_of_a_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": [f"question {i}" for i in range(2000)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[200:240] = b"\xff" * 40  # the footer is whole
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.parquet: a damaged Parquet file: "):
        load_prompts(DataConfig(source=str(path)), tiny_tokenizer())


def test_a_csv_field_may_be_a_long_document(tmp_path: Path) -> None:
    document = "the fox " * 20_000  # 160,000 characters: the csv module's own limit is 131,072
    path = tmp_path / "a.csv"
    path.write_text(f'question\n"{document}"\n')
    ((_, record),) = sources.from_csv(path)
    assert record == {"question": document}


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "\\ud83e\\udd8a"}')
    ((_, record),) = sources.from_jsonl(path)
    assert record == {"question": "\N{FOX FACE}"}


@pytest.mark.parametrize("key", [None, "answer"])
def test_a_number_that_is_none_is_no_answer(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [4.5, float("nan")]}), path)
    found = load_prompts(DataConfig(source=str(path), answer_key=key), tiny_tokenizer()).all()
    assert [prompt.answer for prompt in found] == ["4.5", None]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_file_that_the_system_does_not_read_is_one_line(tmp_path: Path, suffix: str) -> None:
    """A page of this process that is not there: the disk's error, after the file was opened."""
    path = tmp_path / f"data{suffix}"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=rf"data\.source .*data{suffix}: can't be read: Input/output error"):
        load_prompts(DataConfig(source=str(path)), tiny_tokenizer())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("in_directory", [False, True])
def test_a_file_that_is_gone_when_it_is_read_is_one_line(tmp_path: Path, suffix: str, in_directory: bool) -> None:
    """As where a stream's second epoch begins."""
    path = tmp_path / f"data{suffix}"
    path.touch()
    opened = sources.open_source(DataConfig(source=str(tmp_path if in_directory else path)))
    path.unlink()
    with pytest.raises(DataError, match=rf"data\.source .*data{suffix}: can't be read: .*[Nn]o such file"):
        next(opened(0))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.touch()

    def refused(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    for name in ("open", "is_dir"):  # the file, and the directory it is in
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, refused)
            with pytest.raises(DataError, match=r"data\.source .*data\.jsonl: can't be read: Permission denied"):
                load_prompts(DataConfig(source=str(path)), tiny_tokenizer())
