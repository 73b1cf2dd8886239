"""What holds for the whole suite."""

import os
from collections.abc import Iterator

import pytest

# Tests start programs while gRPC works in this process: its handlers of forks would write lines of their own between
# those of the programs. To be set before grpc is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client asks again after waits too short to notice, and logs nothing of it."""
    import stamina

    from teacher_api import asking

    monkeypatch.setattr(asking, "WAIT_INITIAL_S", 0.005)
    monkeypatch.setattr(asking, "WAIT_JITTER_S", 0.005)
    before = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(before)
