"""Defines COCO-Detection/megdet_R50_FPN_b256_normal.yaml as a LazyConfig, for 128 GPUs.

megdet_R50_FPN_b16_normal.py describes how to launch it, here on 16 machines of 8 GPUs.
"""

from megdet_d2.schedule import scaling

from .megdet_R50_FPN_b16_normal import (
    EPOCH_IMAGES,
    dataloader,
    lazy_lr_multiplier,
    model,  # noqa: F401
    optimizer,
    train,
)

dataloader.train.total_batch_size = 256

schedule = scaling.make_schedule(
    scaling.POLICIES["normal"], dataloader.train.total_batch_size, EPOCH_IMAGES
)
lr_multiplier = lazy_lr_multiplier(schedule)
optimizer.lr = schedule.base_lr  # 0.32

train.output_dir = "output/lazy_megdet_R50_FPN_b256_normal"
train.max_iter = schedule.max_iter  # 5,070
train.checkpointer.period = train.eval_period = 461  # one epoch: 118,000 / 256
