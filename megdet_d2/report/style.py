"""Makes figures that need no display and look alike."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure, ``width`` and ``height`` in hundreds of pixels.

    It is made without pyplot, so it needs no display; ``savefig`` writes PNG files by Agg.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The report needs matplotlib: run  pip install -e ".[demo]"') from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def tidy(axes: "Axes") -> None:
    """Adds a light grid and removes the frame's upper and right sides."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
