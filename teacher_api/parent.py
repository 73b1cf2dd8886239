"""Ties a process to the one that started it, for children that hold a GPU or a port."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """In a child that multiprocessing started: it is killed when its parent ends, however that ends. Linux alone has
    the means; elsewhere, and in a process that is nobody's child, nothing is done."""
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)
