"""Connect the workers of a run over the network that Ray uses, and no other.

By default Gloo uses the address of the machine's host name. On many machines this is a loopback
address (Debian writes 127.0.1.1 into /etc/hosts), with which workers on several nodes cannot
connect. Torch's store, through which the workers find each other, listens on all interfaces by
default and executes the commands of any client.
"""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
LOOPBACK = "lo"


@dataclass
class RayNetworkConfig(TorchConfig):
    """Options for connecting the workers; for `TorchTrainer(torch_config=…)`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        worker_group.execute(_set_torch_distributed_env_vars)
        on_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = backend_config.backend or ("nccl" if on_gpu else "gloo")
        world_size, timeout = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        address, port = worker_group.execute_single(0, open_store, world_size, timeout)
        joining = [
            worker_group.execute_single_async(
                rank, join_group, backend, address, port, rank, world_size, timeout
            )
            for rank in range(world_size)
        ]
        ray.get(joining)


def choose_interface() -> None:
    """Make Gloo use this node's interface in Ray's network, unless the environment names another.

    NCCL is restricted only if that is loopback: between nodes it may find a faster network.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is None:
        return
    os.environ.setdefault(GLOO, name)
    if name == LOOPBACK:
        os.environ.setdefault(NCCL, name)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


# The store of the first worker, between `open_store` and `join_group`.
_store: dist.Store | None = None


def open_store(world_size: int, timeout: timedelta) -> tuple[str, int]:
    """Open the store of a run on this node's address only; return the address and the port."""
    global _store
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind((address, 0))
    listening.listen()
    port = int(listening.getsockname()[1])
    _store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return address, port


def join_group(
    backend: str, address: str, port: int, rank: int, world_size: int, timeout: timedelta
) -> None:
    """Add this worker to the run's process group."""
    global _store
    store, _store = _store, None
    if store is None:
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
