"""The stream of training images: every image once an epoch, from any place on, for any batch."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from megdet_d2.data.stream import SeededDataset, StreamSampler, fold_seed, seeded, step_seed

SIZE = 37
BUCKETS = bytes(i % 3 == 0 for i in range(SIZE))


def streams(processes, images_per_gpu, buckets=BUCKETS, seed=5, stock=None):
    """The samplers of all processes, as each would build its own."""
    built = []
    for rank in range(processes):
        inner = stock() if stock else TrainingSampler(SIZE, seed=0)
        sampler = StreamSampler(inner, images_per_gpu, seed, SIZE, buckets)
        sampler._rank, sampler._world_size = rank, processes
        built.append(sampler)
    return built


def take(samplers, updates, steps=1):
    """The samples of so many updates, in the order of the stream, as micro-batches."""
    images = samplers[0].images_per_gpu
    walks = [iter(sampler) for sampler in samplers]
    return [list(itertools.islice(walk, images)) for _ in range(updates * steps) for walk in walks]


def indices(micro_batches):
    return [sample.index for batch in micro_batches for sample in batch]


def test_ungrouped_it_is_detectron2s_stream():
    stock = list(itertools.islice(TrainingSampler(SIZE, seed=5), 48))
    assert indices(take(streams(3, 4, buckets=None), 4)) == stock


@pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["ungrouped", "grouped"])
@pytest.mark.parametrize("processes, images", [(1, 3), (2, 2), (4, 1), (3, 5)])
def test_it_goes_on_from_every_place(processes, images, buckets):
    whole = take(streams(processes, images, buckets), 12)
    walked = streams(processes, images, buckets)
    for updates in range(12):
        place = walked[0].place(updates * processes * images)
        resumed = streams(processes, images, buckets, seed=99)
        for sampler in resumed:
            sampler.seek(place)
        assert take(resumed, 12 - updates) == whole[updates * processes :]


def test_a_micro_batch_is_of_one_shape():
    for batch in take(streams(2, 4), 30):
        assert len({BUCKETS[sample.index] for sample in batch}) == 1


@pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["ungrouped", "grouped"])
def test_no_image_is_repeated_or_skipped_when_the_batch_changes(buckets):
    """Through a chain of batches: what was drawn is what was seen and what is held back."""
    seen, place = [], None
    for processes, images, steps, updates in [
        (2, 5, 1, 3),
        (1, 2, 3, 4),
        (4, 3, 2, 2),
        (3, 1, 1, 9),
    ]:
        samplers = streams(processes, images, buckets)
        if place:
            for sampler in samplers:
                sampler.seek(place)
        seen += indices(take(samplers, updates, steps))
        place = samplers[0].place(len(seen))
        assert place["images_seen"] == len(seen)
        drawn = Counter(seen) + Counter(index for _, index in place["pending"])
        epochs, rest = divmod(sum(drawn.values()), SIZE)
        assert set(drawn.values()) <= {epochs, epochs + 1}
        assert sum(count == epochs + 1 for count in drawn.values()) == rest


def test_other_samplers_of_detectron2_have_a_place_too():
    factors = torch.tensor([1.0 + i % 2 for i in range(SIZE)])
    stock = lambda: RepeatFactorTrainingSampler(factors, seed=0)  # noqa: E731
    whole = take(streams(2, 3, stock=stock), 20)
    resumed = streams(2, 3, stock=stock)
    place = streams(2, 3, stock=stock)[0].place(60)
    for sampler in resumed:
        sampler.seek(place)
    assert take(resumed, 10) == whole[20:]


def test_another_data_set_is_said(caplog):
    sampler = streams(1, 2)[0]
    sampler.seek(sampler.place(10) | {"size": 99, "pending": [(8, 98)]})
    assert "had 99 images and has 37" in caplog.text
    assert max(indices(take([sampler], 30))) < SIZE


def test_seeds_differ_by_image_process_and_seed():
    seeds = [fold_seed(1, s, p) for s in range(3) for p in range(50)]
    seeds += [step_seed(s, p, r) for s in range(3) for p in range(50) for r in range(3)]
    assert len(set(seeds)) == len(seeds)


def draw(_=None):
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_augmentation_is_by_seed_and_leaves_the_random_numbers_alone():
    dataset = SeededDataset([{}] * 4, draw)
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(3)
    expected = draw()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(3)
    samples = take(streams(1, 4, buckets=None), 1)[0]
    first = [dataset[sample._replace(index=0)] for sample in samples]
    assert [dataset[sample._replace(index=0)] for sample in samples] == first
    assert len(set(first)) == 4
    assert draw() == expected
    with pytest.raises(KeyError), seeded(1):
        raise KeyError


def test_an_image_that_the_mapper_refuses_is_replaced_by_its_seed():
    refuse_even = SeededDataset(list(range(10)), lambda i: i if i % 2 else None)
    sample = take(streams(1, 4, buckets=None), 1)[0][0]._replace(index=4)
    replaced = refuse_even[sample]
    assert replaced % 2 and all(refuse_even[sample] == replaced for _ in range(5))
    with pytest.raises(RuntimeError, match="the mapper refused 100 images"):
        SeededDataset([0], lambda _: None)[sample._replace(index=0)]
