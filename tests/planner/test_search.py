"""The search: what fits and why the rest does not, with the schedules of the training itself."""

import json
from dataclasses import replace

import pytest

from megdet_d2.config import load_config
from megdet_d2.engine.background import ROOM
from megdet_d2.planner import growth, hardware
from megdet_d2.planner.advice import find_warnings
from megdet_d2.planner.epochs import EpochModel
from megdet_d2.planner.evaluation_time import (
    SECONDS_OF_AP,
    background_seconds,
    describe_evaluations,
)
from megdet_d2.planner.flops import Counted
from megdet_d2.planner.memory import Memory
from megdet_d2.planner.plan import choose, describe_need
from megdet_d2.planner.plan_tables import to_text
from megdet_d2.planner.question import Question
from megdet_d2.planner.resolved import launch_line, resolve, to_words
from megdet_d2.planner.search import Search
from megdet_d2.planner.topology import network
from megdet_d2.planner.training_images import TrainingImages
from megdet_d2.schedule.build import scale_config
from tests.helpers.paths import CONFIGS

STAGES = ("res2", "res3", "res4", "res5", "fpn", "rpn")
PAPER = "COCO-Detection/megdet_R50_FPN_b16_normal.yaml"


def question(config=CONFIGS / PAPER, opts=(), **changes) -> Question:
    defaults = {
        "machines": 1, "gpus": 8, "memory": 24.5e9, "hardware": hardware.presets()["A100-SXM-80GB"],
        "across": network(1600), "images": TrainingImages(118_000, 0.88, 0.88, 5000),
        "epochs": EpochModel(12.5, 700),
    }  # fmt: skip
    cfg = load_config(config, opts)
    return Question(cfg, frozenset(opts[::2]), **{**defaults, **changes})


def memory(images: int, stages: tuple[str, ...]) -> Memory:
    each = {(): 7, STAGES[:5]: 3}.get(stages, 2)
    return Memory(0, 0, 0, 0, 0, 0, int(each * images * 1e9), 0, int(3e9))


def counted(stages: tuple[str, ...]) -> Counted:
    return Counted(1e12 + 1e11 * len(stages), 41_000_000, 50, STAGES)


def search(asked: Question):
    return Search(asked, memory, counted).run()


def test_settings_that_fit_come_best_first_and_the_others_have_a_reason():
    found = search(question())
    hours = [s.hours_to_equal_ap for s in found.settings if s.bn_size == 16]
    assert hours == sorted(hours) and len(hours) > 20
    assert "4 images per GPU or more, all kept: 4 needs 31.0 GB of 24.5" in found.out
    text = "8 images per GPU or more, sublinear memory in res2, res3, res4, res5, fpn"
    assert f"{text}: 8 needs 27.0 GB of 24.5" in found.out
    for s in found.settings:
        assert s.resolved.batch == s.images_per_gpu * s.micro_batches * 8
        assert s.memory.total <= 24.5e9 and s.bn_size == s.images_per_gpu * s.group
        assert bool(s.sublinear) == (s.images_per_gpu > 3)
    best = choose(found.settings, 6)
    assert len({s.resolved.batch for s in best}) == len(best) == 6
    one = search(question(batch=64)).settings
    assert choose(one, 99) == one and len(choose(one, 2)) == 2


def test_the_schedule_is_the_one_that_a_training_resolves():
    asked = question(batch=64)
    for setting in search(asked).settings:
        cfg = load_config(CONFIGS / PAPER, setting.resolved.keys)
        scale_config(cfg, world_size=8)
        resolved = setting.resolved
        assert (resolved.lr, resolved.iterations, resolved.warmup) == (
            cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
        )  # fmt: skip
        assert (resolved.lr, resolved.iterations) == (0.08, 20_281)
        assert cfg.MEGDET.ACCUMULATION_STEPS == setting.micro_batches
        assert cfg.MODEL.CGBN.BN_SIZE == setting.bn_size
        assert cfg.MODEL.SUBLINEAR.ENABLED == bool(setting.sublinear)
        assert cfg.TEST.EVAL_PERIOD == cfg.SOLVER.CHECKPOINT_PERIOD == 1844  # an epoch again
        assert resolved.evaluations == 11


def test_keys_of_the_command_line_stay():
    opts = ["MODEL.CGBN.BN_SIZE", "32", "MEGDET.ACCUMULATION_STEPS", "4"]
    found = search(question(opts=opts))
    assert {s.micro_batches for s in found.settings} == {4}
    assert {s.bn_size for s in found.settings} == {32}
    assert any("MODEL.CGBN.BN_SIZE is 32, but no equal groups" in reason for reason in found.out)
    opts = ["SOLVER.IMS_PER_BATCH", "48", "MODEL.SUBLINEAR.ENABLED", "True"]
    found = search(question(opts=opts))
    assert {(s.resolved.batch, s.sublinear) for s in found.settings} == {(48, STAGES[:5])}


def test_three_gpus_and_one():
    found = search(question(gpus=3))
    assert {s.resolved.batch % 3 for s in found.settings} == {0}
    first = found.settings[0]
    assert first.bn_size == 18
    assert "config's BN size 16 is not possible here, 18" in find_warnings(question(), first)[-1]
    with pytest.raises(ValueError, match="16 images cannot be shared by 3 GPUs; nearest .* 15 and"):
        search(question(gpus=3, batch=16))
    alone = search(question(gpus=1, batch=16)).settings
    assert {s.group for s in alone} == {1} and alone[0].step.gradients == 0


def test_agvm_on_one_gpu_has_two_micro_batches_and_a_second_copy_of_gradients():
    opts = ("MEGDET.OPTIMIZER", "agvm")
    one, eight = search(question(opts=opts, gpus=1)), search(question(opts=opts))
    assert min(s.micro_batches for s in one.settings) == 2
    assert any("1 micro-batch on 1 GPU: MEGDET.OPTIMIZER 'agvm'" in reason for reason in one.out)
    assert {s.memory.gradients for s in one.settings} == {2 * 4 * 41_000_000}
    assert min(s.micro_batches for s in eight.settings) == 1
    assert {s.memory.gradients for s in eight.settings} == {0, 4 * 41_000_000}


def test_groups_stay_on_a_machine():
    found = search(question(machines=4, gpus=4, batch=16))
    assert {s.bn_size for s in found.settings} == {4}
    wide = question(machines=4, gpus=4, batch=16, opts=["MODEL.CGBN.CROSS_MACHINE", "True"])
    assert {s.bn_size for s in search(wide).settings} == {16}


def test_frozen_norms_have_no_bn_size():
    def frozen(stages):
        return replace(counted(stages), layers=0)

    found = Search(question(batch=16), memory, frozen).run()
    assert found.settings[0].bn_size == 0 and found.settings[0].step.norm == 0
    assert "MODEL.CGBN.BN_SIZE" not in found.settings[0].resolved.keys


def test_nothing_fits():
    asked = question(memory=4e9)
    found = search(asked)
    assert not found.settings
    text = describe_need(asked, found)
    assert "nothing fits in 4 GB per GPU. The smallest need is 5.0 GB: 1 image per GPU" in text
    assert "SOLVER.AMP.ENABLED True" in text and "1 needs 10.0 GB of 4" in text


def test_too_few_images_for_the_epochs():
    tiny = question(images=TrainingImages(40, 0.88, 0.88, 0), opts=["MEGDET.EPOCH_IMAGES", "0"])
    found = search(tiny)
    assert "mini-batches of 64 and more: MEGDET.EPOCHS 11 with" in found.out[-1]
    assert max(s.resolved.batch for s in found.settings) < 64


def test_a_schedule_of_detectron2_is_for_its_own_batch():
    from detectron2 import model_zoo

    stock = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    own = search(question(stock)).settings
    assert {s.resolved.batch for s in own} == {16} and own[0].resolved.iterations == 90_000
    keys = search(question(stock, batch=64)).settings[0].resolved
    assert (keys.lr, keys.iterations, keys.warmup) == (0.04, 22_500, 1000)
    cfg = load_config(stock, keys.keys)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (0.04, (15_000, 20_000))


def test_warnings():
    asked = question(batch=1024, gpus=64, machines=1)
    setting = search(asked).settings[0]
    text = "\n".join(find_warnings(asked, setting))
    assert "1,267 iterations are below the floor of 2,107" in text
    assert "a warm-up of 115 iterations, 9%, is short for LR 1.28" in text
    asked = question(batch=8, opts=["MODEL.CGBN.BN_SIZE", "8", "TEST.EVAL_PERIOD", "100"])
    text = "\n".join(find_warnings(asked, search(asked).settings[0]))
    assert "BN size 8 is under 16" in text and "set TEST.EVAL_PERIOD, or TEST.COCO_API" in text


TTA = ("TEST.AUG.ENABLED", "True")
EMA = ("MEGDET.EMA_DECAY", "0.9998")
BACKGROUND = ("TEST.BACKGROUND", "True", "TEST.BACKGROUND_DEVICE", "cuda:8")


def evaluation(opts=(), **changes) -> float:
    """Returns the seconds of the evaluations of 64 images per update, 11 of them."""
    setting = search(question(opts=opts, batch=64, **changes)).settings[0]
    assert setting.resolved.evaluations == 11 and setting.resolved.evaluation_period == 1844
    assert setting.hours == pytest.approx(
        (setting.resolved.iterations * setting.step.total + setting.evaluation) / 3600
    )
    return setting.evaluation


def test_an_average_doubles_the_evaluations():
    assert evaluation(EMA) == pytest.approx(2 * evaluation())


def test_test_time_augmentation_comes_once_for_each_model():
    # With as many pixels as ten plain tests: forward is ten times as long, and AP is not.
    images = TrainingImages(118_000, 0.88, 0.88, 5000, augmented_megapixels=8.8)
    plain, ap = evaluation() / 11, 5000 * SECONDS_OF_AP["pycocotools"]
    augmented = 10 * (plain - ap) + ap
    assert evaluation(TTA, images=images) == pytest.approx(11 * plain + augmented)
    assert evaluation(EMA + TTA, images=images) == pytest.approx(22 * plain + 2 * augmented)
    masks = evaluation((*TTA, "MODEL.MASK_ON", "True"), images=images)
    assert masks == pytest.approx(11 * plain + 2 * augmented - ap)
    said = describe_evaluations(question(opts=EMA + TTA, images=images))
    assert said == (
        "Evaluations: each tests two models (MEGDET.EMA_DECAY); the last one tests again with 10 "
        "times the pixels (TEST.AUG)."
    )
    often = question(opts=(*TTA, "TEST.EVAL_PERIOD", "100"), batch=64, images=images)
    assert "fewer TEST.AUG.MIN_SIZES" in "".join(find_warnings(often, search(often).settings[0]))


def test_an_evaluation_beside_the_training_counts_where_the_training_waits():
    plain = evaluation() / 11
    assert evaluation(BACKGROUND) == pytest.approx(plain)  # an epoch is longer than an evaluation
    assert evaluation(BACKGROUND + EMA) == pytest.approx(2 * plain)
    # On one process a test of so many images takes longer than an epoch on eight.
    images = TrainingImages(118_000, 0.88, 0.88, 200_000)
    here, beside = evaluation(images=images), evaluation(BACKGROUND, images=images)
    assert here / 11 < beside < 10 * here
    cpu = ("TEST.BACKGROUND", "True", "TEST.BACKGROUND_DEVICE", "cpu")
    assert evaluation(cpu, images=images) == pytest.approx(here / 11)
    assert "'cpu' are not known" in describe_evaluations(question(opts=cpu))
    assert "not known" not in describe_evaluations(question(opts=BACKGROUND))
    on_cpu = replace(hardware.presets()["A100-SXM-80GB"], slots=8)
    assert evaluation(cpu, images=images, hardware=on_cpu) > beside  # a ninth process on 8 cores
    assert describe_evaluations(question()) == ""
    assert describe_evaluations(question(opts=EMA, images=TrainingImages(9, 1, 1, 0))) == ""


def wait_for_evaluations(number, each, last, period, rest):
    """Returns the time that trainings take longer, by the rule of ``BackgroundEvaluation``."""
    now, ends = 0.0, []
    for _ in range(number):
        now += period
        if len(ends) >= ROOM:
            now = max(now, ends[-ROOM])
        ends.append(max([now, *ends[-1:]]) + each)
    return max([now + rest + last, *ends[-1:]]) - number * period - rest


@pytest.mark.parametrize("number", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("each", [0.0, 3.0, 9.9, 10.0, 10.1, 14.0, 75.0])
@pytest.mark.parametrize("rest", [1.0, 10.0])
def test_waiting_for_a_process_that_evaluates(number, each, rest):
    found = background_seconds(number, each, 2.0, 10.0, rest)
    assert found == pytest.approx(wait_for_evaluations(number, each, 2.0, 10.0, rest))


def test_launch_line(monkeypatch, tmp_path):
    asked = question(machines=2, batch=256)
    values = {"MEGDET.ACCUMULATION_STEPS": 4, "MODEL.CGBN.BN_SIZE": 16,
              "MODEL.SUBLINEAR.ENABLED": True, "MODEL.SUBLINEAR.STAGES": STAGES[:2]}  # fmt: skip
    resolved = resolve(asked, 256)
    resolved = replace(resolved, keys=(*resolved.keys, *to_words(asked.cfg, values)))
    opts = ["OUTPUT_DIR", "a b", "SOLVER.IMS_PER_BATCH", "16"]
    monkeypatch.chdir(tmp_path)
    line = launch_line(resolved, PAPER, 2, 8, opts)
    assert line == (
        f"megdet train --config-file {PAPER} --num-gpus 8 --num-machines 2 --machine-rank $RANK "
        "--dist-url tcp://$HOST0:29500 OUTPUT_DIR 'a b' SOLVER.IMS_PER_BATCH 256 "
        "SOLVER.CHECKPOINT_PERIOD 461 TEST.EVAL_PERIOD 461 MEGDET.ACCUMULATION_STEPS 4 "
        """MODEL.SUBLINEAR.ENABLED True MODEL.SUBLINEAR.STAGES '["res2", "res3"]'"""
    )
    (tmp_path / "train_net.py").touch()
    assert launch_line(resolved, PAPER, 1, 8, []).startswith("python train_net.py --config-file")


def test_the_printed_tables():
    asked = question()
    found = search(asked)
    chosen = choose(found.settings, 3)
    warnings = [["a is small"], ["a is small", "b is large"], []]
    text = to_text(["What is planned."], chosen, found, warnings, ["x", "y", "z"])
    assert text.startswith("What is planned.\n\n|") and "4 needs 31.0 GB of 24.5" in text
    assert "* 1, 2: a is small.\n* 2: b is large." in text
    assert text.endswith("Launch:\n1: x\n2: y\n3: z")
    first = [cell.strip() for cell in text.split("\n")[4].split("|")][1:-1]
    s = chosen[0]
    assert first[:3] == ["1", str(s.resolved.batch), str(s.images_per_gpu)]
    assert "evaluation" in text and "activations" in text
    assert json.loads(json.dumps(s.as_dict()))["hours"] == s.hours


def test_growth(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the demo extra")
    asked = question(batch=64)
    best = search(asked).settings[0]
    over = Search(asked, memory, counted)
    stays, grows = growth.grow(over, best)
    assert {s.resolved.batch for _, s in stays} == {64}
    assert [gpus for gpus, _ in grows][:5] == [1, 2, 4, 8, 16]
    assert all(s.resolved.batch == gpus * best.resolved.batch // 8 for gpus, s in grows)
    assert dict(grows)[8].hours == pytest.approx(best.hours)
    assert list(growth.clusters(3, 1))[:3] == [(1, 1), (1, 3), (2, 3)]
    picture = growth.draw(over, best, tmp_path / "new")
    assert picture.read_bytes().startswith(b"\x89PNG")
