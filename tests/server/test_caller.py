"""Who a call is taken for: by its key, its headers and what the request itself says."""

from __future__ import annotations

import pytest

from teacher_api.errors import InvalidRequest, PermissionDenied
from teacher_api.types import CallMetadata
from teacher_server.caller import Caller

OF_A_KEY = Caller(tenant="vision")


def test_a_call_without_a_word_is_its_keys() -> None:
    assert OF_A_KEY.from_headers({}) == OF_A_KEY.named(CallMetadata()) == OF_A_KEY


def test_headers_name_experiment_and_run_and_the_request_goes_before_them() -> None:
    headers = {"preceptor-experiment": "by-header", "preceptor-run": "3", "preceptor-tenant": "vision"}
    caller = OF_A_KEY.from_headers(headers)
    assert caller == Caller("vision", "by-header", "3")
    assert caller.named(CallMetadata(experiment="by-request")) == Caller("vision", "by-request", "3")


def test_the_tenant_is_the_keys_and_never_the_calls_word() -> None:
    with pytest.raises(PermissionDenied, match="'vision'") as refused:
        OF_A_KEY.named(CallMetadata(tenant="speech"))
    assert refused.value.field == "metadata.tenant"
    assert "speech" not in refused.value.message


@pytest.mark.parametrize("name", ["tenant", "experiment", "run"])
@pytest.mark.parametrize("text", ["x" * 129, "a\nb", "\x1b[2J"])
def test_names_are_short_and_can_be_shown(name: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        OF_A_KEY.named(CallMetadata(**{name: text}))
    assert refused.value.field == f"metadata.{name}"


def test_a_call_says_its_priority_in_headers_or_in_the_request():
    urgent = OF_A_KEY.from_headers({"preceptor-priority": "interactive"})
    assert (OF_A_KEY.priority, urgent.priority) == ("bulk", "interactive")
    assert urgent.named(CallMetadata(run="3")) == Caller("vision", run="3", priority="interactive")
    assert urgent.named(CallMetadata(priority="bulk")).priority == "bulk"


def test_a_priority_that_is_none_is_refused():
    with pytest.raises(InvalidRequest, match="'urgent'; expected interactive or bulk") as refused:
        OF_A_KEY.named(CallMetadata(priority="urgent"))
    assert refused.value.field == "metadata.priority"
