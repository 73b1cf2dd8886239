"""What runs inside vLLM's own processes; vLLM calls `register` in each through the entry point vllm.general_plugins.

Imports nothing large: it is also loaded by vLLM engines that serve something else, and does nothing there.
"""

from __future__ import annotations

import os

from teacher_api.parent import end_with_parent

SERVER_PID = "PRECEPTOR_VLLM_SERVER_PID"
"""Environment variable: the process whose engine this is. Outside the server's own TEACHER_ names, which it checks."""


def register() -> None:
    """Makes our model classes known, and ties an engine process to its parent: a teacher that is killed leaves no
    engine behind holding a GPU."""
    server = os.environ.get(SERVER_PID)
    if server is None:
        return
    from vllm.platforms import current_platform

    from teacher_server.vllm_plugin.models import register_all
    from teacher_server.vllm_plugin.waiting import sleep_between_messages

    register_all()
    if current_platform.is_cpu():
        sleep_between_messages()
    if server != str(os.getpid()):
        end_with_parent()
