"""Reads what an ensemble is made of, models or saved results, and prepares the models' configs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from megdet_d2.config import load_config, merge_overrides
from megdet_d2.data import register_datasets
from megdet_d2.engine import prepare_config
from megdet_d2.engine.ema import FOLDER
from megdet_d2.report.run import existing, read_config

_LAST, _AVERAGE = "model_final.pth", f"{FOLDER}/model_final.pth"
_KINDS = "the folder of a run, CONFIG.yaml:WEIGHTS, or a json of COCO results"


@dataclass(frozen=True)
class Source:
    """A member of an ensemble: a model to evaluate, or a file of its results.

    Attributes:
        name: as on the command line.
        cfg: config of the model with its MODEL.WEIGHTS; None for a file of results.
        label: the name in the table, with the file of weights where a run has two.
    """

    name: str
    cfg: CfgNode | None
    label: str

    @classmethod
    def read(cls, text: str, opts: Sequence[str] = ()) -> "Source":
        """Reads the config, if the source is a model.

        A run with ``MEGDET.EMA_DECAY`` gives the average of its weights, as in ``megdet ablate``.

        Args:
            text: the folder of a run, CONFIG.yaml:WEIGHTS, or a json of COCO results.
            opts: overrides of the config, KEY VALUE ....

        Raises:
            FileNotFoundError: there is no such file, or the run has no config or no weights.
            ValueError: the text is none of these, or an override has an unknown key.
        """
        label = text
        model = re.fullmatch(r"(.+?\.ya?ml):(.+)", text)
        if model:
            cfg = load_config(existing("", model[1], f"give {_KINDS}"))
            cfg.MODEL.WEIGHTS = model[2]
        elif Path(text).is_dir():
            cfg = read_config(text)
            advice = "train to the end, or give {run}/config.yaml:CHECKPOINT"
            averages = cfg.MEGDET.EMA_DECAY > 0
            file = _AVERAGE if averages and Path(text, _AVERAGE).is_file() else _LAST
            cfg.MODEL.WEIGHTS = str(existing(text, file, advice))
            label += f" ({file})" * averages
        elif text.endswith(".json"):
            existing("", text, f"give {_KINDS}")
            return cls(text, None, label)
        else:
            raise ValueError(f"{text!r} is none of: {_KINDS}. Overrides come after the flags")
        merge_overrides(cfg, opts)
        return cls(text, cfg, label)


def prepare_models(cfgs: Sequence[CfgNode], dataset: str | None = None) -> str:
    """Prepares all configs, in place, for the same data set; registers it and returns its name.

    Args:
        dataset: a name that the first config knows; by default its DATASETS.TEST.

    Raises:
        ValueError: there are several test sets and ``dataset`` is None; the models have different
            classes; ``prepare_config`` refuses a config.
    """
    first = cfgs[0]
    if dataset is None:
        if len(first.DATASETS.TEST) != 1:
            raise ValueError(
                f"DATASETS.TEST of the first config is {tuple(first.DATASETS.TEST)}; choose one "
                "data set by --dataset NAME"
            )
        dataset = first.DATASETS.TEST[0]
    first.DATASETS.TEST = (dataset,)
    # Each config's class names come from its own data sets. The first config is read last, so that
    # its data sets stay registered.
    classes = [_class_names(cfg) for cfg in reversed(cfgs)][::-1]
    for number, names in enumerate(classes[1:], start=2):
        if names != classes[0]:
            raise ValueError(
                f"The classes of model {number} are {names[:8]}, of the first {classes[0][:8]}; an "
                "ensemble needs models of the same classes in the same order"
            )
    for cfg in cfgs:
        cfg.DATASETS = first.DATASETS.clone()
        prepare_config(cfg, eval_only=True)
    return dataset


def _class_names(cfg: CfgNode) -> list[str]:
    """Returns the class names of the first test set, or else training set; checks the set."""
    split = "TEST" if cfg.DATASETS.TEST else "TRAIN"
    if not cfg.DATASETS[split]:
        raise ValueError("A config has no DATASETS.TEST, which names its classes; add it")
    register_datasets(cfg, (split,))
    name = cfg.DATASETS[split][0]
    if "thing_classes" not in MetadataCatalog.get(name).as_dict():
        DatasetCatalog.get(name)  # sets them
    return list(MetadataCatalog.get(name).thing_classes)
