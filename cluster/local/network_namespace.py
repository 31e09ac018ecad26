"""A network of its own for each node on one machine, so that it can be cut.

Nodes live in network namespaces, joined by a bridge to this machine, which has the bridge's first
address. Made by iproute2 and by root only; needs nothing of Ray.
"""

import shutil
import subprocess
from collections.abc import Sequence

PREFIX = "halyard-"
BRIDGE = "halyard0"
# For measurements between devices (RFC 2544): no network that a machine is on uses it.
SUBNET = "198.18.87."


def node_address(index: int) -> str:
    """The address of node `index`; this machine's is that of 0."""
    return f"{SUBNET}{index + 1}"


def problem() -> str | None:
    """Say why nodes cannot have networks of their own here, or return None."""
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
    """Make the bridge, if it is not there."""
    if subprocess.run(["ip", "link", "show", BRIDGE], capture_output=True, check=False).returncode:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{node_address(0)}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")


def connect_node(name: str, address: str) -> None:
    """Make a node's network and plug it in. Raises CalledProcessError without permission."""
    create_bridge()
    space = PREFIX + name
    _ip("netns", "add", space)
    _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", space, "master", BRIDGE, "up")
    _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _ip("-n", space, "link", "set", device, "up")


def disconnect_node(name: str) -> None:
    """Take a node's network away; its processes must have ended."""
    # What still holds the namespace would keep the cable, too.
    for command in (("link", "del", PREFIX + name), ("netns", "del", PREFIX + name)):
        subprocess.run(["ip", *command], capture_output=True, check=False)


def remove_bridge() -> None:
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def enter_command(name: str, command: str) -> list[str]:
    """Return the words that run a shell command in a node's network and a mount table of its own.

    Without what it mounts being seen outside.
    """
    inside = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", command]
    return ["nsenter", f"--net=/run/netns/{PREFIX}{name}", *inside]


def cut_node(name: str) -> None:
    """Unplug a node: what is sent to it or by it is lost."""
    _ip("link", "set", PREFIX + name, "down")


def heal_node(name: str) -> None:
    _ip("link", "set", PREFIX + name, "up")


def is_cut(name: str) -> bool:
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
