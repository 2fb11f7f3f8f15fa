"""The models of the paper's appendix, registered on import, and ResNet blocks with fused CGBN."""

from . import (  # noqa: F401
    atrous,
    challenge,
    context,
    large_kernel,
    maxout,
    ohem,
    segmentation,
    senet,
    thin_resnet,
)
