"""Gloo on the network that Ray uses.

Gloo takes the address that the machine's own name has, which on many machines is loopback (Debian
writes 127.0.1.1 into /etc/hosts): workers on several nodes would look for each other at home.
"""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915


@dataclass
class OverRaysNetwork(TorchConfig):
    """How workers find each other; for `TorchTrainer(torch_config=…)`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: object, backend_config: TorchConfig) -> None:
        worker_group.execute(choose)  # type: ignore[attr-defined]
        super().on_start(worker_group, backend_config)


def choose() -> None:
    """Name this node's interface to Gloo, unless one is named."""
    if VARIABLE not in os.environ and (name := interface(ray.util.get_node_ip_address())):
        os.environ[VARIABLE] = name


def interface(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address; None if none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
