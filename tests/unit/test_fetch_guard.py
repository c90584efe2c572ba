"""A guarded process reaches public addresses, allowed hosts and its own folder; nothing else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.curation.network_guard import AllowedHosts, is_public
from tests.unit.fetch_server import Answer, WebServer


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2001::1", "2001:db8::1", "3fff::1", "fec0::1", "5f00::1"),
        *("localhost", "2130706433", "0x7f000001", "", "127.1"),
    ],
)
def test_other_addresses_are_not(address: str) -> None:
    assert not is_public(address)


def test_allowed_hosts_are_names_addresses_networks_and_ports() -> None:
    hosts = AllowedHosts(["10.0.0.5", "10.1.0.0/16", "10.2.0.1:8080", "[fd00::1]:80", "Media.test"])
    assert hosts.allows("10.0.0.5", 1)
    assert hosts.allows("10.1.200.3", 443)
    assert hosts.allows("10.2.0.1", 8080)
    assert hosts.allows("fd00::1", 80)
    assert not hosts.allows("10.2.0.1", 80)
    assert not hosts.allows("fd00::1", 81)
    assert not hosts.allows("10.9.0.1", 80)
    assert not hosts.allows("media.test", 80)


def test_an_allowed_name_stands_for_the_addresses_it_has() -> None:
    hosts = AllowedHosts(["media.test:80"])
    hosts.note("other.test", 80, ["10.0.0.1"])
    hosts.note("MEDIA.test.", 80, ["10.0.0.2"])
    assert not hosts.allows("10.0.0.1", 80)
    assert hosts.allows("10.0.0.2", 80)
    assert not hosts.allows("10.0.0.2", 22)


@pytest.mark.parametrize("entry", ["", "http://host/", "user@host", "a b", "host:port", "[::1"])
def test_an_entry_that_is_no_host_is_refused_with_an_example(entry: str) -> None:
    with pytest.raises(ValueError, match=r"allow_hosts has .* such as media\.example"):
        AllowedHosts([entry])


_ACTIONS = """
import json, os, socket, sqlite3, subprocess, sys, urllib.request
from pipelines.curation import network_guard
folder, outside, allowed, private = sys.argv[1:]
network_guard.install(folder, [allowed])
read = lambda url: urllib.request.urlopen(url, timeout=5).read()
port = private.rpartition(":")[2]
actions = {
    "allowed host": lambda: read(f"http://{allowed}/video"),
    "own file": lambda: open(f"{folder}/own", "w").write("x"),
    "own rename": lambda: os.rename(f"{folder}/own", f"{folder}/mine"),
    "own file again": lambda: open(f"{folder}/mine").read(),
    "standard library": lambda: __import__("xml.dom.minidom").dom,
    "loopback": lambda: read(f"http://{private}/"),
    "redirect to loopback": lambda: read(f"http://{allowed}/away"),
    "redirect to a file": lambda: read(f"http://{allowed}/file"),
    "name": lambda: read(f"http://localhost:{port}/"),
    "hexadecimal": lambda: read(f"http://0x7f000001:{port}/"),
    "decimal": lambda: read(f"http://2130706433:{port}/"),
    "short": lambda: read(f"http://127.1:{port}/"),
    "unspecified": lambda: read(f"http://0.0.0.0:{port}/"),
    "IPv6": lambda: read(f"http://[::1]:{port}/"),
    "mapped": lambda: read(f"http://[::ffff:127.0.0.1]:{port}/"),
    "name at the socket": lambda: socket.socket().connect(("localhost", int(port))),
    "local socket": lambda: socket.socket(socket.AF_UNIX).connect(f"{folder}/socket"),
    "datagram": lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)),
    "server": lambda: socket.socket().bind(("127.0.0.1", 0)),
    "file address": lambda: read("file://" + outside),
    "ftp address": lambda: read(f"ftp://{private}/"),
    "program": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "spawned": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": lambda: os.fork(),
    "database": lambda: sqlite3.connect(outside),
    "reading": lambda: open(outside, "rb").read(),
    "reading low": lambda: os.open(outside, os.O_RDONLY),
    "through the folder": lambda: open(f"{folder}/../{os.path.basename(outside)}").read(),
    "through a link": lambda: open(f"{folder}/link").read(),
    "writing": lambda: open(outside, "ab"),
    "replacing": lambda: os.replace(f"{folder}/mine", outside),
    "taking": lambda: os.rename(outside, f"{folder}/taken"),
    "removing": lambda: os.remove(outside),
    "new folder": lambda: os.mkdir(outside + ".d"),
    "linking": lambda: os.symlink(outside, f"{folder}/link2"),
}
outcomes = {}
for name, action in actions.items():
    try:
        outcomes[name] = f"done: {str(action())[:20]}"
    except BaseException as error:
        outcomes[name] = type(error).__name__
print(json.dumps(outcomes))
"""
_DONE = ("allowed host", "own file", "own rename", "own file again", "standard library")
_ADDRESSES = (
    *("loopback", "redirect to loopback", "name", "hexadecimal", "decimal", "short"),
    *("unspecified", "IPv6", "mapped", "name at the socket", "local socket"),
    *("file address", "ftp address"),
)
_FILES = (
    *("datagram", "server", "program", "shell", "spawned", "fork", "database", "reading"),
    *("reading low", "through the folder", "through a link", "writing", "replacing", "taking"),
    *("removing", "new folder", "linking"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What became of each action in one guarded process."""
    base = tmp_path_factory.mktemp("guard")
    folder, outside = base / "folder", base / "private.mp4"
    folder.mkdir()
    outside.write_bytes(b"private")
    (folder / "link").symlink_to(outside)
    allowed, private = WebServer(), WebServer()
    private.serve("/", Answer(b"private"))
    allowed.serve("/video", Answer(b"video"))
    allowed.serve("/away", Answer(status=302, headers={"Location": private.url("/")}))
    allowed.serve("/file", Answer(status=302, headers={"Location": f"file://{outside}"}))
    arguments = [str(folder), str(outside), allowed.host, private.host]
    said = subprocess.run(
        [sys.executable, "-c", _ACTIONS, *arguments],
        capture_output=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert outside.read_bytes() == b"private"
    assert not private.requests
    yield json.loads(said.stdout)
    allowed.close()
    private.close()


@pytest.mark.parametrize("action", _DONE)
def test_a_guarded_process_does_its_work(outcomes: dict[str, str], action: str) -> None:
    assert outcomes[action].startswith("done")


@pytest.mark.parametrize("action", _ADDRESSES)
def test_a_guarded_process_is_refused_private_addresses(
    outcomes: dict[str, str], action: str
) -> None:
    assert outcomes[action] == "AddressRefusedError"


def test_a_guarded_process_is_not_led_to_files(outcomes: dict[str, str]) -> None:
    assert outcomes["redirect to a file"] == "HTTPError"  # urllib itself


@pytest.mark.parametrize("action", _FILES)
def test_a_guarded_process_is_refused_files_and_programs(
    outcomes: dict[str, str], action: str
) -> None:
    assert outcomes[action] == "NotAllowedError"


def test_every_action_is_judged(outcomes: dict[str, str]) -> None:
    assert set(outcomes) == {*_DONE, *_ADDRESSES, *_FILES, "redirect to a file"}
