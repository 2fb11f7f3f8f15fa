"""Figures without a display, all of one look."""


def make_figure(width: float, height: float):
    """A figure, sizes in hundreds of pixels. Without pyplot it needs no display: Agg draws PNGs.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The report needs matplotlib: run  pip install -e ".[demo]"') from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def tidy(axes) -> None:
    """A light grid, and no box around the panel."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
