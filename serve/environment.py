"""Print what Ray needs in its environment before it starts, so that it can serve.

    source <(python -m serve.environment)           # before `ray start`, on each machine
    source <(python -m serve.environment --local)   # before `serve run FILE`, on one machine

--local keeps Ray on loopback, where no other machine reaches it.
"""

import os
import shlex
from collections.abc import Sequence

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from cluster import connect, serve_environment
from cluster.cli import CommandOptions, parse_options, run_command


class EnvironmentOptions(CommandOptions):
    """Print export lines with the variables that Ray needs before it starts, so that it serves."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.environment")

    local: bool = Field(False, description="For a Ray on this machine alone.")


def main(argv: Sequence[str]) -> None:
    options = parse_options(EnvironmentOptions, argv)
    serve_environment.prepare_local_serving()
    values = {name: os.environ[name] for name in serve_environment.variable_names()}
    if options.local:
        values |= connect.local_environment()
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    run_command(main)
