"""Runs ``megdet`` as ``python -m megdet_cli``."""

from . import main

if __name__ == "__main__":  # processes of a training import this module too
    main()
