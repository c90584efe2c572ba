"""Taking models from folders and zips: what is found, verified, refused, left out."""

import hashlib
import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cli import main
from pipelines.model_archive import unpack_networks, unpacked_size
from pipelines.model_cache import accept_licences, read_record
from pipelines.model_catalogue import CATALOGUE, KnownModel, ModelError, RemoteFile, known
from pipelines.model_download import Downloader
from pipelines.model_import import import_models
from pipelines.model_pull import plan_pull, pull
from pipelines.models import cache_folder, find, locate_face_pack, locate_folder
from tests.unit.file_server import FileServer, Served

V1 = ("pose_net.pth", "face_encoder.pth", "unet.pth")
NETWORKS = {"det_10g.onnx": b"detector" * 100, "w600k_r50.onnx": b"recogniser" * 100}


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack_zip(path: Path, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        if prefix:
            zipped.mkdir(prefix.rstrip("/"))
        for name, data in NETWORKS.items():
            zipped.writestr(prefix + name, data)
        zipped.writestr(prefix + "README.txt", "about")
    return path


def catalogue_with(name: str, digests: dict[str, bytes]) -> tuple[KnownModel, ...]:
    """The catalogue with the digests of the test's own files for one model."""
    model = known(name)
    files = tuple(
        replace(file, sha256=digest(digests[file.path]) if file.path in digests else file.sha256)
        for file in model.files
    )
    networks = tuple((n, digest(digests[n]) if n in digests else d) for n, d in model.networks)
    changed = replace(model, files=files, networks=networks)
    return tuple(changed if entry.name == name else entry for entry in CATALOGUE)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code if isinstance(ended.value.code, int) else 0


def svd_folder(folder: Path, pipeline: str = "StableVideoDiffusionPipeline") -> dict[str, bytes]:
    files = {file.path: file.path.encode() for file in known("svd-xt").files}
    files["model_index.json"] = json.dumps({"_class_name": pipeline}).encode()
    for path, content in files.items():
        put(folder / path, content)
    return files


def test_a_hub_snapshot_of_links_is_copied(no_models: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--stabilityai--svd"
    files = svd_folder(hub / "real")
    for path, content in files.items():  # as the hub's cache lays them out
        blob = put(hub / "blobs" / digest(content), content)
        link = hub / "snapshots" / "abc" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(hub / "real")
    report = import_models(hub, catalogue=catalogue_with("svd-xt", files))
    folder = locate_folder("svd-xt")
    assert folder is not None
    assert folder == cache_folder() / "svd-xt"
    copied = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert {path: file.read_bytes() for path, file in copied.items()} == files
    assert not any(file.is_symlink() for file in copied.values())
    assert [each["name"] for each in report["imported"]] == ["svd-xt"]
    assert report["unrecognised"] == []


def test_a_folder_of_many_things_is_sorted_out(no_models: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    weights = {name: put(given / "checkpoints" / "Animation" / name, name) for name in V1}
    tiny = put(given / "tinypose_256x192.onnx", "tiny")
    put(given / "notes.txt", "mine")
    put(given / "svd" / "unet" / "diffusion_pytorch_model.fp16.safetensors", "half a model")
    report = import_models(given)
    assert {each["name"] for each in report["imported"]} == {"tinypose", "stableanimator-v1"}
    folder = locate_folder("stableanimator-v1")
    assert folder is not None
    assert (folder / "Animation" / "unet.pth").read_bytes() == weights["unet.pth"].read_bytes()
    assert find("tinypose") == cache_folder() / "pose" / tiny.name
    (incomplete,) = report["incomplete"]
    assert incomplete["name"] == "svd-xt"
    assert "vae/config.json" in incomplete["missing"]
    assert report["unrecognised"] == ["notes.txt"]
    entry = read_record()["models"]["stableanimator-v1"]
    assert str(given) in entry["source"]
    assert entry["imported_at"]
    assert "no digest is known" in entry["files"][0]["verified_against"]


def test_the_folder_of_the_weights_may_be_given_itself(no_models: Path, tmp_path: Path) -> None:
    for name in V1:
        put(tmp_path / "downloads" / name, name)
    import_models(tmp_path / "downloads")
    folder = locate_folder("stableanimator-v1")
    assert folder is not None
    assert (folder / "Animation" / "pose_net.pth").read_text() == "pose_net.pth"


def test_another_pipeline_in_the_same_layout_is_not_taken(no_models: Path, tmp_path: Path) -> None:
    svd_folder(tmp_path / "given", pipeline="StableDiffusionPipeline")
    with pytest.raises(ModelError, match="holds no known model"):
        import_models(tmp_path / "given")


def test_another_file_under_a_known_name_names_both_digests_and_takes_nothing(
    no_models: Path, tmp_path: Path
) -> None:
    put(tmp_path / "given" / "yolox_l.onnx", "something else")
    put(tmp_path / "given" / "tinypose_256x192.onnx", "tiny")
    with pytest.raises(ModelError, match=digest(b"something else")) as caught:
        import_models(tmp_path / "given")
    assert str(known("yolox_l").files[0].sha256) in str(caught.value)
    assert find("tinypose") is None
    assert not [path for path in cache_folder().rglob("*.onnx")]


def test_loose_networks_become_a_pack_of_the_given_name(
    no_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in NETWORKS.items():
        put(tmp_path / "loose" / name, content)
    assert run("models", "import", str(tmp_path / "loose"), "--name", "my_pack") == 0
    said = capsys.readouterr().out
    assert "my_pack" in said
    assert "det_10g.onnx" in said
    assert locate_face_pack("my_pack") == cache_folder() / "face" / "my_pack"
    assert run("models", "list", "--json") == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert listed["my_pack"]["path"] == str(cache_folder() / "face" / "my_pack")
    assert listed["my_pack"]["size"] == sum(map(len, NETWORKS.values()))


@pytest.mark.parametrize("name", ["../up", "a/b", "face", "", ".hidden", "x" * 80])
def test_a_pack_cannot_be_named_out_of_its_folder(
    name: str, no_models: Path, tmp_path: Path
) -> None:
    for network, content in NETWORKS.items():
        put(tmp_path / "loose" / network, content)
    with pytest.raises(ModelError, match="cannot name a model"):
        import_models(tmp_path / "loose", name=name)


def test_an_unpacked_pack_is_held_against_the_digests_of_its_networks(
    no_models: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given" / "buffalo_l"
    for name, content in NETWORKS.items():
        put(given / name, content)
    with pytest.raises(ModelError, match=r"is not the det_10g\.onnx of buffalo_l"):
        import_models(tmp_path / "given")
    import_models(tmp_path / "given", catalogue=catalogue_with("buffalo_l", NETWORKS))
    assert locate_face_pack("buffalo_l") == cache_folder() / "face" / "buffalo_l"
    files = read_record()["models"]["buffalo_l"]["files"]
    assert {file["verified_against"] for file in files} == {"the catalogue's SHA-256"}
    (given / "w600k_r50.onnx").unlink()
    put(given / "other.onnx", "other")
    with pytest.raises(ModelError, match=r"buffalo_l lacks w600k_r50\.onnx"):
        import_models(tmp_path / "given")


def test_a_zip_of_a_pack_is_unpacked_and_an_import_replaces_what_was_there(
    no_models: Path, tmp_path: Path
) -> None:
    zipped = pack_zip(tmp_path / "given" / "buffalo_l.zip", prefix="buffalo_l/")
    catalogue = catalogue_with("buffalo_l", {"buffalo_l.zip": zipped.read_bytes()})
    put(cache_folder() / "face" / "buffalo_l" / "old.onnx", "old")
    import_models(tmp_path / "given", catalogue=catalogue)
    pack = locate_face_pack("buffalo_l")
    assert pack is not None
    assert {path.name: path.read_bytes() for path in pack.iterdir()} == NETWORKS


def test_a_folder_without_models_says_what_it_looked_for(
    no_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "import", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "antelopev2.zip" in said
    assert "yolox_l.onnx" in said
    assert run("models", "import", str(tmp_path / "absent")) == 2
    assert run("models", "import", str(tmp_path), "--name", "yolox_l") == 2
    assert "expected yolox_l.onnx" in capsys.readouterr().err


@pytest.mark.real_data
def test_real_networks_are_imported_and_another_export_is_told_apart(
    no_models: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = data_root / "models"
    assert run("models", "import", str(models), "--name", "tinypose", "--json") == 0
    assert json.loads(capsys.readouterr().out)["imported"][0]["name"] == "tinypose"
    assert run("models", "import", str(models / "face" / "mini"), "--name", "mini") == 0
    assert locate_face_pack("mini") == cache_folder() / "face" / "mini"
    assert run("models", "import", str(models / "pose")) == 2  # its yolox_nano is no release file
    said = capsys.readouterr().err
    assert str(known("yolox_nano").files[0].sha256) in said
    assert digest((models / "pose" / "yolox_nano.onnx").read_bytes()) in said


def _link(zipped: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("one.onnx")
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    zipped.writestr(member, "/etc/hostname")


def _twice(zipped: zipfile.ZipFile) -> None:
    zipped.writestr("one.onnx", "1")
    zipped.writestr("ONE/one.onnx", "2")


def _folders(zipped: zipfile.ZipFile) -> None:
    zipped.writestr("a/one.onnx", "1")
    zipped.writestr("b/two.onnx", "2")


def _encrypted(zipped: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("one.onnx")
    zipped.writestr(member, "1")
    zipped.infolist()[0].flag_bits |= 0x1  # goes into the directory when the zip is closed


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (lambda z: z.writestr("../one.onnx", "1"), "leads outside"),
        (lambda z: z.writestr("a/../../one.onnx", "1"), "leads outside"),
        (lambda z: z.writestr("/one.onnx", "1"), "leads outside"),
        (lambda z: z.writestr("..\\one.onnx", "1"), "leads outside"),
        (lambda z: z.writestr("C:/one.onnx", "1"), "leads outside"),
        (lambda z: z.writestr("../evil.sh", "1"), "leads outside"),
        (lambda z: z.writestr("a/b/one.onnx", "1"), "deeper than one folder"),
        (lambda z: z.writestr("o ne\n.onnx", "1"), "unusual name"),
        (lambda z: z.writestr("one.onnx", bytes(5_000_000)), "more than 20 times"),
        (lambda z: [z.writestr(f"{i}.onnx", "1") for i in range(100)], "100 members"),
        (lambda z: z.writestr("readme.txt", "1"), "holds no .onnx"),
        (_link, "is a link"),
        (_twice, "twice"),
        (_folders, "several folders"),
        (_encrypted, "is encrypted"),
    ],
)
def test_a_malicious_zip_is_refused_with_nothing_outside(
    fill: Callable[[zipfile.ZipFile], object], said: str, tmp_path: Path
) -> None:
    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        fill(zipped)
    with pytest.raises(ModelError, match=said):
        unpack_networks(archive, tmp_path / "inner" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) in (
        ["pack.zip"],
        ["inner", "pack.zip"],
    )


def test_a_zip_that_lies_about_a_size_or_is_cut_is_refused(tmp_path: Path) -> None:
    archive = pack_zip(tmp_path / "pack.zip")
    whole = archive.read_bytes()
    size, false = (len(NETWORKS["det_10g.onnx"]).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert size in whole
    for damaged in (
        whole.replace(size, false),
        whole[:-40],
        b"PK",
        whole.replace(b"PK\1", b"XX\1"),
    ):
        archive.write_bytes(damaged)
        with pytest.raises(ModelError):
            unpack_networks(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_any_damaged_byte_of_a_zip_is_a_reason_and_never_a_crash(
    method: int, tmp_path: Path
) -> None:
    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w", method) as zipped:
        for name, data in NETWORKS.items():
            zipped.writestr(name, data)
        zipped.writestr("größe.txt", "1")
    whole = archive.read_bytes()
    said = []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x84
        archive.write_bytes(damaged)
        for read in (unpacked_size, lambda path: unpack_networks(path, tmp_path / "out")):
            try:
                read(archive)
            except ModelError as error:
                said.append(str(error))
                assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    expected = "Error -3" if method == zipfile.ZIP_DEFLATED else "Corrupt input"
    assert any(expected in text for text in said)
    assert all(text.startswith("pack.zip ") for text in said)


def test_a_damaged_pack_is_named_with_the_mend(
    no_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack_zip(tmp_path / "given" / "my_pack.zip")
    damaged = bytearray(archive.read_bytes())
    damaged[30 + len("det_10g.onnx")] |= 0x06  # a kind of deflate block that does not exist
    archive.write_bytes(damaged)
    assert run("models", "import", str(tmp_path / "given"), "--name", "my_pack") == 2
    said = capsys.readouterr().err
    assert "my_pack.zip is damaged" in said
    assert "Error -3" in said
    assert "fetch it again" in said
    assert locate_face_pack("my_pack") is None


def zip_model(zipped: Path) -> KnownModel:
    url = "https://example.org/releases/buffalo_l.zip"
    file = RemoteFile(url=url, path="buffalo_l.zip", sha256=digest(zipped.read_bytes()))
    return replace(known("buffalo_l"), files=(file,), source=url)


@pytest.mark.parametrize("prefix", ["", "buffalo_l/"])
def test_a_pulled_pack_is_unpacked_where_it_is_looked_for(
    prefix: str, no_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = pack_zip(tmp_path / "buffalo_l.zip", prefix)
    server = FileServer()
    monkeypatch.setenv("ANIMATOR_MODELS_MIRROR", server.url)
    server.files["/example.org/releases/buffalo_l.zip"] = Served(zipped.read_bytes())
    with Downloader(waits=()) as downloader:
        plan = plan_pull([zip_model(zipped)], downloader)
        accept_licences(plan.licences)
        pull(plan, downloader, lambda *_: None)
    server.close()
    pack = locate_face_pack("buffalo_l")
    assert pack is not None
    assert pack == cache_folder() / "face" / "buffalo_l"
    assert {path.name: path.read_bytes() for path in pack.iterdir()} == NETWORKS
    assert list((cache_folder() / ".incoming").iterdir()) == []
    files = read_record()["models"]["buffalo_l"]["files"]
    assert {file["path"]: file["sha256"] for file in files} == {
        name: digest(data) for name, data in NETWORKS.items()
    }


@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("y", 0)])
def test_at_a_terminal_the_licence_is_asked_for(
    answer: str, code: int, no_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FileServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name in V1:
        path = f"/FrancisRing/StableAnimator/resolve/main/Animation/{name}"
        server.files[path] = Served(name.encode(), said_sha256=digest(name.encode()))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from infra.cli import main; main()"]
    command += ["models", "pull", "stableanimator-v1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    asking = subprocess.Popen(
        command, env=environment, stdin=theirs, stderr=subprocess.PIPE, text=True
    )
    os.write(ours, f"{answer}\n".encode())
    _, said = asking.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    server.close()
    assert asking.returncode == code, said
    assert "Do you accept these licences?" in said
    assert "not for commercial use" in said
    assert bool(server.gets()) == (answer == "y")
