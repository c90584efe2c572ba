"""The data order: a pure function of the sample number."""

from collections import Counter

import pytest

from pipelines.order import BucketOrder, ClipOrder


def test_every_epoch_visits_every_clip_once():
    order = ClipOrder(17, seed=3)
    for epoch in range(3):
        clips = [order.clip(sample) for sample in range(17 * epoch, 17 * (epoch + 1))]
        assert sorted(clips) == list(range(17))


def test_epochs_and_seeds_differ():
    first = [ClipOrder(50, seed=0).clip(sample) for sample in range(100)]
    other = [ClipOrder(50, seed=1).clip(sample) for sample in range(50)]
    assert first[:50] != first[50:]
    assert first[:50] != other


def test_order_needs_no_history():
    order = ClipOrder(9, seed=5)
    forward = [order.clip(sample) for sample in range(40)]
    fresh = [ClipOrder(9, seed=5).clip(sample) for sample in reversed(range(40))]
    assert forward == fresh[::-1]


def test_order_is_the_same_on_every_machine():
    # Recorded once: a change here would break the exact resume of every run in progress.
    assert [ClipOrder(8, seed=0).clip(sample) for sample in range(8)] == [3, 2, 1, 6, 0, 7, 4, 5]


def test_empty_store_and_negative_sample_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ClipOrder(0, seed=0)
    with pytest.raises(ValueError, match="-1"):
        ClipOrder(3, seed=0).clip(-1)


def test_one_bucket_is_the_plain_order():
    plain = ClipOrder(11, seed=4)
    bucketed = BucketOrder([range(11)], seed=4, global_batch=3)
    assert [bucketed.clip(s) for s in range(70)] == [plain.clip(s) for s in range(70)]


@pytest.mark.parametrize("batch", [1, 4])
def test_samples_of_a_step_share_a_bucket_and_clips_are_seen_equally_often(batch):
    buckets = [range(0, 14), range(14, 20), range(20, 23)]
    order = BucketOrder(buckets, seed=2, global_batch=batch)
    seen = Counter()
    for step in range(23 * 14 * 6):
        samples = range(step * batch, (step + 1) * batch)
        (bucket,) = {order.bucket(sample) for sample in samples}
        clips = [order.clip(sample) for sample in samples]
        assert set(clips) <= set(buckets[bucket])
        seen.update(clips)
        if step == 22:  # and early on no bucket is far ahead of the others
            shares = [sum(seen[clip] for clip in part) / (23 * batch) for part in buckets]
            assert shares == pytest.approx([14 / 23, 6 / 23, 3 / 23], abs=2 / 23)
    assert set(seen) == set(range(23))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_bucketed_order_needs_no_history_and_differs_by_seed():
    def clips(seed: int, samples) -> list[int]:
        order = BucketOrder([[5, 1, 7], [2, 3, 4, 9]], seed=seed, global_batch=2)
        return [order.clip(sample) for sample in samples]

    assert clips(0, range(100)) == clips(0, reversed(range(100)))[::-1]
    assert clips(0, range(100)) != clips(1, range(100))
    # Recorded once, as above.
    assert clips(0, range(14)) == [9, 3, 7, 1, 2, 4, 5, 1, 4, 3, 7, 5, 2, 9]


def test_stand_ins_are_the_other_clips_of_the_bucket_each_once():
    order = BucketOrder([[5, 1, 7], [2, 3, 4, 9]], seed=0, global_batch=2)
    firsts = set()
    for sample in range(40):
        bucket = order.buckets[order.bucket(sample)]
        others = list(order.others(sample))
        assert others == list(order.others(sample))
        assert sorted([order.clip(sample), *others]) == sorted(bucket)
        firsts.add(others[0])
    assert len(firsts) == 7


def test_impossible_buckets_are_refused():
    with pytest.raises(ValueError, match="no buckets"):
        BucketOrder([], seed=0, global_batch=1)
    with pytest.raises(ValueError, match="at least 1"):
        BucketOrder([[0], []], seed=0, global_batch=1)
    with pytest.raises(ValueError, match="steps of 0"):
        BucketOrder([[0]], seed=0, global_batch=0)
    with pytest.raises(ValueError, match="-1"):
        BucketOrder([[0]], seed=0, global_batch=1).clip(-1)
