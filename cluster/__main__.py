"""python -m cluster doctor [--storage.path PATH]"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from cluster import connect, doctor, storage
from cluster.errors import EXIT_FAILED, run_command


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="python -m cluster")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what works here, what is missing, what to do")
    command.add_argument("--storage.path", dest="storage_path", default=storage.DEFAULT_PATH)
    arguments = parser.parse_args(argv)
    connect.prepare_environment()
    healthy = doctor.report(doctor.examine(arguments.storage_path))
    if not healthy:
        sys.exit(EXIT_FAILED)
    return {"healthy": healthy}


if __name__ == "__main__":
    run_command(main)
