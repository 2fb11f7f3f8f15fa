"""Evaluates several detectors and fuses their boxes."""
