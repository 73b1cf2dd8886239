"""What runs inside vLLM's own processes; vLLM calls `register` in each through the entry point vllm.general_plugins.

Imports nothing large: it is also loaded by vLLM engines that serve something else, and does nothing there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

SERVER_PID = "PRECEPTOR_VLLM_SERVER_PID"
"""Environment variable: the process whose engine this is. Outside the server's own TEACHER_ names, which it checks."""
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


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
    parent = multiprocessing.parent_process()
    if server == str(os.getpid()) or parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)
