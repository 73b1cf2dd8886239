"""`${…}` in a configuration of Hydra or OmegaConf: absolute (`${a.b}`) and relative (`${..b}`) references and `mul`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WHOLE = re.compile(r"\$\{([^${}]+)\}")
_DEPTH = 20


def resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every reference that leads somewhere in it replaced; others stay as they are."""

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(value, (*path, str(name))) for name, value in node.items()}
        if isinstance(node, list):
            return [walk(value, path) for value in node]
        return _value(tree, node, path, _DEPTH)

    found = walk(tree, ())
    assert isinstance(found, dict)
    return found


def _value(tree: Mapping[str, Any], node: Any, path: tuple[str, ...], depth: int) -> Any:
    if not isinstance(node, str) or "${" not in node or not depth:
        return node
    match = _WHOLE.fullmatch(node)
    if match:
        found = _referred(tree, match[1], path, depth)
        return node if found is None else found

    def inner(inside: re.Match[str]) -> str:
        found = _referred(tree, inside[1], path, depth)
        return inside[0] if found is None else str(found)

    replaced = _WHOLE.sub(inner, node)
    return node if replaced == node else _value(tree, _number(replaced), path, depth - 1)


def _referred(tree: Mapping[str, Any], text: str, path: tuple[str, ...], depth: int) -> Any:
    if text.startswith("mul:"):
        try:
            left, right = (float(_number(part.strip())) for part in text[4:].split(","))
        except (TypeError, ValueError):
            return None
        product = left * right
        return int(product) if product.is_integer() else product
    dots = len(text) - len(text.lstrip("."))
    names = text.lstrip(".").split(".")
    at = (*path[: len(path) - dots], *names) if dots else tuple(names)
    node: Any = tree
    for name in at:
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return _value(tree, node, at, depth - 1)


def _number(text: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text
