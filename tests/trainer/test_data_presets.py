"""Presets on local files of the datasets' shape, and datasets of the hub up to the network's edge."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tinymodels import EOS, tiny_tokenizer

from student_trainer.cli import SHORTCUTS
from student_trainer.config import TrainConfig
from student_trainer.data import DataConfig, DataError, open_prompts, sources
from student_trainer.data.config import PromptConfig
from student_trainer.data.presets import PRESETS
from teacher_api import settings

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOXED = "\n\nPut the final answer in \\boxed{}."
MESSAGES = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "the dog"}]

# preset: a record with the fields that the dataset's page lists, the user's turn, reference answer, fixed completion
SHAPES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "tulu3": ({"id": "a", "messages": MESSAGES, "source": "s"}, "the fox?", "the dog", "the dog"),
    "deepmath": (
        {
            "question": "2+2?", "final_answer": "4", "difficulty": 3.0, "topic": "t",
            "r1_solution_1": "four it is", "r1_solution_2": "x", "r1_solution_3": "y",
        },
        "2+2?" + BOXED, "4", "four it is",
    ),
    "math-cl": ({"problem": "3+3?", "ground_truth_answer": "6", "id": 1}, "3+3?" + BOXED, "6", "6"),
    "gsm8k": (
        {"question": "5+5?", "answer": "ten\n#### 10"},
        "5+5?\n\nEnd with the answer alone after ####.", "ten\n#### 10", "ten\n#### 10",
    ),
}  # fmt: skip


def chat_tokenizer() -> Any:
    tok = copy.deepcopy(tiny_tokenizer(300))
    tok.chat_template = CHAT
    return tok


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_preset_reads_its_fields_of_a_local_copy(name: str, suffix: str, tmp_path: Path) -> None:
    record, user, answer, completion = SHAPES[name]
    path = write(tmp_path / f"copy{suffix}", [record])
    tok = chat_tokenizer()
    config = DataConfig.model_validate({"preset": name, "source": str(path), "on_policy_fraction": 0.5})
    (prompt,) = open_prompts(config, tok, eos_token_ids=(1,)).take(0, 1, 0)
    assert prompt.text == f"<user>{user}{EOS}<assistant>"
    assert prompt.answer == answer
    assert prompt.fixed[0].token_ids.tolist() == [*tok(completion)["input_ids"], 1]
    alone = DataConfig.model_validate({"preset": name, "source": str(path)})
    assert open_prompts(alone, tok, eos_token_ids=(1,)).take(0, 1, 0)[0].fixed == ()


def test_the_presets_are_those_and_text_is_packed(tmp_path: Path) -> None:
    assert set(PRESETS) == {*SHAPES, "fineweb-edu"}
    path = write(tmp_path / "t.parquet", [{"text": "the quick brown fox", "id": "a", "dump": "d", "score": 2.5}] * 4)
    config = DataConfig.model_validate({"preset": "fineweb-edu", "source": str(path), "seq_length": 4})
    assert (config.format, config.on_policy_fraction, config.subset) == ("packed_text", 0.0, None)
    tok = tiny_tokenizer(300)
    document = [*tok("the quick brown fox")["input_ids"], 1]
    (piece,) = open_prompts(config.model_copy(update={"shuffle": False}), tok, eos_token_ids=(1,)).take(0, 1, 0)
    assert [*piece.token_ids, *piece.fixed[0].token_ids] == (document * 4)[:5]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("tulu3", ("allenai/tulu-3-sft-mixture", None, "train")),
        ("deepmath", ("zwhe99/DeepMath-103K", None, "train")),
        ("math-cl", ("pe-nlp/math-cl", None, "train")),
        ("gsm8k", ("openai/gsm8k", "main", "train")),
        ("fineweb-edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_preset_names_its_dataset_on_the_hub(
    name: str, asked: tuple[Any, ...], streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls: list[tuple[Any, ...]] = []
    record = SHAPES[name][0] if name in SHAPES else {"text": "the quick brown fox jumps"}

    def load_dataset(source: str, subset: str | None, split: str, streaming: bool) -> Any:
        calls.append((source, subset, split, streaming))
        rows = datasets.Dataset.from_list([record] * 7)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen: dict[str, Any] = {"preset": name, "streaming": streaming}
    chosen |= {"seq_length": 3} if name == "fineweb-edu" else {"max_prompt_tokens": 99} if streaming else {}
    prompts = open_prompts(DataConfig.model_validate(chosen), chat_tokenizer(), eos_token_ids=(1,))
    assert len(prompts.take(0, 20, 0)) == 20
    assert calls == [(*asked, streaming)], "asked for once, however many epochs are read"


def test_what_is_given_is_stronger_than_the_preset() -> None:
    config = DataConfig.model_validate(
        {
            "preset": "gsm8k",
            "split": "test",
            "subset": "socratic",
            "question_key": "q",
            "prompt_template": "{question}!",
        }
    )
    assert (config.source, config.split, config.subset) == ("openai/gsm8k", "test", "socratic")
    assert (config.question_key, config.prompt_template, config.answer_key) == ("q", "{question}!", "answer")
    again = DataConfig.model_validate(config.model_dump(mode="json"))
    assert again == config, "a resolved configuration says the same"
    file = DataConfig.model_validate({"preset": "deepmath", "prompt_template_file": "t.txt"})
    assert (file.prompt_template, file.prompt_template_file) == ("{question}", "t.txt")
    written = DataConfig.model_validate({"preset": "deepmath", "fixed_source": "w.jsonl", "on_policy_fraction": 0.5})
    assert (written.completion_key, written.fixed_source) == (None, "w.jsonl")
    evaluated = PromptConfig.model_validate({"preset": "deepmath", "split": "test"})
    assert evaluated.answer_key == "final_answer"


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (DataConfig, {"preset": "gsm9k"}, r"preset: got 'gsm9k', expected one of .* \(did you mean gsm8k\?\)"),
        (DataConfig, {"preset": "gsm8k", "source": "a.jsonl", "subset": "main"}, ""),
        (PromptConfig, {"preset": "fineweb-edu"}, "expected one with questions"),
        (DataConfig, {"preset": "fineweb-edu", "on_policy_fraction": 0.5}, "on_policy_fraction: got 0.5"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(section: Any, settings: dict[str, Any], message: str) -> None:
    if message:
        with pytest.raises(ValueError, match=message):
            section.model_validate(settings)
    else:  # refused when the file is opened: a file has no subset
        with pytest.raises(DataError, match=r"data\.subset: got 'main' with data\.source a\.jsonl"):
            sources.open_source(section.model_validate(settings))


def cached_dataset(root: Path) -> None:
    """org/name, configuration main, as `datasets` leaves it in its cache after a download."""
    import datasets

    write(root / "rows.jsonl", [{"question": f"q{i}", "answer": str(i)} for i in range(5)])
    datasets.load_dataset("json", data_files={"train": str(root / "rows.jsonl")}, cache_dir=str(root))
    (made,) = (p for p in (root / "json").glob("*/*/*") if p.is_dir())
    cached = root / "org___name" / "main" / made.parent.name / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": "main", "dataset_name": "name"}))
    (cached / "json-train.arrow").rename(cached / "name-train.arrow")


def test_local_files_only_never_reaches_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    cached_dataset(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)

    def reached_out(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"reached out: {args}")

    monkeypatch.setattr(socket.socket, "connect", reached_out)
    monkeypatch.setattr(socket, "getaddrinfo", reached_out)
    for more in ({}, {"streaming": True, "max_prompt_tokens": 9}):
        settings = {"source": "org/name", "subset": "main", "local_files_only": True, **more}
        opened = sources.open_source(DataConfig.model_validate(settings))
        assert [record for _, record in opened(0)] == [{"question": f"q{i}", "answer": str(i)} for i in range(5)]
        assert [where for where, _ in opened(3)] == ["org/name[3]", "org/name[4]"]
    for source, subset in (("org/other", "main"), ("org/name", "another")):
        with pytest.raises(
            DataError, match=rf"data.source {source} \(subset {subset}, split train\) in the local cache"
        ):
            sources.open_source(DataConfig(source=source, subset=subset, local_files_only=True))
    assert not datasets.config.HF_HUB_OFFLINE, "later loads are what they were"


def test_a_stream_from_the_hub_is_skipped_and_its_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def generate() -> Any:
        for i in range(6):
            if i == 5:
                raise OSError("connection lost\nfor good")
            yield {"question": f"q{i}"}

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.IterableDataset.from_generator(generate)
    )
    opened = sources.open_source(DataConfig(source="org/name", streaming=True, max_prompt_tokens=9))
    records = opened(3)
    assert [next(records), next(records)] == [("org/name[3]", {"question": "q3"}), ("org/name[4]", {"question": "q4"})]
    with pytest.raises(DataError, match=r"org/name \(subset None, split train\), record 5: OSError: connection lost$"):
        next(records)


@pytest.mark.parametrize("name", ["gsm8k-on-policy", "deepmath-policy-gradient", "math-cl-mixed"])
def test_the_recipe_of_a_preset_is_a_configuration(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    words = ["--teacher-url=grpc://host:1", "--student=model"]
    options: Any = {"prog": "p", "description": "", "env_prefix": "STUDENT_", "environ": {}, "shortcuts": SHORTCUTS}
    config, _ = settings.load(TrainConfig, [f"--config={path}", *words], **options)
    assert config.data.preset == name.split("-on-")[0].split("-policy")[0].split("-mixed")[0]
    (tmp_path / "again.yaml").write_text(settings.dump_yaml(config))
    again, _ = settings.load(TrainConfig, [f"--config={tmp_path / 'again.yaml'}"], **options)
    assert again == config


# -- files


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, texts in (("b.jsonl", ["c"]), ("a.jsonl", ["a", "b"]), ("more/c.jsonl", ["d", "e"])):
        write(tmp_path / name, [{"text": text} for text in texts])
    (tmp_path / "README.md").write_text("not data")
    opened = sources.open_source(DataConfig(source=str(tmp_path)))
    assert [record["text"] for _, record in opened(0)] == ["a", "b", "c", "d", "e"]
    assert [record["text"] for _, record in opened(3)] == ["d", "e"]
    (tmp_path / "d.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"files of several kinds \(\.csv, \.jsonl\); expected files of one kind"):
        sources.open_source(DataConfig(source=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none; expected files of one kind"):
        sources.open_source(DataConfig(source=str(tmp_path / "empty")))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a"}\n' * 3 + "not JSON\n")
    records = sources.read(DataConfig(source=str(path)))
    assert [next(records)[1]["question"] for _ in range(3)] == ["a"] * 3
    with pytest.raises(DataError, match=r"p\.jsonl:4: not JSON"):
        next(records)


def test_a_prompt_template_may_be_a_file(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"question": "{1}"}])
    template = tmp_path / "t.txt"
    template.write_text("Think. {question}\nBox it: \\boxed{}\n")
    settings = {"source": str(tmp_path / "p.jsonl"), "template": "plain", "prompt_template_file": str(template)}
    (prompt,) = open_prompts(DataConfig.model_validate(settings), tiny_tokenizer(300), eos_token_ids=(1,)).take(0, 1, 0)
    assert prompt.text == "Think. {1}\nBox it: \\boxed{}"
    template.write_text("no place")
    with pytest.raises(DataError, match=r"t\.txt: has no \{question\}"):
        open_prompts(DataConfig.model_validate(settings), tiny_tokenizer(300), eos_token_ids=(1,))
    template.unlink()
    with pytest.raises(DataError, match=r"data\.prompt_template_file .*t\.txt: No such file"):
        open_prompts(DataConfig.model_validate(settings), tiny_tokenizer(300), eos_token_ids=(1,))
    with pytest.raises(ValueError, match="prompt_template_file: got one beside prompt_template"):
        DataConfig.model_validate({**settings, "prompt_template": "{question}?"})
