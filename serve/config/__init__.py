"""Every option of a server."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster import storage
from cluster.errors import UserError
from serve.config.sections import (
    AccessOptions,
    AutoscalingOptions,
    BatchingOptions,
    BodyLimits,
    CacheOptions,
    DriftOptions,
    LimitOptions,
    LogOptions,
    Names,
    RolloutOptions,
    SecurityOptions,
    ServeSection,
)
from train.bundle import signature
from train.tasks import plugins

HOST, HTTP_PORT, GRPC_PORT = "127.0.0.1", 8000, 9000
RANGE = re.compile(r"(\d+)-(\d+)")
ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


# Resolved by the process that reads the options: others may have another current directory.
StoragePath = Annotated[str, AfterValidator(storage.resolve_path)]


class ServeConfig(ServeSection):
    """What `serve run serve.app key=value …` accepts."""

    model: str = Field(
        "models:/digits@production",
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, or the location of a bundle.",
    )
    extra_versions: Names = Field(
        (), description="Versions and aliases to serve beside the default one: candidate,2."
    )
    variant: str | None = Field(
        None, description="Variant to serve; the bundle's default when not given."
    )
    storage: StoragePath = Field(
        "runs", validate_default=True, description="Storage path whose registry has the model."
    )
    replicas: str = Field(
        "1", description="Number of replicas, or MIN-MAX; 0-MAX scales to zero when idle."
    )
    threads: int = Field(1, ge=1, le=256, description="Threads of each replica's engine.")
    shadow: float = Field(
        0, ge=0, le=1, description="Fraction of requests that are copied to the candidate."
    )
    canary: float = Field(
        0, ge=0, le=1, description="Fraction of clients whose requests the candidate answers."
    )
    plugins: Names = Field(
        (),
        description="Modules whose classes a model may name: my_package, and what is below it. "
        "A model is data; code that it names is imported only from these.",
    )
    host: str = Field(HOST, min_length=1, description="Address to listen on.")
    port: int = Field(HTTP_PORT, ge=1, le=65535, description="HTTP port.")
    grpc_port: int = Field(GRPC_PORT, ge=0, le=65535, description="gRPC port; 0 is none.")
    access_log: Literal["all", "errors", "none"] = Field(
        "all", description="Requests to write to the access log, JSON lines in Ray's session logs."
    )
    traces: str | None = Field(
        None, description="OTLP endpoint (http://HOST:4318/v1/traces) that traces are sent to."
    )
    autoscaling: AutoscalingOptions = AutoscalingOptions()
    batching: BatchingOptions = BatchingOptions()
    limits: LimitOptions = LimitOptions()
    cache: CacheOptions = CacheOptions()
    security: SecurityOptions = SecurityOptions()
    drift: DriftOptions = DriftOptions()
    log: LogOptions = LogOptions()
    rollout: RolloutOptions = RolloutOptions()

    @field_validator("replicas")
    @classmethod
    def _replicas_in_order(cls, value: str) -> str:
        match = RANGE.fullmatch(value)
        if match is None and (not value.isdecimal() or not 1 <= int(value) <= 1000):
            raise ValueError("expected a number from 1 to 1000, or MIN-MAX such as 1-4")
        if match and not 0 <= int(match[1]) < int(match[2]) <= 1000:
            raise ValueError("the first of MIN-MAX must be less than the second, at most 1000")
        return value

    @model_validator(mode="after")
    def _tls_whole(self) -> "ServeConfig":
        if (self.security.tls_cert is None) != (self.security.tls_key is None):
            raise ValueError("security.tls_cert and security.tls_key go together")
        if self.security.tls_client_ca and not self.security.tls_cert:
            raise ValueError("security.tls_client_ca needs security.tls_cert and security.tls_key")
        return self

    @model_validator(mode="after")
    def _rollout_whole(self) -> "ServeConfig":
        if (self.shadow or self.canary) and not self.model.endswith("@production"):
            raise ValueError("shadow and canary need model=models:/NAME@production")
        if (self.shadow or self.canary) and not self.log.sample_rate:
            raise ValueError("shadow and canary need log.sample_rate; feedback on the log decides")
        if (self.shadow or self.canary) and "candidate" in self.extra_versions:
            raise ValueError("shadow and canary find the candidate; leave it out of extra_versions")
        return self

    @property
    def phases(self) -> list[tuple[str, float]]:
        """What a candidate goes through, with its share, in order."""
        found = [("shadow", self.shadow), ("canary", self.canary)]
        return [(phase, share) for phase, share in found if share]

    @property
    def replica_range(self) -> tuple[int, int]:
        """Least and most replicas; equal without autoscaling."""
        match = RANGE.fullmatch(self.replicas)
        return (int(match[1]), int(match[2])) if match else (int(self.replicas),) * 2

    @property
    def of_a_replica(self) -> "ServeConfig":
        """Without what is not a replica's: that may change, and the replicas that run stay."""
        fields = type(self).model_fields
        outside = ("replicas", "autoscaling")
        return self.model_copy(update={name: fields[name].default for name in outside})

    @property
    def local_url(self) -> str:
        """URL at which a client on this machine reaches the server."""
        host = ALL_INTERFACES.get(self.host, self.host)
        return f"{'https' if self.security.tls_cert else 'http'}://{host}:{self.port}"

    @property
    def references(self) -> list[str]:
        """`model`, and the others to serve beside it, in the words of the registry."""
        name = re.split(r"[@/]", self.model.removeprefix("models:/"))[0]
        return [
            self.model,
            *(
                f"models:/{name}/{other}" if other.isdecimal() else f"models:/{name}@{other}"
                for other in self.extra_versions
            ),
        ]


class GatewayConfig(ServeSection):
    """What the gateway of several models accepts."""

    models: list[str] = Field(
        min_length=1, description="Applications of models, named as their models are."
    )
    security: AccessOptions = AccessOptions()
    limits: BodyLimits = BodyLimits()


Options = TypeVar("Options", bound=BaseModel)


def set_bundle_policy(modules: Sequence[str], root: str, public_keys: Sequence[str]) -> None:
    """Let this process import classes that a model names, of some modules, and load bundles that
    one of the keys has signed; any for no keys.

    root: the storage path, absolute, below which nothing is imported. Raises UserError where a key
    cannot be used.
    """
    plugins.allow_modules(modules, storage=None if storage.is_url(root) else root)
    signature.require(public_keys)


def validate_options(values: Mapping[str, Any]) -> ServeConfig:
    """Raises UserError for the first key that is unknown or wrong."""
    given = dict(values)
    # A config file has numbers and lists where a command line has words.
    if isinstance(given.get("replicas"), int):
        given["replicas"] = str(given["replicas"])
    if isinstance(given.get("extra_versions"), int):
        given["extra_versions"] = [str(given["extra_versions"])]
    if isinstance(given.get("extra_versions"), list):
        given["extra_versions"] = [str(each) for each in given["extra_versions"]]
    config = _validated(given, ServeConfig)
    if config.extra_versions and not config.model.startswith("models:/"):
        versions = ",".join(config.extra_versions)
        raise UserError(f"option extra_versions={versions} needs a registered model, models:/….")
    return config


def validate_gateway_options(values: Mapping[str, Any]) -> GatewayConfig:
    """Raises UserError for the first key that is unknown or wrong."""
    return _validated(values, GatewayConfig)


def _names(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{option}" for option in _names(field.annotation))
        else:
            yield name


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give `section.option` to its section."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, option = key.partition(".")
        options = nested.get(section, {})
        if dot and isinstance(options, Mapping):
            nested[section] = {**options, option: value}
        else:
            nested[key] = value
    return nested


def _validated(values: Mapping[str, Any], kind: type[Options]) -> Options:
    try:
        return kind.model_validate(_nested(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        if first["type"] == "extra_forbidden":
            known = ", ".join(_names(kind))
            raise UserError(f"unknown option '{key}'; accepted are {known}.") from error
        if first["type"] in ("model_type", "model_attributes_type"):
            raise UserError(f"'{key}' is a section; give {key}.OPTION=VALUE.") from error
        if not key:
            raise UserError(f"{problem}.") from error
        raise UserError(f"option {key}={first['input']}: {problem}.") from error
