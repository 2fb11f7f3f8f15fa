"""Defines COCO-Detection/megdet_R50_FPN_b16_normal.yaml as a LazyConfig.

It is for Detectron2's own script, tools/lazyconfig_train_net.py in its checkout:

    python lazyconfig_train_net.py --num-gpus 8 --config-file .../megdet_R50_FPN_b16_normal.py

This file imports megdet_d2, so the script needs no change. The script does not set a BN size:
statistics are over every image on the machine. With 2 images on each of 8 GPUs these are the
paper's 16. For another BN size, call ``megdet_d2.set_bn_size(model, bn_size, images_per_gpu)`` as
soon as the script has built the model. With several machines the script saves the running
statistics of the first one; ``megdet_d2.Trainer`` averages them.

The batch size decides the learning rate and the schedule: change it here, not on the command line.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

import megdet_d2  # noqa: F401  (registers "CGBN")
from megdet_d2.schedule import scaling

EPOCH_IMAGES = 118_000


def lazy_lr_multiplier(schedule: scaling.Schedule):
    """Returns warm-up and decays of ``schedule``, as multiples of ``schedule.base_lr``."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=list(schedule.values),
            milestones=list(schedule.steps),
            num_updates=schedule.max_iter,
        ),
        warmup_factor=schedule.warmup_factor,
        warmup_length=schedule.warmup_iters / schedule.max_iter,
        warmup_method="linear",
    )


dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 16
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
dataloader.train.mapper.use_instance_mask = False

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stem.norm = "CGBN"
model.backbone.bottom_up.stages.norm = "CGBN"
model.backbone.norm = "CGBN"

schedule = scaling.make_schedule(
    scaling.POLICIES["normal"], dataloader.train.total_batch_size, EPOCH_IMAGES
)
lr_multiplier = lazy_lr_multiplier(schedule)
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = schedule.base_lr

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy_megdet_R50_FPN_b16_normal"
train.max_iter = schedule.max_iter
train.checkpointer.period = train.eval_period = 7375  # one epoch: 118,000 / 16
