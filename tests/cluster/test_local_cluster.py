"""A cluster of several nodes on this machine: the commands that start, query and stop it."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.doctor.listeners import READABLE, protection
from cluster.doctor.nodes import auth_mode, compare_nodes
from cluster.errors import UserError
from cluster.local import lifecycle, network_namespace
from cluster.local.cluster import Cluster, cluster_home
from cluster.local.processes import with_private_tmp
from cluster.nodes import node_checks
from tests.load import wait_for
from tests.server import REPOSITORY
from train.distributed import gloo

START_S = 120


def command(*arguments, environment=None, before=()):
    """Run `python -m cluster …`; return the completed process."""
    return subprocess.run(
        [*before, sys.executable, "-m", "cluster", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cluster():
    answer(command("up", "--nodes", "2", "--cpus", "1"))
    yield lifecycle.current()
    answer(command("down"))


def test_a_node_has_a_private_copy_of_rays_folder(tmp_path, monkeypatch):
    """With TMPDIR, Ray's folder is there; nodes that share it delete each other's files."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    node = tmp_path / "node1"
    node.mkdir()
    words = with_private_tmp(node, ["ray", "start"]).split()
    assert words[:4] == ["mount", "--bind", str(node / "ray"), str(tmp_path / "temporary" / "ray")]
    assert all(Path(folder).is_dir() for folder in words[2:4])


# One method of each of Ray's gRPC services.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/Init",
)


def is_loopback(host):
    return ipaddress.ip_address(host).is_loopback


def ask_without_token(host, port):
    """Return whether a port refuses Ray's methods, over gRPC or HTTP, if the token is missing."""
    codes = set()
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=10)
                codes.add("answered")
            except grpc.RpcError as error:
                codes.add(error.code())
    if grpc.StatusCode.UNAUTHENTICATED in codes:
        return codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    return httpx.get(f"http://{host}:{port}/api/jobs/").status_code == 401


def states():
    return {name: node["state"] for name, node in answer(command("status"))["nodes"].items()}


class TestWithoutACluster:
    def test_down_reports_that_nothing_is_up(self):
        done = command("down")
        assert answer(done) == {"stopped": 0}
        assert done.stderr == "no cluster is up; nothing was stopped.\n"

    def test_status_explains_how_to_start_a_cluster(self):
        done = command("status")
        assert done.returncode == 2
        assert done.stderr == "error: no cluster is up; python -m cluster up starts one.\n"

    def test_a_port_in_use_is_named_and_nothing_is_left(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            done = command("up", "--port", str(port))
        assert done.returncode == 2
        assert f"port {port} is taken by another program" in done.stderr.splitlines()[-1]
        assert lifecycle.current() is None
        assert not cluster_home().exists()

    @pytest.mark.parametrize(
        ("number", "reason"),
        [
            ("0", "should be greater than or equal to 1."),
            ("-1", "should be greater than or equal to 1."),
            ("many", "should be a valid integer"),
            ("101", "should be less than or equal to 100."),
        ],
    )
    def test_an_invalid_number_of_nodes_is_refused(self, number, reason):
        done = command("up", "--nodes", number)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: option --nodes: ")
        assert reason in line


# Must run before the fixture of the next tests starts its cluster.
@pytest.mark.ray
@pytest.mark.slow
def test_without_namespaces_nodes_share_the_network():
    bare = ["setpriv", "--bounding-set", "-net_admin,-sys_admin"]
    try:
        done = command("up", "--nodes", "2", "--cpus", "1", before=bare if os.getuid() == 0 else [])
        described = answer(done)
        assert not described["isolated"]
        assert "the nodes cannot have separate networks (" in done.stderr
        assert states() == {"head": "alive", "node1": "alive"}
        refused = command("cut", "node1")
        assert refused.returncode == 2
        assert "share this machine's network" in refused.stderr
    finally:
        assert lifecycle.down() == 2


@pytest.mark.ray
@pytest.mark.slow
class TestTwoNodes:
    def test_a_second_cluster_is_refused_and_the_first_stays(self, cluster):
        done = command("up")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: a cluster of 2 nodes is up at {cluster.address}; "
            "python -m cluster down stops it.\n"
        )
        assert states() == {"head": "alive", "node1": "alive"}

    def test_a_killed_node_is_off_until_it_is_started(self, cluster):
        assert answer(command("kill", "node1")) == {"node": "node1", "done": "kill"}
        assert cluster.processes("node1") == []
        assert states()["node1"] == "off"
        answer(command("start", "node1"))
        wait_for(lambda: states()["node1"] == "alive", START_S)
        assert command("start", "node1").stderr == "error: node 'node1' is already running.\n"
        done = command("kill", "node7")
        assert done.stderr == "error: unknown node 'node7'; expected one of head, node1.\n"

    def test_a_wrong_token_is_refused_in_one_line(self, cluster):
        environment = {**cluster.client_environment, "RAY_AUTH_TOKEN": "0" * 64}
        done = subprocess.run(
            [sys.executable, "-c", "from cluster import connect; connect.connect()"],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("cluster.errors.UserError: the cluster at")
        assert "requires another token" in last

    def test_rays_ports_refuse_calls_without_the_token(self, cluster):
        found = [each for each in node_checks.listeners() if not is_loopback(each["host"])]
        assert {"gcs_server", "raylet", "DashboardAgent"} <= {each["process"] for each in found}
        for each in found:
            if protection(each) == READABLE:
                answer = httpx.get(f"http://{cluster.host}:{each['port']}/metrics")
                assert answer.text.startswith("# HELP")
                continue
            refused = ask_without_token(cluster.host, each["port"])
            assert refused, each

    def test_the_doctor_reports_both_nodes_as_healthy(self, cluster, storage_path):
        done = command(
            *("doctor", "--storage.path", str(storage_path)),
            environment={**cluster.client_environment, "COLUMNS": "200"},
        )
        assert answer(done) == {"healthy": True}
        for matter in ("versions", "storage", "clocks", "disk", "HAProxy", "authentication"):
            (line,) = [line for line in done.stderr.splitlines() if f" {matter} o" in line]
            assert "ok on all 2" in line
        assert not [file for file in storage_path.iterdir() if "doctor" in file.name]

    def test_storage_that_a_node_lacks_is_named_before_training(self, cluster, tmp_path):
        if not cluster.isolated:
            pytest.skip("without permission for namespaces all nodes see the same files")
        inside = cluster.processes("node1")[0]
        own = ["nsenter", f"--mount=/proc/{inside}/ns/mnt"]
        subprocess.run([*own, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
        environment = {**cluster.client_environment, "COLUMNS": "200"}
        try:
            doctor = command("doctor", "--storage.path", str(tmp_path), environment=environment)
            train = subprocess.run(
                [sys.executable, "train/main.py", "--storage.path", str(tmp_path)],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=START_S,
                check=False,
            )
        finally:
            subprocess.run([*own, "umount", str(tmp_path)], check=True)
        problem = f"{cluster.node_address('node1')}: cannot see files written by other machines"
        assert doctor.returncode == 1
        assert problem in doctor.stderr
        assert train.returncode == 2, train.stderr
        assert problem in train.stderr.splitlines()[-1]

    def test_a_command_with_another_ray_version_is_refused(self, cluster):
        code = (
            "import ray; ray.__version__ = '2.59.0'\nfrom cluster import connect\nconnect.connect()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={**os.environ, **cluster.client_environment},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("cluster.errors.UserError: Version mismatch")
        assert "Ray: 2.59.0" in last
        assert "Use the same versions here as on the cluster." in last

    def test_a_node_with_another_ray_version_cannot_join(self, cluster):
        code = (
            "import sys, ray; ray.__version__ = '2.59.0'\n"
            "from ray.scripts.scripts import main; sys.exit(main())"
        )
        start = ["start", "--address", cluster.address]
        done = subprocess.run(
            [sys.executable, "-c", code, *start],
            env={**os.environ, **cluster.client_environment},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode != 0
        assert "Version mismatch" in done.stderr


def test_ray_accepts_machines_yaml():
    given = yaml.safe_load((REPOSITORY / "cluster" / "machines.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["max_workers"] == len(given["provider"]["worker_ips"])
    for place in ("head", "worker"):
        stop, start = given[f"{place}_start_ray_commands"]
        assert stop.endswith("/ray stop")
        # The server's environment is read when Ray starts, so it must be set before.
        assert start.index("serve.environment") < start.index("ray start")


def test_gloo_uses_the_interface_with_rays_address(monkeypatch):
    for variable in (gloo.GLOO, gloo.NCCL):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(gloo.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    gloo.choose_interface()
    assert os.environ[gloo.GLOO] == os.environ[gloo.NCCL] == "lo"
    monkeypatch.setenv(gloo.GLOO, "chosen0")
    gloo.choose_interface()
    assert os.environ[gloo.GLOO] == "chosen0"
    assert gloo.interface_of("192.0.2.1") is None


def test_node_addresses_are_in_the_range_for_benchmarks():
    assert [network_namespace.node_address(index) for index in range(2)] == [
        "198.18.87.1",
        "198.18.87.2",
    ]


HERE = {
    "python": "3.11.7",
    "packages": {"ray": "2.60.0", "torch": "2.13.0"},
    "gpus": [],
    "free_gib": 50.0,
    "storage": "",
    "haproxy": "",
    "ingress": True,
    "auth": "token",
    "taken": [],
    "listeners": [],
    "skew_s": 0.0,
}


def findings(**changes):
    """Return the problems that compare_nodes finds if one of two nodes differs, by subject."""
    reports = {"10.0.0.1": HERE, "10.0.0.2": {**HERE, **changes}}
    return {each.subject: each for each in compare_nodes(HERE, reports) if each.remedy}


@pytest.mark.parametrize(
    ("changes", "subject", "words", "mark"),
    [
        ({"python": "3.11.9"}, "versions on nodes", "Python 3.11.9, here 3.11.7", "missing"),
        (
            {"packages": {"ray": "2.60.0", "torch": ""}},
            *("versions on nodes", "torch missing, here 2.13.0", "missing"),
        ),
        ({"storage": "permission denied"}, "storage on nodes", "permission denied", "missing"),
        ({"skew_s": -3.0}, "clocks of nodes", "-3.0 s", "missing"),
        ({"free_gib": 0.5}, "disk of nodes", "0.5 GiB free", "missing"),
        ({"haproxy": "not found"}, "HAProxy on nodes", "not found", "optional"),
        ({"ingress": False}, "serving environment on nodes", "not set", "optional"),
        ({"taken": [8000]}, "ports of nodes", "8000 is taken", "optional"),
        ({"auth": "disabled"}, "authentication on nodes", "disabled, here token", "missing"),
    ],
)
def test_the_doctor_names_the_node_and_its_problem(changes, subject, words, mark):
    (found,) = findings(**changes).values()
    assert (found.subject, found.found, found.mark) == (subject, f"10.0.0.2: {words}", mark)


def test_the_doctor_finds_nothing_wrong_with_equal_nodes():
    assert findings() == {}


def test_a_node_that_does_not_respond_is_named():
    (found,) = [
        each
        for each in compare_nodes(HERE, {"10.0.0.2": "does not answer"})
        if each.subject == "nodes"
    ]
    assert (found.found, found.mark) == ("10.0.0.2: does not answer", "missing")


@pytest.mark.parametrize(
    ("address", "mode", "mark"),
    [
        ("10.0.0.1:6379", "disabled", "optional"),
        ("10.0.0.1:6379", "token", "ok"),
        ("127.0.0.1:6379", "disabled", "ok"),
    ],
)
def test_the_doctor_warns_if_a_cluster_needs_no_token(address, mode, mark):
    assert auth_mode(address, mode).mark == mark


def test_the_head_cannot_be_cut():
    alone = Cluster("id", "127.0.0.1", 1, 6379, 8265, True, ["head"], 1)
    with pytest.raises(UserError, match="cut another node"):
        alone.cut("head")
