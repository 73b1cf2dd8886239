"""What is the user's own, named `package.module:function` or `package.module:Class` in the configuration."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def import_function(path: str, key: str = "") -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Args:
        key: the option that names it, where the message should.
    Raises:
        ValueError: no such module or function, or it isn't callable.
    """
    where = f"{key}: " if key else ""
    function = import_named(path, "function", where)
    if not callable(function):
        raise ValueError(f"{where}{path!r} is a {type(function).__name__}; expected a function")
    return function  # type: ignore[no-any-return]


def import_named(path: str, kind: str, where: str = "") -> Any:
    """What `package.module:name` names, looked up as Python would with the working directory on its path.

    Args:
        kind: what it should be, for the message; where: the message's beginning.
    Raises:
        ValueError: no such module, or nothing of that name in it.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path starts in its own folder, not where the user stands
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}can't import {path!r} (package.module:{kind}): {error}") from error
