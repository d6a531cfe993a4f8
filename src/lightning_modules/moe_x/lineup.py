"""Which language models are trained side by side, from which weights, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Control = Literal[
    "dense", "dense_relu", "dense_geglu", "dense_solu", "router_linear", "relu_experts", "gelu_experts", "scratch",
    "source", "dense_continued", "untrained",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A model beside ours.

    Attributes:
        label: in tables.
        changes: what its configuration has otherwise.
        begins: from ``random`` weights at the first step; where the source stands (``upcycled``) when that is trained,
            as experts or as its copy; it is the ``source`` and ends there; or it never learns.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    begins: Literal["random", "upcycled", "source", "never"] = "upcycled"


OURS = Entry("MoE-X (ours)")
_DENSE = {"mlp": "dense", "act": "gelu"}
CONTROLS: dict[str, Entry] = {
    "dense": Entry("dense GELU, same active size", _DENSE, "random"),
    "dense_relu": Entry("dense ReLU, same active size", {"mlp": "dense", "act": "relu"}, "random"),
    "dense_geglu": Entry("dense GEGLU, same active size", {"mlp": "dense", "act": "geglu"}, "random"),
    "dense_solu": Entry("dense SoLU, same active size", {"mlp": "dense", "act": "solu"}, "random"),
    "router_linear": Entry("learned router, GELU (Switch)", {"router": "linear", "act": "gelu"}),
    "relu_experts": Entry("learned router, ReLU experts", {"router": "linear"}),
    "gelu_experts": Entry("sparsity router, GELU experts", {"act": "gelu"}),
    "scratch": Entry("MoE-X from scratch", {}, "random"),
    "source": Entry("dense source", _DENSE | {"mlp_hidden": "expert"}, "source"),
    "dense_continued": Entry("dense source, trained on", _DENSE | {"mlp_hidden": "expert"}),
    "untrained": Entry("MoE-X, untrained", {}, "never"),
}
"""Rows of the paper's Tables 1, 3 and 4, beside ours."""


def window(entry: Entry, dense_steps: int, total: int) -> tuple[int, int]:
    """First step of a model's training and the one after its last."""
    spans = {
        "random": (0, total), "upcycled": (dense_steps, total), "source": (0, dense_steps), "never": (total, total),
    }  # fmt: skip
    return spans[entry.begins]
