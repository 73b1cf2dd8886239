"""What is asked of rollout servers and of the command that starts one, before there is any."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from student_trainer import guards
from student_trainer.config import FREE_TO_CHANGE
from student_trainer.rollout.base import RolloutGone
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.vllm_side import serve
from student_trainer.rollout.vllm_side.plugin import SERVER_PID
from student_trainer.rollout.vllm_side.request import Draws


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"engine": "vllm-server"}, "server.urls: got none with engine vllm-server"),
        ({"server": {"urls": ["http://a:1"]}}, "server: got {'urls': ['http://a:1']} with engine torch, expected none"),
        ({"engine": "vllm", "server": {"timeout_s": 1}}, "server: got {'timeout_s': 1.0} with engine vllm"),
        ({"engine": "vllm-server", "server": {"urls": "grpc://a:1"}}, "got 'grpc://a:1', expected http://host:port"),
        ({"engine": "vllm-server", "server": {"urls": "http://a:1/v1"}}, "expected http://host:port"),
        ({"engine": "vllm-server", "server": {"urls": ["http://a:1", "http://a:1/"]}}, "expected each server once"),
        ({"engine": "vllm-server", "server": {"urls": "http://a:1", "timeout_s": 0}}, "timeout_s"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RolloutConfig.model_validate(given)
    assert told in str(refused.value)


def test_a_key_is_shown_nowhere() -> None:
    secret = {"api_key": "sesame"}
    with pytest.raises(ValidationError) as refused:
        RolloutConfig.model_validate({"server": secret})
    config = RolloutConfig.model_validate({"engine": "vllm-server", "server": {"urls": "http://a:1", **secret}})
    assert "'api_key': '**********'} with engine torch" in str(refused.value)
    assert "sesame" not in repr(config) + config.model_dump_json()


def test_servers_may_be_others_when_a_run_goes_on() -> None:
    assert "server" in FREE_TO_CHANGE["rollout"]


def test_servers_that_are_gone_end_a_run_that_can_go_on() -> None:
    gone = RolloutGone("http://a:1", 61.2, "connection refused")
    assert isinstance(gone, guards.RESUMABLE)
    assert "no rollout server at http://a:1 for 61 s (connection refused)" in str(gone)
    for other in (copy.copy(gone), pickle.loads(pickle.dumps(gone))):  # as ranks tell each other
        assert (str(other), other.seconds) == (str(gone), 61.2)


@pytest.mark.parametrize("option", ["--max-logprobs=5", "--speculative-config={}", "--worker_extension_cls=x"])
def test_options_of_vllm_that_would_change_what_is_recorded_are_refused(option: str, capsys: Any) -> None:
    assert serve.main(["model", option]) == 2
    assert f"got {option}, expected none" in capsys.readouterr().err


def test_without_a_model_it_says_how_it_is_called(capsys: Any) -> None:
    assert serve.main([]) == 2
    assert "usage: rollout-serve MODEL [options of vllm serve]" in capsys.readouterr().out


@pytest.mark.parametrize("allowed", [None, "mine"])
def test_plugins_of_others_stay_as_they_are(allowed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SERVER_PID, "VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(serve, "entry_points", lambda group: [])
    monkeypatch.setenv("VLLM_PLUGINS", allowed or "")  # also where it is unset: what is set is taken back at the end
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    serve.prepare_environment()
    names = serve.os.environ["VLLM_PLUGINS"].split(",")
    assert [n for n in names if n] == (["preceptor-rollout"] if allowed is None else ["mine", "preceptor-rollout"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1), ("uid", -1), ("uid", 2**63), ("uid", "7"), ("uid", 1.5), ("max_new_tokens", 0), ("top_k", -1),
        ("vocabulary_size", 0), ("temperature", 0.0), ("temperature", float("nan")), ("temperature", None),
        ("top_p", 1.5),
    ],
)  # fmt: skip
def test_numbers_that_would_end_an_engine_for_all_are_refused_before_it(field: str, value: Any) -> None:
    fit = {"seed": 1, "uid": 7, "max_new_tokens": 3, "vocabulary_size": 120, "temperature": 0.5, "top_p": 1, "top_k": 2}
    Draws(**fit)
    with pytest.raises(ValueError, match=rf"draws\.{field}: got .*, expected"):
        Draws(**{**fit, field: value})
