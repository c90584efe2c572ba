"""Duplicates over a whole run: the same bytes, nearly the same pictures, and none overlooked."""

import time
from itertools import combinations

import numpy as np
import pytest

from pipelines.curation.hash_search import SignatureSearch, choose_tables
from pipelines.curation.signature import distance
from tests.unit.curated_run import Video, clip, run, settings, signature, sources

D = 6.0


def found_by_comparing_all(texts, families, most) -> list[int]:
    """Each against all the new ones before it, as the rule says."""
    new: list[int] = []
    found = []
    for j, text in enumerate(texts):
        alike = (i for i in new if families[i] != families[j] and distance(texts[i], text) <= most)
        found.append(next(alike, -1))
        if found[-1] < 0:
            new.append(j)
    return found


def searched(texts, families, most) -> list[int]:
    rows = [np.frombuffer(bytes.fromhex(text), ">u8") for text in texts]
    words = np.stack(rows, axis=1).astype(np.uint64)
    return SignatureSearch(words, np.array(families), most).first_alike().tolist()


def crowd(count: int, seed: int, most_flips: int, plain: float) -> list[str]:
    """Signatures in families of variants, at distances around the limit; some show nothing."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2, (count, 512), dtype=np.uint8)
    for j in range(1, count):
        if random.random() < 0.6:
            bits[j] = bits[random.integers(0, j)]
            bits[j, random.choice(512, random.integers(0, most_flips), replace=False)] ^= 1
    for j in np.flatnonzero(random.random(count) < plain):
        frames = random.choice(8, random.integers(1, 6), replace=False)
        bits[j].reshape(8, 64)[frames] = 0
    return [np.packbits(row).tobytes().hex() for row in bits]


@pytest.mark.parametrize(
    ("most", "flips", "plain"),
    [(6.0, 70, 0.0), (6.0, 70, 0.3), (2.2, 30, 0.1), (0.0, 2, 0.2), (9.0, 90, 0.1)],
)
def test_search_decides_as_comparing_all_with_all_does(most, flips, plain):
    texts = crowd(240, 1, flips, plain)
    families = np.random.default_rng(2).integers(0, 120, 240).tolist()
    expected = found_by_comparing_all(texts, families, most)
    assert searched(texts, families, most) == expected
    assert sum(first >= 0 for first in expected) > 20


def test_crowds_of_copies_are_decided_exactly_too():
    random = np.random.default_rng(0)
    texts = [signature(int(random.integers(3)), int(random.integers(0, 45))) for _ in range(240)]
    families = list(range(240))
    assert searched(texts, families, D) == found_by_comparing_all(texts, families, D)


def test_tables_for_the_default_distance_hold_every_pair_within_it():
    tables = choose_tables(512, 48, 10**6, 10**6)
    assert len(tables) > 100
    random = np.random.default_rng(0)
    for _ in range(300):
        # As uneven as differences can be: runs of bits, scattered ones, whole frames.
        places = random.choice(512, 48, replace=False)
        start = random.integers(0, 464)
        changed = places if random.random() < 0.5 else np.arange(start, start + 48)
        flips = sum(1 << int(place) for place in changed)
        assert any(not (flips >> table.start) & table.mask for table in tables)


def test_many_clips_take_seconds():
    count = 30_000
    random = np.random.default_rng(0)
    words = random.integers(0, 2**63, (8, count), dtype=np.uint64)
    later, earlier = np.arange(count // 2, count, 50), np.arange(0, count // 2, 50)
    words[:, later] = words[:, earlier] ^ np.uint64(0b111111 << 20)
    began = time.process_time()
    found = SignatureSearch(words, np.arange(count), D).first_alike()
    assert time.process_time() - began < 10
    np.testing.assert_array_equal(found[later], earlier)
    assert (found >= 0).sum() == len(later)


def test_the_same_bytes_under_other_names_are_one_source(tmp_path):
    video = Video("same", (clip(signature(1)),))
    other = Video("other", (clip(signature(2)),))
    names = {"a": video, "b": other, "c": video, "d": other, "e": video, "f": other}
    found = sources(run(tmp_path, names, settings()))
    assert [found[name].verdict for name in "abcdef"] == ["kept"] * 2 + ["rejected"] * 4
    for name in "cdef":
        copy, first = found[name], found["a" if name in "ce" else "b"]
        assert (copy.reasons, copy.duplicate_of) == (("duplicate",), first.id)
        assert (copy.clips, copy.scores, copy.info) == ((), {}, {})
        assert copy.provenance == {"uri": name}


def test_a_source_that_failed_is_nobodys_original(tmp_path):
    names = {
        "a": Video("same", fails=True),
        "b": Video("same", (clip(),)),
        "c": Video("x"),
        "d": Video("same", (clip(),)),
    }
    found = sources(run(tmp_path, names, settings()))
    assert [found[name].verdict for name in "abd"] == ["failed", "kept", "rejected"]
    assert found["d"].duplicate_of == found["b"].id


def test_a_clip_that_shows_what_an_earlier_one_shows_is_rejected(tmp_path):
    names = {
        "a": Video("a", (clip(signature(1)),)),
        "b": Video("b", (clip(signature(2)), clip(signature(1, 40)))),
        "c": Video("c", (clip(signature(1, 60)),)),
        "d": Video("d", (clip(signature(1, 30)),)),
    }
    found = sources(run(tmp_path, names, settings()))
    first = found["a"].clips[0]
    assert [entry.duplicate_of for entry in found["b"].clips] == [None, first.key]
    assert (found["b"].verdict, found["b"].clips[1].reasons) == ("kept", ("duplicate",))
    assert found["b"].clips[1].num_frames == 0
    assert found["c"].verdict == "kept"
    assert (found["d"].verdict, found["d"].reasons) == ("rejected", ("duplicate",))


def test_clips_of_one_source_do_not_repeat_each_other(tmp_path):
    parts = (clip(signature(1)), clip(signature(1)), clip(signature(1, 5)))
    found = sources(run(tmp_path, {"a": Video("a", parts)}, settings()))
    assert [entry.verdict for entry in found["a"].clips] == ["kept"] * 3


def test_only_clips_that_pass_their_own_rules_stand_for_others(tmp_path):
    names = {
        "a": Video("a", (clip(signature(1), sharpness=0.0),)),
        "b": Video("b", (clip(signature(1, 4)),)),
        "c": Video("c", (clip(signature(1, 8)),)),
        "d": Video("d", (clip(signature(1), sharpness=0.0),)),
    }
    found = sources(run(tmp_path, names, settings()))
    assert [found[name].reasons for name in "abcd"] == [
        ("blurred",),
        (),
        ("duplicate",),
        ("blurred",),
    ]
    assert found["c"].clips[0].duplicate_of == found["b"].clips[0].key


def test_a_repeat_does_not_pass_on_what_it_repeats(tmp_path):
    """b is near a, c near b but not near a: c is compared with what is kept, so it is new."""
    base = np.unpackbits(np.frombuffer(bytes.fromhex(signature(1)), np.uint8))
    near, far = base.copy(), base.copy()
    near[:40] ^= 1
    far[:80] ^= 1
    texts = [np.packbits(bits).tobytes().hex() for bits in (base, near, far)]
    assert [distance(*pair) <= D for pair in combinations(texts, 2)] == [True, False, True]
    names = {name: Video(name, (clip(text),)) for name, text in zip("abc", texts, strict=True)}
    found = sources(run(tmp_path, names, settings()))
    assert [found[name].verdict for name in "abc"] == ["kept", "rejected", "kept"]


def test_near_duplicates_are_kept_where_they_are_wanted(tmp_path):
    names = {name: Video(name, (clip(signature(1)),)) for name in "abcd"}
    found = sources(run(tmp_path, names, settings("duplicates.near=false")))
    assert [source.verdict for source in found.values()] == ["kept"] * 4


def test_clips_without_a_signature_repeat_nothing(tmp_path):
    plain = signature(3, plain=range(5))
    names = {"a": Video("a", (clip(),)), "b": Video("b", (clip(),))}
    names |= {"c": Video("c", (clip(plain),)), "d": Video("d", (clip(plain),))}
    found = sources(run(tmp_path, names, settings()))
    assert [source.verdict for source in found.values()] == ["kept"] * 4
