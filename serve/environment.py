"""Print what Ray needs in its environment before it starts, so that it can serve.

    source <(python -m serve.environment)           # before `ray start`, on each machine
    source <(python -m serve.environment --local)   # before `serve run FILE`, on one machine

--local keeps Ray on loopback, where no other machine reaches it.
"""

import argparse
import os
import shlex
from collections.abc import Sequence

from cluster import connect, ingress


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.environment")
    parser.add_argument("--local", action="store_true", help="for a Ray on this machine alone")
    local = parser.parse_args(arguments).local
    ingress.prepare()
    values = {name: os.environ[name] for name in ingress.names()}
    if local:
        values |= connect.local_environment()
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
