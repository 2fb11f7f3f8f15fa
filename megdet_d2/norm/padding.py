"""Takes the padded border of a batch out of the statistics of CGBN.

Images of a batch have several sizes and are padded to one. Stock batch norms include the border in
their statistics, though it has nothing of the images. A ``ValidRegion`` holds where the images are.
CGBN layers then take their statistics from the images alone, and normalise the border with them.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Parts of a Detectron2 model that see feature maps of whole images. Box and mask heads see regions,
# which have no padding.
_WHOLE_IMAGES = ("backbone.", "proposal_generator.", "head.", "roi_heads.segmentation_head.")


@dataclass(eq=False)  # compared by identity, because layers share one
class ValidRegion:
    """The places of the current batch's images in the padded tensor, shared by a model's layers.

    It is written in place before each forward. It stays until the next forward, because a
    recomputation in backward reads it again.

    Attributes:
        sizes: (height, width) of each image, pixels; empty until there is a batch.
        padded: (height, width) of the tensor that holds them.
        hooks: the model's hooks that write both; see ``ignore_padding``.
        masks: the masks of this batch, which all layers of one feature map's size share.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    padded: tuple[int, int] = (0, 0)
    hooks: list[RemovableHandle] = field(default_factory=list, repr=False)
    masks: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, x: Tensor) -> Tensor | None:
        """Returns the mask of the images in x, a feature map of the batch.

        In a feature map of stride s the first ⌈H / s⌉ rows belong to an image of H rows.

        Args:
            x: (N, C, h, w).

        Returns:
            bool, (N, 1, h, w), true on the images. None if nothing is padded or x is not of this
            batch: then all of x counts.
        """
        if len(self.sizes) != len(x) or x.dim() != 4 or set(self.sizes) == {self.padded}:
            return None
        if torch.compiler.is_compiling():
            return self._make_mask(x)
        batch = tuple(self.sizes), self.padded
        key = (batch, x.shape[2:], x.device)
        if any(other != batch for other, *_ in self.masks):
            self.masks.clear()
        if key not in self.masks:
            self.masks[key] = self._make_mask(x)
        return self.masks[key]

    def _make_mask(self, x: Tensor) -> Tensor:
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
        backbone = model.get_submodule("backbone")
        region.hooks = [
            model.register_forward_pre_hook(functools.partial(_note_sizes, region)),
            backbone.register_forward_pre_hook(functools.partial(_note_padding, region)),
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
