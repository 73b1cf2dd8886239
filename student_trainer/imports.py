"""Functions of the user's own, named `package.module:function` in the configuration."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def import_function(path: str, key: str = "") -> Callable[..., Any]:
    """The function `package.module:function` names, looked up as Python would with the working directory on its path.

    Args:
        key: the option that names it, where the message should.
    Raises:
        ValueError: no such module or function, or it isn't callable.
    """
    where = f"{key}: " if key else ""
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path starts in its own folder, not where the user stands
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}can't import {path!r} (package.module:function): {error}") from error
    if not callable(function):
        raise ValueError(f"{where}{path!r} is a {type(function).__name__}; expected a function")
    return function  # type: ignore[no-any-return]
