"""The private names of Ray that this project uses exist in the installed version."""

import ast
import inspect
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

from cluster import ray_internals
from serve import ray_serve_internals
from tests.server import REPOSITORY
from train.distributed import ray_train_internals

HOMES = {
    "cluster.ray_internals",
    "serve.ray_serve_internals",
    "train.distributed.ray_train_internals",
    # Separate from the other names of Ray Train because these import torch.
    "train.distributed.gloo",
}


def private_imports(path: Path) -> set[str]:
    """Return the private modules and names of Ray that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {
        name
        for name in found
        if name.startswith("ray.") and ("._" in name or ".v2." in name or "internal_kv" in name)
    }


def test_one_module_per_area_imports_private_names_of_ray():
    users = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for part in ("cluster", "train", "tune", "serve")
        for path in (REPOSITORY / part).rglob("*.py")
        if private_imports(path)
    }
    assert users == HOMES


@pytest.mark.parametrize("package", ["ray", "uvicorn"])
def test_the_installed_version_matches_the_pinned_minor(package):
    wanted = [Requirement(each) for each in requires("halyard")]
    (needed,) = [each.specifier for each in wanted if each.name == package and not each.marker]
    assert needed.contains(version(package))
    # Private names may change with any minor version, so no other one is accepted.
    minor = ".".join(version(package).split(".")[:2])
    assert f">={minor}" in str(needed)


def test_private_names_of_ray_core_exist():
    from ray._private import ray_constants, ray_logging, services, worker
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.worker import global_worker
    from ray._raylet import Config
    from ray.experimental import internal_kv

    assert ray_internals.address_file().name == "ray_current_cluster"
    assert {"address", "node_id"} <= {
        name.replace("gcs_", "") for name in inspect.signature(services.get_node).parameters
    }
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert hasattr(worker, "_global_node")
    assert callable(worker.print_to_stdstream)
    assert callable(ray_logging.global_worker_stdstream_dispatcher.remove_handler)
    assert next(iter(inspect.signature(init_grpc_channel).parameters)) == "address"
    assert isinstance(ray.WORKER_MODE, int)
    assert hasattr(global_worker, "mode")
    assert callable(Config.initialize)
    for name in ("put", "get", "list", "del"):
        function = getattr(internal_kv, f"_internal_kv_{name}")
        assert "namespace" in inspect.signature(inspect.unwrap(function)).parameters


def test_patient_start_patches_the_function_that_ray_calls():
    from ray._private import node, services

    assert "services.get_node(" in inspect.getsource(node)
    before = services.get_node
    with ray_internals.patient_start(1):
        assert services.get_node is not before
    assert services.get_node is before


def test_private_names_of_ray_train_exist():
    for name in ray_train_internals.__all__:
        assert getattr(ray_train_internals, name) is not None
    callback = ray_train_internals.ControllerCallback
    for hook in (
        "after_controller_start",
        "before_controller_execute_resize_decision",
        "before_controller_execute_failure_decision",
    ):
        assert callable(getattr(callback, hook))
    assert callable(ray_train_internals.FixedScalingPolicy._maybe_send_resource_request)
    from ray.train.torch import TorchTrainer
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    assert callable(_set_torch_distributed_env_vars)
    assert callable(_TorchBackend.on_start)

    for hook in ("_create_default_callbacks", "_initialize_and_run_controller"):
        assert callable(getattr(TorchTrainer, hook))


def test_private_names_of_ray_serve_exist():
    assert callable(ray_serve_internals.default_impl.add_grpc_address)
    assert callable(ray_serve_internals.replica.add_port_to_grpc_server)
    assert ray_serve_internals.build_address("::1", "80") == "[::1]:80"
    assert ray_serve_internals.SERVE_CONTROLLER_NAME
    assert ray_serve_internals.SERVE_NAMESPACE
