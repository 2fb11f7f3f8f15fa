"""The ROI heads with the appendix's OHEM, context and segmentation supervision together."""

from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from .context import ContextROIHeads
from .ohem import OHEMROIHeads
from .segmentation import SegmentationROIHeads


@ROI_HEADS_REGISTRY.register()
class ChallengeROIHeads(OHEMROIHeads, ContextROIHeads, SegmentationROIHeads):
    """The ROI heads with all three techniques.

    The keys are in MODEL.OHEM, MODEL.CONTEXT and MODEL.SEGMENTATION.

    For two of them, write a class like this one with two bases. Each extends another part of
    ``StandardROIHeads``: the proposals that train, the features of the box head, and the losses.
    """
