"""The one exception of the client, and how other libraries' errors become it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


class ClientError(RuntimeError):
    """A request that cannot be made or was refused; the message says why and what to do."""


def import_part(name: str, remedy: str) -> Any:
    """Imports a part of tritonclient, or says what to install."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: what tritonclient makes of a missing `cuda`
        raise ClientError(f"the Python module {name} cannot be imported ({one_line(error)}); run {remedy}") from None


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())[:500] or type(error).__name__


MALFORMED = ("key usage extension", "Key Identifier", "marked critical")
"""What OpenSSL says of a certificate that breaks RFC 5280; Python's default context checks that from 3.13 on."""


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turns what tritonclient and its transports raise into one sentence."""
    try:
        yield
    except ClientError:
        raise
    except Exception as error:  # tritonclient's own, and those of gevent, geventhttpclient, json
        status = error.status() if hasattr(error, "status") else "StatusCode.UNAVAILABLE"  # an InferenceServerException
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            remedy = (
                "use --ca or SSL_CERT_FILE to pass the certificate of the authority that signed the server's "
                "certificate"
            )
            if any(words in str(error) for words in MALFORMED):
                remedy = (
                    "create the certificate again without this fault, because Python 3.13 and later only accept "
                    "certificates that conform to RFC 5280"
                )
            raise ClientError(f"{url}: the server's certificate is not trusted ({one_line(error)}); {remedy}") from None
        if status in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
            remedy = "start tritonserver, check --url (HTTP uses port 8000, gRPC 8001), or use a longer --timeout"
            raise ClientError(f"{url}: no answer ({type(error).__name__}: {one_line(error)}); {remedy}") from None
        who = "the server refused the request" if status else "the request cannot be sent"
        raise ClientError(f"{url}: {who}: {one_line(error)}") from None
