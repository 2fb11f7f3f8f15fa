"""Trains the rows of an ablation over seeds and tabulates them."""
