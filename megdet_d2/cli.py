"""Runs ``megdet`` as ``python -m megdet_d2.cli``.

It starts more slowly than ``megdet``: Python first imports ``megdet_d2``, and with it torch.
"""

from megdet_cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
