"""python -m cluster doctor [--storage.path PATH]"""

import argparse
from collections.abc import Sequence
from typing import Any

from cluster import connect, doctor, storage
from cluster.errors import Failed, run_command


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="python -m cluster")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what works here, what is missing, what to do")
    command.add_argument("--storage.path", dest="storage_path", default=storage.DEFAULT_PATH)
    arguments = parser.parse_args(argv)
    connect.prepare_environment()
    if not doctor.report(doctor.examine(arguments.storage_path)):
        raise Failed("something that is needed is missing; the table says what to do.")
    return {"healthy": True}


if __name__ == "__main__":
    run_command(main)
