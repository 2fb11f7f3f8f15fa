"""Checks that configure_cgbn applies every MODEL.CGBN key in a loop without a Trainer."""

import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from megdet_d2.modeling import fused_resnet
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm, cgbn_layers
from megdet_d2.norm.collective import OutOfStepError
from megdet_d2.norm.configure import configure_cgbn
from megdet_d2.norm.groups import SELF
from tests.helpers.models import tiny_config

IMAGES_PER_GPU = 2
WIDTHS = (64, 33)


def build_stock(cfg, wrapped=False):
    """Builds Detectron2's model without configure_cgbn."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    return DistributedDataParallel(model) if wrapped else model


def batch(rank):
    """Returns two images of different widths, so that one of them is padded."""
    generator = torch.Generator().manual_seed(rank)
    images = []
    for width in WIDTHS:
        truth = Instances((64, width), gt_boxes=Boxes(torch.tensor([[4.0, 4.0, 30.0, 32.0]])))
        truth.gt_classes = torch.tensor([rank])
        pixels = torch.randint(0, 255, (3, 64, width), dtype=torch.uint8, generator=generator)
        images.append({"image": pixels, "instances": truth, "height": 64, "width": width})
    return images


def step(model, rank):
    """Runs a plain training step: losses, backward."""
    with EventStorage():
        losses = model(batch(rank))
    sum(losses.values()).backward()


def bare(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def stem_norm(model):
    return bare(model).backbone.bottom_up.stem.conv1.norm


def record_stem_input(model):
    seen = []
    stem_norm(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


def hooks(model):
    return len(bare(model)._forward_pre_hooks), len(bare(model).backbone._forward_pre_hooks)


ALL_KEYS = [
    "MODEL.CGBN.BN_SIZE", 4, "MODEL.CGBN.ALGORITHM", "two_pass",
    "MODEL.CGBN.IGNORE_PADDING", True, "MODEL.CGBN.FUSE_ACTIVATION", True,
    "MEGDET.ACCUMULATION_STEPS", 3,
]  # fmt: skip


def run_plain_loop(rank, world_size, wrapped, group_size, keys):
    cfg = tiny_config(*keys)
    model = build_stock(cfg, wrapped)
    assert configure_cgbn(model, cfg, IMAGES_PER_GPU) is model
    layers = cgbn_layers(model)
    names = {name for name, _ in bare(model).named_modules()}
    assert layers and all(layer.name in names for layer in layers)
    assert {layer.group_size() for layer in layers} == {group_size}
    seen = record_stem_input(model)
    step(model, rank)
    norm = stem_norm(model)
    return seen[0], norm.running_mean, type(bare(model).backbone.bottom_up.res2[0]).__name__


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "world_size, group_size, keys",
    [
        (2, 2, ALL_KEYS),
        (4, 2, ALL_KEYS),
        (4, 4, ["MODEL.CGBN.ALGORITHM", "two_pass"]),
        (4, 1, ["MODEL.CGBN.BN_SIZE", 2, "MODEL.CGBN.IGNORE_PADDING", True]),
    ],
)
def test_every_key_takes_effect(request, world_size, group_size, keys, wrapped):
    pool = request.getfixturevalue(f"pool{world_size}")
    results = pool.run(run_plain_loop, world_size, wrapped, group_size, keys)
    cfg = tiny_config(*keys)
    momentum = 1 - 0.9 ** (1 / cfg.MEGDET.ACCUMULATION_STEPS)
    widths = WIDTHS if cfg.MODEL.CGBN.IGNORE_PADDING else (64, 64)
    for first in range(0, world_size, group_size):
        group = results[first : first + group_size]
        # The stem halves the resolution; 33 columns need 17 of its 32.
        values = [
            x[i, :, :, : -(-width // 2)].flatten(1)
            for x, _, _ in group
            for i, width in enumerate(widths)
        ]
        expected = momentum * torch.cat(values, 1).double().mean(1)
        for _, mean, block in group:
            torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-6)
            fused = "Fused" if cfg.MODEL.CGBN.FUSE_ACTIVATION else ""
            assert block == f"{fused}BottleneckBlock"


def run_two_pass(rank, algorithm):
    cfg = tiny_config("MODEL.CGBN.ALGORITHM", algorithm)
    model = configure_cgbn(build_stock(cfg), cfg, IMAGES_PER_GPU)
    assert {layer.algorithm for layer in cgbn_layers(model)} == {algorithm}
    try:
        # Rank 1 leaves out the stem: the error has the name and the direction of both.
        model.backbone.bottom_up.stem.conv1.norm.train(rank == 0)
        step(model, rank)
    except OutOfStepError as error:
        return str(error)
    return None


@pytest.mark.parametrize("algorithm", ["one_reduce", "two_pass"])
def test_errors_name_the_layer_as_in_the_model(pool2, algorithm):
    for message in pool2.run(run_two_pass, algorithm):
        assert "rank 0: backbone.bottom_up.stem.conv1.norm, forward; rank 1: backbone." in message


def run_again(rank, wrapped):
    cfg, stock = tiny_config(*ALL_KEYS), tiny_config()
    model = build_stock(cfg, wrapped)
    before = hooks(model)
    for _ in range(2):
        configure_cgbn(model, cfg, IMAGES_PER_GPU)
        assert hooks(model) == (before[0] + 1, before[1] + 1)
        assert len({layer.valid_region for layer in cgbn_layers(bare(model).backbone)}) == 1
        assert type(bare(model).backbone.bottom_up.stem) is fused_resnet.FusedBasicStem
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # copies have the hooks
    step(model, rank)
    assert stem_norm(model).valid_region.sizes == [(64, 64), (64, 33)]

    configure_cgbn(model, stock, IMAGES_PER_GPU)  # other values undo every key
    reference = configure_cgbn(build_stock(stock, wrapped), stock, IMAGES_PER_GPU)
    assert hooks(model) == hooks(reference) == before
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    attributes = ("algorithm", "_group_name", "accumulation_steps", "valid_region", "name")
    for ours, theirs in zip(cgbn_layers(model), cgbn_layers(reference), strict=True):
        assert all(getattr(ours, name) == getattr(theirs, name) for name in attributes)
    configure_cgbn(model, cfg, IMAGES_PER_GPU)
    assert hooks(model) == (before[0] + 1, before[1] + 1)
    step(model, rank)


@pytest.mark.parametrize("wrapped", [False, True])
def test_calling_it_again_gives_the_last_values(pool2, wrapped):
    pool2.run(run_again, wrapped)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.CGBN.BN_SIZE", 3, r"MODEL\.CGBN\.BN_SIZE is 3, .* Nearest valid sizes: 2"),
        ("MODEL.CGBN.ALGORITHM", "one", r"MODEL\.CGBN\.ALGORITHM is 'one'; use one of one_red"),
        ("MEGDET.ACCUMULATION_STEPS", 0, r"MEGDET\.ACCUMULATION_STEPS is 0; give a whole number"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key_and_changes_nothing(key, value, message):
    cfg = tiny_config(*ALL_KEYS, "MODEL.CGBN.BN_SIZE", -1)
    cfg.merge_from_list([key, value])
    model = build_stock(cfg)
    before = [vars(layer) | {} for layer in cgbn_layers(model)]
    with pytest.raises(ValueError, match=message):
        configure_cgbn(model, cfg, IMAGES_PER_GPU)
    assert [vars(layer) for layer in cgbn_layers(model)] == before
    assert hooks(model) == (0, 0)


def test_a_config_without_the_keys_is_refused():
    with pytest.raises(ValueError, match=r"cfg has no MEGDET keys: call megdet_d2\.add_megdet"):
        configure_cgbn(torch.nn.Identity(), get_cfg(), 1)


def test_a_model_without_cgbn_stays_as_it_is():
    cfg = tiny_config("MODEL.CGBN.BN_SIZE", 3, "MODEL.CGBN.IGNORE_PADDING", True)
    model = torch.nn.BatchNorm2d(3)
    assert configure_cgbn(model, cfg, IMAGES_PER_GPU) is model
    assert not model._forward_pre_hooks


def test_in_one_process_the_group_is_the_process():
    cfg = tiny_config("MODEL.CGBN.BN_SIZE", IMAGES_PER_GPU)
    model = configure_cgbn(build_stock(cfg), cfg, IMAGES_PER_GPU)
    assert all(layer.process_group is SELF for layer in cgbn_layers(model))
    step(model, 0)


def test_fusing_is_logged_once_and_nothing_to_fuse_is_a_warning(caplog):
    caplog.set_level("INFO")
    cfg = tiny_config("MODEL.CGBN.FUSE_ACTIVATION", True)
    model = build_stock(cfg)
    for _ in range(2):
        configure_cgbn(model, cfg, IMAGES_PER_GPU)
    fused = fused_resnet.fused_blocks(model)
    assert fused == 17 and caplog.text.count(f"fused the activations of {fused} blocks") == 1
    assert "FUSE_ACTIVATION" not in caplog.text
    configure_cgbn(CrossGPUBatchNorm(3), cfg, IMAGES_PER_GPU)
    assert "MODEL.CGBN.FUSE_ACTIVATION is True, but the model has no ResNet block" in caplog.text


def test_no_padding_to_ignore_is_a_warning(caplog):
    cfg = tiny_config("MODEL.CGBN.IGNORE_PADDING", True)
    configure_cgbn(CrossGPUBatchNorm(3), cfg, IMAGES_PER_GPU)
    assert "MODEL.CGBN.IGNORE_PADDING is True, but the model has no CGBN layer" in caplog.text
    caplog.clear()
    configure_cgbn(build_stock(cfg), cfg, IMAGES_PER_GPU)
    assert "IGNORE_PADDING" not in caplog.text


def test_a_region_that_the_user_has_set_stays():
    from megdet_d2.norm.padding import ValidRegion

    model, region = build_stock(tiny_config()), ValidRegion([(64, 64)], (64, 64))
    stem_norm(model).valid_region = region
    configure_cgbn(model, tiny_config(), IMAGES_PER_GPU)
    assert stem_norm(model).valid_region is region
