"""A certificate authority for tests."""

import ssl
from pathlib import Path

import trustme


class Authority:
    """Certificate authority that writes server and client certificates to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        self.file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(self.file)

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """Write NAME.pem (with the chain) and NAME.key, each atomically; return their paths."""
        made = self._authority.issue_cert(*(hosts or ("localhost", "127.0.0.1")))
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        for path, content in zip(paths, (chain, made.private_key_pem.bytes()), strict=True):
            aside = path.with_suffix(".aside")
            aside.write_bytes(content)
            aside.replace(path)
        return paths

    def context(self, *protocols: str, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Return the TLS context of a client that trusts this authority.

        protocols: for ALPN. client: certificate and key of the client.
        """
        made = ssl.create_default_context(cafile=str(self.file))
        if protocols:
            made.set_alpn_protocols(list(protocols))
        if client is not None:
            made.load_cert_chain(*client)
        return made
