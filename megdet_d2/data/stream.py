"""The training images as one endless stream with a position, so that a resume is exact.

Every process walks the same stream of indices and takes its part. The stream does not depend on
the number of loader workers; only its cutting into micro-batches depends on the batch. A place in
the stream has three parts: the seed, the images that training has seen, and the few images that
grouping by aspect ratio has drawn and not yet used.
"""

import contextlib
import itertools
import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data import build as d2_build
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from .backend import apply_backend, pins_memory
from .cache import Cache, find_cache_fault
from .classes import num_classes
from .coco import forget_parsed, refuse_unreadable
from .mapping import BadImageError, CheckedMapper, Mapper

logger = logging.getLogger(__name__)

_AUGMENTATION, _STEP = 1, 2  # so that seeds of the two uses differ


class Sample(NamedTuple):
    """An image to load: its index in the data set, and the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    seed: int


class StreamSampler(Sampler):
    """A sampler that yields this process's part of the stream as ``Sample``s.

    The stream is cut into micro-batches of ``images_per_gpu``; process r of W takes the r-th of
    every W. With ``buckets``, all images of a micro-batch are from one bucket. Detectron2's
    aspect-ratio grouping does the same in each process; here it is done over all processes at once.

    Args:
        stock: a training sampler of Detectron2. The stream is its sequence of indices before they
            are distributed to processes, shuffled or weighted by ``seed``.
        images_per_gpu: images of a micro-batch.
        seed: equal in all processes.
        size: images of the data set.
        buckets: the bucket of each image of the data set; None for one bucket.

    Attributes:
        stock, images_per_gpu, size: the arguments.
        seed: of the place that the stream is at.
    """

    def __init__(
        self,
        stock: Sampler,
        images_per_gpu: int,
        seed: int,
        size: int,
        buckets: Sequence[int] | None = None,
    ):
        self.stock: Any = stock  # Detectron2's samplers have no types
        self.images_per_gpu = images_per_gpu
        self.size = size
        self._buckets = buckets
        # Not in __iter__: a loader's worker has no process group.
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()
        self.seek({"seed": seed, "size": size, "images_seen": 0, "pending": []})

    def seek(self, place: dict[str, Any]) -> None:
        """Goes to a ``place``. Call it before iterating a loader, since its workers have copies."""
        if place["size"] != self.size:
            logger.warning(
                f"The training set had {place['size']} images and has {self.size}: the stream "
                "goes on at the same place, in another shuffling"
            )
            place = place | {"size": self.size, "pending": []}
        self.seed = self.stock._seed = place["seed"]
        self._place = place
        self._walk: Iterator[tuple[list, list]] | None = None

    def place(self, images_seen: int) -> dict[str, Any]:
        """Returns the place after ``images_seen`` images, as plain numbers for a checkpoint.

        ``images_seen`` is that of the last call, or larger by whole micro-batches.
        """
        if self._walk is None:
            self._walk = self.micro_batches()
        while self._place["images_seen"] < images_seen:
            batch, pending = next(self._walk)
            seen = self._place["images_seen"] + len(batch)
            self._place = self._place | {"images_seen": seen, "pending": pending}
        return self._place

    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            shield_loader_worker()
        for batch in self.own_batches():
            for position, index in batch:
                yield Sample(index, fold_seed(_AUGMENTATION, self.seed, position))

    def own_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yields this process's micro-batches, as lists of (position in the stream, index)."""
        micro_batches = self.micro_batches()
        for batch, _ in itertools.islice(micro_batches, self._rank, None, self._world_size):
            yield batch

    def micro_batches(self) -> Iterator[tuple[list, list]]:
        """Yields all micro-batches of (position, index), each with the images then pending."""
        pending = [tuple(image) for image in self._place["pending"]]
        drawn = self._place["images_seen"] + len(pending)
        fresh = itertools.islice(self.stock._infinite_indices(), drawn, None)
        images = itertools.chain(pending, enumerate(fresh, drawn))
        waiting: dict[int, list] = {}
        ahead = len(pending)  # carried images that the new cutting has not yet looked at
        for position, index in images:
            bucket = waiting.setdefault(self._buckets[index] if self._buckets else 0, [])
            bucket.append((position, index))
            ahead -= 1
            if len(bucket) == self.images_per_gpu:
                batch = bucket.copy()
                bucket.clear()
                held = [image for images in waiting.values() for image in images]
                yield batch, sorted(held + (pending[-ahead:] if ahead > 0 else []))


class SeededDataset(Dataset):
    """A ``MapDataset`` that takes ``Sample``s and maps each image with its seed.

    So the augmentation is the same in every process and order of loading. Where the mapper returns
    None, another image is drawn by the same seed; ``MapDataset`` draws one without a seed. With
    ``skip_bad``, another image is also drawn after a ``BadImageError``. That image has the reasons
    under the key "skipped", which the training process counts.

    Args:
        dataset: has a length.
        mapper: takes an entry of the data set.
        skip_bad: draws another image in place of one that raises ``BadImageError``.
        cache: keeps mapped images, so the mapper may not be random; None keeps none.

    Raises:
        BadImageError: without ``skip_bad``; it names the image and the fix.
        RuntimeError: 100 images in a row were refused.
    """

    def __init__(
        self, dataset: Dataset, mapper: Mapper, skip_bad: bool = False, cache: Cache | None = None
    ):
        self._dataset: Any = dataset  # a Dataset with a length
        self._cache = cache
        self._mapper = PicklableWrapper(mapper)  # so that a lambda reaches the workers too
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: Sample) -> dict:
        kept = None if self._cache is None else self._cache.get(sample.index)
        if kept is not None:
            return kept
        with seeded(sample.seed):
            index, skipped = sample.index, []
            for _ in range(100):
                try:
                    data = self._mapper(self._dataset[index])
                except BadImageError as error:
                    if not self._skip_bad:
                        raise BadImageError(
                            f"{error}; correct the image or its annotations, or set "
                            "MEGDET.SKIP_BAD_IMAGES True"
                        ) from error
                    skipped.append(str(error))
                    data = None
                if data is not None:
                    if self._cache is not None and index == sample.index:  # not another image
                        self._cache.keep(index, data)
                    return data | {"skipped": skipped} if skipped else data
                index = random.randrange(len(self._dataset))
        last = f"the last: {skipped[-1]}" if skipped else "by returning None"
        raise RuntimeError(f"the mapper refused 100 images in a row, {last}")


def build_stream_loader(
    seed: int,
    *,
    dataset: Any,
    sampler: Sampler,
    mapper: Mapper,
    total_batch_size: int,
    aspect_ratio_grouping: bool,
    num_workers: int,
    skip_bad: bool = False,
    cache: Cache | None = None,
    timeout: float = 0,
    **options: Any,
) -> DataLoader:
    """Builds Detectron2's training loader over a ``StreamSampler``.

    Args:
        seed: seed of the stream; equal in all processes.
        dataset, ...: see Detectron2's ``build_detection_train_loader``; ``total_batch_size`` counts
            the images of a micro-batch over all processes.
        skip_bad, cache: see ``SeededDataset``.
        timeout: seconds to wait for a worker; 0 for no limit.
        options: other arguments of torch's ``DataLoader``.
    """
    images_per_gpu = total_batch_size // comm.get_world_size()
    buckets = None
    if aspect_ratio_grouping:
        try:
            buckets = bytes(image["width"] > image["height"] for image in dataset)
        except KeyError as error:
            logger.warning(
                "DATALOADER.ASPECT_RATIO_GROUPING is True, and the data set does not say every "
                f"image's {error}: not grouping. Add width and height to its entries."
            )
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return d2_build.build_detection_train_loader(
        SeededDataset(dataset, mapper, skip_bad, cache),
        mapper=None,
        sampler=StreamSampler(sampler, images_per_gpu, seed, len(dataset), buckets),
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=False,  # done in the sampler, whose place can be saved
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        seed=seed,  # or each new loader would draw from the process's random numbers
        **options,
    )


def build_train_loader(
    cfg: CfgNode, images_per_gpu: int, mapper: Mapper | None = None
) -> DataLoader:
    """Builds the training loader of a config, with Detectron2's data set and sampler.

    ``SEED`` seeds the stream; if it is negative, all processes share a random seed. A bad image
    raises ``BadImageError``; with ``MEGDET.SKIP_BAD_IMAGES`` another image takes its place. Every
    process has to call this function.

    Args:
        images_per_gpu: images of a micro-batch, and so of each list that the loader yields.
        mapper: takes an entry of the data set and returns a model's input. The default is
            Detectron2's ``DatasetMapper``.

    Raises:
        ValueError: ``DATALOADER.CACHE_MB`` cannot keep what the mapper returns.
    """
    chosen = d2_build._train_loader_from_config(cfg, mapper=mapper)
    forget_parsed()
    refuse_unreadable(cfg.DATASETS.TRAIN, chosen["mapper"])
    megabytes = cfg.DATALOADER.CACHE_MB
    if fault := find_cache_fault(megabytes, chosen["mapper"], chosen["dataset"]):
        raise ValueError(fault)
    mapper = apply_backend(chosen["mapper"], cfg.INPUT.BACKEND)
    chosen["mapper"] = CheckedMapper(mapper, num_classes(cfg))
    chosen["total_batch_size"] = images_per_gpu * comm.get_world_size()
    if isinstance(chosen["dataset"], IterableDataset):
        return d2_build.build_detection_train_loader(**chosen)
    shared = comm.shared_random_seed()
    seed = cfg.SEED if cfg.SEED >= 0 else int(shared)
    return build_stream_loader(
        seed,
        skip_bad=cfg.MEGDET.SKIP_BAD_IMAGES,
        cache=Cache(megabytes) if megabytes else None,
        timeout=cfg.MEGDET.TIMEOUT,
        pin_memory=pins_memory(cfg),
        prefetch_factor=cfg.DATALOADER.PREFETCH_FACTOR if chosen["num_workers"] else None,
        **chosen,
    )


def find_stream(loader: Any) -> StreamSampler | None:
    """Returns the stream of a loader that ``build_train_loader`` made; None for other loaders."""
    sampler = getattr(getattr(loader, "dataset", None), "sampler", None)
    return sampler if isinstance(sampler, StreamSampler) else None


def step_seed(seed: int, images_seen: int, rank: int) -> int:
    """Returns a process's seed for the update that follows ``images_seen`` images."""
    return fold_seed(_STEP, seed, images_seen, rank)


def fold_seed(*numbers: int) -> int:
    """Returns a 32-bit seed made of numbers >= 0; unlike a sum, two seeds agree only by chance."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def seed_cpu(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's CPU random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU random numbers; restores their state at the end."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def shield_loader_worker(worker: int = 0) -> None:
    """Makes a loader's worker ignore SIGINT, and SIGTERM unless its parent sends it.

    Schedulers send both signals to every process, and a worker that dies makes the training fail.
    Only the training process may end its workers, as it does when it exits. Call this function in
    the worker.

    Args:
        worker: number of the worker, which ``DataLoader`` passes to ``worker_init_fn``; unused.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On Linux it ends with its parent, even if it is stopped; elsewhere torch's watchdog checks.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # private
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS does not tell which process sent a signal
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    # Blocked in this thread and in later ones, so that only the waiting thread receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
