"""Who may ask what: by key, and, in a browser, by the page that asks.

What each route and each gRPC method needs stands beside it, as an Access; REST and gRPC both ask
the same Guard.
"""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, lru_cache
from urllib.parse import urlsplit

from cluster.connect import LOOPBACK
from cluster.ingress import haproxy_config
from serve.errors import Forbidden, Unauthorized
from serve.security import APIKey, KeyStore

# The value of a header by its name in lower case; None where it was not sent.
Header = Callable[[bytes], str | None]
ANY = "*"


class Access(Enum):
    """What a request must bring. Where there are no keys, a loopback address stands for one."""

    OPEN = auto()  # nothing: whether the server lives, and pages that hold no data
    PAGE = auto()  # the same, and another site may link to it
    METRICS = auto()  # a key, unless metrics are open
    KEY = auto()  # any key; what is answered depends on its models
    MODEL = auto()  # a key for the model
    FEEDBACK = auto()  # a key for the model, or a server that only its own machine reaches
    ADMIN = auto()  # a key that may change the model, or such a server


# Without keys, these are for the server's own machine: they change what others are answered.
CHANGES = (Access.FEEDBACK, Access.ADMIN)


@dataclass(frozen=True)
class Actor:
    """Who asked for a change. address: the client's, as HAProxy or the server saw it."""

    name: str
    address: str
    request_id: str


_proof = cache(haproxy_config.proof_prefix)


def client_address(peer: str | None, direct: str) -> str:
    """Return the address of a client.

    peer: what HAProxy says of it; None behind none. direct: the other end of the connection.
    """
    proof, _, address = (peer or "").partition(" ")
    known = hmac.compare_digest(proof.encode(errors="replace"), _proof().encode())
    return address if known and address else direct


class Guard:
    """Refuses what a client may not ask. Belongs to one event loop."""

    def __init__(
        self,
        keys: KeyStore | None,
        *,
        loopback: bool,
        metrics_without_key: bool = False,
        hosts: Iterable[str] = (),
        own_name: str = "",
    ) -> None:
        """loopback: whether only this machine reaches the server.

        hosts: names that the server has elsewhere, whose pages are its own. "*.a.b" is every name
        that ends so, and "*" every name; their pages are not. own_name: what it listens on.
        """
        self.keys = keys
        self._loopback = loopback
        self._metrics_without_key = metrics_without_key
        self._hosts = AllowedHosts(hosts, own_name)

    def check_page(self, header: Header, *, method: str, access: Access | None) -> None:
        """Refuse what a page of another site makes a browser ask. Raises Forbidden.

        Without keys a browser on this machine is all that such a page needs. Two ways are closed:
        its requests name it in Origin or Sec-Fetch-Site, and a name of its own that leads to this
        server's address, so that the browser takes both for one site, comes as Host.
        """
        host, origin = header(b"host"), header(b"origin")
        if host is not None and not self._hosts.has(host):
            raise Forbidden(
                f"this server is not known as '{host[:100]}'. Ask it by its address, or start it "
                "with security.allowed_hosts=NAME."
            )
        if origin is not None:
            if not self._is_own(origin, host):
                raise Forbidden(f"requests of pages from '{origin[:100]}' are not answered.")
            return
        site = header(b"sec-fetch-site")
        if site in (None, "same-origin", "none"):
            return
        linked = (
            header(b"sec-fetch-mode") == "navigate"
            and header(b"sec-fetch-dest") in (None, "document")
            and method in ("GET", "HEAD")
        )
        if not (access is Access.PAGE and linked):
            raise Forbidden("requests of pages from other sites are not answered.")

    def _is_own(self, origin: str, host: str | None) -> bool:
        """Whether a page is this server's own, under another name where a gateway changes Host."""
        place = _place(origin)
        return place is not None and (place == host or self._hosts.lists(place))

    def needs_key(self, access: Access | None) -> bool:
        """access: None where there is no such route; that, too, is told only with a key."""
        if self.keys is None or access in (Access.OPEN, Access.PAGE):
            return False
        return not (access is Access.METRICS and self._metrics_without_key)

    def authenticate(self, authorization: str | None) -> APIKey | None:
        """Return the key of a header; None where there are no keys.

        Raises Unauthorized, RateLimited.
        """
        if self.keys is None:
            return None
        return self.keys.check(authorization, asyncio.get_running_loop().time())

    def authorize(self, key: APIKey | None, access: Access, model: str) -> None:
        """Raises Forbidden for a model or a change that a key is not for, Unauthorized for a change
        that needs a key where there are none."""
        if key is None:
            if self.keys is None and not self._loopback and access in CHANGES:
                raise Unauthorized(
                    "this needs a key, as other machines reach this server: start it with "
                    "security.api_keys_file=FILE (python -m serve.security makes one)."
                )
            return
        if access in (Access.MODEL, *CHANGES) and not key.sees(model):
            raise Forbidden(f"key '{key.name}' is not for model '{model[:100]}'.")
        if access is Access.ADMIN and not key.admin:
            raise Forbidden(f"key '{key.name}' may not load and unload models.")


class AllowedHosts:
    """Names by which clients may ask for a server."""

    def __init__(self, listed: Iterable[str] = (), own_name: str = "") -> None:
        self._listed = [name.lower().rstrip(".") for name in listed]
        self._own = {*LOOPBACK, socket.gethostname().lower(), own_name.lower()}
        # Clients choose what they send: only a bounded memory of it is kept.
        self._known = lru_cache(256)(self._has)

    def has(self, host: str) -> bool:
        """Whether a Host header names this server. An address does: no site owns it as a name."""
        return (self._known if len(host) <= 256 else self._has)(host)

    def _has(self, host: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        return name in self._own or _is_address(name) or self._is_listed(name)

    def lists(self, place: str) -> bool:
        """Whether the operator has listed the very name of a place HOST[:PORT]."""
        return _name(place) in self._listed

    def _is_listed(self, name: str) -> bool:
        return any(
            name == each or each == ANY or (each.startswith("*.") and name.endswith(each[1:]))
            for each in self._listed
        )


def _place(origin: str) -> str | None:
    """HOST[:PORT] of an Origin; None for one without, such as that of a file: "null"."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _name(place: str) -> str | None:
    """The name in HOST[:PORT], in lower case and without the brackets of IPv6."""
    try:
        parts = urlsplit(f"//{place}")
        _ = parts.port  # raises where it is none
    except ValueError:
        return None
    if parts.netloc != place or "@" in place:
        return None
    return parts.hostname.rstrip(".") if parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
