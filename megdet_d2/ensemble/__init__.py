"""Evaluates several detectors, or their saved results, and fuses their boxes into one set."""
