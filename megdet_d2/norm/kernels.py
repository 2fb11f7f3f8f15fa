"""Placeholder until the kernels are merged."""


def available() -> bool:
    return False
