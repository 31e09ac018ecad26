"""The servers that are compared: how each is installed, started and called."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import server
from tests.server import REPOSITORY
from train.bundle.manifest import TensorMetadata

PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
HERE = "tests.bench.peers"
MAX_SHOWN = 500


@dataclass(frozen=True)
class Setup:
    """The model to serve and the environment to start a server in.

    file: the ONNX file. venvs: folder of the peers' virtual environments. environment: variables
    that are added to this process's.
    """

    model: str
    storage: str
    variant: str
    file: Path
    venvs: Path
    log: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class Candidate:
    """A server to measure: how to start it and how to form a request.

    package: the package whose version is reported. body: returns the request's body for the input's
    tensor and the raw bytes of one image. In `path`, {name} stands for the model's name; in
    `headers`, {json_length} stands for the length of the JSON in front of the binary data.
    """

    package: str
    start: Callable[[Setup], subprocess.Popen[bytes]]
    path: str = "/predict"
    body: Callable[[TensorMetadata, bytes], bytes] = lambda tensor, raw: raw
    content_type: str = "application/octet-stream"
    headers: tuple[str, ...] = ()

    def version(self, venvs: Path) -> str:
        own = isinstance(self.start, Peer)
        python = venvs / self.package / "bin/python" if own else sys.executable
        code = f"from importlib.metadata import version; print(version('{self.package}'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()


@dataclass(frozen=True)
class Peer:
    """A server in its own virtual environment, which is named after its package.

    command: a program of that environment and its arguments.
    """

    package: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, setup: Setup) -> subprocess.Popen[bytes]:
        folder = setup.venvs / self.package
        install(folder, self.packages)
        program, *arguments = self.command
        with setup.log.open("wb") as log:
            return subprocess.Popen(
                [str(folder / "bin" / program), *arguments],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    **setup.environment,
                    **self.environment,
                    "MODEL": str(setup.file),
                    "PORT": str(PORT),
                    "PYTHONPATH": str(REPOSITORY),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def install(folder: Path, packages: Sequence[str]) -> None:
    """Create a virtual environment with packages, unless it exists.

    Raises RuntimeError with the end of the installer's output if the installation fails.
    """
    # Written last: if it exists, the environment is complete.
    complete = folder / "installed.json"
    if complete.is_file() and json.loads(complete.read_text()) == list(packages):
        return
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin" / "pip"), "install", "--quiet", *packages],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the installation failed: {done.stderr.strip()[-MAX_SHOWN:]}")
    complete.write_text(json.dumps(list(packages)))


def halyard(setup: Setup, *more: str) -> subprocess.Popen[bytes]:
    """Start Halyard. more: further options of the server."""
    options = [f"{key}={getattr(setup, key)}" for key in ("model", "storage", "variant")]
    return server.start(*options, "replicas=2", *more, log=setup.log, environment=setup.environment)


def ray_serve(setup: Setup) -> subprocess.Popen[bytes]:
    return server.start(
        f"model={setup.file}",
        app=f"{HERE}.ray_serve_server:app",
        ready="/-/healthz",
        log=setup.log,
        environment={**setup.environment, "RAY_SERVE_ENABLE_HA_PROXY": "0"},
    )


def infer_json(tensor: TensorMetadata, raw: bytes) -> bytes:
    """Return the JSON in front of one image of a v2 request with binary data."""
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": [1, *tensor.shape[1:]]}
    parameters = {"binary_data_size": len(raw)}
    return json.dumps({"inputs": [{**entry, "parameters": parameters}]}).encode()


def infer_base64(tensor: TensorMetadata, raw: bytes) -> bytes:
    """Return a v2 request of MLServer with one image as base64."""
    entry = {"name": tensor.name, "datatype": "BYTES", "shape": [1]}
    data = {"parameters": {"content_type": "base64"}, "data": [base64.b64encode(raw).decode()]}
    return json.dumps({"inputs": [{**entry, **data}]}).encode()


ONNX = ("numpy>=2.1,<3", "onnxruntime>=1.22,<2")
INFER = "/v2/models/{name}/infer"
JSON_LENGTH = "Inference-Header-Content-Length"
CANDIDATES = {
    "halyard": Candidate("halyard", halyard, INFER, headers=(f"{JSON_LENGTH}: 0",)),
    "halyard-oip": Candidate(
        "halyard",
        halyard,
        INFER,
        body=lambda tensor, raw: infer_json(tensor, raw) + raw,
        headers=(JSON_LENGTH + ": {json_length}",),
    ),
    "fastapi": Candidate(
        "fastapi",
        Peer(
            "fastapi",
            ("fastapi>=0.115,<1", "uvicorn[standard]>=0.34,<1", "orjson>=3.10,<4", *ONNX),
            (
                *("python", "-m", "uvicorn", f"{HERE}.fastapi_server:app", "--port", str(PORT)),
                *("--workers", "2", "--no-access-log", "--log-level", "warning"),
            ),
        ),
    ),
    "litserve": Candidate(
        "litserve",
        Peer(
            "litserve",
            ("litserve>=0.2.19,<0.3", "uvicorn[standard]>=0.34,<1", *ONNX),
            ("python", "-m", f"{HERE}.litserve_server"),
        ),
    ),
    "bentoml": Candidate(
        "bentoml",
        Peer(
            "bentoml",
            ("bentoml>=1.4.39,<1.5", *ONNX),
            (
                *("bentoml", "serve", f"{HERE}.bento_server:Classifier"),
                *("--host", "127.0.0.1", "--port", str(PORT)),
            ),
            {"BENTOML_DO_NOT_TRACK": "True"},
        ),
    ),
    "mlserver": Candidate(
        "mlserver",
        Peer(
            "mlserver",
            # MLServer 1.7 relies on an implicit event loop, which uvloop 0.22 no longer creates.
            ("mlserver>=1.7,<1.8", "uvloop<0.22", *ONNX),
            ("mlserver", "start", str(REPOSITORY / "tests/bench/peers")),
            {
                "MLSERVER_HOST": "127.0.0.1",
                "MLSERVER_HTTP_PORT": str(PORT),
                "MLSERVER_PARALLEL_WORKERS": "2",
                "MLSERVER_DEBUG": "false",
                "MLSERVER_MODEL_NAME": "model",
                "MLSERVER_MODEL_IMPLEMENTATION": f"{HERE}.mlserver_server.Runtime",
                "MLSERVER_MODEL_MAX_BATCH_SIZE": "32",
                "MLSERVER_MODEL_MAX_BATCH_TIME": "0.005",
            },
        ),
        path="/v2/models/model/infer",
        body=infer_base64,
        content_type="application/json",
    ),
    "ray-serve": Candidate("ray", ray_serve, path="/"),
}
