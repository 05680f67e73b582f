"""Certificates for 127.0.0.1 of an authority that nobody knows, and a relay that speaks TLS with it."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_certificates(folder: Path) -> Any:
    """Files of an authority's certificate, of a server's that it signed, and of that one's private key."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    files = folder / "ca.pem", folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(_signed("authority", authority, authority, x509.BasicConstraints(ca=True, path_length=None)))
    files[1].write_bytes(_signed("server", server, authority, address))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files[2].write_bytes(server.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return files


def _signed(name: str, key: Any, authority: Any, extension: Any) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")]),
        subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(hours=1),
        not_valid_after=now + datetime.timedelta(hours=1),
    )
    builder = builder.add_extension(extension, critical=True)
    return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@contextmanager
def tls_relay(files: Any, port: int) -> Iterator[Any]:
    """Yields a port that speaks TLS and passes what it hears to `port`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files[1:])
    open_sockets: list[Any] = []

    def pump(source: Any, target: Any) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def greet(client: Any) -> None:
        with suppress(OSError):
            near, far = context.wrap_socket(client, server_side=True), socket.create_connection(("127.0.0.1", port))
            open_sockets.extend((near, far))
            threading.Thread(target=pump, args=(far, near), daemon=True).start()
            pump(near, far)

    def listen() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=greet, args=(client,), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for stream in open_sockets:
            stream.close()
