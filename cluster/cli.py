"""Shared by all commands: parsing of options, one-line error messages, and exit codes."""

import argparse
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cluster.errors import EXIT_FAILED, EXIT_USER_ERROR, CommandFailed, UserError, disk_is_full


class CommandOptions(BaseSettings):
    """Base of a command's options, which are read from the command line only, not the environment.

    The docstring of a subclass is the text of --help; its `cli_prog_name` is the program's name.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        # The word for None, shown by --help. With pydantic's default, a "null" that a script
        # passes on by mistake would be read as None and lift a limit.
        cli_parse_none_str="not given",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


Options = TypeVar("Options", bound=CommandOptions)

# Ends of a description that add nothing to it.
NO_DEFAULT = re.compile(r" \(default: (None|not given|\(\)|\[\]|\{\})\)$")
# Words of --help for pydantic's names of types.
TYPES = {
    "bool": "true|false",
    "dict": "JSON",
    "float": "NUMBER",
    "int": "INTEGER",
    "list": "LIST",
    "str": "TEXT",
    "tuple": "LIST",
    "Path": "PATH",
}


def parse_options(
    command: type[Options], argv: Sequence[str], *, verbatim: Collection[str] = ()
) -> Options:
    """Return the options on a command line. --help prints all options and exits.

    verbatim: list options, such as "--header", whose values may contain commas. Each use of such
    an option adds one entry; the values of other list options are split at commas.
    Raises UserError, with one line that names the option, if an option is wrong.
    """
    rest, entries = _take_verbatim(argv, verbatim)
    try:
        return command.model_validate({**read_arguments(command, rest), **entries})
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if isinstance(part, str)]
        # The location begins with the names of subcommands.
        name = (path[-1] if path else "").replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"option --{name}: {message[:1].lower()}{message[1:]}.") from error


def read_arguments(
    command: type[BaseSettings], argv: Sequence[str], *, common: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the options on a command line, grouped by section, without validating values.

    common: options that --help lists first, such as "--data.train".
    Raises UserError for an unknown option, or an option without its value.
    """
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        command, cli_exit_on_error=False
    )
    _arrange_help(source.root_parser, common)
    try:
        return source(args=list(argv))()
    except SettingsError as error:
        problem = str(error).removeprefix("error parsing CLI: ")
        program = command.model_config["cli_prog_name"]
        raise UserError(f"{problem}; '{program} --help' lists the options.") from error


def _arrange_help(parser: argparse.ArgumentParser, common: Sequence[str]) -> None:
    """Name the types of values plainly; if `common` is given, list those options first."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _arrange_help(inner, ())
            continue
        if isinstance(action.metavar, str):
            action.metavar = _plain_type(action.metavar)
        if action.help:
            action.help = NO_DEFAULT.sub("", action.help)
            # A config file may give what the command line does not.
            action.help = action.help.removesuffix(" (required)") if common else action.help
    if common:
        parser.usage = f"{parser.prog} [--OPTION VALUE ...]"
        group = argparse._ArgumentGroup(parser, "common options")
        by_name = {name: action for action in parser._actions for name in action.option_strings}
        group._group_actions = [by_name[name] for name in common]
        parser._action_groups.insert(0, group)


def _plain_type(metavar: str) -> str:
    """Return the word for a type of values, as help shows it, for pydantic's."""
    plain = re.sub(r"^\{(.*),None\}$", r"\1", metavar)
    kind = re.split(r"[\[,]", plain)[0]
    return plain if plain.startswith("{") else TYPES.get(kind, plain)


def _take_verbatim(
    argv: Sequence[str], names: Collection[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into the values of the options `names`, by field, and all the rest."""
    rest: list[str] = []
    entries: dict[str, list[str]] = {}
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        if not equals:
            try:
                value = next(arguments)
            except StopIteration:
                raise UserError(f"option {name}: expected a value.") from None
        entries.setdefault(name.removeprefix("--").replace("-", "_"), []).append(value)
    return rest, entries


def run_command(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> NoReturn:
    """Run a command's `main` on the process's arguments, then exit.

    The return value of `main` is printed on stdout as one line of JSON. The exit status is 0 for
    success, 2 for wrong input (one line on stderr, no traceback) and 1 for any other failure.
    """
    # Treat SIGTERM, which process managers send, like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = main(sys.argv[1:])
    except UserError as error:
        _exit(EXIT_USER_ERROR, str(error))
    except CommandFailed as error:
        _exit(EXIT_FAILED, str(error))
    except KeyboardInterrupt:
        _exit(EXIT_FAILED, "interrupted")
    except Exception as error:
        if disk_is_full(error):
            _exit(
                EXIT_FAILED,
                "the disk is full. Complete files are kept; free some space and run this again.",
            )
        traceback.print_exc()
        sys.exit(EXIT_FAILED)
    if result is not None:
        print(json.dumps(result), flush=True)
    sys.exit(0)


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
