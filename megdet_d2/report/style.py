"""Makes figures that need no display and look alike."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure, ``width`` and ``height`` in hundreds of pixels.

    It is made without pyplot, so it needs no display; ``save_figure`` writes PNG files by Agg.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The report needs matplotlib: run  pip install -e ".[demo]"') from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save_figure(figure: "Figure", path: Path) -> Path:
    """Writes a PNG file and returns ``path``.

    Names of classes, files and runs are drawn as they are: a ``$`` in them begins no formula.
    """
    from matplotlib.text import Text

    axis = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {label for each in axis for label in each.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if text not in ticks:  # powers of ten are formulas
            text.set_parse_math(False)
    figure.savefig(path)
    return path


def tidy(axes: "Axes") -> None:
    """Adds a light grid and removes the frame's upper and right sides."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
