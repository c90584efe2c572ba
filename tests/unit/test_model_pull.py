"""Pulling models: resumed, verified, accepted first, and only from where it may come."""

import base64
import hashlib
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.cli import main
from pipelines.model_cache import SourceError, accept_licences, cache_lock, read_record
from pipelines.model_catalogue import APACHE, KnownModel, ModelError, RemoteFile, known
from pipelines.model_download import Downloader
from pipelines.model_pull import plan_pull, pull, with_needs
from pipelines.models import cache_folder, find, locate_folder
from tests.unit.file_server import FileServer, Served

HUB_PATH = "/owner/thing/resolve/main"
V1_PATH = "/FrancisRing/StableAnimator/resolve/main/Animation"
V1_FILES = ("pose_net.pth", "face_encoder.pth", "unet.pth")


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def second_server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def hub(server: FileServer, no_models: Path, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """The local server in place of the hub, and an empty cache."""
    for name in ("HF_TOKEN", "ANIMATOR_MODELS_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


@pytest.fixture
def downloader() -> Iterator[Downloader]:
    with Downloader(waits=(0.0, 0.0), timeout=5.0) as downloader:
        yield downloader


def content(size: int = 300_000, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hub_model(sha256: str | None = None, size: int | None = None) -> KnownModel:
    """A model of one file on the hub."""
    url = f"https://huggingface.co{HUB_PATH}/net.onnx"
    return KnownModel(
        name="thing",
        kind="pose",
        purpose="a test",
        places=("pose/net.onnx", "net.onnx"),
        source=url,
        terms=(APACHE,),
        files=(RemoteFile(url=url, path="net.onnx", size=size, sha256=sha256),),
    )


def pull_now(model: KnownModel, downloader: Downloader) -> Path:
    plan = plan_pull([model], downloader)
    accept_licences(plan.licences)
    pull(plan, downloader, lambda *_: None)
    return cache_folder() / model.places[0]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code if isinstance(ended.value.code, int) else 0


def serve_v1(server: FileServer, size: int = 200_000, pause: float = 0.0) -> dict[str, bytes]:
    files = {name: content(size, seed) for seed, name in enumerate(V1_FILES)}
    for name, data in files.items():
        server.files[f"{V1_PATH}/{name}"] = Served(
            data, said_sha256=digest(data), etag=f'"{name}"', pause=pause
        )
    return files


def test_a_broken_transfer_is_continued_where_it_broke_off(
    hub: FileServer, downloader: Downloader
) -> None:
    data = content()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, etag='"v1"', cut=[100_000, 50_000])
    path = pull_now(hub_model(digest(data), len(data)), downloader)
    assert path.read_bytes() == data
    asked = [headers.get("range") for _, headers in hub.gets()]
    assert asked == [None, "bytes=100000-", "bytes=150000-"]
    assert [headers.get("if-range") for _, headers in hub.gets()][1:] == ['"v1"'] * 2
    assert not list(cache_folder().rglob("*.part*"))


def test_a_transfer_that_goes_nowhere_ends_and_keeps_its_part(
    hub: FileServer, downloader: Downloader
) -> None:
    data = content()
    served = Served(data, etag='"v1"', cut=[100_000, 0, 0])
    hub.files[f"{HUB_PATH}/net.onnx"] = served
    model = hub_model(digest(data), len(data))
    with pytest.raises(SourceError, match="the same command continues there"):
        pull_now(model, downloader)
    assert not (cache_folder() / "pose").exists()
    hub.requests.clear()
    assert pull_now(model, downloader).read_bytes() == data
    assert [headers.get("range") for _, headers in hub.gets()] == ["bytes=100000-"]


def test_a_part_of_another_version_is_not_continued(
    server: FileServer,
    downloader: Downloader,
    no_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANIMATOR_MODELS_MIRROR", server.url)
    url = "https://example.org/net.onnx"
    model = KnownModel(
        name="thing",
        kind="pose",
        purpose="a test",
        places=("pose/net.onnx", "net.onnx"),
        source=url,
        terms=(APACHE,),
        files=(RemoteFile(url=url, path="net.onnx"),),
    )
    old, new = content(seed=1), content(seed=2)
    server.files["/example.org/net.onnx"] = Served(old, etag='"old"', cut=[100_000, 0, 0])
    with pytest.raises(SourceError, match="broke off"):
        pull_now(model, downloader)
    server.files["/example.org/net.onnx"] = Served(new, etag='"new"')
    assert pull_now(model, downloader).read_bytes() == new
    files = read_record()["models"]["thing"]["files"]
    assert files[0]["sha256"] == digest(new)
    assert "size alone" in files[0]["verified_against"]


@pytest.mark.parametrize("known_by", ["catalogue", "source"])
def test_wrong_bytes_name_both_digests_and_leave_nothing(
    known_by: str, hub: FileServer, downloader: Downloader
) -> None:
    right, wrong = content(seed=1), content(seed=2)
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(
        wrong, said_sha256=digest(right) if known_by == "source" else None
    )
    model = hub_model(digest(right) if known_by == "catalogue" else None)
    with pytest.raises(SourceError, match=digest(right)) as caught:
        pull_now(model, downloader)
    assert digest(wrong) in str(caught.value)
    assert not [path for path in cache_folder().rglob("net*") if path.is_file()]


def test_a_source_that_publishes_another_digest_is_refused_before_the_transfer(
    hub: FileServer, downloader: Downloader
) -> None:
    data = content()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, said_sha256=digest(data))
    with pytest.raises(SourceError, match="it is another file"):
        plan_pull([hub_model("0" * 64)], downloader)
    assert not hub.gets()


def test_small_files_of_the_hub_are_held_against_its_git_id(
    hub: FileServer, downloader: Downloader
) -> None:
    data = b'{"a": 1}\n'
    made = subprocess.run(
        ["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True
    )
    git_id = made.stdout.decode().strip()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, etag=f'"{git_id}"')
    assert pull_now(hub_model(), downloader).read_bytes() == data
    assert "git id" in read_record()["models"]["thing"]["files"][0]["verified_against"]
    (cache_folder() / "pose" / "net.onnx").unlink()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(b'{"a": 2}\n', etag=f'"{git_id}"')
    with pytest.raises(SourceError, match=git_id):
        pull_now(hub_model(), downloader)


def test_more_bytes_than_declared_are_refused(hub: FileServer, downloader: Downloader) -> None:
    data = content()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, chunked=True, said_size=1000)
    with pytest.raises(SourceError, match="sends more than the 1000 bytes"):
        pull_now(hub_model(), downloader)
    parts = list(cache_folder().rglob("*.part"))
    assert all(part.stat().st_size <= 1000 for part in parts)


def test_a_full_disk_is_noticed_before_the_transfer(
    hub: FileServer, downloader: Downloader
) -> None:
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(content(), said_size=10**18)
    with pytest.raises(SourceError, match="make room"):
        pull_now(hub_model(), downloader)
    assert not hub.gets()


def test_nothing_is_fetched_before_the_licence_is_accepted_and_once_is_enough(
    hub: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    files = serve_v1(hub)
    assert run("models", "pull", "stableanimator-v1") == 2
    said = capsys.readouterr().err
    assert "Stability AI Community Licence" in said
    assert "--accept-licence" in said
    assert "Animation/unet.pth" in said
    assert not hub.gets()
    assert run("models", "pull", "stableanimator-v1", "--accept-licence", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    folder = Path(result["path"])
    assert locate_folder("stableanimator-v1") == folder
    assert {p.name: p.read_bytes() for p in folder.rglob("*.pth")} == files
    accepted = read_record()["licences"]
    assert len(accepted) == 2
    assert all(each["accepted_at"] for each in accepted.values())
    (folder / "Animation" / "unet.pth").write_bytes(b"damaged")
    hub.requests.clear()
    assert run("models", "pull", "stableanimator-v1") == 0
    assert hub.gets()
    assert (folder / "Animation" / "unet.pth").read_bytes() == files["unet.pth"]


def test_what_is_here_is_not_fetched_again(hub: FileServer, no_models: Path) -> None:
    for name in V1_FILES:
        path = no_models / "StableAnimator" / "Animation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    assert run("models", "pull", "stableanimator-v1") == 0
    assert not hub.requests


def test_the_record_says_what_was_pulled_from_where(
    hub: FileServer, downloader: Downloader, capsys: pytest.CaptureFixture[str]
) -> None:
    files = serve_v1(hub)
    pull_now(known("stableanimator-v1"), downloader)
    entry = read_record()["models"]["stableanimator-v1"]
    assert entry["source"] == "https://huggingface.co/FrancisRing/StableAnimator"
    assert entry["revision"] == "0123456789abcdef"
    assert entry["pulled_at"]
    assert entry["non_commercial"] is True
    assert {f["path"]: f["sha256"] for f in entry["files"]} == {
        f"Animation/{name}": digest(data) for name, data in files.items()
    }
    assert entry["files"][0]["fetched_from"] == f"{hub.url}{V1_PATH}/pose_net.pth"
    capsys.readouterr()
    assert run("models", "list", "--json") == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert listed["stableanimator-v1"]["size"] == sum(map(len, files.values()))
    assert listed["stableanimator-v1"]["path"]
    assert listed["svd-xt"]["path"] is None
    assert run("models", "list") == 0
    assert "animator models pull svd-xt" in capsys.readouterr().out


def test_a_killed_pull_is_completed_by_the_same_command(hub: FileServer) -> None:
    files = serve_v1(hub, size=4_000_000, pause=0.01)
    command = [sys.executable, "-c", "from infra.cli import main; main()"]
    command += ["models", "pull", "stableanimator-v1", "--accept-licence"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    part = cache_folder() / ".incoming/stableanimator-v1/files/Animation/face_encoder.pth.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1_000_000):
        assert first.poll() is None, "the pull ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = part.stat().st_size
    assert 1_000_000 < there < 4_000_000
    assert find("stableanimator-v1") is None
    hub.requests.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = locate_folder("stableanimator-v1")
    assert folder is not None
    assert {p.name: digest(p.read_bytes()) for p in folder.rglob("*.pth")} == {
        name: digest(data) for name, data in files.items()
    }
    asked = {path.rsplit("/", 1)[1]: headers.get("range") for path, headers in hub.gets()}
    assert asked == {"face_encoder.pth": f"bytes={there}-", "unet.pth": None}
    assert not (cache_folder() / ".incoming" / "stableanimator-v1").exists()


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(
    tmp_path: Path, no_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = _certificate(tmp_path, monkeypatch)
    hub, storage = FileServer(context), FileServer(context)
    monkeypatch.delenv("ANIMATOR_MODELS_MIRROR", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    data = content()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, redirect=f"{storage.url}/signed?key=1")
    storage.files["/signed?key=1"] = Served(data)
    with Downloader(waits=()) as downloader:
        assert pull_now(hub_model(), downloader).read_bytes() == data
    hub.close()
    storage.close()
    assert {h.get("authorization") for _, _, h in hub.requests} == {"Bearer hf_secret"}
    assert storage.gets()
    assert all("authorization" not in headers for _, _, headers in storage.requests)
    assert "hf_secret" not in (cache_folder() / "models.json").read_text()


def test_the_token_is_never_sent_over_http(
    hub: FileServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http://", "HTTP://"))
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(status=401)
    with pytest.raises(SourceError, match="never sent over http: name an https address"):
        plan_pull([hub_model()], downloader)
    data = content()
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data)
    assert pull_now(hub_model(), downloader).read_bytes() == data
    assert hub.gets()
    assert all("authorization" not in headers for _, _, headers in hub.requests)


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_an_impossible_port_is_named_with_who_gave_it(
    port: str, hub: FileServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(redirect=f"https://example.org:{port}/net.onnx")
    with pytest.raises(SourceError, match=rf"{HUB_PATH}/net\.onnx leads to "):
        plan_pull([hub_model()], downloader)
    monkeypatch.setenv("HF_ENDPOINT", f"https://example.org:{port}")
    with pytest.raises(ModelError, match=r"HF_ENDPOINT is .*expected an address such as"):
        plan_pull([hub_model()], downloader)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_model_says_what_to_do(
    token: str | None,
    hub: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in V1_FILES:
        hub.files[f"{V1_PATH}/{name}"] = Served(status=401)
    assert run("models", "pull", "stableanimator-v1", "--accept-licence") == 1
    said = capsys.readouterr().err
    assert "https://huggingface.co/FrancisRing/StableAnimator" in said
    assert "HF_TOKEN" in said
    assert "hf_wrong" not in said


def test_without_a_network_the_way_round_is_said(
    no_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = FileServer()
    closed.close()
    monkeypatch.setenv("ANIMATOR_MODELS_MIRROR", closed.url)
    assert run("models", "pull", "dwpose") == 1
    said = capsys.readouterr().err
    assert "127.0.0.1 could not be reached" in said
    assert "animator models import DIR" in said
    for file in ("yolox_l.onnx", "dw-ll_ucoco_384.onnx"):
        assert f"{file}  https://huggingface.co/yzd-v/DWPose/resolve/main/{file}" in said


def test_a_mirror_serves_hosts_as_folders(
    server: FileServer,
    downloader: Downloader,
    no_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = server.url.replace("http://", "http://me:password@")
    monkeypatch.setenv("ANIMATOR_MODELS_MIRROR", f"{address}/models/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    data = content()
    served = Served(data, cut=[1000, 0, 0])
    server.files[f"/models/huggingface.co{HUB_PATH}/net.onnx"] = served
    model = hub_model(digest(data), len(data))
    with pytest.raises(SourceError, match="broke off") as caught:
        pull_now(model, downloader)
    kept = "".join(path.read_text() for path in cache_folder().rglob("*.json"))
    assert "net.onnx" in kept
    assert pull_now(model, downloader).read_bytes() == data
    # The user's own words for the mirror go to it, and the hub's token does not.
    basic = f"Basic {base64.b64encode(b'me:password').decode()}"
    assert {headers.get("authorization") for _, _, headers in server.requests} == {basic}
    kept += (cache_folder() / "models.json").read_text()
    assert "password" not in kept + str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/net.onnx", "expected https"),
        ("file:///etc/hostname", "expected https"),
        ("https://127.0.0.1:1/net.onnx", "private network"),
        ("https://localhost:1/net.onnx", "private network"),
        ("https://[::ffff:10.0.0.1]/net.onnx", "private network"),
        ("https://169.254.169.254/latest/meta-data", "private network"),
    ],
)
def test_without_a_mirror_only_public_addresses_over_https_are_contacted(
    url: str, said: str, no_models: Path, downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_ENDPOINT", "ANIMATOR_MODELS_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    file = RemoteFile(url=url, path="net.onnx")
    model = KnownModel(
        name="thing",
        kind="pose",
        purpose="a test",
        places=("pose/net.onnx", "net.onnx"),
        source=url,
        terms=(APACHE,),
        files=(file,),
    )
    with pytest.raises(SourceError, match=said):
        plan_pull([model], downloader)


def test_a_safe_mirror_may_not_lead_to_an_unsafe_address(
    tmp_path: Path,
    server: FileServer,
    no_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    safe = FileServer(_certificate(tmp_path, monkeypatch))
    monkeypatch.setenv("HF_ENDPOINT", safe.url)
    data = content()
    server.files["/net.onnx"] = Served(data)
    safe.files[f"{HUB_PATH}/net.onnx"] = Served(redirect=f"{server.url}/net.onnx")
    with Downloader(waits=()) as downloader:
        with pytest.raises(SourceError, match="expected https"):
            plan_pull([hub_model()], downloader)
        safe.files[f"{HUB_PATH}/net.onnx"] = Served(data)
        assert pull_now(hub_model(), downloader).read_bytes() == data
    safe.close()
    assert not server.requests


def test_a_mirror_that_is_no_address_is_wrong_use(
    no_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANIMATOR_MODELS_MIRROR", "mirror.example.org")
    assert run("models", "pull", "buffalo_sc") == 2
    assert "expected an address such as https://" in capsys.readouterr().err


def test_a_damaged_record_is_named(hub: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "models.json").write_text("{")
    assert run("models", "pull", "stableanimator-v1") == 2
    assert "models.json cannot be read" in capsys.readouterr().err


def test_a_pull_goes_on_at_another_mirror(
    hub: FileServer,
    second_server: FileServer,
    downloader: Downloader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = content()
    model = hub_model(digest(data), len(data))
    hub.files[f"{HUB_PATH}/net.onnx"] = Served(data, etag='"a"', cut=[100_000, 0, 0])
    with pytest.raises(SourceError, match="broke off"):
        pull_now(model, downloader)
    monkeypatch.setenv("HF_ENDPOINT", second_server.url)
    second_server.files[f"{HUB_PATH}/net.onnx"] = Served(data, etag='"b"')
    assert pull_now(model, downloader).read_bytes() == data
    assert [headers.get("range") for _, headers in second_server.gets()] == ["bytes=100000-"]


def test_endless_redirects_end(hub: FileServer, downloader: Downloader) -> None:
    path = f"{HUB_PATH}/net.onnx"
    hub.files[path] = Served(redirect=path)
    with pytest.raises(SourceError, match="redirects more than"):
        plan_pull([hub_model()], downloader)


def test_two_pulls_do_not_work_in_one_cache(hub: FileServer) -> None:
    serve_v1(hub)
    with cache_lock():
        assert run("models", "pull", "stableanimator-v1", "--accept-licence") == 1
    assert not hub.gets()


def test_a_pose_network_is_pulled_with_its_detector() -> None:
    assert [model.name for model in with_needs(["dwpose", "yolox_l"])] == ["yolox_l", "dwpose"]


def test_what_has_no_file_or_no_entry_is_wrong_use(
    no_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "pull", "tinypose") == 2
    assert "animator models import DIR" in capsys.readouterr().err
    assert run("models", "pull", "nothing") == 2
    with pytest.raises(ModelError, match="expected one of"):
        with_needs(["nothing"])


def _certificate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A certificate for localhost that this process trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "localhost.pem", folder / "localhost.key"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context
