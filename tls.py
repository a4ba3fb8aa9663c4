"""TLS contexts: of the port, and of the command line that calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # ssl takes 10 ms and 1.6 MiB: a gateway without TLS never imports it
    from ssl import SSLContext

CLOSE_SECONDS = 2.0  # for a peer to end its side; asyncio would wait 30 for one that says nothing


def server_context(cert: str, key: str) -> SSLContext:
    """Return what serves with the certificate and the key of these files. OSError: they cannot be read, or used."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        said = f"gateway.tls: {cert} and {key} cannot be used ({error.strerror})"
        raise OSError(f"{said}: name a certificate and its key, in PEM, that this user may read") from None
    return context


def listening(cert: str, key: str, seconds: float) -> dict[str, Any]:
    """Return what asyncio's create_server is given for it, the handshake within these seconds. OSError likewise."""
    times = {"ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": CLOSE_SECONDS}
    return {"ssl": server_context(cert, key), **times}


def client_context(cert: str | None) -> SSLContext:
    """Return what trusts the first certificate of this file and no other; None: the system's authorities. OSError."""
    import ssl

    if cert is None:
        return ssl.create_default_context()
    end = "-----END CERTIFICATE-----"
    with open(cert, encoding="latin-1") as file:
        own = file.read().partition(end)[0] + end
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # whoever has its key is ours, by whatever name we call
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not have signed itself
    context.load_verify_locations(cadata=own)
    return context
