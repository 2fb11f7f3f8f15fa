"""The appendix's ROI heads in one: OHEM, context and segmentation supervision."""

from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from .context import ContextROIHeads
from .ohem import OHEMROIHeads
from .segmentation import SegmentationROIHeads


@ROI_HEADS_REGISTRY.register()
class ChallengeROIHeads(OHEMROIHeads, ContextROIHeads, SegmentationROIHeads):
    """All three, each by its own keys: MODEL.OHEM, MODEL.CONTEXT and MODEL.SEGMENTATION.

    For two of them write a class like this one with two bases. Each extends ``StandardROIHeads`` in
    another place: which proposals train, what the box head sees, which losses there are.
    """
