"""The names of the classes in a checkpoint, since a model knows them by their numbers alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from megdet_d2.data.classes import classes_of, differing_classes
from megdet_d2.data.finding import Finding, raise_findings


class SavedClasses:
    """A checkpointable with the names of the classes of a training.

    Args:
        cfg: a config whose training set is loaded, so that Detectron2 knows its classes.
    """

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg

    def state_dict(self) -> dict[str, Any]:
        """Returns ``names``, in the order of the model's numbers; None where they are not known."""
        known = (known_classes(name) for name in self._cfg.DATASETS.TRAIN)
        return {"names": next((names for names in known if names), None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares the names in a checkpoint with those of the training that resumes from it.

        Raises:
            ValueError: they have another order or number.
        """
        here, saved = self.state_dict()["names"], saved_names({"classes": state})
        raise_findings(find_other_classes("DATASETS.TRAIN", here, "the checkpoint", saved))


def saved_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Returns the names in a checkpoint; None if it has none, as those of other code."""
    state = checkpoint.get("classes")
    return state.get("names") if isinstance(state, dict) else None


def known_classes(name: str) -> list[str] | None:
    """Returns the names of a data set's classes as far as Detectron2 knows them; None if not."""
    classes = MetadataCatalog.get(name).as_dict().get("thing_classes")
    return list(classes) if classes else None


def read_classes(name: str) -> list[str] | None:
    """Returns the names of a data set's classes, from its json where it is not loaded yet."""
    path = MetadataCatalog.get(name).as_dict().get("json_file")
    if (known := known_classes(name)) or not path or not PathManager.isfile(path):
        return known
    with PathManager.open(path) as file:
        return classes_of(json.load(file).get("categories", []))


def find_other_classes(
    where: str, classes: Sequence[str] | None, other: str, expected: Sequence[str] | None
) -> Iterator[Finding]:
    """Yields what makes an AP wrong: a class that has the number of another one.

    Args:
        where: whose classes they are, such as "DATASETS.TEST 'my_val'".
        classes: in the order of the model's numbers; None where not known.
        other, expected: the same of what was trained on.
    """
    if not classes or not expected or list(classes) == list(expected):
        return
    # With other names in the same places, such as "Cat" for "cat", the AP can be right.
    certain = len(expected) != len(classes) or any(
        name != wanted and name in expected for wanted, name in zip(expected, classes, strict=True)
    )
    yield Finding(
        "error" if certain else "warning",
        "categories-differ",
        where,
        "",
        f"its categories differ from those of {other} in {differing_classes(expected, classes)}",
        "give both the same names in the order of their ids",
    )
