"""Measures the variance and the noise scale of the gradient (§3.1, Equations 2 to 4)."""
