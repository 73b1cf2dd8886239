"""Datasets that people distil on, by name: where they are on the hub and which of their fields is what. A preset only
fills in keys that the user leaves out; with `source` naming a file of the same shape it reads that file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

PresetName = Literal["tulu3", "deepmath", "math-cl", "gsm8k", "fineweb-edu"]

PRESETS: dict[str, dict[str, Any]] = {
    "tulu3": {
        "source": "allenai/tulu-3-sft-mixture",
        "messages_key": "messages",
    },
    "deepmath": {
        "source": "zwhe99/DeepMath-103K",
        "question_key": "question",
        "answer_key": "final_answer",
        "completion_key": "r1_solution_1",
        "prompt_template": "{question}\n\nPut the final answer in \\boxed{}.",
    },
    "math-cl": {
        "source": "pe-nlp/math-cl",
        "question_key": "problem",
        "answer_key": "ground_truth_answer",
        "prompt_template": "{question}\n\nPut the final answer in \\boxed{}.",
    },
    "gsm8k": {
        "source": "openai/gsm8k",
        "subset": "main",
        "question_key": "question",
        "answer_key": "answer",
        "prompt_template": "{question}\n\nEnd with the answer alone after ####.",
    },
    "fineweb-edu": {
        "source": "HuggingFaceFW/fineweb-edu",
        "subset": "sample-10BT",
        "format": "packed_text",
        "text_key": "text",
        "on_policy_fraction": 0.0,
    },
}
"""Keys of the `data` section; `split` is train unless said otherwise. Fields as the datasets' own pages list them."""

HUB_KEYS = ("subset", "split")
"""Only a dataset of the hub has these: they are left out where `source` is something else."""
EXCLUDED_BY = {
    "messages_key": ("question_key", "prompt_key"),
    "question_key": ("messages_key", "prompt_key"),
    "prompt_template": ("prompt_template_file", "messages_key", "prompt_key"),
    "completion_key": ("fixed_source",),
}
"""A key of the preset gives way where the user sets one of these instead."""


def apply(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a data section with what its preset fills in.

    Args:
        known: the section's fields; keys of the preset that it doesn't have are left out.

    Raises:
        ValueError: there is no such preset, or it is not for this section.
    """
    name = values.get("preset")
    if name is None:
        return dict(values)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}{meant}")
    if "format" in preset and "format" not in known:
        raise ValueError(f"preset: got {name!r}, expected one with questions: it is text alone")
    own_source = bool(values.get("source")) and values["source"] != preset["source"]
    filled = {
        key: value
        for key, value in preset.items()
        if key in known
        and not (own_source and key in HUB_KEYS)
        and not any(values.get(other) for other in EXCLUDED_BY.get(key, ()))
    }
    return {**filled, **{key: value for key, value in values.items() if value != "" or key != "source"}}


assert set(PRESETS) == set(get_args(PresetName))
