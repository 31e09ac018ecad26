"""A separate network for each node on one machine, so that nodes can be disconnected.

Each node runs in a network namespace. A bridge connects the namespaces with this machine, which has
the first address of the bridge. Needs iproute2 and root permissions, but not Ray.
"""

import shutil
import subprocess
from collections.abc import Sequence

PREFIX = "halyard-"
BRIDGE = "halyard0"
# Reserved for benchmarks of network devices (RFC 2544), so no real network should use it.
SUBNET = "198.18.87."


def node_address(index: int) -> str:
    """Return the IP address of node `index`; index 0 is this machine."""
    return f"{SUBNET}{index + 1}"


def problem() -> str | None:
    """Return the reason why nodes cannot have separate networks here, None if they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    try:
        connect_node("probe", node_address(200))
        subprocess.run(enter_command("probe", "true"), check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines()
        return words[-1] if words else f"{error.cmd[0]} failed"
    finally:
        disconnect_node("probe")
        remove_bridge()
    return None


def create_bridge() -> None:
    """Create the bridge unless it exists."""
    if subprocess.run(["ip", "link", "show", BRIDGE], capture_output=True, check=False).returncode:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{node_address(0)}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")


def connect_node(name: str, address: str) -> None:
    """Create a node's network and connect it. Raises CalledProcessError without permission."""
    create_bridge()
    space = PREFIX + name
    _ip("netns", "add", space)
    _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", space, "master", BRIDGE, "up")
    _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _ip("-n", space, "link", "set", device, "up")


def disconnect_node(name: str) -> None:
    """Remove a node's network. The node's processes must have ended."""
    # The link is deleted too, because a process that holds the namespace would keep it.
    for command in (("link", "del", PREFIX + name), ("netns", "del", PREFIX + name)):
        subprocess.run(["ip", *command], capture_output=True, check=False)


def remove_bridge() -> None:
    """Remove the bridge if it exists."""
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def enter_command(name: str, command: str) -> list[str]:
    """Return the arguments that run a shell command in a node's network and a mount namespace.

    What the command mounts is not visible outside.
    """
    inside = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", command]
    return ["nsenter", f"--net=/run/netns/{PREFIX}{name}", *inside]


def cut_node(name: str) -> None:
    """Disconnect a node: all packets to and from it are lost."""
    _ip("link", "set", PREFIX + name, "down")


def heal_node(name: str) -> None:
    """Reconnect a node."""
    _ip("link", "set", PREFIX + name, "up")


def is_cut(name: str) -> bool:
    """Return whether a node is disconnected."""
    shown = subprocess.run(
        ["ip", "-oneline", "link", "show", PREFIX + name],
        capture_output=True,
        text=True,
        check=False,
    )
    return ",UP" not in shown.stdout


def _ip(*words: str) -> None:
    command: Sequence[str] = ["ip", *words]
    subprocess.run(command, check=True, capture_output=True, text=True)
