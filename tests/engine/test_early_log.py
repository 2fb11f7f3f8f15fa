"""What the checks of a config say is in log.txt, for train_net.py and for a script of one's own."""

import pytest

from tests.helpers.paths import TINY, TRAIN_NET
from tests.helpers.processes import finish, start

OWN = """
from detectron2.engine import default_argument_parser, default_setup
import megdet_d2

args = default_argument_parser().parse_args()
cfg = megdet_d2.load_config(args.config_file, args.opts)
megdet_d2.prepare_config(cfg, opts=args.opts)
cfg.freeze()
default_setup(cfg, args)
megdet_d2.Trainer(cfg).train()
"""


@pytest.mark.parametrize("own", [False, True], ids=["train_net.py", "an own script"])
def test_warnings_and_classes_are_in_the_log(coco, tmp_path, own):
    script = tmp_path / "own.py"
    script.write_text(OWN)
    output = tmp_path / "run"
    status, out = finish(start(
        script if own else TRAIN_NET, "--config-file", TINY, "DATASETS.COCO", repr(coco),
        "DATASETS.TRAIN", "('mixed',)", "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", 1,
        "MEGDET.EPOCHS", 2.0, "OUTPUT_DIR", output,
    ))  # fmt: skip
    assert status == 0, out
    log = (output / "log.txt").read_text()
    for once in (
        "WARNING: MEGDET.POLICY is 'custom': its 2 epochs are 6 iterations",
        "Distribution of instances among all 1 categories", "CGBN: 60 layers",
    ):  # fmt: skip
        assert log.count(once) == 1, once
        assert out.count(once.removeprefix("WARNING: ")) == 1, once


# In a separate process, since pytest puts handlers on every logger.
ALONE = """
import logging
from megdet_d2.engine.early_log import kept_log, write_kept_log

class Listed(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

ours, theirs = logging.getLogger("megdet_d2"), logging.getLogger("detectron2")
try:
    with kept_log():
        ours.warning("shown at once, and not kept for another config")
        raise ValueError
except ValueError:
    pass

early, late = Listed(), Listed()
ours.addHandler(early)
with kept_log():
    ours.warning("short")
    theirs.info("table")
    theirs.warning("shown at once")
write_kept_log()
assert early.said == ["short"]  # Detectron2's logger has no handler yet: nothing is lost
for logger in (ours, theirs):
    logger.addHandler(late)
write_kept_log()
write_kept_log()
assert early.said == ["short"], early.said
assert late.said == ["short", "table", "shown at once"], late.said
assert ours.level == theirs.level == logging.NOTSET
"""


def test_each_handler_has_each_record_once():
    status, out = finish(start("-c", ALONE))
    assert status == 0, out
    assert [line for line in out.splitlines() if "shown" in line] == [
        "shown at once, and not kept for another config", "shown at once",
    ]  # fmt: skip
    assert "short" not in out and "table" not in out
