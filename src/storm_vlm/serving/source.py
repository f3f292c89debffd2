"""From a `video_url` to a file: data URLs, addresses of the public internet, files of one folder.

It runs in a reader's process (`reader.py`), which ends it when it takes too long. No message holds a path.
"""

from __future__ import annotations

import base64
import socket
import ssl
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import IPv6Address, IPv6Network, ip_address
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from storm_vlm.errors import InputError
from storm_vlm.serving.config import ServeConfig

HOPS = 5  # redirects that are followed
# IPv6 that leads to an IPv4 address of its own choice: NAT64, Teredo, 6to4.
_TRANSLATED = ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")


class SourceError(InputError):
    """A `video_url` that is not followed, or leads nowhere."""


def video_file(url: str, config: ServeConfig, scratch: Path) -> Path:
    """The file, or `scratch`, where the bytes of another source are written. Raises SourceError."""
    try:
        scheme = urlsplit(url[:2048]).scheme
        if scheme == "data":
            scratch.write_bytes(_inline(url))
        elif scheme in ("http", "https"):
            _fetch(url, config, scratch)
        elif scheme in ("", "file"):
            return _local(url, config.root)
        else:
            raise SourceError("video_url must be a data: or http(s) address, or a file")
    except (HTTPException, OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError("video_url leads to nothing that can be read") from error
    return scratch


def _inline(url: str) -> bytes:
    head, _, payload = url.partition(",")
    if not head.endswith(";base64"):
        raise SourceError("a data: address must be base64: data:video/mp4;base64,…")
    return base64.b64decode(payload, validate=True)


def _local(url: str, root: Path | None) -> Path:
    if root is None:
        raise SourceError("this server reads no files; send a data: or http(s) address")
    parts = urlsplit(url)
    name = unquote(parts.path) if parts.scheme else url
    root = root.resolve()
    path = (root / name).resolve()  # behind links and ".."
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(root) or not path.is_file():
        raise SourceError("there is no such file in the server's folder")
    return path


def _fetch(url: str, config: ServeConfig, scratch: Path) -> None:
    for _ in range(HOPS):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise SourceError("video_url must be http:// or https://, without a user's name")
        connection = _Connection(parts, config)
        try:
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
            query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
            connection.request("GET", target + query, headers={"Accept-Encoding": "identity"})
            response = connection.getresponse()
            if 300 <= response.status < 400 and (place := response.headers.get("Location")):
                url = urljoin(url, place)
                continue
            if response.status != 200:
                raise SourceError(f"video_url answers with status {response.status}")
            return _save(response, config.max_bytes, scratch)
        finally:
            connection.close()
    raise SourceError(f"video_url redirects more than {HOPS} times")


def _save(response: HTTPResponse, most: int, scratch: Path) -> None:
    with scratch.open("wb") as file:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            if file.tell() > most:
                raise SourceError(f"the video has more than {most:,} bytes; send a smaller one")


class _Connection(HTTPConnection):
    """To the very address that was looked at: its name is not looked up again, so a second answer cannot differ."""

    def __init__(self, parts: SplitResult, config: ServeConfig) -> None:
        self.tls = parts.scheme == "https"
        port = parts.port or (443 if self.tls else 80)
        super().__init__(parts.hostname or "", port)  # no timeout: the process has one
        self.private = config.private

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(sockaddr[0]) for *_, sockaddr in found]
        if not self.private and not all(map(is_public, addresses)):
            raise SourceError("video_url is not on the public internet")
        self.sock = socket.create_connection((addresses[0], self.port), self.timeout)
        if self.tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)


def is_public(address: str) -> bool:
    """Whether anyone's machine reaches it: not this machine, its network, or a way round to them."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        if any(ip in IPv6Network(network) for network in _TRANSLATED):
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast
