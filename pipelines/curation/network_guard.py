"""What a process that reads addresses from strangers may touch: public hosts and its own folder.

`install` closes a whole process for good, by an audit hook that sees what Python itself does:
every connection as it is made, so after redirects and name lookups, every file as it is opened,
every program that would be started. It guards against hostile addresses and pages, not against
hostile Python code, and it does not see libraries with a network stack of their own: the process
must not load any.
"""

import ipaddress
import os
import socket
import ssl
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Special-purpose blocks (IANA registries) that `ipaddress.is_global` calls global in some
# versions, and public addresses under which a cloud answers its own machines.
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments; one cloud's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # one cloud's host services
        "2001::/23",  # Teredo, ORCHID and other assignments
        "2002::/16",  # 6to4: any IPv4 address inside
        "3fff::/20",  # documentation
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Networks without IPv4 reach all of it through this prefix, so it counts as what it leads to.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CODE = (".py", ".pyc", ".so", ".pyd")
_NEVER = (
    "subprocess.Popen os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.startfile "
    "pty.spawn sqlite3.connect ctypes.dlopen socket.bind socket.sendto socket.sendmsg "
    "os.symlink os.link"
).split()
_SCHEMES = ("http", "https", "data")


class AddressRefusedError(BaseException):
    """A connection to where the process may not go.

    Not an Exception, so that no library takes it for an ordinary failure and tries again.
    """


class NotAllowedError(PermissionError):
    """A file or program that the process may not touch."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's; False for what is no IP address.

    Private, loopback, link-local, shared (carrier-grade NAT), multicast, reserved and
    documentation addresses are not, nor IPv6 forms that hide an IPv4 address, but for NAT64 in
    front of a public one.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed in _NAT64:
            return is_public(str(ipaddress.IPv4Address(parsed.packed[-4:])))
        if parsed not in _GLOBAL_UNICAST:
            return False
    special = any(parsed in block for block in _SPECIAL if block.version == parsed.version)
    return parsed.is_global and not parsed.is_multicast and not special


@dataclass
class AllowedHosts:
    """Hosts that are allowed whatever their address is: `HOST`, `ADDRESS`, `NETWORK/BITS`, each
    also as `HOST:PORT` (`[ADDRESS]:PORT` for IPv6) for one port alone.

    A named host's addresses become known when its name is looked up (`note`).

    Raises:
        ValueError: an entry is none of these.
    """

    entries: Iterable[str] = ()
    names: set[tuple[str, int | None]] = field(default_factory=set, init=False)
    networks: list[tuple[Any, int | None]] = field(default_factory=list, init=False)
    found: set[tuple[Address, int | None]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        for entry in self.entries:
            host, port = _host_and_port(entry.strip())
            try:
                self.networks.append((ipaddress.ip_network(host, strict=False), port))
            except ValueError:
                self.names.add((host.lower().rstrip("."), port))

    def note(self, host: str, port: int | None, addresses: Iterable[str]) -> None:
        """`host` was looked up and has these addresses."""
        name = host.lower().rstrip(".")
        for allowed in {None, port}:
            if (name, allowed) in self.names:
                self.found |= {(_parsed(address), allowed) for address in addresses}

    def allows(self, address: str, port: int) -> bool:
        """Whether an IP address and port belong to an allowed host."""
        try:
            parsed = _parsed(address)
        except ValueError:
            return False
        if {(parsed, None), (parsed, port)} & self.found:
            return True
        return any(
            parsed.version == network.version and parsed in network and only in (None, port)
            for network, only in self.networks
        )


def install(folder: str, allow_hosts: Iterable[str] = ()) -> None:
    """Close this process, for good: public addresses and `allow_hosts` only, files in `folder`.

    Read are also Python's own code and the certificates. A refused connection raises
    AddressRefusedError, a refused file or program NotAllowedError.
    """
    hosts = AllowedHosts(allow_hosts)
    looked_up: dict[str, str] = {}
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        found = lookup(host, port, *args, **options)
        if host is not None:
            name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
            addresses = [str(entry[4][0]) for entry in found]
            hosts.note(name, int(found[0][4][1]) if found else None, addresses)
            looked_up.update(dict.fromkeys(addresses, name))
        return found

    def check_connection(_: socket.socket, address: Any) -> None:
        if not isinstance(address, tuple):
            raise AddressRefusedError("a local socket")
        host, port = str(address[0]), int(address[1])
        # A name here would be looked up behind our back.
        if is_public(host) or hosts.allows(host, port):
            return
        name = looked_up.get(host, host)
        raise AddressRefusedError(host if name == host else f"{name} ({host})")

    def check_request(url: Any, *_: Any) -> None:
        scheme = urlsplit(str(url)).scheme.lower()
        if scheme not in _SCHEMES:
            raise AddressRefusedError(f"a {scheme}: address")

    rules: dict[str, Callable[..., None]] = {
        **dict.fromkeys(_NEVER, _refuse),
        "socket.connect": check_connection,
        "urllib.Request": check_request,
        **_file_rules(folder),
    }
    socket.getaddrinfo = getaddrinfo

    def hook(event: str, args: tuple[Any, ...]) -> None:
        rule = rules.get(event)
        if rule is not None:
            rule(*args)

    sys.addaudithook(hook)


def _file_rules(folder: str) -> dict[str, Callable[..., None]]:
    own = (os.path.realpath(folder),)
    readable = (*own, *_library_folders())
    # Where this package lies need not be on the path: an editable install finds it by a hook.
    here = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
    code = (here, *(os.path.realpath(entry) for entry in sys.path if entry))
    single = {os.devnull, "/dev/urandom", *code, *_certificate_files()}

    def check_open(path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):  # opened already, and seen then
            return
        real = os.path.realpath(os.fsdecode(path))
        writing = bool((flags or 0) & _WRITING) or bool(set(mode or "") & set("wax+"))
        if _inside(real, own) or real == os.devnull:
            return
        if not writing and (real in single or _inside(real, readable)):
            return
        if not writing and real.endswith(_CODE) and _inside(real, code):
            return
        raise NotAllowedError(f"{'writing' if writing else 'reading'} outside the download folder")

    def check_paths(*args: Any) -> None:
        for path in args:
            if isinstance(path, str | bytes | os.PathLike):
                if not _inside(os.path.realpath(os.fsdecode(path)), own):
                    raise NotAllowedError("changing files outside the download folder")
            elif isinstance(path, int) and path != -1:
                raise NotAllowedError("changing files by a folder's number")

    def check_first(path: Any, *_: Any) -> None:
        check_paths(path)

    changes = dict.fromkeys(("os.rename", "os.remove", "os.rmdir"), check_paths)
    first = dict.fromkeys(("os.mkdir", "os.chmod", "os.chown", "os.truncate"), check_first)
    return {"open": check_open, **changes, **first}


def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib")
    return tuple({os.path.realpath(sysconfig.get_path(name)) for name in names})


def _certificate_files() -> set[str]:
    paths = ssl.get_default_verify_paths()
    files = {paths.cafile, paths.openssl_cafile, os.environ.get("SSL_CERT_FILE")}
    try:
        import certifi

        files.add(certifi.where())
    except ImportError:
        pass
    return {os.path.realpath(file) for file in files if file}


def _inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _refuse(*_: Any) -> None:
    raise NotAllowedError("no other programs, servers or libraries here")


def _parsed(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])


def _host_and_port(entry: str) -> tuple[str, int | None]:
    if entry.startswith("[") or entry.count(":") == 1:
        try:
            parts = urlsplit(f"//{entry}")
            if parts.hostname and not parts.path and not parts.username:
                return parts.hostname, parts.port
        except ValueError:
            pass
    elif entry and not any(sign in entry for sign in "@?# ") and "//" not in entry:
        return entry, None
    raise ValueError(
        f"download.allow_hosts has {entry!r}, expected a host, an address or a network, "
        "such as media.example, media.example:8080, 10.0.0.5 or 10.0.0.0/8."
    )
