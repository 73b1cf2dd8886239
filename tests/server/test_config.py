"""The server's configuration: nothing is read and ignored, and what can't work is refused before anything starts."""

from __future__ import annotations

import pytest

from teacher_api import settings
from teacher_server.config import USED_BY, ServerConfig


def load(*argv: str, environ: dict[str, str] | None = None) -> ServerConfig:
    config, _ = settings.load(
        ServerConfig,
        list(argv),
        prog="teacher-serve",
        description="",
        env_prefix="TEACHER_",
        shortcuts={"api-key": "api_keys"},
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
