"""Tabulates the settings of a plan: schedule, memory and seconds by part, and launch lines."""

from collections.abc import Sequence
from dataclasses import asdict

from .search import Found, Setting
from .tables import to_table


def to_text(
    introduction: Sequence[str],
    settings: Sequence[Setting],
    found: Found,
    warnings: Sequence[Sequence[str]],
    lines: Sequence[str],
) -> str:
    """Returns all that ``megdet plan CONFIG`` prints.

    Args:
        introduction: lines on what is planned.
        settings: best first.
        found: the reasons of those that are out.
        warnings, lines: sentences and launch line of each setting.
    """
    parts = [
        "\n".join(introduction),
        settings_table(settings),
        "Memory of one GPU at its peak, GB:\n\n" + memory_table(settings),
        "An update, ms:\n\n" + seconds_table(settings),
    ]
    if found.out:
        parts.append("Out:\n" + "\n".join(f"* {reason}" for reason in found.out))
    rows: dict[str, list[str]] = {}
    for i, texts in enumerate(warnings, 1):
        for text in texts:
            rows.setdefault(text, []).append(str(i))
    if rows:
        said = (f"* {', '.join(numbers)}: {text}." for text, numbers in rows.items())
        parts.append("Warnings:\n" + "\n".join(said))
    parts.append("Launch:\n" + "\n".join(f"{i}: {line}" for i, line in enumerate(lines, 1)))
    return "\n\n".join(parts)


def settings_table(settings: Sequence[Setting]) -> str:
    """Returns a Markdown table of the settings and their schedule."""
    return to_table(
        [
            {
                "": str(i),
                "mini-batch": f"{s.resolved.batch:,}",
                "images per GPU": str(s.images_per_gpu),
                "micro-batches": str(s.micro_batches),
                "BN size": str(s.bn_size or "-"),
                "of GPUs": str(s.group) if s.bn_size else "-",
                "sublinear": ", ".join(s.sublinear) or "-",
                "LR": f"{s.resolved.lr:.4g}",
                "warm-up": f"{s.resolved.warmup:,}",
                "iterations": f"{s.resolved.iterations:,}",
                "GB": f"{s.memory.total / 1e9:.1f}",
                "hours": f"{s.hours:.3g}",
                "to equal AP": f"{s.hours_to_equal_ap:.3g}",
                "efficiency": f"{s.efficiency:.0%}",
            }
            for i, s in enumerate(settings, 1)
        ]
    )


def memory_table(settings: Sequence[Setting]) -> str:
    """Returns a Markdown table of the parts of the memory."""
    rows = []
    for i, setting in enumerate(settings, 1):
        parts = {name: f"{size / 1e9:.2f}" for name, size in setting.memory.parts().items()}
        rows.append({"": str(i)} | parts | {"total": f"{setting.memory.total / 1e9:.2f}"})
    return to_table(rows)


def seconds_table(settings: Sequence[Setting]) -> str:
    """Returns a Markdown table of the parts of an update; evaluation is shared out over updates."""
    rows = []
    for i, setting in enumerate(settings, 1):
        evaluation = setting.evaluation / setting.resolved.iterations
        parts = asdict(setting.step) | {"evaluation": evaluation}
        parts["total"] = sum(parts.values())
        rows.append({"": str(i)} | {name: f"{1e3 * s:.1f}" for name, s in parts.items()})
    return to_table(rows)
