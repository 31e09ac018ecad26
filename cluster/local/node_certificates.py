"""Certificates for TLS between the nodes of a local cluster."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID = timedelta(days=365)
# Certificates are valid from this long ago, for nodes whose clocks are a little behind.
SLACK = timedelta(hours=1)


def issue_certificates(folder: Path, addresses: Mapping[str, str]) -> None:
    """Write `ca.pem`, and `NAME/cert.pem` and `NAME/key.pem` for each node, to a new folder.

    The authority is new and its key is not stored, so that no other node can join later.
    addresses: the nodes' IP addresses, by name.
    """
    folder.mkdir(mode=0o700)
    now = datetime.now(UTC)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = _name("Halyard cluster")
    authority = (
        _builder(now, authority_name, authority_name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    for node, address in addresses.items():
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            *(x509.DNSName(each) for each in ("localhost", socket.gethostname())),
            *(x509.IPAddress(ipaddress.ip_address(each)) for each in {address, "127.0.0.1"}),
        ]
        cert = (
            _builder(now, _name(node), authority_name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        place = folder / node
        place.mkdir()
        (place / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        with open(
            place / "key.pem", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)
        ) as file:
            file.write(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )


def tls_environment(folder: Path, node: str) -> dict[str, str]:
    """Return the environment variables with which Ray uses a node's certificate."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / node / "cert.pem"),
        "RAY_TLS_SERVER_KEY": str(folder / node / "key.pem"),
        "RAY_TLS_CA_CERT": str(folder / "ca.pem"),
    }


def _builder(
    now: datetime, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now - SLACK,
        now + VALID,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
