"""Encoding of shards without Ray: what is computed, kept, refused and read back."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.data import astronaut

from animator.block_dct import BlockDCT
from animator.image_token import open_image_token
from animator.latents import TemporalVAE
from pipelines import schema, shards
from pipelines.clips import ClipStore
from pipelines.curation.ledger import RunJournal
from pipelines.encode import clip as clip_module
from pipelines.encode import encoders as encoders_module
from pipelines.encode.clip import mean_directions
from pipelines.encode.config import EncodeConfig, EncodeError, native_size
from pipelines.encode.encoders import Encoders, chunk_length
from pipelines.encode.members import LatentWriter, locate_latents, shard_problems
from pipelines.encode.model import choose_encoders
from pipelines.encode.plan import check_folders, check_settings, survey, write_settings
from pipelines.encode.store import LatentStore
from pipelines.encode.worker import MAX_DEATHS, Job, encode_shard
from pipelines.faces import FaceError, open_face_backend
from pipelines.framing import fit
from pipelines.schema import ShardError, shard_name
from pipelines.tars import Slice
from tests.unit.encode_shards import HEIGHT, WIDTH, moving_stripes, write_clips
from tests.unit.published_folders import small_svd
from training.frames import FramedClips

NAME = shard_name(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_clips(folder, NAME, {"bb_000": moving_stripes(21, 0), "aa_000": moving_stripes(9, 1)})
    return folder


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """For the encoders that are slow on a CPU."""
    write_clips(tmp_path / "short", NAME, {"aa_000": moving_stripes(5, 1)})
    return tmp_path / "short"


def encoded(source: Path, out: Path, model: Path | None = None, name: str = NAME, **settings):
    """Encode one shard as a worker does; the folder's store."""
    choice = choose_encoders(EncodeConfig(**settings), model, "cpu")
    out.mkdir(exist_ok=True)
    write_settings(out, choice)
    journal, _ = RunJournal.create(out)
    job = Job(source=source, out=out, choice=choice)
    encode_shard(job, name, journal, Encoders(choice))
    journal.close()
    return LatentStore(out)


def unit(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_latents_are_those_that_training_computes_from_the_clip(source, tmp_path):
    store = encoded(source, tmp_path / "out")
    clips = ClipStore(source)
    assert store.keys == clips.keys == ("aa_000", "bb_000")
    framed = FramedClips(clips, (128, 96), "pad")
    for i in range(2):
        frames = framed.frames(i, np.arange(clips.num_frames(i)))
        expected = BlockDCT().encode(unit(frames))
        assert store.latents(i).shape == (clips.num_frames(i), 48, 16, 12)
        np.testing.assert_allclose(store.latents(i), expected.half(), atol=2e-3, rtol=2e-3)
        assert store.framing(i) == framed.clip(i).framing
        assert (store.num_frames(i), store.fps(i)) == (clips.num_frames(i), clips.fps(i))
    assert store.scale(0) == 1.0
    store.check_made_from(clips)


def test_any_frames_of_a_clip_are_read_in_the_order_asked_for(source, tmp_path):
    store = encoded(source, tmp_path / "out")
    i = store.index("bb_000")
    whole = store.latents(i)
    wanted = [20, 3, 4, 5, 0, 5]
    np.testing.assert_array_equal(store.latents(i, wanted), whole[wanted])
    assert store.latents(i, []).shape == (0, 48, 16, 12)
    with pytest.raises(IndexError, match="from 0 to 20"):
        store.latents(i, [21])
    with pytest.raises(IndexError, match="from 0 to 20"):
        store.latents(i, [-1])


def test_keypoints_lie_on_the_same_things_in_the_encoded_frame(tmp_path):
    """A bright dot at a known place of the clip is bright there in the decoded latents."""
    frames = [np.full((HEIGHT, WIDTH, 3), 20, np.uint8) for _ in range(3)]
    for frame in frames:
        frame[40:48, 16:24] = 235
    write_clips(tmp_path / "shards", NAME, {"aa_000": frames})
    for fitted in ("pad", "crop"):
        store = encoded(tmp_path / "shards", tmp_path / fitted, size="96x128", fit=fitted)
        x, y = store.framing(0).points(np.array([20 / WIDTH, 44 / HEIGHT], np.float32))
        image = BlockDCT().decode(torch.from_numpy(store.latents(0)).float())[0].mean(0)
        row, column = divmod(int(image.argmax()), 128)
        assert abs(row / 96 - y) < 0.12
        assert abs(column / 128 - x) < 0.12


def test_length_of_the_chunks_does_not_change_what_is_written(source, tmp_path, monkeypatch):
    one = encoded(source, tmp_path / "one")
    monkeypatch.setattr(encoders_module, "CHUNK_PIXELS", 5 * 128 * 96)
    assert chunk_length((128, 96)) == 5
    monkeypatch.setattr(clip_module, "_TOKENS_AT_ONCE", 1)
    other = encoded(source, tmp_path / "other")
    for i in range(2):
        np.testing.assert_allclose(one.latents(i), other.latents(i), atol=1e-3)


def test_same_clips_and_settings_give_the_same_bytes(source, tmp_path):
    one = encoded(source, tmp_path / "one", image_tokens=True)
    other = encoded(source, tmp_path / "other", image_tokens=True)
    assert one.fingerprint == other.fingerprint
    record = (tmp_path / "one" / f"{NAME}.json").read_bytes()
    assert record == (tmp_path / "other" / f"{NAME}.json").read_bytes()


def test_long_clips_are_streamed(tmp_path, monkeypatch):
    """The codec never sees more frames than a chunk, and no frame waits for another chunk."""
    write_clips(tmp_path / "shards", NAME, {"aa_000": moving_stripes(200, 0)})
    seen: list[int] = []
    plain = Encoders.latents
    monkeypatch.setattr(
        Encoders, "latents", lambda self, frames: seen.append(len(frames)) or plain(self, frames)
    )
    store = encoded(tmp_path / "shards", tmp_path / "out")
    assert seen == [64, 64, 64, 8]
    assert store.num_frames(0) == 200


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_svd(tmp_path_factory.mktemp("svd"))


def test_temporal_vae_and_clip_tokens_of_a_published_folder(short, tmp_path, svd):
    settings = {"size": "64x128", "image_tokens": True, "fit": "crop"}
    store = encoded(short, tmp_path / "out", svd, **settings)
    clips = ClipStore(short)
    i = store.index("aa_000")
    framing = fit((HEIGHT, WIDTH), (64, 128), "crop")
    frames = clips.frames(i, range(5))
    framed = np.stack([framing.image(frame) for frame in frames])
    codec = TemporalVAE.from_folder(svd / "vae")
    with torch.no_grad():
        expected, reference = codec.encode(unit(framed)), codec.encode_reference(unit(framed))
        encoder = open_image_token("clip_vision", 64, svd / "image_encoder", torch.float32)
        tokens = encoder(unit(frames[::4]))[:, 0]
    np.testing.assert_allclose(store.latents(i), expected.half(), atol=2e-3, rtol=2e-3)
    scaled = store.latents(i).astype(np.float32) / store.scale(i)
    np.testing.assert_allclose(scaled, reference, atol=1e-2, rtol=1e-2)
    found = store.image_tokens(i)
    # Two of eight frames a second, in the clip's own shape.
    assert found.frames.tolist() == [0, 4]
    np.testing.assert_allclose(found.tokens, tokens.half(), atol=2e-3, rtol=1e-2)


def test_half_precision_is_encoded_in_the_type_asked_for(short, tmp_path, svd):
    whole = encoded(short, tmp_path / "fp32", svd, size="64x64")
    half = encoded(short, tmp_path / "bf16", svd, size="64x64", dtype="bf16")
    difference = np.abs(whole.latents(0).astype(np.float32) - half.latents(0))
    assert 0 < difference.max() < 0.2
    assert half.models["codec"]["dtype"] == "bf16"


def test_tokens_of_the_tiny_model_are_of_the_framed_picture(source, tmp_path):
    store = encoded(source, tmp_path / "out", latents=False, image_tokens=True)
    framed = FramedClips(ClipStore(source), (128, 96), "pad").frames(1, np.array([0, 4, 8, 12]))
    expected = open_image_token("thumbnail", 128, None)(unit(framed))[:, 0]
    found = store.image_tokens(1)
    assert found.frames.tolist() == [0, 4, 8, 12, 16, 20]
    np.testing.assert_allclose(found.tokens[:4], expected.half(), atol=1e-3)
    with pytest.raises(ShardError, match=r"encoded for image\.npz.*--latents"):
        store.latents(0)


def test_json_says_how_and_with_what_a_clip_was_encoded(short, tmp_path, svd):
    store = encoded(short, tmp_path / "out", svd, size="64x64")
    meta = store.meta(0)
    model = meta["latents"]["model"]
    weights = svd / "vae" / "diffusion_pytorch_model.safetensors"
    assert model["files"][weights.name] == shards.sha256_file(weights)
    assert set(model["files"]) == {weights.name, "config.json"}
    assert (model["name"], model["dtype"]) == ("temporal_vae", "fp32")
    assert "Stability" in model["licence"]
    assert meta["source"] == {
        "shard": NAME,
        "tar_sha256": shards.sha256_file(short / f"{NAME}.tar"),
    }
    assert meta["framing"]["source_size"] == [HEIGHT, WIDTH]
    assert meta["licence"] == "CC0"
    assert {"torch", "av", "python"} <= meta["versions"].keys()
    assert str(tmp_path) not in json.dumps(meta)


def test_native_size_keeps_the_shape_and_never_exceeds_the_model(source, tmp_path):
    assert native_size((1080, 1920), 64, 576 * 1024) == (576, 1024)
    assert native_size((1920, 1080), 64, 576 * 1024) == (1024, 576)
    assert native_size((512, 512), 64, 576 * 1024) == (512, 512)
    assert native_size((40, 700), 64, 576 * 1024) == (64, 640)
    for size in ((333, 777), (2160, 3840), (91, 57)):
        tall, wide = native_size(size, 32, 128 * 96)
        assert tall % 32 == wide % 32 == 0
        assert tall * wide <= max(128 * 96, 32 * 32)
    store = encoded(source, tmp_path / "out", size="native")
    # 72 x 56 pixels in cells of 32: nothing is padded, less than a cell is lost.
    assert store.latents(0).shape[2:] == (8, 4)
    assert store.framing(0).inner_box() == (0, 0, 32, 64)


def test_sizes_that_the_model_does_not_take_are_refused():
    with pytest.raises(EncodeError, match=r"100x100.*multiples of 32.*128x96"):
        choose_encoders(EncodeConfig(size="100x100"), None, "cpu")
    with pytest.raises(EncodeError, match="HEIGHTxWIDTH such as 512x512"):
        EncodeConfig(size="big")
    with pytest.raises(EncodeError, match="--latents, --image-tokens and --faces"):
        EncodeConfig(latents=False)


def test_folder_without_the_encoders_says_what_is_missing(tmp_path, svd):
    bare = tmp_path / "bare"
    (bare / "unet").mkdir(parents=True)
    (bare / "unet" / "config.json").write_bytes((svd / "unet" / "config.json").read_bytes())
    with pytest.raises(EncodeError, match=r"vae has no config\.json with diffusion_pytorch_model"):
        choose_encoders(EncodeConfig(), bare, "cpu")
    with pytest.raises(ValueError, match="is not a model folder"):
        choose_encoders(EncodeConfig(), tmp_path / "nowhere", "cpu")


def test_faces_without_a_pack_are_refused(no_models):
    with pytest.raises(FaceError, match=r"No InsightFace pack.*ANIMATOR_MODELS.*research only"):
        choose_encoders(EncodeConfig(faces=True), None, "cpu")
    with pytest.raises(EncodeError, match="only recognition networks"):
        choose_encoders(EncodeConfig(faces=True, face="cascade"), None, "cpu")


@pytest.mark.real_data
def test_faces_are_embedded_at_their_stored_place(tmp_path, models_env):
    picture = astronaut()[:256, :384]
    backend = open_face_backend("insightface")
    face = backend.detect(picture)[0]
    expected = backend.embed(picture, face)
    stored = {
        "boxes": np.stack([face.box, np.zeros(4)]),
        "landmarks": np.stack([face.landmarks, np.zeros((5, 2))]),
        "score": np.array([face.score, 0.0]),
    }
    write_clips(tmp_path / "shards", NAME, {"aa_000": [picture] * 6}, faces=stored)
    store = encoded(tmp_path / "shards", tmp_path / "out", latents=False, faces=True)
    found = store.face_embeddings(0)
    assert found.frames.tolist() == [0, 4]
    assert found.embeddings.shape == (2, 2, len(expected))
    cosine = found.person[0] @ expected / np.linalg.norm(expected)
    assert cosine > 0.9
    assert not found.person[1].any()
    assert (found.score[:, 0] > 0).all()
    assert not found.score[:, 1].any()
    assert "non-commercial" in store.models["face_embedding"]["licence"]
    assert store.models["face_embedding"]["files"].keys() >= {"mobilefacenet.onnx"}

    # A box without landmarks, as the cascade leaves them, is looked at again.
    unmarked = {**stored, "landmarks": np.full((2, 5, 2), np.nan)}
    write_clips(tmp_path / "cascade", NAME, {"aa_000": [picture] * 3}, faces=unmarked)
    store = encoded(tmp_path / "cascade", tmp_path / "again", latents=False, faces=True)
    person = store.face_embeddings(0).person[0]
    assert person @ expected / np.linalg.norm(expected) > 0.9


def test_mean_direction_leaves_out_frames_without_a_face():
    embeddings = np.zeros((3, 2, 2), np.float32)
    embeddings[0, 0], embeddings[1, 0] = [3, 0], [0, 5]
    embeddings[2, 0] = [-9, -9]
    score = np.array([[1, 0], [1, 0], [0, 0]], np.float32)
    found = mean_directions(embeddings, score)
    np.testing.assert_allclose(found, [[2**-0.5, 2**-0.5], [0, 0]], atol=1e-6)


def test_clip_that_does_not_decode_is_recorded_and_the_others_are_encoded(tmp_path):
    clips = {"aa_000": moving_stripes(5, 0), "bb_000": moving_stripes(5, 1)}
    write_clips(tmp_path / "shards", NAME, clips, damaged=["aa_000"])
    store = encoded(tmp_path / "shards", tmp_path / "out")
    assert store.keys == ("bb_000",)
    (record,) = shards.read_records(tmp_path / "out")
    assert record.counts == {"clips": 1, "failed": 1, "frames": 5}
    (made_from,) = record.sources
    assert made_from.verdict == "failed"
    assert [(clip.key, clip.verdict) for clip in made_from.clips] == [
        ("aa_000", "failed"),
        ("bb_000", "kept"),
    ]
    assert "video does not decode" in made_from.info["errors"]["aa_000"]
    assert str(tmp_path) not in str(made_from)
    assert "aa_000" not in " ".join(record.members)


def test_clip_with_fewer_frames_than_its_record_says_fails(tmp_path):
    record = write_clips(tmp_path / "shards", NAME, {"aa_000": moving_stripes(5, 0)})
    path = tmp_path / "shards" / f"{NAME}.json"
    path.write_text(path.read_text().replace('"num_frames":5', '"num_frames":7'))
    encoded(tmp_path / "shards", tmp_path / "out")
    (made,) = shards.read_records(tmp_path / "out")
    assert "ends before frame 5 of 7" in made.sources[0].info["errors"]["aa_000"]
    assert record.kept_clips


def test_clip_that_keeps_ending_its_process_is_given_up(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    choice = choose_encoders(EncodeConfig(), None, "cpu")
    journal, _ = RunJournal.create(out)
    for _ in range(MAX_DEATHS):
        journal.begin("bb_000")
    encode_shard(Job(source=source, out=out, choice=choice), NAME, journal, Encoders(choice))
    (made,) = shards.read_records(out)
    assert made.sources[0].info["errors"] == {
        "bb_000": f"ended its worker process {MAX_DEATHS} times (crash or time limit)"
    }
    assert LatentStore(out).keys == ("aa_000",)


def test_full_disk_stops_the_run_and_writes_no_clip_off(source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        encoded(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "record"])
def test_damaged_source_shard_is_a_recorded_failure(source, tmp_path, damage):
    tar = source / f"{NAME}.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    if damage == "gone":
        tar.unlink()
    elif damage == "record":
        (source / f"{NAME}.json").write_text("{")
    else:
        tar.write_bytes(data if damage == "flip" else data[:-600])
    choice = choose_encoders(EncodeConfig(), None, "cpu")
    encoded(source, tmp_path / "out")
    (made,) = shards.read_records(tmp_path / "out")
    expected = {
        "flip": "has been changed",
        "cut": "its record says",
        "gone": "is missing",
        "record": "is not JSON",
    }
    assert expected[damage] in str(made.sources[0].error)
    assert made.members == {}
    assert shards.verify(tmp_path / "out").problems == ()
    # It is looked at again by the next run, unless nobody could tell whether it has changed.
    seen = survey(source, tmp_path / "out", choice)
    assert (seen.failed if damage == "record" else seen.changed) == (NAME,)


def test_survey_tells_done_from_new_changed_failed_and_torn(source, tmp_path):
    for index in range(1, 5):
        write_clips(
            source,
            shard_name(index),
            {f"c{index}_000": moving_stripes(3, index)},
            damaged=["c4_000"],
        )
    out = tmp_path / "out"
    choice = choose_encoders(EncodeConfig(), None, "cpu")
    for index in range(5):
        if index != 1:
            encoded(source, out, name=shard_name(index))
    os.truncate(out / f"{shard_name(2)}.tar", 100)
    write_clips(source, shard_name(3), {"c3_000": moving_stripes(4, 9)})
    seen = survey(source, out, choice)
    assert seen.done == (NAME,)
    assert seen.new == (shard_name(1), shard_name(2))
    assert seen.changed == (shard_name(3),)
    assert seen.failed == (shard_name(4),)
    assert seen.todo(retry_failed=False, limit=None) == tuple(map(shard_name, (1, 2, 3)))
    assert seen.todo(retry_failed=True, limit=4) == tuple(map(shard_name, (1, 2, 3, 4)))

    # Changed in place to the same length: the tar is newer than its record, so it is read.
    tar = out / f"{NAME}.tar"
    data = bytearray(tar.read_bytes())
    data[-2000] ^= 1
    tar.write_bytes(data)
    assert NAME in survey(source, out, choice).new

    (source / f"{NAME}.json").unlink()
    with pytest.raises(EncodeError, match=rf"{NAME}, which .* does not have"):
        survey(source, out, choice)


def test_other_settings_and_models_are_refused_with_the_difference(source, tmp_path, svd):
    encoded(source, tmp_path / "out")
    config = EncodeConfig(image_tokens=True, size="64x64")
    with pytest.raises(EncodeError) as refused:
        check_settings(tmp_path / "out", choose_encoders(config, None, "cpu"))
    assert "settings.image_tokens: False → True" in str(refused.value)
    assert "settings.size: '128x96' → '64x64'" in str(refused.value)
    with pytest.raises(EncodeError, match=r"models\.codec\.name: 'block_dct' → 'temporal_vae'"):
        check_settings(tmp_path / "out", choose_encoders(EncodeConfig(size="64x64"), svd, "cpu"))
    check_settings(tmp_path / "out", choose_encoders(EncodeConfig(size="128x96"), None, "cpu"))


def test_folders_that_do_not_fit_are_refused(source, tmp_path):
    with pytest.raises(EncodeError, match="folder of the clips themselves"):
        check_folders(source, source)
    with pytest.raises(EncodeError, match="no committed shards"):
        check_folders(tmp_path, tmp_path / "out")
    with pytest.raises(EncodeError, match="is no folder"):
        check_folders(tmp_path / "nothing", tmp_path / "out")
    write_clips(tmp_path / "other", NAME, {"zz_000": moving_stripes(3, 0)})
    with pytest.raises(EncodeError, match="did not make"):
        check_folders(source, tmp_path / "other")
    encoded(source, tmp_path / "out")
    with pytest.raises(EncodeError, match="shards of latents, expected clips"):
        check_folders(tmp_path / "out", tmp_path / "more")


def test_store_refuses_clips_it_was_not_made_from(source, tmp_path):
    store = encoded(source, tmp_path / "out")
    write_clips(source, NAME, {"aa_000": moving_stripes(9, 1), "bb_000": moving_stripes(21, 7)})
    with pytest.raises(ShardError, match=rf"another {NAME}"):
        store.check_made_from(ClipStore(source))
    write_clips(source, shard_name(1), {"dd_000": moving_stripes(3, 1)})
    with pytest.raises(ShardError, match=r"lacks 1 of the 3 clips.*dd_000"):
        store.check_made_from(ClipStore(source))
    with pytest.raises(ShardError, match="expected latents"):
        LatentStore(source)
    with pytest.raises(ShardError, match="no latents of a clip 'zz_000'"):
        store.index("zz_000")


def test_contract_check_passes_what_is_written_and_names_damage(source, tmp_path):
    store = encoded(source, tmp_path / "out", image_tokens=True)
    (record,) = shards.read_records(tmp_path / "out")
    tar = tmp_path / "out" / f"{NAME}.tar"
    assert shard_problems(tar, record) == []
    place = store.latent_array(0)
    data = bytearray(tar.read_bytes())
    data[place.offset : place.offset + 2] = np.float16(np.nan).tobytes()
    tar.write_bytes(data)
    assert "aa_000.latents.npy holds numbers that are not finite" in shard_problems(tar, record)[0]
    more = dataclasses.replace(record, models=record.models | {"face_embedding": {}})
    assert f"{NAME}.tar: bb_000.embedding.npz is missing." in shard_problems(tar, more)


@pytest.mark.parametrize(
    ("shape", "kind"), [((3, 4, 2), "<f2"), ((3, 4, 2, 2), "<f4"), ((9, 4, 2, 2), "<f2")]
)
def test_arrays_that_are_no_latents_are_refused(tmp_path, shape, kind):
    path = tmp_path / "x.npy"
    with path.open("wb") as stream:
        about = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, about)
        stream.write(bytes(96))
    with pytest.raises(ShardError, match=r"x: k\.npy"):
        locate_latents(Slice(path, 0, path.stat().st_size), "x: k.npy")


def test_latents_of_another_length_than_promised_are_no_file(tmp_path):
    part = np.zeros((2, 4, 2, 2), np.float16)
    with pytest.raises(ShardError, match="2 frames, expected 3"):
        with LatentWriter(tmp_path / "x.npy", (3, 4, 2, 2)) as writer:
            writer.write(part)
    with pytest.raises(ShardError, match="at most 4294967296: encode at a smaller --size"):
        LatentWriter(tmp_path / "x.npy", (100_000, 48, 100, 100))
    with LatentWriter(tmp_path / "y.npy", (2, 4, 2, 2)) as writer:
        writer.write(part)
    assert np.load(tmp_path / "y.npy").shape == part.shape
    assert schema.split_member("a_000.latents.npy") == ("a_000", "latents.npy")
