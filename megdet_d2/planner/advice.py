"""Warns of settings that fit the machines, and train worse."""

from megdet_d2.engine.advice import SHORTEST_WARMUP, WARMUP_SHARE, is_short_warmup

from .question import Question
from .search import SMALLEST_BN_SIZE, Setting

LARGE_SHARE = 0.2
"""Of the time, from which evaluations are worth a warning."""


def find_warnings(question: Question, setting: Setting) -> list[str]:
    """Returns a sentence for everything in a setting that lowers the AP."""
    found, resolved = [], setting.resolved
    floor = question.epochs.least_iterations(question.images.count)
    if resolved.iterations < floor:
        found.append(
            f"{resolved.iterations:,} iterations are below the floor of {floor:,.0f}, which no "
            f"mini-batch goes below for the same AP: {setting.equal_ap:.2f} times the epochs are "
            "needed"
        )
    share = resolved.warmup / resolved.iterations
    raised = resolved.batch > resolved.reference
    if raised and is_short_warmup(resolved.warmup, resolved.iterations):
        found.append(
            f"a warm-up of {resolved.warmup} iterations, {share:.0%}, is short for LR "
            f"{resolved.lr:g}: give {WARMUP_SHARE:.0%} or {SHORTEST_WARMUP} iterations, by "
            f"{'MEGDET.WARMUP_EPOCHS' if question.cfg.MEGDET.POLICY else 'SOLVER.WARMUP_ITERS'}"
        )
    if 0 < setting.bn_size < SMALLEST_BN_SIZE:
        found.append(
            f"BN size {setting.bn_size} is under {SMALLEST_BN_SIZE}: the AP falls (Table 3)"
        )
    asked = question.cfg.MODEL.CGBN.BN_SIZE
    if setting.bn_size and asked > 0 and setting.bn_size != asked:
        found.append(f"the config's BN size {asked} is not possible here, {setting.bn_size} is")
    share = setting.evaluation / 3600 / setting.hours
    if share > LARGE_SHARE:
        test = question.cfg.TEST
        faster = "" if test.COCO_API == "hotcoco" else ', or TEST.COCO_API "hotcoco"'
        faster += ", or fewer TEST.AUG.MIN_SIZES" if test.AUG.ENABLED else ""
        found.append(
            f"evaluations take more than {LARGE_SHARE:.0%} of the time: set TEST.EVAL_PERIOD"
            f"{faster}"
        )
    return found
