"""Predicts how long a training takes on machines that are not there, and tests its predictions."""
