"""Every knob of a server."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster import storage
from cluster.errors import UserError
from train.tasks import plugins

HOST, HTTP_PORT, GRPC_PORT = "127.0.0.1", 8000, 9000
RANGE = re.compile(r"(\d+)-(\d+)")


def _listed(value: Any) -> Any:
    """A command line has a comma between names where a config file has a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class SecurityConfig(BaseModel):
    """Options of the section `security`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_hosts: Names = Field(
        (),
        description="Names by which clients may ask for the server, besides this machine's own "
        "name and its addresses: api.example.com, *.example.com; * for every name.",
    )


class ServeConfig(BaseModel):
    """What `serve run serve.app key=value …` accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "models:/digits@production",
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, or the location of a bundle.",
    )
    also: str = Field(
        "", description="Versions and aliases of the model to serve beside it, such as candidate,2."
    )
    variant: str | None = Field(
        None, description="Variant to serve; the bundle's default when not given."
    )
    storage: str = Field("runs", description="Storage path whose registry has the model.")

    replicas: str = Field(
        "1", description="Copies of the model, or MIN-MAX; 0-MAX lets it go when nobody asks."
    )
    threads: int = Field(1, ge=1, le=256, description="Threads of each replica's engine.")
    target_rows: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Rows in progress per replica that autoscaling aims at; from the measured "
        "profile when not given.",
    )
    upscale_delay_s: float = Field(
        1, ge=0, le=3600, description="How long there must be too much to do."
    )
    downscale_delay_s: float = Field(
        60, ge=0, le=86_400, description="How long there must be too little to do."
    )

    max_batch_rows: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Most rows that the engine is given at once; from the measured profile when "
        "not given.",
    )
    batch_wait_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="How long an idle engine waits for a batch to fill; 0 is best for most.",
    )
    max_queue_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Waiting rows per replica before 503 is answered."
    )
    timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="Longest that a request waits for its answer; a client may ask for less.",
    )
    priorities: int = Field(
        3, ge=1, le=100, description="Levels of priority: 1 goes first; the middle one is default."
    )

    max_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Most rows in one request; more is answered by 413."
    )
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31, description="Largest request body; more is answered by 413."
    )
    max_json_bytes: int = Field(
        16 * 2**20,
        ge=1,
        le=2**31,
        description="Largest JSON in a request, which costs far more to read than binary data; "
        "more is answered by 413.",
    )
    max_pixels: int = Field(
        2**26, ge=1, le=2**40, description="Most pixels of a request's images together; then 413."
    )
    max_pending_bytes: int = Field(
        2**29,
        ge=1,
        le=2**40,
        description="Memory of each replica for bodies that arrive; then 503.",
    )
    body_timeout_s: float = Field(
        10, gt=0, le=3600, description="Longest that a body may take to arrive; then 408."
    )

    cache_bytes: int = Field(
        0, ge=0, le=2**40, description="Memory of each replica for answers given; 0 keeps none."
    )
    cache_ttl_s: float = Field(300, gt=0, le=1e9, description="How long an answer is kept.")

    monitor_rows_per_s: float = Field(
        200,
        ge=0,
        le=1e6,
        description="Rows per second of each replica that the monitor counts; 0 switches it off.",
    )
    drift_window: int = Field(
        500,
        ge=50,
        le=1_000_000,
        multiple_of=50,
        description="Counted rows that are compared with the baseline at a time.",
    )
    drift_alarm_rate: float = Field(
        0.001,
        ge=0.001,
        le=0.5,
        description="Share of the windows with any alarm when nothing has drifted.",
    )

    log_share: float = Field(
        0, ge=0, le=1, description="Share of the requests that are logged and take feedback."
    )
    log_bytes: int = Field(
        2**30, ge=2**20, le=2**50, description="Most bytes of a model's request log."
    )
    log_days: float = Field(30, gt=0, le=36_500, description="How long logged requests are kept.")
    log_drop: str = Field("", description="Fields that are not logged, such as name,email.")
    log_hash: str = Field("", description="Fields of which only a keyed hash is logged.")

    shadow: float = Field(
        0, ge=0, le=1, description="Share of the requests of which the candidate gets a copy."
    )
    canary: float = Field(
        0, ge=0, le=1, description="Share of the clients that the candidate answers."
    )
    rollout_labelled: int = Field(
        200,
        ge=10,
        le=10_000_000,
        description="Records with feedback before a candidate is promoted.",
    )
    rollout_margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="How much worse a candidate may be, for all that its feedback tells.",
    )
    rollout_latency: float = Field(
        2,
        ge=1,
        le=1000,
        description="How many times production's 95th percentile a candidate's may be.",
    )

    plugins: Names = Field(
        (),
        description="Modules whose classes a model may name: my_package, and what is below it. "
        "A model is data; code that it names is imported only from these.",
    )

    security: SecurityConfig = SecurityConfig()
    keys: str | None = Field(
        None,
        description="File of hashed keys (python -m serve.security). Without, all who reach the "
        "server may ask, and changes are for its own machine.",
    )
    open_metrics: bool = Field(
        False, description="Answer /metrics without a key, for a Prometheus that has none."
    )
    tls_cert: str | None = Field(None, description="PEM certificate; the server speaks HTTPS.")
    tls_key: str | None = Field(None, description="PEM key of the certificate.")
    host: str = Field(HOST, min_length=1, description="Address to listen on.")
    port: int = Field(HTTP_PORT, ge=1, le=65535, description="HTTP port.")
    grpc_port: int = Field(GRPC_PORT, ge=0, le=65535, description="gRPC port; 0 is none.")

    access_log: Literal["all", "errors", "none"] = Field(
        "all", description="Which requests are logged, as JSON lines in Ray's session logs."
    )
    traces: str | None = Field(
        None, description="OTLP endpoint (http://HOST:4318/v1/traces) that gets a trace of each."
    )

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
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self

    @model_validator(mode="after")
    def _rollout_whole(self) -> "ServeConfig":
        if (self.shadow or self.canary) and not self.model.endswith("@production"):
            raise ValueError("shadow and canary need model=models:/NAME@production")
        if (self.shadow or self.canary) and not self.log_share:
            raise ValueError("shadow and canary need log_share, by whose feedback they decide")
        if (self.shadow or self.canary) and "candidate" in self.also.replace(" ", "").split(","):
            raise ValueError("shadow and canary find the candidate; leave it out of 'also'")
        return self

    @property
    def phases(self) -> list[tuple[str, float]]:
        """What a candidate goes through, with its share, in order."""
        found = [("shadow", self.shadow), ("canary", self.canary)]
        return [(phase, share) for phase, share in found if share]

    @property
    def replica_range(self) -> tuple[int, int]:
        """Least and most replicas; the same where there is no autoscaling."""
        match = RANGE.fullmatch(self.replicas)
        return (int(match[1]), int(match[2])) if match else (int(self.replicas),) * 2

    @property
    def of_a_replica(self) -> "ServeConfig":
        """Without what is not a replica's: that may change, and the replicas that run stay."""
        fields = type(self).model_fields
        outside = ("replicas", "target_rows", "upscale_delay_s", "downscale_delay_s")
        return self.model_copy(update={name: fields[name].default for name in outside})

    @property
    def references(self) -> list[str]:
        """`model`, and the others to serve beside it, in the words of the registry."""
        others = [part.strip() for part in self.also.split(",") if part.strip()]
        name = re.split(r"[@/]", self.model.removeprefix("models:/"))[0]
        return [
            self.model,
            *(
                f"models:/{name}/{other}" if other.isdecimal() else f"models:/{name}@{other}"
                for other in others
            ),
        ]


class FrontConfig(BaseModel):
    """What the front of several models accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = Field(
        min_length=1, description="Applications of models, named as their models are."
    )
    security: SecurityConfig = SecurityConfig()
    keys: str | None = Field(None, description="File of hashed keys, as of the models.")
    open_metrics: bool = Field(False, description="Answer /metrics without a key.")
    max_body_bytes: int = Field(64 * 2**20, ge=1, le=2**31, description="Largest request body.")
    body_timeout_s: float = Field(10, gt=0, le=3600, description="Longest that a body may take.")
    max_pending_bytes: int = Field(
        2**29, ge=1, le=2**40, description="Memory for bodies that arrive; then 503."
    )


Options = TypeVar("Options", bound=BaseModel)


def allow(modules: Sequence[str], path: str) -> None:
    """Let this process import classes that a model names, of some modules.

    path: the storage path, below which nothing is imported.
    """
    root = storage.resolve(path)
    plugins.allow(modules, storage=None if storage.is_url(root) else root)


def validate(values: Mapping[str, Any]) -> ServeConfig:
    """Raises UserError for the first key that is unknown or wrong."""
    given = dict(values)
    # A config file has numbers and lists where a command line has words.
    for key in ("replicas", "also"):
        if isinstance(given.get(key), int):
            given[key] = str(given[key])
        if isinstance(given.get(key), list):
            given[key] = ",".join(map(str, given[key]))
    config = _validated(given, ServeConfig)
    if config.also and not config.model.startswith("models:/"):
        raise UserError(f"option also={config.also} needs a model of the registry, models:/….")
    return config


def validate_front(values: Mapping[str, Any]) -> FrontConfig:
    """Raises UserError for the first key that is unknown or wrong."""
    return _validated(values, FrontConfig)


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
        if not key:
            raise UserError(f"{problem}.") from error
        raise UserError(f"option {key}={first['input']}: {problem}.") from error
