"""Times a collective by an alpha-beta model: latencies in series, and bytes over a bandwidth.

NCCL's tree all-reduce of n bytes over g GPUs in each of M machines takes

    T(n) = base + 2 (g - 1) α_in + 2 log2(M) α_across + 2 (P - 1) / P · n / β,   P = g M,

where β is the slower of the bandwidth of one GPU inside its machine and of a machine's network
cards. The latencies are those that NCCL chooses its algorithm by (src/graph/tuning.cc), for small
messages (protocol LL) and for large ones (Simple).
"""

import math
from dataclasses import dataclass, replace

SMALL_MESSAGE = 64 * 1024
"""Bytes up to which a message takes the latencies of small ones."""
BASE_SMALL, BASE_LARGE = 6.8e-6, 8.4e-6
"""Seconds of NCCL to begin an all-reduce by trees."""
ACHIEVED = 0.8
"""The part of a nominal bandwidth that a large all-reduce achieves: an assumption."""


@dataclass(frozen=True)
class Link:
    """A link between two GPUs, or between two machines.

    Attributes:
        small, large: α, seconds for each step of a small and of a large message.
        bandwidth: nominal bytes per second in one direction, of a GPU or of a machine.
    """

    small: float
    large: float
    bandwidth: float


NVLINK = Link(0.6e-6, 4.0e-6, 300e9)
"""NVLink 3 of an A100; 450e9 on an H100."""
PCIE = Link(1.0e-6, 4.0e-6, 25e9)
"""PCIe 4.0 x16."""


def network(gbit: float) -> Link:
    """Returns the link between machines whose network cards have ``gbit`` Gb/s together."""
    return Link(5.0e-6, 14.0e-6, gbit / 8 * 1e9)


@dataclass(frozen=True)
class Topology:
    """A cluster of machines with the same number of GPUs.

    Attributes:
        machines: M.
        gpus: g, GPUs per machine.
        inside: the link between GPUs of a machine.
        across: the link between machines.

    Raises:
        ValueError: there is no machine or no GPU.
    """

    machines: int
    gpus: int
    inside: Link = NVLINK
    across: Link = network(1600)

    def __post_init__(self) -> None:
        if self.machines < 1 or self.gpus < 1:
            raise ValueError(f"{self.machines} machines of {self.gpus} GPUs; give 1 or more")

    @property
    def ranks(self) -> int:
        """The ranks P = g M."""
        return self.machines * self.gpus

    def group(self, ranks: int) -> "Topology":
        """Returns the part that ``ranks`` consecutive ranks span.

        Raises:
            ValueError: groups of this size would not cover whole machines, or parts of one.
        """
        if ranks <= self.gpus and self.gpus % ranks == 0:
            return replace(self, machines=1, gpus=ranks)
        if ranks % self.gpus == 0 and self.machines % (ranks // self.gpus) == 0:
            return replace(self, machines=ranks // self.gpus)
        raise ValueError(
            f"groups of {ranks} ranks do not divide {self.machines} machines of {self.gpus} GPUs"
        )


def all_reduce(topology: Topology, size: float) -> float:
    """Returns T(n), the seconds of an all-reduce of ``size`` bytes over all ranks."""
    if topology.ranks == 1:
        return 0.0
    small = size <= SMALL_MESSAGE
    inside, across = topology.inside, topology.across
    hops = 2 * (topology.gpus - 1) * (inside.small if small else inside.large)
    bandwidth = inside.bandwidth if topology.gpus > 1 else math.inf
    if topology.machines > 1:
        hops += 2 * math.log2(topology.machines) * (across.small if small else across.large)
        bandwidth = min(bandwidth, across.bandwidth)
    moved = 2 * (topology.ranks - 1) / topology.ranks * size
    return (BASE_SMALL if small else BASE_LARGE) + hops + moved / (ACHIEVED * bandwidth)
