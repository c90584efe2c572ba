"""Where a published file is fetched from: its own address or a mirror, and what may be contacted.

Without a mirror only public addresses are contacted, over https. Where the user names another
place (ANIMATOR_MODELS_MIRROR for everything, HF_ENDPOINT for the hub), that place may be anywhere;
a redirect from it may still not lead to anything less public or less safe than it is itself.
"""

import ipaddress
import os
import socket
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipelines.model_cache import SourceError
from pipelines.model_catalogue import HUB, ModelError, RemoteFile

MIRROR = "ANIMATOR_MODELS_MIRROR"
ENDPOINT = "HF_ENDPOINT"
TOKEN = "HF_TOKEN"


class UnreachableError(SourceError):
    """No connection could be made."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file's address and the rules for it.

    `token` goes to the address's own host alone, and never over plain http.
    """

    url: str
    hub: bool = False  # answers with the hub's headers
    page: str | None = None  # where a person accepts the licence
    token: str | None = None
    token_withheld: bool = False  # there is one, but the address is plain http
    https_only: bool = True
    named_by: str | None = None  # the variable with which the user chose the place

    @property
    def host(self) -> str:
        """The host, for messages."""
        return urlsplit(self.url).hostname or self.url


def source_of(file: RemoteFile) -> Source:
    """Where `file` is fetched from under the present environment.

    Raises:
        ModelError: a mirror is named that is no address.
    """
    hub = file.url.startswith(f"{HUB}/")
    page = file.url.split("/resolve/")[0] if hub else None
    token = (os.environ.get(TOKEN) or "").strip() or None
    if mirror := os.environ.get(MIRROR):
        # A copy of the web as folders, HOST/PATH: what `wget -x` makes and any file server serves.
        base = _base(mirror, MIRROR)
        url, token, named_by = f"{base}/{file.url.removeprefix('https://')}", None, MIRROR
    elif hub and (endpoint := os.environ.get(ENDPOINT)):
        base = _base(endpoint, ENDPOINT)
        url, named_by = base + file.url.removeprefix(HUB), ENDPOINT
    else:
        base, url, named_by = file.url, file.url, None
    token = token if hub else None
    safe = url.startswith("https://")
    return Source(
        url=url,
        hub=hub,
        page=page,
        token=token if safe else None,
        token_withheld=token is not None and not safe,
        https_only=named_by is None or base.startswith("https://"),
        named_by=named_by,
    )


def _base(text: str, variable: str) -> str:
    try:
        scheme, host, _ = origin(text.strip())
    except ValueError as error:
        raise ModelError(
            f"{variable} is {text!r} ({error}), expected an address such as https://example.org"
        ) from None
    if scheme not in ("http", "https") or not host:
        raise ModelError(f"{variable} is {text!r}, expected an address such as https://example.org")
    # The scheme in small letters, by which the rules go.
    return scheme + text.strip().rstrip("/")[len(scheme) :]


def origin(url: str) -> tuple[str, str | None, int | None]:
    """What two addresses share that belong to one server; ValueError for an impossible port."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def shown(url: str) -> str:
    """The address without what may be secret in it: credentials, signatures."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def check_address(url: str, source: Source) -> None:
    """Refuse an address that the rules of `source` do not allow.

    Raises:
        SourceError: another scheme than https, an impossible port, or a private address.
        UnreachableError: the host is not known.
    """
    try:
        scheme, host, port = origin(url)
    except ValueError as error:
        raise SourceError(
            f"{shown(source.url)} leads to an address that cannot be used ({error}): "
            f"try again later, or name another place with {MIRROR}"
        ) from None
    allowed = ("https",) if source.https_only else ("https", "http")
    if scheme not in allowed or not host:
        raise SourceError(
            f"{shown(source.url)} leads to {shown(url)}: expected {' or '.join(allowed)}"
        )
    if origin(url) == origin(source.url) and source.named_by:
        return  # the user's own choice
    if not is_public(host, port) and not _chosen_private(source):
        raise SourceError(
            f"{shown(url)} is an address of a private network: "
            f"where a mirror there is meant, name it with {MIRROR} or {ENDPOINT}"
        )


def check_peer(address: str, url: str, source: Source) -> None:
    """Refuse an answer that came from a private address although the name had a public one."""
    scheme, host, _ = origin(url)
    if origin(url) == origin(source.url) and source.named_by:
        return
    if host and _by_proxy(scheme, host):
        return
    if not _public(address) and not _chosen_private(source):
        raise SourceError(f"{shown(url)} answered from {address}, a private address: refused")


def _chosen_private(source: Source) -> bool:
    """Whether the user's own mirror lies in a private network, and so may what it leads to."""
    if not source.named_by:
        return False
    _, host, port = origin(source.url)
    return host is not None and not is_public(host, port)


def is_public(host: str, port: int | None) -> bool:
    """Whether every address of the host is a public one; a proxy's word is taken for names."""
    try:
        return _public(host)
    except ValueError:
        if _by_proxy("https", host):
            return host.lower() != "localhost"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreachableError(f"{host} could not be reached: {reason}") from None
    return all(_public(str(entry[4][0])) for entry in found)


def _public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return parsed.is_global and not parsed.is_multicast


def _by_proxy(scheme: str, host: str) -> bool:
    proxies = urllib.request.getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host)
