"""Counts the collectives that a piece of code makes."""

import contextlib

import pytest
import torch.distributed as dist


@contextlib.contextmanager
def counted_all_reduces():
    """Collects the lengths of the messages that are reduced inside."""
    lengths, stock = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        lengths.append(tensor.numel())
        return stock(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        yield lengths
