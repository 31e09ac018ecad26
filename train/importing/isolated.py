"""A process that runs and converts a model which is not trusted. Shapes: N records, K classes.

`run_isolated` starts it. Reading a pickle runs the code in it, so the process is cut off from the
network before it reads anything, it gets none of the environment, and what it returns are numbers,
JSON and an ONNX file. It starts without numpy, whose threads would not be cut off.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.errors import UserError

REQUEST, FACTS, MODEL, ANSWERS = "request.json", "facts.json", "model.onnx", "answers.npz"
# Numbers of the system calls that open a socket, create an io_uring or reach into another process,
# with the number that filters know the architecture by.
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 425, 101, 310, 311)),
    "aarch64": (0xC00000B7, (198, 425, 117, 270, 271)),
}
# Functions that run and convert a model of each format.
ADAPTERS = {
    "pickle": "train.importing.originals.scikit_learn:adapt_pickle",
    "skops": "train.importing.originals.scikit_learn:adapt_skops",
    "xgboost": "train.importing.originals.boosted_trees:adapt_xgboost_file",
    "lightgbm": "train.importing.originals.boosted_trees:adapt_lightgbm_file",
    "onnx": "train.importing.onnx_file:adapt_file",
    "torch": "train.importing.originals.torch_module:adapt_module",
    "transformers": "train.importing.originals.text_classifier:adapt_text_classifier",
}
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from train.importing.isolated import main; main(sys.argv[2])"
)
ROOT = Path(__file__).resolve().parents[2]


class Unsuitable(Exception):
    """The model cannot be imported; the message gives the reason."""


def run_isolated(
    path: Path,
    model_format: str,
    columns: list[str],
    folder: Path,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run and convert a model in a process of its own; return what is known of it.

    path: file of the model. model_format: a key of ADAPTERS. columns: the sample's columns besides
    the target, which `Sample.write` has written to the folder. options: further arguments of the
    format's function. Afterwards, the folder also
    has the converted model, MODEL, and the model's own outputs for the sample, ANSWERS.
    Raises UserError with the reason if the model cannot be run or converted.
    """
    request = {
        "path": str(path.resolve()),
        "format": model_format,
        "columns": columns,
        "options": dict(options or {}),
    }
    (folder / REQUEST).write_text(json.dumps(request))
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-I", "-c", START, str(ROOT), str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"its process ended with {done.returncode}"
        raise UserError(f"'{path}' cannot be imported: {reason[:500].rstrip('.')}.")
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def main(folder: str) -> None:
    """Run and convert the model that REQUEST in the folder names."""
    place = Path(folder)
    request = json.loads((place / REQUEST).read_text())
    if sys.platform == "linux" and platform.machine() in FORBIDDEN:
        forbid_network()
    try:
        facts = _adapted(place, request)
    except Exception as error:  # other libraries raise many classes
        kind = "" if isinstance(error, Unsuitable) else f"{type(error).__name__}: "
        sys.exit(f"{kind}{' '.join(str(error).split())}")
    (place / FACTS).write_text(json.dumps(facts))


def _adapted(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    from train.importing.sample import Sample

    module, _, function = ADAPTERS[request["format"]].partition(":")
    sample = Sample.read(folder, request["columns"])
    facts, outputs = getattr(import_module(module), function)(
        Path(request["path"]), sample, folder / MODEL, **request["options"]
    )
    import numpy as np

    np.savez(folder / ANSWERS, allow_pickle=False, **outputs)
    return dict(facts)


def forbid_network() -> None:
    """Forbid this process and its children to open sockets. Raises OSError if that fails."""
    architecture, calls = FORBIDDEN[platform.machine()]
    load, is_equal, is_at_least, end = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050001, 0x7FFF0000
    # Each instruction: its code, how many to skip if true and if false, and its operand. Calls of
    # another architecture have other numbers, as have those that add 2^30 for 32-bit pointers.
    program = [
        *((load, 0, 0, 4), (is_equal, 1, 0, architecture), (end, 0, 0, refuse)),
        *((load, 0, 0, 0), (is_at_least, 0, 1, 1 << 30), (end, 0, 0, refuse)),
    ]
    for call in calls:
        program += [(is_equal, 0, 1, call), (end, 0, 0, refuse)]
    program.append((end, 0, 0, allow))
    instructions = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    filters = _Filters(len(program), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, mode_filter = 38, 22, 2
    for arguments in (
        (no_new_privileges, 1, 0, 0, 0),
        (seccomp, mode_filter, ctypes.byref(filters), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the process cannot be cut off from the network")


class _Instruction(ctypes.Structure):
    _fields_ = [
        *(("code", ctypes.c_uint16), ("skip_true", ctypes.c_uint8)),
        *(("skip_false", ctypes.c_uint8), ("operand", ctypes.c_uint32)),
    ]


class _Filters(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]
