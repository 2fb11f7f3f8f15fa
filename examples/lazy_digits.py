"""The embedded digits and a small Faster R-CNN with CGBN, as a LazyConfig for lazy_train.py."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from megdet_d2.data import register_digits
from megdet_d2.schedule import scaling

BATCH_SIZE, NUM_TRAIN, NUM_VAL = 16, 400, 20
BN_SIZE = 16  # images that a CGBN layer normalises over; read by lazy_train.py
register_digits(image_size=64, num_train=NUM_TRAIN, num_val=NUM_VAL)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "megdet_digits_train"
dataloader.test.dataset.names = "megdet_digits_val"
dataloader.train.mapper.augmentations = []  # no flip: a mirrored digit is not that digit
dataloader.test.mapper.augmentations = []
dataloader.train.mapper.use_instance_mask = False
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.train.total_batch_size = BATCH_SIZE

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
model.roi_heads.num_classes = 10
model.backbone.out_channels = model.proposal_generator.head.in_channels = 64
model.roi_heads.box_head.input_shape.channels = 64
model.roi_heads.box_head.fc_dims = [128]
model.roi_heads.box_predictor.input_shape.channels = 128
model.roi_heads.batch_size_per_image = 64
model.proposal_generator.post_nms_topk = (100, 50)
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.pop("stride_in_1x1")  # an option of deeper ResNets
model.backbone.bottom_up.stem.norm = "CGBN"
model.backbone.bottom_up.stages.norm = "CGBN"
model.backbone.norm = "CGBN"

# Linear scaling, warm-up and the paper's "normal" epochs (§3.2, §4).
schedule = scaling.make_schedule(scaling.POLICIES["normal"], BATCH_SIZE, NUM_TRAIN)
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = schedule.base_lr
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=list(schedule.values),
        milestones=list(schedule.steps),
        num_updates=schedule.max_iter,
    ),
    warmup_factor=schedule.warmup_factor,
    warmup_length=schedule.warmup_iters / schedule.max_iter,
    warmup_method="linear",
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = schedule.max_iter
train.output_dir = "output/lazy_digits"
train.device = "cpu"
