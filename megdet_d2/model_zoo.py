"""Finds and loads the configs that come with the package, as ``detectron2.model_zoo`` does.

A config's name is its path below ``configs/``. A wheel carries that folder as
``megdet_d2/configs``; in a checkout it lies beside the package.
"""

import difflib
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from .config import load_config

_HERE = Path(__file__).resolve().parent
_IN_WHEEL = _HERE / "configs"
CONFIGS = _IN_WHEEL if _IN_WHEEL.is_dir() else _HERE.parent / "configs"
"""The folder that holds the configs; there is none where the package was copied without it."""


def get_config_file(config_path: str) -> str:
    """Returns the path of a config.

    Args:
        config_path: its name, ``"COCO-Detection/megdet_R50_FPN_b16_normal.yaml"``.

    Raises:
        FileNotFoundError: there is no config of this name. The message lists similar names.
    """
    path = CONFIGS / config_path
    if not path.is_file():
        raise FileNotFoundError(_no_config(config_path))
    return str(path)


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """Loads a config: of a .yaml file as ``load_config``, of a .py file as a LazyConfig.

    The schedule of a .yaml file is not resolved yet; ``prepare_config`` does that.

    Args:
        config_path: see ``get_config_file``.
        trained: not supported, since no trained weights are published. Detectron2 has it.

    Raises:
        FileNotFoundError: see ``get_config_file``.
        ValueError: ``trained`` is True.
    """
    path = get_config_file(config_path)
    if trained:
        raise ValueError(
            f"there are no trained weights for {config_path}; use trained=False, and set "
            "MODEL.WEIGHTS to the checkpoint of your own training"
        )
    return LazyConfig.load(path) if path.endswith(".py") else load_config(path)


def find(path: str | Path, folder: str = "") -> Path:
    """Returns ``path`` where it exists, and otherwise the config or folder of this name.

    Args:
        path: a path, or a name. A name may begin with ``configs/``.
        folder: a folder of configs in which a name is looked up too.

    Raises:
        FileNotFoundError: there is neither. The message lists similar names.
    """
    if Path(path).exists():
        return Path(path)
    name = str(path).removeprefix("configs/")
    for found in (CONFIGS / name, CONFIGS / folder / name):
        if name and not Path(name).is_absolute() and found.exists():
            return found
    raise FileNotFoundError(_no_config(str(path)))


def _no_config(name: str) -> str:
    names = [
        str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*") if p.suffix in (".yaml", ".py")
    ]
    similar = difflib.get_close_matches(name.removeprefix("configs/"), names)
    hint = f"Similar names are {', '.join(similar)}" if similar else f"All are below {CONFIGS}"
    if not CONFIGS.is_dir():
        hint = f"The configs are not installed: copy the folder configs to {CONFIGS}"
    return f"there is no config {name}, neither a file nor a config of megdet_d2. {hint}"
