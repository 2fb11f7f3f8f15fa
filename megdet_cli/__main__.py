"""Runs ``megdet`` as ``python -m megdet_cli``."""

from . import main

main()
