"""Every config key of the plugin."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager


def add_megdet_config(cfg: CN) -> None:
    """Adds the plugin's keys to ``cfg``, with defaults that change nothing of stock Detectron2."""
    if "MEGDET" in cfg:
        return

    # --- Cross-GPU Batch Normalization (§3.3): set *.NORM to "CGBN" to use it --------------------
    cfg.MODEL.CGBN = CN()
    # Images that a normalisation group sees, the paper's "BN size" (it uses 16, finds 32 best); -1
    # is every image on the machine. A whole number of processes: BN_SIZE = images per GPU x
    # processes.
    cfg.MODEL.CGBN.BN_SIZE = -1
    # Let a group span machines. The paper does not. With BN_SIZE -1: every image of the mini-batch.
    cfg.MODEL.CGBN.CROSS_MACHINE = False
    # "one_reduce": one collective a layer. "two_pass": the paper's Algorithm 1, two.
    cfg.MODEL.CGBN.ALGORITHM = "one_reduce"
    # CGBN, the shortcut's addition and ReLU of a ResNet block in one kernel (where Triton runs).
    cfg.MODEL.CGBN.FUSE_ACTIVATION = False
    # Leave the border that pads a batch's images to one size out of the statistics.
    cfg.MODEL.CGBN.IGNORE_PADDING = False

    # --- Sublinear memory (§4): less memory for a second forward during backward -----------------
    cfg.MODEL.SUBLINEAR = CN()
    cfg.MODEL.SUBLINEAR.ENABLED = False
    # Parts of the model that are computed twice: "stem", "res2" to "res5", "fpn", "rpn" (and
    # RetinaNet's head), "roi_heads". docs/memory.md has what they save and cost.
    cfg.MODEL.SUBLINEAR.STAGES = ("res2", "res3", "res4", "res5", "fpn")

    # --- Appendix: atrous convolution. MODEL.BACKBONE.NAME "build_atrous_resnet_fpn_backbone" -----
    cfg.MODEL.ATROUS = CN()
    # The ResNet under the FPN, by its name as a backbone: also "build_se_resnet_backbone".
    cfg.MODEL.ATROUS.BOTTOM_UP = "build_resnet_backbone"

    # --- Appendix: SE-ResNe(X)t. MODEL.BACKBONE.NAME "build_se_resnet_fpn_backbone", or without an
    # FPN "build_se_resnet_backbone" --------------------------------------------------------------
    cfg.MODEL.SE = CN()
    # r: a gate over C channels has C / r hidden ones.
    cfg.MODEL.SE.REDUCTION = 16

    # --- Appendix: large kernel. MODEL.RPN.HEAD_NAME "LargeKernelRPNHead",
    # MODEL.ROI_BOX_HEAD.NAME "LargeKernelBoxHead" ------------------------------------------------
    cfg.MODEL.LARGE_KERNEL = CN()
    # k in the RPN's head, in pixels of each level; 15 is the paper's. Odd.
    cfg.MODEL.LARGE_KERNEL.SIZE = 15
    # Channels between k x 1 and 1 x k, in both heads.
    cfg.MODEL.LARGE_KERNEL.MID_CHANNELS = 64
    # The norm in the RPN's head. The box head's is MODEL.ROI_BOX_HEAD.NORM.
    cfg.MODEL.LARGE_KERNEL.NORM = ""
    # In the box head: k, in bins of the pooled region, odd, and the channels of its thin map.
    cfg.MODEL.LARGE_KERNEL.BOX_SIZE = 7
    cfg.MODEL.LARGE_KERNEL.BOX_CHANNELS = 10

    # --- Appendix: Maxout. MODEL.ROI_BOX_HEAD.NAME "MaxoutBoxHead" --------------------------------
    cfg.MODEL.MAXOUT = CN()
    # Linear maps whose maximum a fully connected layer returns; from 2.
    cfg.MODEL.MAXOUT.PIECES = 2

    # --- Appendix: online hard example mining. MODEL.ROI_HEADS.NAME "OHEMROIHeads", or for this and
    # the next two together "ChallengeROIHeads" ---------------------------------------------------
    # B, the proposals kept, is MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE; POSITIVE_FRACTION is not used.
    cfg.MODEL.OHEM = CN()
    # "image": the B hardest of each image, as in the paper. "batch": of a process's N images the
    # B x N hardest, as in its authors' code.
    cfg.MODEL.OHEM.SCOPE = "image"
    # A proposal is dropped that overlaps a harder one by more than this IoU; 1.0 drops none.
    cfg.MODEL.OHEM.NMS_THRESH = 0.7
    # Let a proposal only drop those of its own label, as the authors' code does and the paper does
    # not say.
    cfg.MODEL.OHEM.NMS_PER_CLASS = False

    # --- Appendix: context. MODEL.ROI_HEADS.NAME "ContextROIHeads" --------------------------------
    cfg.MODEL.CONTEXT = CN()
    # The box head sees the box, the box with width and height times each of these, and the image.
    cfg.MODEL.CONTEXT.SCALES = (1.8,)
    cfg.MODEL.CONTEXT.WHOLE_IMAGE = True

    # --- Appendix: segmentation supervision. MODEL.ROI_HEADS.NAME "SegmentationROIHeads" ----------
    cfg.MODEL.SEGMENTATION = CN()
    # Feature map that the auxiliary head takes. A cell's label is that of its centre, so an object
    # smaller than the stride may be on none.
    cfg.MODEL.SEGMENTATION.IN_FEATURE = "p3"
    # "boxes": an object is all of its box. "masks": real masks; needs MODEL.MASK_ON.
    cfg.MODEL.SEGMENTATION.TARGETS = "boxes"
    # 3x3 convolutions in front of the 1x1 classifier, their channels and their norm.
    cfg.MODEL.SEGMENTATION.NUM_CONV = 2
    cfg.MODEL.SEGMENTATION.CONV_DIM = 128
    cfg.MODEL.SEGMENTATION.NORM = ""
    # Multiplies loss_segmentation, the mean of the cross entropy over cells.
    cfg.MODEL.SEGMENTATION.LOSS_WEIGHT = 0.2

    # --- Schedule (§3.2, §4): written into SOLVER before training --------------------------------
    cfg.MEGDET = CN()
    # "": SOLVER is used as it is. "normal" or "long": the paper's. "custom": the three keys below.
    cfg.MEGDET.POLICY = ""
    # Only with "custom". Epochs may be fractions; at DECAY_EPOCHS the learning rate is multiplied
    # by DECAY_FACTORS, one each.
    cfg.MEGDET.EPOCHS = None
    cfg.MEGDET.DECAY_EPOCHS = ()
    cfg.MEGDET.DECAY_FACTORS = ()
    # The rule's anchor: this learning rate is right for this mini-batch.
    cfg.MEGDET.REFERENCE_BATCH_SIZE = 16
    cfg.MEGDET.REFERENCE_LR = 0.02
    # How the learning rate follows the mini-batch: "linear", "sqrt" or "none".
    cfg.MEGDET.SCALING_RULE = "linear"
    # Multiplies the scaled learning rate; 0.5 is Table 2's half learning rate.
    cfg.MEGDET.LR_FACTOR = 1.0
    # Length of the linear warm-up, and its start: "reference" is min(r, scaled r), as in the paper,
    # "zero" is a thousandth of the scaled learning rate.
    cfg.MEGDET.WARMUP_EPOCHS = 1.0
    cfg.MEGDET.WARMUP_START = "reference"
    # Images an epoch counts; 0 is the training set after Detectron2's filtering.
    cfg.MEGDET.EPOCH_IMAGES = 0
    # Micro-batches an update. SOLVER.IMS_PER_BATCH stays the images of an update; a process takes
    # IMS_PER_BATCH / (processes x ACCUMULATION_STEPS) at once, and BN_SIZE counts those.
    cfg.MEGDET.ACCUMULATION_STEPS = 1
    # When a loss or a gradient is not finite: "stop" all processes, with an error that names it; or
    # go back to the last good checkpoint and on with "half_lr", or with a "longer_warmup", twice as
    # long and at least twice as long as training had come; at most MAX_ROLLBACKS times in a run.
    cfg.MEGDET.ON_DIVERGENCE = "stop"
    cfg.MEGDET.MAX_ROLLBACKS = 2
    # Seconds that a process waits for others, or for its loader, before it ends with an error. Has
    # to be more than an evaluation takes on rank 0 after the others have finished theirs.
    cfg.MEGDET.TIMEOUT = 600
    # Train on another image in place of one that cannot be read or whose annotations are invalid;
    # logged, and counted as skipped_images. False: an error that names it.
    cfg.MEGDET.SKIP_BAD_IMAGES = False
    # Read by `megdet ablate` alone, without effect on a training: what a row is to be run on and
    # compared with. GPUs over all machines; the paper's mmAP, or "failed", and its hours.
    cfg.MEGDET.ABLATION = CN()
    cfg.MEGDET.ABLATION.GPUS = 1
    cfg.MEGDET.ABLATION.PAPER_AP = None
    cfg.MEGDET.ABLATION.PAPER_HOURS = None
    # Written by scale_config, so that a dumped config can be loaded again: what it put into SOLVER.
    # Not for setting by hand.
    cfg.MEGDET.RESOLVED = CN()
    cfg.MEGDET.RESOLVED.BASE_LR = 0.0
    cfg.MEGDET.RESOLVED.MAX_ITER = 0
    cfg.MEGDET.RESOLVED.STEPS = ()
    cfg.MEGDET.RESOLVED.WARMUP_ITERS = 0
    cfg.MEGDET.RESOLVED.WARMUP_FACTOR = 0.0

    # --- Data ------------------------------------------------------------------------------------
    # Your own COCO-format data sets, [name, annotation json, image root] each.
    cfg.DATASETS.COCO = []
    # The embedded data set, megdet_digits_train and megdet_digits_val: square images of this size
    # in pixels, how many, and "easy" (smooth backgrounds) or "hard" (sharp photographs).
    cfg.DATASETS.DIGITS = CN()
    cfg.DATASETS.DIGITS.IMAGE_SIZE = 64
    cfg.DATASETS.DIGITS.NUM_TRAIN = 2000
    cfg.DATASETS.DIGITS.NUM_VAL = 200
    cfg.DATASETS.DIGITS.DIFFICULTY = "easy"


def load_config(config_file: str | Path | None = None, opts: Sequence[str] = ()) -> CN:
    """Detectron2's and the plugin's defaults, ``config_file`` over them, and ``opts`` over that.

    Args:
        opts: overrides, KEY VALUE ..., as on train_net.py's command line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML; an unknown key, or a value of another type.
    """
    cfg = get_cfg()
    add_megdet_config(cfg)
    if config_file is not None:
        path = str(config_file)
        if "://" not in path and not PathManager.isfile(path):
            raise FileNotFoundError(
                f"there is no config {config_file}; correct the path, or run this in a checkout of "
                "megdet_d2"
            )
        try:
            cfg.merge_from_file(path)
        except (AssertionError, KeyError, yaml.YAMLError) as error:
            raise ValueError(f"{config_file}: {error}") from None
    merge_overrides(cfg, opts)
    return cfg


def merge_overrides(cfg: CN, opts: Sequence[str]) -> None:
    """Merges KEY VALUE ... into ``cfg``.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError) as error:
        raise ValueError(f"Overrides {' '.join(opts)}: {error}") from None
