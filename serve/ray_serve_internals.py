"""The private names of Ray Serve that this project uses.

Written for Ray 2.60. `tests/test_ray_internals.py` uses each of them, so that it fails with a
version of Ray that lacks one.
"""

import ray.serve._private.default_impl as default_impl
import ray.serve._private.replica as replica
from ray._common.network_utils import build_address
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_internal_replica_context as internal_replica_context

__all__ = [
    "SERVE_CONTROLLER_NAME",
    "SERVE_NAMESPACE",
    "build_address",
    "default_impl",
    "internal_replica_context",
    "replica",
]
