"""Where the server is and who asks: the URL, credentials, headers, and the certificates that are trusted."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ClientError

PORTS = {"http": 8000, "grpc": 8001}
"""Triton's own ports, for a URL without a scheme; http:// and https:// have 80 and 443."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A server's address, without the credentials that its URL may contain.

    Attributes:
        shown: as messages show it.
        host: `host:port`, and for HTTP the path behind it, as tritonclient takes it.
        tls: whether it is https.
        headers: what every request carries; never shown.
    """

    shown: str
    host: str
    tls: bool
    headers: Mapping[str, str] = dataclasses.field(repr=False)


def read_address(
    url: str,
    protocol: str,
    user: str = "",
    password: str = "",
    token: str = "",
    headers: Mapping[str, str] | None = None,
) -> Address:
    """Reads a URL and what authenticates the client.

    Args:
        url: `[http[s]://][USER:PASSWORD@]HOST[:PORT][/PATH]`.
        protocol: `http` or `grpc`.
        user, password: for basic authentication; those in the URL are used if there are none here.
        token: sent as `Authorization: Bearer TOKEN`.
        headers: further headers of every request.

    Raises:
        ClientError: none of them is shown in it.
    """
    expected = f"expected [https://]HOST:PORT, such as localhost:{PORTS[protocol]}"
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"//{url}")
        port, name = parts.port, parts.hostname or ""
    except ValueError:
        raise ClientError(f"the URL is invalid; {expected}") from None
    if parts.scheme not in ("", "http", "https") or not name:
        raise ClientError(f"the URL has no host, or a scheme other than http and https; {expected}")
    if parts.query or parts.fragment or (protocol == "grpc" and parts.path.strip("/")):
        raise ClientError(f"the URL contains more than a host and a port; {expected}")
    host = f"[{name}]" if ":" in name else name
    host += f":{port or {'http': 80, 'https': 443}.get(parts.scheme, PORTS[protocol])}"
    host += parts.path.rstrip("/")
    user, password = (
        user or urllib.parse.unquote(parts.username or ""),
        password or urllib.parse.unquote(parts.password or ""),
    )
    if user and token:
        raise ClientError("both a user name and a token were given; give only the user name or only the token")
    sent = {str(key).lower(): str(value) for key, value in (headers or {}).items()}
    if user:
        sent["authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    if token:
        sent["authorization"] = f"Bearer {token}"
    for key, value in sent.items():
        if not re.fullmatch(r"[a-z0-9!#$%&'*+.^_`|~-]+", key) or not re.fullmatch(r"[\x20-\x7e]*", value):
            raise ClientError(
                f"the name or the value of the header {key!r} contains characters that are not allowed in a "
                "header; use printable ASCII characters only"
            )
    tls = parts.scheme == "https"
    return Address(("https://" if tls else "") + host, host, tls, sent)


def trusted(ca: Path | str | None) -> str | None:
    """The file of trusted certificates: the given one, else that of SSL_CERT_FILE, else None for the usual ones.

    Raises:
        ClientError: the file cannot be read.
    """
    where = str(ca) if ca else os.environ.get("SSL_CERT_FILE") or None
    if where is not None:
        try:
            Path(where).read_bytes()
        except OSError as error:
            raise ClientError(
                f"{where}: the file of trusted certificates cannot be read ({error.strerror}); choose another "
                "file with --ca"
            ) from None
    return where


def connect(library: Any, protocol: str, address: Address, ca: Path | str | None, timeout_s: float) -> Any:
    """tritonclient's client of the server, which sends the headers with every request.

    Raises:
        ClientError: the trusted certificates cannot be read.
    """
    certificates = trusted(ca) if address.tls else None
    options: dict[str, Any] = {"ssl": address.tls}
    if protocol == "http":
        options |= {"connection_timeout": timeout_s, "network_timeout": timeout_s}
        options |= {"ssl_options": {"ca_certs": certificates}} if certificates else {}
    elif certificates:
        options["root_certificates"] = certificates
    client = library.InferenceServerClient(address.host, **options)
    if address.headers:

        class Headers(library.InferenceServerClientPlugin):
            def __call__(self, request: Any) -> None:
                request.headers = {**(request.headers or {}), **address.headers}

        client.register_plugin(Headers())
    return client
