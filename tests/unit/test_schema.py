"""The contract: names, records and array files, and the refusal of everything else."""

import io
import zipfile

import numpy as np
import pytest

from pipelines import schema
from pipelines.schema import ClipRecord, ShardError, ShardRecord, SourceRecord


def record(**changes) -> ShardRecord:
    clip = ClipRecord(key="ab_000", start=0.0, end=1.0, verdict="kept", scores={"face": 0.5})
    source = SourceRecord(
        id="ab", sha256="ab" * 32, bytes=3, uris=("a.mp4",), verdict="kept", clips=(clip,)
    )
    fields = {
        "name": "shard-000001",
        "config_hash": "c",
        "tar_sha256": "d",
        "tar_bytes": 0,
        "members": {"ab_000.mp4": 3},
        "counts": {"sources": 1},
        "sources": (source,),
    }
    return ShardRecord(**(fields | changes))


def test_record_survives_json():
    data = schema.encode_json(record())
    assert schema.decode_record(data, "x") == record()


def test_json_is_the_same_for_any_order_and_has_no_nan():
    one = schema.encode_json({"b": float("nan"), "a": np.float32(0.25)})
    two = schema.encode_json({"a": 0.25, "b": float("inf")})
    assert one == two
    assert b"NaN" not in one


@pytest.mark.parametrize(
    "name", ["../x.mp4", "a/b.mp4", "a b.mp4", ".mp4", "a", "ä.mp4", "a.mp4\n"]
)
def test_member_names_outside_the_contract_are_refused(name):
    with pytest.raises(ShardError):
        schema.split_member(name)


def test_member_names_split_at_the_first_dot():
    assert schema.split_member("ab_000.pose.npz") == ("ab_000", "pose.npz")


def test_unknown_format_is_refused_with_the_mend():
    with pytest.raises(ShardError, match="format 9"):
        schema.decode_record(
            schema.encode_json(record()).replace(b'"format": 1', b'"format": 9'), "x"
        )


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"name": 3}', b"[" * 100_000])
def test_damaged_records_are_refused(data):
    with pytest.raises(ShardError):
        schema.decode_record(data, "shard-000001.json")


def test_arrays_keep_their_values_and_their_bytes():
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.array("name")}
    data = schema.pack_arrays(arrays)
    assert data == schema.pack_arrays(dict(reversed(arrays.items())))
    unpacked = schema.unpack_arrays(data, "x")
    np.testing.assert_array_equal(unpacked["b"], arrays["b"])
    assert str(unpacked["a"]) == "name"


def test_pickled_arrays_are_never_read():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], dtype=object))
    with pytest.raises(ShardError, match="Python objects"):
        schema.unpack_arrays(buffer.getvalue(), "x")


def test_array_that_claims_more_than_it_holds_is_refused():
    payload = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        payload, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", payload.getvalue())
    with pytest.raises(ShardError, match="do not hold"):
        schema.unpack_arrays(buffer.getvalue(), "x")


def test_array_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(schema, "MAX_ARRAYS_BYTES", 1000)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(10_000))
    with pytest.raises(ShardError, match="unpacks to"):
        schema.unpack_arrays(buffer.getvalue(), "x")


def pose_arrays(num_frames: int, num_keypoints: int) -> dict[str, np.ndarray]:
    return {
        "keypoints": np.zeros((num_frames, 1, num_keypoints, 2), np.float32),
        "score": np.zeros((num_frames, 1, num_keypoints), np.float32),
        "boxes": np.zeros((num_frames, 1, 4), np.float32),
    }


def test_pose_is_a_body_or_a_whole_body_and_nothing_else():
    schema.check_pose(pose_arrays(4, 18), 4, "x")
    schema.check_pose(pose_arrays(4, 128), 4, "x")
    with pytest.raises(ShardError, match="x: 60 keypoints a person, expected 18 or 128"):
        schema.check_pose(pose_arrays(4, 60), 4, "x")
    with pytest.raises(ShardError, match=r"score is .* expected floats of shape \(4, 1, 128\)"):
        schema.check_pose(pose_arrays(4, 18) | {"keypoints": np.zeros((4, 1, 128, 2))}, 4, "x")
    with pytest.raises(ShardError, match="expected floats of shape"):
        schema.check_pose(pose_arrays(4, 18) | {"keypoints": np.zeros((4, 1))}, 4, "x")


def test_pose_of_another_length_is_refused():
    arrays = pose_arrays(4, 18)
    with pytest.raises(ShardError, match="expected floats of shape"):
        schema.check_pose(arrays, 5, "x")
