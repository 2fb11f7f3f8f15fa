"""Every config loads, resolves to the paper's numbers and builds; LazyConfigs equal their YAMLs."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.solver import LRMultiplier, build_optimizer

import megdet_d2
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.groups import ranks_per_group
from tests.helpers.models import build_on_meta, load_config
from tests.helpers.paths import CONFIG_FILES, CONFIGS
from tests.helpers.schedules import GPUS_PER_MACHINE, LONG, NORMAL

DETECTION, SEGMENTATION = "COCO-Detection", "COCO-InstanceSegmentation"
# ResNet-50 has 53 convolutions with a norm, 11 of them in the frozen stem and res2; the FPN has two
# a level, on four levels, and on three for RetinaNet.
FASTER, RETINANET = 42 + 8, 42 + 6
# The challenge's ResNet-101 has 104, 11 of them frozen; its FPN three levels and a p5 of its own;
# then context's convolution and the segmentation head's two. The box head's are on top.
CHALLENGE = 93 + 6 + 1 + 1 + 2
# file: (batch, row above, factor on the learning rate, CGBN layers)
COCO = {
    **{f"{DETECTION}/megdet_R50_FPN_b{b}_normal": (b, NORMAL[b], 1, FASTER) for b in NORMAL},
    **{f"{DETECTION}/megdet_R50_FPN_b{b}_long": (b, LONG[b], 1, FASTER) for b in LONG},
    f"{DETECTION}/faster_rcnn_R50_FPN_b16_frozen_normal": (16, NORMAL[16], 1, 0),
    f"{DETECTION}/retinanet_megdet_R50_FPN_b16_normal": (16, NORMAL[16], 0.5, RETINANET),
    f"{DETECTION}/retinanet_megdet_R50_FPN_b256_normal": (256, NORMAL[256], 0.5, RETINANET),
    f"{DETECTION}/megdet_challenge_X101": (256, LONG[256], 1, CHALLENGE + 2),
    f"{DETECTION}/megdet_challenge_SE_X101": (256, LONG[256], 1, CHALLENGE + 2),
    f"{DETECTION}/megdet_challenge_X101_light": (256, LONG[256], 1, CHALLENGE + 1),
    f"{DETECTION}/megdet_challenge_SE_R101": (256, LONG[256], 1, CHALLENGE + 4),
    f"{SEGMENTATION}/mask_rcnn_megdet_R50_FPN_b16_normal": (16, NORMAL[16], 1, FASTER),
    f"{SEGMENTATION}/mask_rcnn_megdet_R50_FPN_b256_normal": (256, NORMAL[256], 1, FASTER),
}
ALL = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIG_FILES)
LEAVES = [name for name in ALL if not Path(name).name.startswith("Base-")]
# The paper's tables and what varies them are in tests/ablation/test_configs.py.
BUILT_HERE = [name for name in LEAVES if not name.startswith("ablations/")]
TWINS = ["megdet_R50_FPN_b16_normal", "megdet_R50_FPN_b256_normal"]


def code_lines(name: str) -> list[str]:
    lines = (line.strip() for line in (CONFIGS / f"{name}.yaml").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def differences(ours: CfgNode, stock: CfgNode, prefix: str = "") -> set[str]:
    """Dotted keys in which two configs differ, numbers to four decimals."""
    keys = set()
    for key in ours.keys() | stock.keys():
        a, b = ours.get(key), stock.get(key)
        if isinstance(a, CfgNode) and isinstance(b, CfgNode):
            keys |= differences(a, b, f"{prefix}{key}.")
        elif key not in ours or key not in stock or rounded(a) != rounded(b):
            keys.add(f"{prefix}{key}")
    return keys


def rounded(value):
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def test_every_coco_config_has_a_row_here():
    assert {name for name in LEAVES if name.startswith("COCO-")} == set(COCO)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_is_its_difference(name):
    path, hops = CONFIGS / f"{name}.yaml", 0
    while base := re.search(r'^_BASE_: "(.+)"$', path.read_text(), re.MULTILINE):
        path, hops = path.parent / base[1], hops + 1
    # A config may also stand alone, as long as it likes.
    assert hops == 0 or len(code_lines(name)) <= 12
    assert (name in COCO) <= hops <= 2


@pytest.mark.parametrize("name", COCO)
def test_coco_schedule_is_the_papers(name):
    batch, (gpus, lr, max_iter, steps, warmup, start), factor, _ = COCO[name]
    cfg = load_config(name)
    # No images are given or counted: the config's own EPOCH_IMAGES.
    megdet_d2.scale_config(cfg, world_size=gpus)
    solver = cfg.SOLVER
    assert solver.IMS_PER_BATCH == batch == 2 * gpus
    assert solver.BASE_LR == pytest.approx(lr * factor, rel=1e-12)
    assert (solver.MAX_ITER, tuple(solver.STEPS)) == (max_iter, steps)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (warmup, start)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 0.0001)
    # Once an epoch, and the last one at the end of training.
    epochs = 18 if cfg.MEGDET.POLICY == "long" else 11
    period = cfg.TEST.EVAL_PERIOD
    assert period == solver.CHECKPOINT_PERIOD
    assert (epochs - 1) * period < max_iter <= epochs * period
    assert cfg.OUTPUT_DIR == f"output/{Path(name).name}"


@pytest.mark.parametrize("name", sorted(set(LEAVES) - set(COCO)))
def test_other_schedules_follow_from_their_keys(name):
    cfg = load_config(name)
    before = cfg.SOLVER.clone()
    keys, batch, images = cfg.MEGDET, cfg.SOLVER.IMS_PER_BATCH, cfg.DATASETS.DIGITS.NUM_TRAIN
    megdet_d2.scale_config(cfg, num_images=images, world_size=2)
    if not keys.POLICY:
        assert cfg.SOLVER == before
        return
    epochs, decays = {"normal": (11, (8, 10)), "long": (18, (11, 14, 17))}.get(
        keys.POLICY, (keys.EPOCHS, keys.DECAY_EPOCHS)
    )
    images = keys.EPOCH_IMAGES or images
    iterations = [int(Fraction(str(e)) * images / batch) for e in (*decays, epochs)]
    assert [*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER] == iterations
    k = batch / keys.REFERENCE_BATCH_SIZE
    scale = {"linear": k, "sqrt": k**0.5, "none": 1}[keys.SCALING_RULE]
    assert cfg.SOLVER.BASE_LR == pytest.approx(scale * keys.REFERENCE_LR * keys.LR_FACTOR)


@pytest.mark.parametrize("name", BUILT_HERE)
def test_builds_with_a_bn_size_that_exists(name):
    cfg = load_config(name)
    layers = len(cgbn_layers(build_on_meta(cfg)))
    bn_size = cfg.MODEL.CGBN.BN_SIZE
    if name in COCO:
        batch, (gpus, *_), _, expected = COCO[name]
        assert layers == expected
        assert bn_size == 16
        assert ranks_per_group(bn_size, batch // gpus, GPUS_PER_MACHINE) == GPUS_PER_MACHINE
    else:
        assert (layers > 0) == ("CGBN" in cfg.MODEL.RESNETS.NORM + cfg.MODEL.FPN.NORM)
        assert bn_size == -1 or any(
            exists(bn_size, cfg.SOLVER.IMS_PER_BATCH, n) for n in (1, 2, 4, 128)
        )


def exists(bn_size: int, batch: int, processes: int) -> bool:
    try:
        return ranks_per_group(bn_size, batch // processes, processes) > 0
    except ValueError:
        return False


# The two-stage Base has no mask head to configure.
NO_MASK = "ROI_MASK_HEAD.NUM_CONV"


def keys_of_the_plugin() -> set[str]:
    """What ``add_megdet_config`` adds to MODEL, one block a technique."""
    cfg = get_cfg()
    stock = set(cfg.MODEL)
    megdet_d2.add_megdet_config(cfg)
    return set(cfg.MODEL) - stock


OURS = keys_of_the_plugin()


@pytest.mark.parametrize(
    ("name", "stock", "expected"),
    [
        (
            f"{DETECTION}/megdet_R50_FPN_b16_normal",
            f"{DETECTION}/faster_rcnn_R_50_FPN_1x",
            OURS | {"RESNETS.NORM", "FPN.NORM", NO_MASK},
        ),
        (
            f"{DETECTION}/faster_rcnn_R50_FPN_b16_frozen_normal",
            f"{DETECTION}/faster_rcnn_R_50_FPN_1x",
            OURS | {NO_MASK},
        ),
        (
            f"{SEGMENTATION}/mask_rcnn_megdet_R50_FPN_b16_normal",
            f"{SEGMENTATION}/mask_rcnn_R_50_FPN_1x",
            OURS | {"RESNETS.NORM", "FPN.NORM"},
        ),
    ],
)
def test_model_is_detectron2s_but_for_the_norm(name, stock, expected):
    stock = model_zoo.get_config(f"{stock}.yaml")
    assert differences(load_config(name).MODEL, stock.MODEL) == expected


def test_retinanet_is_detectron2s_but_for_the_norm():
    ours = load_config(f"{DETECTION}/retinanet_megdet_R50_FPN_b16_normal").MODEL
    stock = model_zoo.get_config(f"{DETECTION}/retinanet_R_50_FPN_1x.yaml").MODEL
    # What the inherited Base says of the two-stage detector's heads is not looked at.
    found = {key for key in differences(ours, stock) if not key.startswith(("ROI_", "RPN."))}
    assert found == OURS | {"RESNETS.NORM", "FPN.NORM"}


@pytest.mark.parametrize("name", TWINS)
def test_lazy_config_equals_its_yaml(name):
    cfg = load_config(f"{DETECTION}/{name}")
    lazy = LazyConfig.load(str(CONFIGS / "LazyConfig" / f"{name}.py"))
    assert set(lazy) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    megdet_d2.scale_config(cfg, world_size=cfg.SOLVER.IMS_PER_BATCH // 2)
    model = build_on_meta(cfg)
    with torch.device("meta"):
        lazy_model = instantiate(lazy.model)

    assert str(lazy_model) == str(model)
    layers, lazy_layers = (
        [n for n, m in each.named_modules() if isinstance(m, megdet_d2.CrossGPUBatchNorm)]
        for each in (model, lazy_model)
    )
    assert lazy_layers == layers and len(layers) == FASTER
    trained, lazy_trained = (
        {n: (p.shape, p.requires_grad) for n, p in each.named_parameters()}
        for each in (model, lazy_model)
    )
    assert lazy_trained == trained

    optimizer = build_optimizer(cfg, model)
    lazy.optimizer.params.model = lazy_model
    lazy_optimizer = instantiate(lazy.optimizer)
    assert decay_of(lazy_model, lazy_optimizer) == decay_of(model, optimizer)
    assert lazy_optimizer.defaults["momentum"] == cfg.SOLVER.MOMENTUM
    scheduler = megdet_d2.build_lr_scheduler(cfg, optimizer)
    lazy_scheduler = LRMultiplier(
        lazy_optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter
    )
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    for i in range(0, cfg.SOLVER.MAX_ITER, 10):
        assert lr_at(lazy_scheduler, i) == lr_at(scheduler, i), f"iteration {i}"
    assert lr_at(scheduler, 0) == pytest.approx(0.02)

    loader, train = lazy.dataloader.train, lazy.train
    resize = loader.mapper.augmentations[0]
    assert loader.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (loader.dataset.names,) == cfg.DATASETS.TRAIN
    assert (lazy.dataloader.test.dataset.names,) == cfg.DATASETS.TEST
    assert (*resize.short_edge_length,) == cfg.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN
    assert loader.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert train.eval_period == train.checkpointer.period == cfg.TEST.EVAL_PERIOD


def decay_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Weight decay by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def lr_at(scheduler: LRMultiplier, iteration: int) -> float:
    scheduler.last_epoch = iteration
    (lr,) = set(scheduler.get_lr())
    return lr


def test_lazy_configs_are_all_compared():
    assert sorted(p.stem for p in (CONFIGS / "LazyConfig").glob("*.py")) == sorted(TWINS)
