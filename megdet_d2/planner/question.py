"""The question that a search answers: a config, its data, a cluster and a device."""

from dataclasses import dataclass

from detectron2.config import CfgNode

from .epochs import EpochModel
from .hardware import Hardware
from .topology import Link, Topology
from .training_images import TrainingImages


@dataclass(frozen=True)
class Question:
    """The question that a search answers.

    Attributes:
        cfg: the config, with the overrides of the command line.
        fixed: the keys that the command line sets; a search does not change these.
        machines, gpus: M and g.
        memory: bytes of one GPU.
        hardware: seconds of an image, and the link inside a machine.
        across: the link between machines.
        images: the data.
        epochs: E(B).
        batch: the mini-batch to reach; None for any.
    """

    cfg: CfgNode
    fixed: frozenset[str]
    machines: int
    gpus: int
    memory: float
    hardware: Hardware
    across: Link
    images: TrainingImages
    epochs: EpochModel
    batch: int | None = None

    @property
    def topology(self) -> Topology:
        """The cluster."""
        return Topology(self.machines, self.gpus, self.hardware.inside, self.across)

    @property
    def ranks(self) -> int:
        """The ranks P."""
        return self.machines * self.gpus
