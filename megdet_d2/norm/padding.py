"""Statistics without the padded border: images of a batch are of several sizes, padded to one.

Stock batch norms count the border's values like any others, though they say nothing of the images,
and the more of them the more the sizes differ. A ``ValidRegion`` tells CGBN layers where the images
are; the border is normalised with their statistics and has no part in them, on any process.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The parts of a Detectron2 model that see feature maps of whole images. Box and mask heads see
# regions, which have no padding.
_WHOLE_IMAGES = ("backbone.", "proposal_generator.", "head.", "roi_heads.segmentation_head.")


@dataclass(eq=False)  # two are equal only where they are one: layers share it
class ValidRegion:
    """Where the images of the current batch are in the padded tensor; shared by a model's layers.

    Written in place before each forward, and kept until the next: a recomputation needs it again.

    Attributes:
        sizes: (height, width) of each image, pixels; empty until there is a batch.
        padded: (height, width) of the tensor that holds them.
        hooks: the model's hooks that write both; see ``ignore_padding``.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    padded: tuple[int, int] = (0, 0)
    hooks: list[RemovableHandle] = field(default_factory=list, repr=False)

    def mask(self, x: Tensor) -> Tensor | None:
        """Bool (N, 1, h, w), true on the images; x (N, C, h, w) is a feature map of the batch.

        Of a feature map with stride s the first ⌈H / s⌉ rows belong to an image of H rows. None
        where nothing is padded, or x is not of this batch: then all of x counts.
        """
        if len(self.sizes) != len(x) or x.dim() != 4 or set(self.sizes) == {self.padded}:
            return None
        inside = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
        for image, size in zip(inside, self.sizes, strict=True):
            rows, columns = (
                -(-extent * cells // whole)
                for extent, cells, whole in zip(size, x.shape[2:], self.padded, strict=True)
            )
            image[:, :rows, :columns] = True
        return inside.to(x.device, non_blocking=True)


def ignore_padding(model: nn.Module) -> nn.Module:
    """Takes the padded border out of the statistics of a Detectron2 model's CGBN layers, in place.

    Layers in box and mask heads stay as they are: regions have no padding. A second call changes
    nothing; ``count_padding`` undoes it.

    Args:
        model: takes Detectron2's list of dicts, whose "image" is (C, H, W), and has a ``backbone``
            that takes the padded batch. Not wrapped in ``DistributedDataParallel``.

    Returns:
        the model.
    """
    layers = _layers(model)
    regions = [layer.valid_region for layer in layers if layer.valid_region is not None]
    region = next((region for region in regions if region.hooks), None) or ValidRegion()
    for layer in layers:
        layer.valid_region = region
    if layers and not region.hooks:
        region.hooks = [
            model.register_forward_pre_hook(functools.partial(_note_sizes, region)),
            model.backbone.register_forward_pre_hook(functools.partial(_note_padding, region)),
        ]
    return model


def count_padding(model: nn.Module) -> nn.Module:
    """Undoes ``ignore_padding``, in place: the padded border counts again. Returns the model."""
    for layer in _layers(model):
        region = layer.valid_region
        if region is None or not region.hooks:  # none, or one that the user has set
            continue
        for hook in region.hooks:
            hook.remove()
        layer.valid_region = None
    return model


def _layers(model: nn.Module) -> list[Any]:
    """Returns the CGBN layers of ``model`` that see feature maps of whole images."""
    return [
        layer
        for name, layer in model.named_modules()
        if f"{name}.".startswith(_WHOLE_IMAGES) and hasattr(layer, "valid_region")
    ]


def _note_sizes(region: ValidRegion, model: nn.Module, args: tuple) -> None:
    region.sizes = [tuple(image["image"].shape[-2:]) for image in args[0]]


def _note_padding(region: ValidRegion, backbone: nn.Module, args: tuple) -> None:
    region.padded = tuple(args[0].shape[-2:])
