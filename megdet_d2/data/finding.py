"""A finding: one kind of fault of a data set, with all rows that have it, as plain data."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

logger = logging.getLogger(__name__)

Level: TypeAlias = Literal["error", "warning"]
_EXAMPLES = 5  # rows that a message names
_ALL = 10  # lines of an error


@dataclass(frozen=True)
class Finding:
    """Finding of one kind; ``str`` makes a line for people, ``as_dict`` is for machines.

    Attributes:
        level: "error" where training is refused.
        kind: a short name that does not change, such as "box-outside".
        where: the key and the data set, such as "DATASETS.COCO 'my_train'".
        file: the annotation file or the image folder; "" if the config is at fault.
        problem: what is wrong, to be read after "3 of 20 annotations".
        fix: what to do.
        rows: "annotations", "images" or "categories"; "" if the finding is of a whole file.
        ids: the ids of all rows that have the fault; "annotations[3]" for a row without an id.
        images: the file names of their images, in the same order.
        values: their faulty values as text, in the same order.
        num_rows: the number of all rows.
        by_mapper: True if only the mapper decides whether it is a fault: one of the user's may read
            what Detectron2's cannot.
    """

    level: Level
    kind: str
    where: str
    file: str
    problem: str
    fix: str
    rows: str = ""
    ids: tuple[Any, ...] = ()
    images: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    num_rows: int = 0
    by_mapper: bool = False

    @property
    def count(self) -> int:
        """The number of rows that have the fault."""
        return len(self.ids)

    def __str__(self) -> str:
        """Returns place, problem, examples and fix in one line."""
        at = f"{self.where}, {self.file!r}" if self.file else self.where
        if not self.rows:
            return f"{at}: {self.problem}; {self.fix}"
        shown = [self._example(i) for i in range(min(self.count, _EXAMPLES))]
        more = ", ..." if self.count > _EXAMPLES else ""
        return (
            f"{at}: {self.count} of {self.num_rows} {self.rows} {self.problem}: "
            f"{', '.join(shown)}{more}; {self.fix}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns all attributes and the count, ready for json."""
        return asdict(self) | {"count": self.count}

    def _example(self, i: int) -> str:
        label = self.ids[i]
        text = label if str(label).startswith(f"{self.rows}[") else f"id {label!r}"
        if i < len(self.images) and self.images[i]:
            text += f" in {self.images[i]!r}" if self.rows == "annotations" else ""
            text += f" {self.images[i]!r}" if self.rows == "images" else ""
        return f"{text} ({self.values[i]})" if i < len(self.values) else text


def raise_findings(findings: Iterable[Finding]) -> None:
    """Logs the warnings, and raises one error that lists all errors.

    Findings that depend on the mapper are warnings here; ``CheckedMapper`` refuses such an image.

    Raises:
        FileNotFoundError: every error is of a file that is not there.
        ValueError: the other errors.
    """
    errors = []
    for finding in findings:
        if finding.level == "error" and not finding.by_mapper:
            errors.append(finding)
        else:
            logger.warning(str(finding))
    if not errors:
        return
    missing = all(finding.kind.startswith("missing-file") for finding in errors)
    kind = FileNotFoundError if missing else ValueError
    if len(errors) == 1:
        raise kind(str(errors[0]))
    lines = [f"\n  {number}. {finding}" for number, finding in enumerate(errors[:_ALL], 1)]
    more = f"\n  and {len(errors) - _ALL} more" if len(errors) > _ALL else ""
    raise kind(f"The data sets have {len(errors)} faults:{''.join(lines)}{more}")
