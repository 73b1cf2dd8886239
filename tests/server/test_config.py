"""The server's configuration: nothing is read and ignored, and what can't work is refused before anything starts."""

from __future__ import annotations

import dataclasses

import pytest

from teacher_api import settings
from teacher_server.config import ENGINE_FIELDS, SHORTCUTS, USED_BY, ServerConfig


def load(*argv: str, environ: dict[str, str] | None = None) -> ServerConfig:
    config, _ = settings.load(
        ServerConfig,
        list(argv),
        prog="teacher-serve",
        description="",
        env_prefix="TEACHER_",
        shortcuts=SHORTCUTS,
        flat=True,
        environ=environ or {},
    )
    return config


def test_defaults_listen_on_loopback_and_load_no_remote_code():
    config = load("--model", "some/model")
    assert config.host == "127.0.0.1"
    assert config.backend == "torch"
    assert config.display_name == "model"
    assert not any("trust" in name for name in ServerConfig.model_fields)


def test_files_environment_and_command_line_in_that_order(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: from-file\nmax_top_k: 1\nmax_candidates: 1\nmax_completions: 1\n")
    environ = {"TEACHER_MAX_CANDIDATES": "2", "TEACHER_MAX_COMPLETIONS": "2"}
    config = load("--config", str(file), "--max-completions", "3", environ=environ)
    assert (config.model, config.max_top_k, config.max_candidates, config.max_completions) == ("from-file", 1, 2, 3)


def test_keys_and_engine_arguments():
    config = load("--model", "m", "--api-key", "first-key", "--api-key", "other-key")
    assert [key.get_secret_value() for key in config.api_keys] == ["first-key", "other-key"]
    assert "first-key" not in repr(config)
    one = load("--model", "m", environ={"TEACHER_API_KEY": "first-key"})  # as teacher-check reads it
    assert [key.get_secret_value() for key in one.api_keys] == ["first-key"]
    engine = load("--model", "m", "--backend", "vllm", "--vllm.max_num_seqs", "4", "--vllm.enforce_eager", "true").vllm
    assert engine == {"max_num_seqs": 4, "enforce_eager": True}


def test_vllms_own_names_reach_its_engine(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("tensor_parallel_size: 2\nlora:\n  math: from/file\n")
    flags = ["--quantization", "fp8", "--gpu-memory-utilization", "0.8", "--lora.v1-x", "dir", "--max-model-len", "512"]
    environ = {"TEACHER_PIPELINE_PARALLEL_SIZE": "3", "TEACHER_LORA__CODE": "other/dir"}
    config = load("--model", "m", "--backend", "vllm", "--config", str(file), *flags, environ=environ)
    assert config.engine_arguments == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "quantization": "fp8",
        "gpu_memory_utilization": 0.8,
    }
    assert config.lora == {"math": "from/file", "code": "other/dir", "v1-x": "dir"}
    assert config.max_sequence_tokens == 512
    again = load("--model", "m", environ={"TEACHER_MAX_MODEL_LEN": "256"})
    assert again.max_sequence_tokens == 256


@pytest.mark.vllm
def test_the_options_of_vllms_name_are_vllms():
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert set(ENGINE_FIELDS) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


WRONG = [
    (["--model", "m", "--backend", "fake", "--threads", "2"], "threads has no meaning for backend fake"),
    (["--model", "m", "--fake-latency-s", "1"], "fake_latency_s has no meaning for backend torch"),
    (["--model", "m", "--vllm.x", "1"], "vllm has no meaning for backend torch"),
    (["--model", "m", "--backend", "vllm", "--batch-tokens", "9"], "batch_tokens has no meaning"),
    (["--model", "m", "--backend", "vllm", "--reference"], "reference needs backend torch"),
    (["--model", "m", "--max-sequence-tokens", "10", "--queue-tokens", "5"], "could never be accepted"),
    (["--model", "m", "--api-key", "short"], "fewer than 8"),
    (["--model", "m", "--high-water", "1.5"], "high_water"),
    (["--model", "m", "--http-port", "70000"], "http_port"),
    (["--model", "m", "--backend", "jax"], "backend"),
    (["--model", "m", "--tensor-parallel-size", "2"], "tensor_parallel_size has no meaning for backend torch"),
    (["--model", "m", "--lora.math", "dir"], "lora has no meaning for backend torch; it is for vllm, fake"),
    (["--model", "m", "--backend", "fake", "--lora.a b", "dir"], "expected 1 to 128 letters"),
    (["--model", "x/math", "--backend", "fake", "--lora.math", "dir"], "lora.math: the base is called so"),
    (["--model", "m", "--backend", "fake", "--lora.math", ""], "lora.math: empty"),
    (
        ["--model", "m", "--backend", "vllm", "--quantization", "fp8", "--vllm.quantization", "fp8"],
        "quantization is given twice, also as vllm.quantization",
    ),
    (["--model", "m", "--backend", "vllm", "--data-parallel-size", "0"], "data_parallel_size"),
]


@pytest.mark.parametrize(("argv", "cause"), WRONG, ids=[w[1] for w in WRONG])
def test_what_cannot_work_is_one_line(argv: list[str], cause: str):
    with pytest.raises(settings.SettingsError) as refused:
        load(*argv)
    assert cause in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "short" not in str(refused.value) or "fewer" in cause


def test_every_field_of_the_table_exists_and_every_field_is_documented():
    fields = ServerConfig.model_fields
    assert {name for name in USED_BY if name != "fake_"} <= set(fields)
    assert [name for name, field in fields.items() if not field.description] == []


def test_a_body_that_could_never_be_received_is_refused_at_the_start():
    with pytest.raises(settings.SettingsError, match=r"max_request_bytes 4096 exceeds receiving_bytes 2048"):
        load("--model", "m", "--max-request-bytes", "4096", "--receiving-bytes", "2048")
