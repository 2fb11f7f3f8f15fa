"""Finds the settings in which a config can be trained on a cluster: best first, with the rest.

A setting is a mini-batch B = b k P of b images per GPU, k micro-batches and P = g M GPUs, a BN size
of whole ranks, and the stages of sublinear memory. Its schedule is the one that the training itself
resolves, from the same keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megdet_d2.norm.groups import ranks_per_group
from megdet_d2.optim.halves import keeps_first_half

from .evaluation_time import evaluation_seconds
from .flops import Counted
from .memory import Memory
from .question import Question
from .resolved import Resolved, resolve, to_words
from .step_time import StepTime, Work, step_time
from .topology import Topology

MOST_IMAGES_PER_GPU, MOST_BATCH = 16, 1024
SMALLEST_BN_SIZE = 16
"""The paper's AP falls below it."""
GRADIENT_BYTES = 4
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Images of an update for each GPU, b k, that are tried."""


@dataclass(frozen=True)
class Setting:
    """A setting that fits.

    Attributes:
        images_per_gpu, micro_batches: b and k.
        bn_size, group: images that CGBN normalises over, and their ranks; 0 and 1 without CGBN.
        sublinear: stages that are computed twice.
        resolved: mini-batch, schedule and keys.
        memory: of one GPU.
        step: seconds of an update by part.
        evaluation: seconds of the evaluations for which the training does not go on.
        equal_ap: times the iterations that this mini-batch takes to the AP of the reference.
        efficiency: images/s of a GPU, relative to one GPU alone.
    """

    images_per_gpu: int
    micro_batches: int
    bn_size: int
    group: int
    sublinear: tuple[str, ...]
    resolved: Resolved
    memory: Memory
    step: StepTime
    evaluation: float
    equal_ap: float
    efficiency: float

    @property
    def hours(self) -> float:
        """Hours of the schedule, with its evaluations."""
        return (self.resolved.iterations * self.step.total + self.evaluation) / 3600

    @property
    def hours_to_equal_ap(self) -> float:
        """Hours to the AP of the reference mini-batch."""
        updates = self.resolved.iterations * self.step.total * self.equal_ap
        return (updates + self.evaluation) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Returns the setting as data."""
        return asdict(self) | {
            "memory": self.memory.parts() | {"total": self.memory.total},
            "hours": self.hours,
            "hours_to_equal_ap": self.hours_to_equal_ap,
        }


@dataclass
class Found:
    """The settings that fit, best first, and why others do not.

    Attributes:
        settings: by hours to equal AP. Those with the config's BN size come first, and those with
            another under 16 last.
        out: sentences, one for each reason.
        needs: bytes of every memory that was computed, by images per GPU and stages.
    """

    settings: list[Setting] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    needs: dict[tuple[int, tuple[str, ...]], float] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        """Adds a reason, once."""
        if reason not in self.out:
            self.out.append(reason)


class Search:
    """A search for a question.

    Args:
        question: the question.
        memory: returns the memory of b images per GPU with these stages.
        counted: returns the arithmetic of the model with these stages.
    """

    def __init__(
        self,
        question: Question,
        memory: Callable[[int, tuple[str, ...]], Memory],
        counted: Callable[[tuple[str, ...]], Counted],
    ):
        self.question = question
        self._memory, self._counted = memory, counted
        self._found = Found()
        self._fits: dict[tuple[int, tuple[str, ...]], Memory | None] = {}

    def run(self) -> Found:
        """Returns all settings that fit, best first, and the reasons of the others."""
        question = self.question
        for batch in self.batches():
            try:
                resolved = resolve(question, batch)
            except ValueError as error:  # it is too large for the epochs: so are larger ones
                self._found.leave_out(f"mini-batches of {batch:,} and more: {error}")
                break
            for b, k in self._divisions(batch):
                self._try(resolved, b, k)
        asked = question.cfg.MODEL.CGBN.BN_SIZE

        def rank(setting: Setting) -> tuple[int, float, int]:
            worse = 0
            if setting.bn_size and setting.bn_size != asked:
                worse = 2 if setting.bn_size < SMALLEST_BN_SIZE else int(asked > 0)
            return worse, setting.hours_to_equal_ap, setting.micro_batches

        self._found.settings.sort(key=rank)
        return self._found

    def for_question(self, question: Question) -> "Search":
        """Returns a search for the same model on another cluster."""
        return Search(question, self._memory, self._counted)

    def batches(self) -> list[int]:
        """Returns the mini-batches to try.

        Raises:
            ValueError: the ranks cannot share the one that is asked for.
        """
        question, ranks = self.question, self.question.ranks
        own = question.cfg.SOLVER.IMS_PER_BATCH
        asked = own if "SOLVER.IMS_PER_BATCH" in question.fixed else question.batch
        if asked is None and not question.cfg.MEGDET.POLICY:
            asked = own  # whose iterations are for this mini-batch
        if asked is not None:
            if asked < 1 or asked % ranks:
                below = asked // ranks * ranks
                near = " and ".join(str(b) for b in (below, below + ranks) if b > 0)
                raise ValueError(
                    f"a mini-batch of {asked} images cannot be shared by {ranks} GPUs; nearest "
                    f"that work: {near}, by --target-batch"
                )
            return [asked]
        tried = {ranks * each for each in LADDER if ranks * each <= MOST_BATCH}
        tried |= {own} if own % ranks == 0 else {ranks}
        return sorted(tried)

    def _divisions(self, batch: int) -> Iterator[tuple[int, int]]:
        each = batch // self.question.ranks
        steps = self.question.cfg.MEGDET.ACCUMULATION_STEPS
        for b in range(1, min(each, MOST_IMAGES_PER_GPU) + 1):
            if each % b:
                continue
            if "MEGDET.ACCUMULATION_STEPS" in self.question.fixed and each // b != steps:
                continue
            yield b, each // b

    def options(self) -> list[tuple[str, ...]]:
        """Returns the stages of sublinear memory to try: none, the config's, and all."""
        keys = self.question.cfg.MODEL.SUBLINEAR
        stages = self._counted(()).stages
        own = tuple(stage for stage in keys.STAGES if stage in stages)
        if "MODEL.SUBLINEAR.ENABLED" in self.question.fixed:
            return [own if keys.ENABLED else ()]
        options = [(), own]
        if "MODEL.SUBLINEAR.STAGES" not in self.question.fixed:
            options.append(stages)
        return list(dict.fromkeys(options))

    def _try(self, resolved: Resolved, b: int, k: int) -> None:
        in_halves = keeps_first_half(self.question.cfg, self.question.ranks)
        if in_halves and k == 1:
            self._found.leave_out(
                "1 micro-batch on 1 GPU: MEGDET.OPTIMIZER 'agvm' compares two halves of a "
                "mini-batch"
            )
            return
        for stages in self.options():
            memory = self._fit(b, stages)
            if memory is None:
                continue
            if k > 1:  # gradients of earlier micro-batches are there at the peak
                size = GRADIENT_BYTES * self._counted(()).parameters * (1 + in_halves)
                memory = replace(memory, gradients=max(memory.gradients, size))
            if memory.total > self.question.memory:
                self._found.leave_out(
                    f"{b} images per GPU, {k} micro-batches, {_describe(stages)}: needs "
                    f"{memory.total / 1e9:.1f} GB of {self.question.memory / 1e9:g}"
                )
                continue
            try:
                self._found.settings.append(self.make(resolved, b, k, stages, memory))
            except ValueError as error:
                self._found.leave_out(str(error))
            return  # more stages only take longer

    def _fit(self, b: int, stages: tuple[str, ...]) -> Memory | None:
        """Returns the memory; None if it, or that of fewer images, is more than there is."""
        if any(fewer < b and self._fits[fewer, other] is None
               for fewer, other in self._fits if other == stages):  # fmt: skip
            return None
        if (b, stages) not in self._fits:
            memory = self._memory(b, stages)
            self._found.needs[b, stages] = memory.total
            self._fits[b, stages] = memory if memory.total <= self.question.memory else None
            if self._fits[b, stages] is None:
                self._found.leave_out(
                    f"{b} images per GPU or more, {_describe(stages)}: {b} needs "
                    f"{memory.total / 1e9:.1f} GB of {self.question.memory / 1e9:g}"
                )
        return self._fits[b, stages]

    def make(
        self, resolved: Resolved, b: int, k: int, stages: tuple[str, ...], memory: Memory
    ) -> Setting:
        """Returns a setting.

        Raises:
            ValueError: no BN group has whole ranks.
        """
        question, hardware = self.question, self.question.hardware
        plain, counted = self._counted(()), self._counted(stages)
        bn_size, group = self._group(b) if plain.layers else (0, 1)
        values: dict[str, Any] = {"MEGDET.ACCUMULATION_STEPS": k}
        if bn_size:
            values["MODEL.CGBN.BN_SIZE"] = bn_size
        values["MODEL.SUBLINEAR.ENABLED"] = bool(stages)
        if stages:
            values["MODEL.SUBLINEAR.STAGES"] = stages
        keys = (*resolved.keys, *to_words(question.cfg, values))
        resolved = replace(resolved, keys=keys)
        alone = hardware.seconds_per_image * counted.step / hardware.flops
        shared = hardware.sharing(question.gpus)
        work = Work(
            alone * shared,
            b,
            k,
            variation=hardware.variation,
            gradient_bytes=GRADIENT_BYTES * plain.parameters * (question.ranks > 1),
            layers=plain.layers,
            group=group,
            host=hardware.host * shared,
            loader=hardware.loader and hardware.loader / shared,
        )
        step = step_time(work, question.topology)
        one = replace(
            work, seconds_per_image=alone, group=1, gradient_bytes=0, host=hardware.host,
            loader=hardware.loader,
        )  # fmt: skip
        single = step_time(one, Topology(1, 1))
        return Setting(
            b, k, bn_size, group, stages, resolved, memory, step,
            evaluation_seconds(question, resolved, plain.step, step.total),
            question.epochs.factor(resolved.batch, resolved.reference),
            single.total / step.total,
        )  # fmt: skip

    def _group(self, b: int) -> tuple[int, int]:
        """Returns the BN size that whole ranks give, nearest to the config's, and its ranks."""
        keys, question = self.question.cfg.MODEL.CGBN, self.question
        ranks = question.ranks if keys.CROSS_MACHINE else question.gpus
        if "MODEL.CGBN.BN_SIZE" in question.fixed or keys.BN_SIZE == -1:
            group = ranks_per_group(keys.BN_SIZE, b, ranks)
        else:
            possible = [n for n in range(1, ranks + 1) if ranks % n == 0]
            group = min(possible, key=lambda n: (abs(n * b - keys.BN_SIZE), n))
        question.topology.group(group)  # for its error
        return group * b, group


def _describe(stages: tuple[str, ...]) -> str:
    return f"sublinear memory in {', '.join(stages)}" if stages else "all kept"
