"""Finds the names that torch 2.4 has in other places."""

import contextlib
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import checkpoint

if TYPE_CHECKING or hasattr(torch.library, "infer_schema"):
    infer_schema = torch.library.infer_schema
else:
    from torch._library.infer_schema import infer_schema  # noqa: F401

if TYPE_CHECKING or hasattr(checkpoint, "CheckpointPolicy"):
    CheckpointPolicy = checkpoint.CheckpointPolicy
    create_selective_checkpoint_contexts = checkpoint.create_selective_checkpoint_contexts
else:

    class CheckpointPolicy(enum.Enum):
        """The policy for the output of an operator."""

        MUST_SAVE = 0
        PREFER_RECOMPUTE = 1

    def create_selective_checkpoint_contexts(
        policy: Callable[..., CheckpointPolicy],
    ) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Returns the contexts of a first and a second forward.

        Args:
            policy: called as policy(None, op, *args, **kwargs).
        """

        def saves(_: str, op: Any, *args: Any, **kwargs: Any) -> bool:
            return policy(None, op, *args, **kwargs) is CheckpointPolicy.MUST_SAVE

        return checkpoint._pt2_selective_checkpoint_context_fn_gen(saves)
