"""Copies of a model in training, as teachers and moving averages are made: all ways, all keys."""

import copy
import io

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.gradient_noise.hook import GradientNoise
from tests.helpers.training import config

ALL_KEYS = (
    "MEGDET.ACCUMULATION_STEPS", 2, "MEGDET.SKIP_BAD_IMAGES", True, "MEGDET.EPOCHS", 1.0,
    "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (), "MODEL.CGBN.IGNORE_PADDING", True,
    "MODEL.SUBLINEAR.ENABLED", True,
    "MODEL.SUBLINEAR.STAGES", ("stem", "res2", "res3", "res4", "res5", "fpn", "rpn", "roi_heads"),
)  # fmt: skip
NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
STOCK = (
    "MODEL.CGBN.IGNORE_PADDING", False, "MODEL.SUBLINEAR.ENABLED", False,
    *(word for key in NORMS for word in (key, "BN")),
)  # fmt: skip
FUSED = ("MODEL.CGBN.FUSE_ACTIVATION", True)
CASES = {"all keys": ALL_KEYS, "fused": ALL_KEYS + FUSED, "stock norm": ALL_KEYS + STOCK}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    content = file.getvalue()
    assert b"megdet_d2.engine" not in content  # nothing of the trainer, so it loads in any script
    norms = [m for m in model.modules() if type(m).__module__.startswith("megdet_d2")]
    assert norms or b"megdet_d2" not in content
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": lambda model: AveragedModel(model).module,
    "torch.save": saved_and_loaded,
}


class CopyModel(HookBase):
    """Copies the model wherever a hook can, in every way."""

    def __init__(self):
        self.copies = []

    def before_train(self):
        self._copy()

    def _copy(self):
        model = self.trainer.model
        for original in dict.fromkeys([model, getattr(model, "module", model)]):
            for make in WAYS.values():
                copied = make(original)
                check_apart(copied, original)
                self.copies.append((copied, original))

    def before_step(self):
        if self.trainer.iter == 1:
            self._copy()

    after_step, after_train = before_step, before_train


def check_apart(copied, original):
    """Checks that a copy has the same values in other memory, and no method of the original."""
    theirs, ours = copied.state_dict(), original.state_dict()
    assert type(copied) is type(original) and theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    places = [{t.data_ptr() for t in state.values() if t.numel()} for state in (theirs, ours)]
    assert not places[0] & places[1]
    modules = set(original.modules())
    for module in copied.modules():
        for value in vars(module).values():
            parts = [value, getattr(value, "__self__", None), *getattr(value, "args", ())]
            assert not [part for part in parts if isinstance(part, nn.Module) and part in modules]


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def check_trains_alone(copied, original, batch):
    """Trains a copy, which leaves the original as it is, and does what the original does."""
    original.zero_grad()
    copied.load_state_dict(original.state_dict())
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    found = losses_and_gradients(copied, batch)
    assert all(torch.equal(before[name], t) for name, t in original.state_dict().items())
    assert all(p.grad is None for p in original.parameters())
    losses, gradients = losses_and_gradients(original, batch)
    original.load_state_dict(before)
    assert found[0] == losses
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def train_and_copy(rank, output, coco, overrides):
    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    first, last = CopyModel(), CopyModel()

    class Own(Trainer):
        def build_hooks(self):
            return [first, *super().build_hooks()]

    trainer = Own(cfg)
    trainer.resume_or_load(resume=False)
    check_apart(copy.deepcopy(trainer.model), trainer.model)
    hooks = [last]
    if hasattr(trainer.model, "module"):
        hooks.append(GradientNoise(trainer.layout.images_per_gpu))
    trainer.register_hooks(hooks)
    trainer.train()
    batch = next(iter(trainer.data_loader))
    copies = first.copies + last.copies
    for copied, original in copies[:: len(copies) // 6]:
        check_trains_alone(copied, original, batch)
    return len(copies), trainer.iter


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_a_model_can_be_copied_wherever_a_hook_runs(coco, tmp_path, overrides):
    copies, updates = train_and_copy(0, str(tmp_path), coco, overrides)
    assert updates == 3 and copies == 2 * 3 * 4


def test_a_model_in_ddp_can_be_copied_wherever_a_hook_runs(pool2, coco, tmp_path):
    for copies, updates in pool2.run(train_and_copy, str(tmp_path), coco, ALL_KEYS, timeout=200):
        assert updates == 3 and copies == 2 * 2 * 3 * 4
