"""Measures the variance and the noise scale of the gradient (Equations 2 to 4)."""
