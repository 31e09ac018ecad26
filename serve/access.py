"""Access control: by API key, and for browsers also by the page that sends the request.

Each route and each gRPC method declares the Access that it requires. REST and gRPC use the same
Guard.
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

# Header name in lower case → value; None if the header was not sent.
Header = Callable[[bytes], str | None]
ANY = "*"


class Access(Enum):
    """The access that a request requires, if the server has keys.

    A server without keys is open, except for CHANGES, which then require that the server is
    reachable from its own machine only.
    """

    OPEN = auto()  # no key: health checks, and pages without data
    PAGE = auto()  # no key, and other sites may link to it
    METRICS = auto()  # any key, unless metrics are open
    KEY = auto()  # any key; the response depends on the models of the key
    MODEL = auto()  # a key for the model
    FEEDBACK = auto()  # a key for the model
    ADMIN = auto()  # a key that may load and unload the model


# Requests that change the responses to other clients.
CHANGES = (Access.FEEDBACK, Access.ADMIN)


@dataclass(frozen=True)
class Actor:
    """The client that requested a change. name: of its key. address: seen by HAProxy or the server.

    request_id: id of the request.
    """

    name: str
    address: str
    request_id: str


_proof = cache(haproxy_config.proof_prefix)


def client_address(peer: str | None, direct: str) -> str:
    """Return the address of a client.

    peer: value of the header that HAProxy sets, a proof and the address; None without HAProxy.
    direct: the remote address of the connection, used if the proof is wrong.
    """
    proof, _, address = (peer or "").partition(" ")
    known = hmac.compare_digest(proof.encode(errors="replace"), _proof().encode())
    return address if known and address else direct


class Guard:
    """Rejects requests that a client may not send. Belongs to one event loop."""

    def __init__(
        self,
        keys: KeyStore | None,
        *,
        loopback: bool,
        metrics_without_key: bool = False,
        hosts: Iterable[str] = (),
        own_name: str = "",
    ) -> None:
        """Set the rules.

        keys: None for a server without keys. loopback: whether the server is reachable from this
        machine only. hosts: further host names of the server. Pages from these hosts count as the
        server's own, but not those that match only a pattern: "*.a.b" is every name with that
        ending, "*" every name. own_name: the host that the server listens on.
        """
        self.keys = keys
        self._loopback = loopback
        self._metrics_without_key = metrics_without_key
        self._hosts = AllowedHosts(hosts, own_name)

    def check_page(self, header: Header, *, method: str, access: Access | None) -> None:
        """Reject requests that pages of other sites make a browser send. Raises Forbidden.

        Without keys, such a page would have the access of the user's machine. Requests across
        sites are detected by Origin or Sec-Fetch-Site. DNS rebinding, in which the other site's
        name resolves to this server's address, is detected by Host.
        """
        host, origin = header(b"host"), header(b"origin")
        if host is not None and not self._hosts.has(host):
            raise Forbidden(
                f"the host '{host[:100]}' is not a name of this server. Use its address, or start "
                "it with security.allowed_hosts=NAME."
            )
        if origin is not None:
            if not self._is_own(origin, host):
                raise Forbidden(f"requests from pages of '{origin[:100]}' are not allowed.")
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
            raise Forbidden("requests from pages of other sites are not allowed.")

    def _is_own(self, origin: str, host: str | None) -> bool:
        """Return whether a page is from this server: its host is in the header Host, or in `hosts`
        if a gateway changes that header."""
        place = _place(origin)
        return place is not None and (place == host or self._hosts.lists(place))

    def needs_key(self, access: Access | None) -> bool:
        """Return whether a request needs a key. access: None if the route does not exist.

        Unknown routes need a key too, so that clients without one cannot find out routes.
        """
        if self.keys is None or access in (Access.OPEN, Access.PAGE):
            return False
        return not (access is Access.METRICS and self._metrics_without_key)

    def authenticate(self, authorization: str | None) -> APIKey | None:
        """Return the key in an Authorization header; None if the server has no keys.

        Raises Unauthorized if there is no valid key, RateLimited if the key exceeds its rate.
        """
        if self.keys is None:
            return None
        return self.keys.check(authorization, asyncio.get_running_loop().time())

    def authorize(self, key: APIKey | None, access: Access, model: str) -> None:
        """Check that a key allows `access` to a model.

        Raises Forbidden if it does not, Unauthorized for a change on a server without keys that is
        reachable from other machines.
        """
        if key is None:
            if self.keys is None and not self._loopback and access in CHANGES:
                raise Unauthorized(
                    "this requires a key, because the server is reachable from other machines: "
                    "start it with security.api_keys_file=FILE (python -m serve.security creates "
                    "keys)."
                )
            return
        if access in (Access.MODEL, *CHANGES) and not key.sees(model):
            raise Forbidden(f"key '{key.name}' may not use model '{model[:100]}'.")
        if access is Access.ADMIN and not key.admin:
            raise Forbidden(f"key '{key.name}' may not load and unload models.")


class AllowedHosts:
    """The host names of a server."""

    def __init__(self, listed: Iterable[str] = (), own_name: str = "") -> None:
        self._listed = [name.lower().rstrip(".") for name in listed]
        self._own = {*LOOPBACK, socket.gethostname().lower(), own_name.lower()}
        # Clients choose the Host header, so the cache has bounds on the number and length of keys.
        self._known = lru_cache(256)(self._has)

    def has(self, host: str) -> bool:
        """Return whether a Host header names this server.

        Any IP address does, because DNS rebinding needs a name.
        """
        return (self._known if len(host) <= 256 else self._has)(host)

    def _has(self, host: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        return name in self._own or _is_address(name) or self._is_listed(name)

    def lists(self, place: str) -> bool:
        """Return whether the name in HOST[:PORT] is listed literally, not by a pattern."""
        return _name(place) in self._listed

    def _is_listed(self, name: str) -> bool:
        return any(
            name == each or each == ANY or (each.startswith("*.") and name.endswith(each[1:]))
            for each in self._listed
        )


def _place(origin: str) -> str | None:
    """Return HOST[:PORT] of an Origin; None if it has none, such as "null" for a file."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _name(place: str) -> str | None:
    """Return the name in HOST[:PORT], in lower case and without IPv6 brackets; None if invalid."""
    try:
        parts = urlsplit(f"//{place}")
        _ = parts.port  # raises ValueError if it is not a port
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
