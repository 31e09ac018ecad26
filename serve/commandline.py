"""Command lines of this package's commands."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from cluster.errors import UserError

Options = TypeVar("Options", bound=BaseModel)


def parse(command: type[BaseSettings], options: type[Options], argv: Sequence[str]) -> Options:
    """Return the options given. Raises UserError with one line that names the option.

    command: the options as settings, whose help is shown.
    """
    try:
        given = CliSettingsSource(command, cli_parse_args=list(argv), cli_exit_on_error=False)()
        return options.model_validate(given)
    except SettingsError as error:
        problem = str(error).removeprefix("error parsing CLI: ")
        raise UserError(f"{problem}; --help lists the options.") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise UserError(f"option --{name}: {first['msg'].lower()}.") from error
