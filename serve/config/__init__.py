"""All options of `serve run`."""

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
from serve.config.batching import BatchingOptions
from serve.config.sections import (
    AccessOptions,
    AutoscalingOptions,
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


# Made absolute by the process that reads the options, because replicas may run in another
# current directory.
StoragePath = Annotated[str, AfterValidator(storage.resolve_path)]


class ServeConfig(ServeSection):
    """Options of `serve run serve.app key=value …`, also as `args` of a Ray Serve config file."""

    model: str = Field(
        "models:/digits@production",
        min_length=1,
        description="Model to serve: models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URL "
        "of a bundle. When an alias moves to another version, the server loads that version.",
    )
    extra_versions: Names = Field(
        (),
        description="Further versions and aliases of the model to serve, such as candidate,2, at "
        "/v2/models/NAME/versions/VERSION.",
    )
    variant: str | None = Field(
        None,
        description="Variant to serve, one that the gate accepted. By default the bundle's default "
        "variant, or fp32 if it runs clearly faster on this machine.",
    )
    storage: StoragePath = Field(
        "runs",
        validate_default=True,
        description="Directory or URL of the storage that contains the registry. The server writes "
        "its request log, audit log and serving state there.",
    )
    replicas: str = Field(
        "1",
        description="Number of replicas, or MIN-MAX to scale with the load. 0-MAX scales to zero "
        "when idle; the next request then waits until a replica has started.",
    )
    threads: int = Field(
        1,
        ge=1,
        le=256,
        description="CPU threads of each replica's engine, and the cores that Ray reserves for it. "
        "Raise it for large models; for many small requests, raise replicas instead.",
    )
    shadow: float = Field(
        0,
        ge=0,
        le=1,
        description="Fraction of requests that are copied to the candidate version; its "
        "predictions are compared with production's and never returned. 0 skips this phase. Needs "
        "log.sample_rate > 0.",
    )
    canary: float = Field(
        0,
        ge=0,
        le=1,
        description="Fraction of clients, by API key or X-Client-Id, that the candidate version "
        "answers, after the shadow phase if there is one. 0 skips this phase. Needs "
        "log.sample_rate > 0.",
    )
    plugins: Names = Field(
        (),
        description="Python modules from which models may import classes, such as my_package; "
        "submodules are included. Set it for models with your own tasks, encoders or networks, and "
        "name only code that you trust.",
    )
    host: str = Field(
        HOST,
        min_length=1,
        description="Address to listen on. The default accepts connections from this machine only; "
        "0.0.0.0 accepts them from other machines.",
    )
    port: int = Field(HTTP_PORT, ge=1, le=65535, description="HTTP port.")
    grpc_port: int = Field(GRPC_PORT, ge=0, le=65535, description="gRPC port; 0 turns gRPC off.")
    access_log: Literal["all", "errors", "none"] = Field(
        "all",
        description="Requests to write to the access log, JSON lines in Ray's session logs: all, "
        "errors (status 400 and above) or none.",
    )
    traces: str | None = Field(
        None,
        description="OTLP endpoint to send a trace of each request to, such as "
        "http://HOST:4318/v1/traces. Off by default. Needs pip install 'halyard[traces]'.",
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
            raise ValueError("expected MIN-MAX with MIN less than MAX, and MAX at most 1000")
        return value

    @model_validator(mode="after")
    def _tls_whole(self) -> "ServeConfig":
        if (self.security.tls_cert is None) != (self.security.tls_key is None):
            raise ValueError("security.tls_cert and security.tls_key must be given together")
        if self.security.tls_client_ca and not self.security.tls_cert:
            raise ValueError("security.tls_client_ca needs security.tls_cert and security.tls_key")
        return self

    @model_validator(mode="after")
    def _rollout_whole(self) -> "ServeConfig":
        if (self.shadow or self.canary) and not self.model.endswith("@production"):
            raise ValueError("shadow and canary need model=models:/NAME@production")
        if (self.shadow or self.canary) and not self.log.sample_rate:
            raise ValueError(
                "shadow and canary need log.sample_rate > 0, because they decide by feedback on "
                "logged requests"
            )
        if (self.shadow or self.canary) and "candidate" in self.extra_versions:
            raise ValueError(
                "shadow and canary load the candidate; remove candidate from extra_versions"
            )
        return self

    @property
    def phases(self) -> list[tuple[str, float]]:
        """Phases of a rollout in order, each with its fraction of requests or clients."""
        found = [("shadow", self.shadow), ("canary", self.canary)]
        return [(phase, share) for phase, share in found if share]

    @property
    def replica_range(self) -> tuple[int, int]:
        """Minimum and maximum number of replicas; equal without autoscaling."""
        match = RANGE.fullmatch(self.replicas)
        return (int(match[1]), int(match[2])) if match else (int(self.replicas),) * 2

    @property
    def of_a_replica(self) -> "ServeConfig":
        """These options, with defaults for those that a replica does not use.

        Ray Serve restarts replicas whose options change; changes of the others restart nothing.
        """
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
        """Registry references of all versions to serve, `model` first."""
        name = re.split(r"[@/]", self.model.removeprefix("models:/"))[0]
        return [
            self.model,
            *(
                f"models:/{name}/{other}" if other.isdecimal() else f"models:/{name}@{other}"
                for other in self.extra_versions
            ),
        ]


class GatewayConfig(ServeSection):
    """Options of the gateway of several models; see serve/configs/multi.yaml."""

    models: list[str] = Field(
        min_length=1,
        description="Applications that serve the models. Each has the name of its model.",
    )
    security: AccessOptions = AccessOptions()
    limits: BodyLimits = BodyLimits()


Options = TypeVar("Options", bound=BaseModel)


def set_bundle_policy(modules: Sequence[str], root: str, public_keys: Sequence[str]) -> None:
    """Set which modules this process imports for models, and which signatures bundles need.

    modules: those whose classes a model may name. root: the absolute storage path; nothing below it
    is imported. public_keys: PEM files; without any, bundles need no signature. Raises UserError if
    a key cannot be read.
    """
    plugins.allow_modules(modules, storage=None if storage.is_url(root) else root)
    signature.require(public_keys)


def validate_options(values: Mapping[str, Any]) -> ServeConfig:
    """Return a server's options. Raises UserError for the first unknown or invalid one."""
    given = dict(values)
    # A config file has numbers and lists where a command line has strings.
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
    """Return a gateway's options. Raises UserError for the first unknown or invalid one."""
    return _validated(values, GatewayConfig)


def _names(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{option}" for option in _names(field.annotation))
        else:
            yield name


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with each `section.option` inside its section."""
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
            raise UserError(f"unknown option '{key}'; accepted options are {known}.") from error
        if first["type"] in ("model_type", "model_attributes_type"):
            raise UserError(f"'{key}' is a section; give {key}.OPTION=VALUE.") from error
        if not key:
            raise UserError(f"{problem}.") from error
        raise UserError(f"option {key}={first['input']}: {problem}.") from error
