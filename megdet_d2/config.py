"""The config keys of the plugin, with their defaults, and the loader of a config file."""

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

    # --- Cross-GPU Batch Normalization (§3.3). Set *.NORM to "CGBN" to use it --------------------
    cfg.MODEL.CGBN = CN()
    # Number of images that a normalisation group sees, the paper's "BN size" (it uses 16 and finds
    # 32 best). It has to be images per GPU x a number of processes. -1 is every image on the
    # machine.
    cfg.MODEL.CGBN.BN_SIZE = -1
    # Lets a group span machines. The paper does not. With BN_SIZE -1 a group is then the whole
    # mini-batch.
    cfg.MODEL.CGBN.CROSS_MACHINE = False
    # "one_reduce" needs one collective per layer in the forward pass. "two_pass" is the paper's
    # Algorithm 1 with two: first the mean, then the variance.
    cfg.MODEL.CGBN.ALGORITHM = "one_reduce"
    # Computes CGBN, the shortcut's addition and ReLU of a ResNet block in one kernel, where Triton
    # runs.
    cfg.MODEL.CGBN.FUSE_ACTIVATION = False
    # Leaves the border that pads a batch's images to one size out of the statistics.
    cfg.MODEL.CGBN.IGNORE_PADDING = False

    # --- Sublinear memory (§4). Saves memory, and costs a second forward during backward ---------
    cfg.MODEL.SUBLINEAR = CN()
    # Computes the parts in STAGES a second time instead of keeping their activations.
    cfg.MODEL.SUBLINEAR.ENABLED = False
    # Any of "stem", "res2" to "res5", "fpn", "rpn" (also RetinaNet's head) and "roi_heads".
    # docs/memory.md shows what each saves and costs.
    cfg.MODEL.SUBLINEAR.STAGES = ("res2", "res3", "res4", "res5", "fpn")

    # --- Your own data ---------------------------------------------------------------------------
    # Data sets in COCO's format: [name, annotation json, image root] for each.
    cfg.DATASETS.COCO = []

    # --- Schedule (§3.2, §4). Written into SOLVER before training --------------------------------
    cfg.MEGDET = CN()
    # "" uses SOLVER as it is. "normal" (11 epochs) and "long" (18 epochs) are the paper's. "custom"
    # uses the next three keys.
    cfg.MEGDET.POLICY = ""
    # Only with "custom": the length of training in epochs. It may be a fraction.
    cfg.MEGDET.EPOCHS = None
    # Only with "custom": the epochs at which the learning rate decays. They may be fractions.
    cfg.MEGDET.DECAY_EPOCHS = ()
    # Only with "custom": one factor per decay, above 0, that multiplies the learning rate.
    cfg.MEGDET.DECAY_FACTORS = ()
    # The mini-batch N of the scaling rule, in images.
    cfg.MEGDET.REFERENCE_BATCH_SIZE = 16
    # The learning rate r of the scaling rule, which is right for a mini-batch of N images.
    cfg.MEGDET.REFERENCE_LR = 0.02
    # Growth of the learning rate with the mini-batch: "linear" as in the paper, "sqrt", or "none",
    # which keeps r.
    cfg.MEGDET.SCALING_RULE = "linear"
    # Multiplies the scaled learning rate. 0.5 is Table 2's half learning rate.
    cfg.MEGDET.LR_FACTOR = 1.0
    # Length of the linear warm-up in epochs. It may be a fraction; 0.0 is no warm-up.
    cfg.MEGDET.WARMUP_EPOCHS = 1.0
    # Start of the warm-up. "reference" is min(r, scaled r), as in the paper. "zero" is a thousandth
    # of the scaled learning rate.
    cfg.MEGDET.WARMUP_START = "reference"
    # Number of images that count as an epoch. 0 is the training set after Detectron2's filtering.
    cfg.MEGDET.EPOCH_IMAGES = 0
    # Micro-batches per update. SOLVER.IMS_PER_BATCH stays the number of images of an update. A
    # process takes IMS_PER_BATCH / (processes x ACCUMULATION_STEPS) at once, and BN_SIZE counts
    # those.
    cfg.MEGDET.ACCUMULATION_STEPS = 1
    # Pairs (epoch, mini-batch), such as ((0, 64), (1, 128), (2, 256)). Each mini-batch begins at
    # its epoch, with its learning rate. The first epoch is 0, and the last mini-batch is
    # SOLVER.IMS_PER_BATCH. The mini-batch grows by more micro-batches. BN size and images do not
    # change. See docs/training.md.
    cfg.MEGDET.BATCH_WARMUP = ()

    # Chooses ACCUMULATION_STEPS at the start: the largest micro-batch that fits into the memory and
    # holds BN_SIZE. An update that runs out of memory later is repeated with half of the
    # micro-batch, at most twice in a run. See docs/training.md.
    cfg.MEGDET.AUTO_MICRO_BATCH = False
    # Lets AUTO_MICRO_BATCH turn on MODEL.SUBLINEAR, if no micro-batch that holds BN_SIZE fits
    # without.
    cfg.MEGDET.AUTO_SUBLINEAR = False
    # Memory of one device in MiB, for AUTO_MICRO_BATCH. 0 is all that a GPU has. A CPU needs a
    # number: tensors that live in a step are counted, which makes it slow.
    cfg.MEGDET.MEMORY_LIMIT_MB = 0

    # --- Optimizers. See docs/large_batch.md ------------------------------------------------------
    # "sgd" is Detectron2's, to the bit. "lars", "lamb" and "muon" are timm's, and need the extra
    # "optimizers". "agvm" is SGD whose learning rates of FPN, RPN and heads follow from the
    # variance of their gradients.
    cfg.MEGDET.OPTIMIZER = "sgd"
    cfg.MEGDET.LARS = CN()
    # The ratio of an update to its weight, in norms, at a learning rate of 1. 0.001 is
    # that of the LARS paper.
    cfg.MEGDET.LARS.TRUST_COEFFICIENT = 0.001
    cfg.MEGDET.AGVM = CN()
    # Updates between two measurements of the variances. 10 is that of AGVM's authors.
    cfg.MEGDET.AGVM.INTERVAL = 10
    # Updates between the end of the warm-up and the first measurement. 100 is that of AGVM's
    # authors.
    cfg.MEGDET.AGVM.AFTER_WARMUP = 100
    # The moving average keeps this part of the last factors at a measurement. 0.97 is that of
    # AGVM's authors.
    cfg.MEGDET.AGVM.SMOOTHING = 0.97

    # --- Reliability. See docs/reliability.md -----------------------------------------------------
    # Action after a loss or a gradient that is not finite. "stop" ends all processes with an error
    # that names it. "half_lr" and "longer_warmup" go back to the last good checkpoint. They then
    # continue with half the learning rate, or with a warm-up that is twice as long and takes at
    # least twice the images seen so far.
    cfg.MEGDET.ON_DIVERGENCE = "stop"
    # The largest number of such roll-backs in a run, with those before a resume; 0 or more.
    cfg.MEGDET.MAX_ROLLBACKS = 2
    # Seconds that a process waits for others, or for its loader, before it ends with an error.
    # After the other ranks have finished an evaluation, rank 0 still works on it. The timeout has
    # to be longer than that.
    cfg.MEGDET.TIMEOUT = 600
    # Trains on another image instead of one that cannot be read or has invalid annotations. This is
    # logged and counted as skipped_images. Without it an error names the image.
    cfg.MEGDET.SKIP_BAD_IMAGES = False

    # --- Switches of today's recipes. See docs/training.md ----------------------------------------
    # Keeps the weights of convolutions and their feature maps in channels_last memory.
    cfg.MODEL.CHANNELS_LAST = False
    # Compiles the backbone and the heads by torch.compile, in the first steps. On a CPU this needs
    # a C++ compiler.
    cfg.MODEL.COMPILE = False
    # Number format of SOLVER.AMP.ENABLED. "float16" is Detectron2's and needs a GPU. "bfloat16"
    # needs no loss scaling, and works on CPUs too.
    if "PRECISION" not in cfg.SOLVER.AMP:
        cfg.SOLVER.AMP.PRECISION = "float16"
    # Implementation of torch's SGD: "for_loop", "foreach" or "fused". "" is Detectron2's choice,
    # "foreach".
    cfg.SOLVER.SGD_IMPLEMENTATION = ""
    # Precision of float32 matrix products: "highest", "high" (TF32 on GPUs) or "medium". "" leaves
    # torch's default.
    if "FLOAT32_PRECISION" not in cfg:
        cfg.FLOAT32_PRECISION = ""
    # Decay of an exponential moving average of the weights, per update of REFERENCE_BATCH_SIZE
    # images, such as 0.9998. A mini-batch of k times these images uses the k-th power of the decay.
    # 0.0 keeps no average.
    cfg.MEGDET.EMA_DECAY = 0.0
    # Saves model_best.pth after each evaluation in which this metric is the best so far, such as
    # "bbox/AP". "" saves none.
    cfg.MEGDET.BEST_METRIC = ""
    # "max" if larger values of BEST_METRIC are better, or "min".
    cfg.MEGDET.BEST_MODE = "max"
    # Experiment trackers that get config, metrics, images and the final model: "wandb", "mlflow".
    cfg.MEGDET.TRACKERS = ()

    # --- Loading. See docs/performance.md ---------------------------------------------------------
    # Library that decodes and resizes images: "pil" as Detectron2, or the faster "torchvision". Its
    # pixels differ from PIL's by at most one grey level, and seldom. All else is the same. Where
    # there is a GPU, the loader's tensors are then in pinned memory.
    cfg.INPUT.BACKEND = "pil"
    # Number of micro-batches that each worker of a loader keeps ready, 1 or more. 2 is torch's.
    cfg.DATALOADER.PREFETCH_FACTOR = 2
    # Megabytes of mapped training images that each process of the loader keeps in memory; 0 keeps
    # none. No augmentation may be random then: one INPUT.MIN_SIZE_TRAIN, INPUT.RANDOM_FLIP "none".
    cfg.DATALOADER.CACHE_MB = 0

    # --- Evaluation. See docs/performance.md ------------------------------------------------------
    # Library that computes COCO's AP: "pycocotools" as Detectron2, or "hotcoco", which gives the
    # same numbers in a fraction of the time.
    cfg.TEST.COCO_API = "pycocotools"
    # Makes the evaluations of TEST.EVAL_PERIOD in one process beside the training, which goes on.
    # Their results come at their own iteration. The last evaluation uses all processes.
    cfg.TEST.BACKGROUND = False
    # Device of that process: "cpu", or a GPU that does not train, such as "cuda:7".
    cfg.TEST.BACKGROUND_DEVICE = "cpu"
    # CPU threads of that process, 1 or more. Loader workers come in addition.
    cfg.TEST.BACKGROUND_THREADS = 1

    # --- Appendix: atrous convolution. Set MODEL.BACKBONE.NAME to
    # "build_atrous_resnet_fpn_backbone" ----------------------------------------------------------
    cfg.MODEL.ATROUS = CN()
    # Name of the ResNet under the FPN: "build_resnet_backbone" or "build_se_resnet_backbone".
    cfg.MODEL.ATROUS.BOTTOM_UP = "build_resnet_backbone"

    # --- Appendix: SE-ResNe(X)t. Set MODEL.BACKBONE.NAME to "build_se_resnet_fpn_backbone", or
    # without an FPN to "build_se_resnet_backbone" ------------------------------------------------
    cfg.MODEL.SE = CN()
    # The reduction r: a gate over C channels has C / r hidden channels.
    cfg.MODEL.SE.REDUCTION = 16

    # --- Appendix: large kernel. Set MODEL.RPN.HEAD_NAME to "LargeKernelRPNHead" or
    # MODEL.ROI_BOX_HEAD.NAME to "LargeKernelBoxHead" ---------------------------------------------
    cfg.MODEL.LARGE_KERNEL = CN()
    # Kernel size k in the RPN's head, an odd number of pixels of each level. 15 is the cited
    # paper's.
    cfg.MODEL.LARGE_KERNEL.SIZE = 15
    # Channels between k x 1 and 1 x k, in both heads.
    cfg.MODEL.LARGE_KERNEL.MID_CHANNELS = 64
    # Norm in the RPN's head, such as "CGBN"; "" for none. The box head uses
    # MODEL.ROI_BOX_HEAD.NORM.
    cfg.MODEL.LARGE_KERNEL.NORM = ""
    # Kernel size k in the box head, an odd number of bins of the pooled region.
    cfg.MODEL.LARGE_KERNEL.BOX_SIZE = 7
    # Channels of the box head's thin map.
    cfg.MODEL.LARGE_KERNEL.BOX_CHANNELS = 10

    # --- Appendix: Maxout. Set MODEL.ROI_BOX_HEAD.NAME to "MaxoutBoxHead" -------------------------
    cfg.MODEL.MAXOUT = CN()
    # Number of linear maps, 2 or more. A fully connected layer returns their maximum.
    cfg.MODEL.MAXOUT.PIECES = 2

    # --- Appendix: online hard example mining. Set MODEL.ROI_HEADS.NAME to "OHEMROIHeads", or to
    # "ChallengeROIHeads" for this and the next two together --------------------------------------
    # MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE is B, the number of proposals that are kept.
    # MODEL.ROI_HEADS.POSITIVE_FRACTION is not used.
    cfg.MODEL.OHEM = CN()
    # "image" keeps the B hardest of each image, as in the cited paper. "batch" keeps the B x N
    # hardest of a process's N images, as in its authors' code.
    cfg.MODEL.OHEM.SCOPE = "image"
    # Drops a proposal that overlaps a harder one by more than this IoU. 1.0 drops none.
    cfg.MODEL.OHEM.NMS_THRESH = 0.7
    # Lets a proposal drop only those of the same label, as the authors' code does. The paper does
    # not say.
    cfg.MODEL.OHEM.NMS_PER_CLASS = False

    # --- Appendix: context. Set MODEL.ROI_HEADS.NAME to "ContextROIHeads" -------------------------
    cfg.MODEL.CONTEXT = CN()
    # The box head also sees the box with width and height times each of these.
    cfg.MODEL.CONTEXT.SCALES = (1.8,)
    # The box head also sees the whole image.
    cfg.MODEL.CONTEXT.WHOLE_IMAGE = True

    # --- Appendix: segmentation supervision. Set MODEL.ROI_HEADS.NAME to "SegmentationROIHeads" ---
    cfg.MODEL.SEGMENTATION = CN()
    # Feature map that the auxiliary head takes. The label of a cell is the label at its centre, so
    # an object smaller than the stride may be in no cell.
    cfg.MODEL.SEGMENTATION.IN_FEATURE = "p3"
    # "boxes" counts all of a box as the object. "masks" takes real masks and needs MODEL.MASK_ON.
    cfg.MODEL.SEGMENTATION.TARGETS = "boxes"
    # Number of 3x3 convolutions before the 1x1 classifier.
    cfg.MODEL.SEGMENTATION.NUM_CONV = 2
    # Channels of these convolutions.
    cfg.MODEL.SEGMENTATION.CONV_DIM = 128
    # Norm after these convolutions, such as "CGBN"; "" for none.
    cfg.MODEL.SEGMENTATION.NORM = ""
    # Multiplies loss_segmentation, the mean cross entropy over cells.
    cfg.MODEL.SEGMENTATION.LOSS_WEIGHT = 0.2

    # --- The embedded data set. It is megdet_digits_train and megdet_digits_val -------------------
    cfg.DATASETS.DIGITS = CN()
    # Width and height of its images in pixels; 32 or more.
    cfg.DATASETS.DIGITS.IMAGE_SIZE = 64
    # Number of training images.
    cfg.DATASETS.DIGITS.NUM_TRAIN = 2000
    # Number of validation images.
    cfg.DATASETS.DIGITS.NUM_VAL = 200
    # "easy" has light digits on smooth, dark backgrounds. "hard" has digits of any colour on sharp
    # photographs.
    cfg.DATASETS.DIGITS.DIFFICULTY = "easy"

    # --- Ablations. Only megdet ablate reads these; they change nothing in a training -------------
    cfg.MEGDET.ABLATION = CN()
    # Number of GPUs, over all machines, on which to run a row.
    cfg.MEGDET.ABLATION.GPUS = 1
    # The paper's mmAP in percent, or "failed" if its training diverged. The table shows it.
    cfg.MEGDET.ABLATION.PAPER_AP = None
    # The paper's training time in hours. The table shows it.
    cfg.MEGDET.ABLATION.PAPER_HOURS = None

    # --- Resolved schedule. Do not set these keys -------------------------------------------------
    cfg.MEGDET.RESOLVED = CN()
    # The values that scale_config wrote into SOLVER, so that a dumped config can be loaded again.
    cfg.MEGDET.RESOLVED.BASE_LR = 0.0
    cfg.MEGDET.RESOLVED.MAX_ITER = 0
    cfg.MEGDET.RESOLVED.STEPS = ()
    cfg.MEGDET.RESOLVED.WARMUP_ITERS = 0
    cfg.MEGDET.RESOLVED.WARMUP_FACTOR = 0.0
    # The (first iteration, mini-batch) of each phase of BATCH_WARMUP.
    cfg.MEGDET.RESOLVED.PHASES = ()


def load_config(config_file: str | Path | None = None, opts: Sequence[str] = ()) -> CN:
    """Returns the defaults of Detectron2 and the plugin with ``config_file`` and ``opts`` merged.

    Args:
        config_file: path of a YAML file; None for the defaults alone.
        opts: overrides, KEY VALUE ..., as on train_net.py's command line. They win over the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML; an unknown key, or a value of another type.
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
    """Merges KEY VALUE ... into ``cfg``, in place.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError) as error:
        raise ValueError(f"Overrides {' '.join(opts)}: {error}") from None
