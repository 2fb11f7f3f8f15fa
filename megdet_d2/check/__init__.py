"""Checks a data set, and a config on it, before anything is trained."""
