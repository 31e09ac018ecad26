"""Validation of options, with a message of one line about the first invalid field."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ValidationError,
)

from cluster.errors import UserError

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def validate_as(model: type[AnyModel], values: Mapping[str, Any]) -> AnyModel:
    """Validate options by a pydantic model. Raises UserError for the first invalid field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(describe_error(error, model)) from error


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line with the first invalid field, its value and what is accepted."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        accepted = ", ".join(_fields(model, path[:-1]))
        return f"unknown option '{where}'; accepted options are {accepted}."
    if first["type"] == "missing":
        return f"option '{where}' is missing; give --{where} VALUE or add it to the config file."
    message = first["msg"].removeprefix("Value error, ")
    if not where:  # an error of a model validator concerns several options
        return f"{message}."
    message = message[0].lower() + message[1:]
    if isinstance(first["input"], Mapping):  # a whole section, of which the message names options
        return f"section '{where}': {message}."
    return f"option '{where}' is {first['input']!r}; {message}."


def _fields(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
