"""Reads finished runs and draws them."""
