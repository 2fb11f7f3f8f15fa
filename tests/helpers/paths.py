"""Paths of files in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TRAIN_NET = str(ROOT / "train_net.py")
HELPERS = Path(__file__).parent
# A thin ResNet-50 FPN on 64-pixel digits, which trains in seconds.
TINY = str(ROOT / "tests" / "data" / "tiny.yaml")
# A file of configs/ is a config, or a list of rows for `megdet ablate`.
ROW_LISTS = sorted((CONFIGS / "ablations").glob("[a-z]*.yaml"))
CONFIG_FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(ROW_LISTS))
