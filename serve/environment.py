"""Print the environment variables that Ray must be started with to serve models.

    source <(python -m serve.environment)           # before `ray start`, on each machine
    source <(python -m serve.environment --local)   # before `serve run FILE`, on one machine

--local keeps Ray on loopback, where other machines cannot reach it.
"""

import os
import shlex
from collections.abc import Sequence

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from cluster import connect, serve_environment
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError
from cluster.ingress.certificates import Certificates


class EnvironmentOptions(CommandOptions):
    """Print export lines with the variables that Ray must be started with to serve models."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.environment")

    local: bool = Field(False, description="Keep Ray on loopback, for a single machine.")
    tls_cert: str | None = Field(None, description="PEM certificate that servers use for TLS.")
    tls_key: str | None = Field(None, description="PEM private key of the certificate.")
    tls_client_ca: str | None = Field(
        None, description="PEM certificates of the authorities that sign client certificates."
    )


def main(argv: Sequence[str]) -> None:
    """Print the export lines."""
    options = parse_options(EnvironmentOptions, argv)
    serve_environment.prepare_local_serving()
    values = {name: os.environ[name] for name in serve_environment.variable_names()}
    if options.tls_cert or options.tls_key or options.tls_client_ca:
        values |= _certificates(options)
    if options.local:
        values |= connect.local_environment()
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")


def _certificates(options: EnvironmentOptions) -> dict[str, str]:
    """Return the variables for the certificates. Raises UserError if they are unusable."""
    if not options.tls_cert or not options.tls_key:
        raise UserError("--tls-cert and --tls-key must be given together.")
    named = Certificates(options.tls_cert, options.tls_key, options.tls_client_ca)
    try:
        named.read()
    except ValueError as error:
        raise UserError(f"option --tls-cert: {error}.") from error
    return named.environment()


if __name__ == "__main__":
    run_command(main)
