"""What the paper's appendix adds; importing it registers each technique with Detectron2."""

from . import atrous, challenge, large_kernel, maxout, senet  # noqa: F401
