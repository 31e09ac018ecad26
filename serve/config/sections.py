"""Sections of a server's options: `section.option` on a command line, nested in a config file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cluster.ingress.certificates import Certificates


def _split(value: Any) -> Any:
    """Split a comma-separated string, as a command line has where a config file has a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Replicas may have another current folder."""
    return tuple(str(Path(path).resolve()) for path in paths)


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
PublicKeys = Annotated[Names, AfterValidator(_absolute)]


class ServeSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingOptions(ServeSection):
    target_rows: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Rows in progress per replica to aim at; from the measured profile by default.",
    )
    upscale_delay_s: float = Field(
        1, ge=0, le=3600, description="Seconds of overload before replicas are added."
    )
    downscale_delay_s: float = Field(
        60, ge=0, le=86_400, description="Seconds of underload before replicas are removed."
    )


class BatchingOptions(ServeSection):
    max_rows: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Most rows per batch; from the measured profile by default.",
    )
    wait_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="How long an idle engine waits for a batch to fill; 0 suits most models.",
    )


class BodyLimits(ServeSection):
    """Limits on request bodies, for a model and for the gateway of several."""

    max_body_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31, description="Largest request body; larger ones get 413."
    )
    body_timeout_s: float = Field(
        10, gt=0, le=3600, description="Longest that a body may take to arrive; then 408."
    )
    max_pending_bytes: int = Field(
        2**29,
        ge=1,
        le=2**40,
        description="Memory of each replica for bodies that are arriving; then 503.",
    )


class LimitOptions(BodyLimits):
    max_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Most rows in one request; more get 413."
    )
    max_json_bytes: int = Field(
        16 * 2**20,
        ge=1,
        le=2**31,
        description="Largest JSON in a request, which costs far more to read than binary data; "
        "larger ones get 413.",
    )
    max_pixels: int = Field(
        2**26, ge=1, le=2**40, description="Most pixels in the images of a request; more get 413."
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore", description="Fields of a record that the model does not take."
    )
    max_queue_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Most rows waiting per replica; more get 503."
    )
    timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="Longest that a request waits for its response; a client may ask for less.",
    )
    priorities: int = Field(
        3, ge=1, le=100, description="Priority levels: 1 goes first; the middle one is the default."
    )


class CacheOptions(ServeSection):
    max_bytes: int = Field(
        0, ge=0, le=2**40, description="Memory of each replica for responses; 0 turns it off."
    )
    ttl_s: float = Field(300, gt=0, le=1e9, description="How long a response is kept.")


class DriftOptions(ServeSection):
    rows_per_s: float = Field(
        200,
        ge=0,
        le=1e6,
        description="Most rows per second that each replica samples; 0 turns monitoring off.",
    )
    window_rows: int = Field(
        500,
        ge=50,
        le=1_000_000,
        multiple_of=50,
        description="Sampled rows that are compared with the baseline at a time.",
    )
    alarm_rate: float = Field(
        0.001,
        ge=0.001,
        le=0.5,
        description="Fraction of windows with a false alarm, over all statistics together.",
    )


class LogOptions(ServeSection):
    """The request log."""

    sample_rate: float = Field(
        0, ge=0, le=1, description="Fraction of requests that are logged and accept feedback."
    )
    max_bytes: int = Field(
        2**30,
        ge=1,
        le=2**50,
        description="Largest size of a model's logs; the oldest files are deleted.",
    )
    retention_days: float = Field(
        30, gt=0, le=36_500, description="How long logged requests are kept."
    )
    exclude_fields: Names = Field((), description="Fields that are not logged: name,email.")
    hash_fields: Names = Field(
        (),
        description="Fields of which only an HMAC-SHA256 is logged, by the key in HALYARD_LOG_KEY, "
        "or else by one that changes with each start.",
    )
    flush_s: float = Field(10, gt=0, le=3600, description="Longest that rows wait to be written.")
    file_rows: int = Field(2000, ge=1, le=10**6, description="Rows after which a file is full.")


class RolloutOptions(ServeSection):
    min_labels: int = Field(
        200,
        ge=10,
        le=10_000_000,
        description="Requests with feedback that a decision about accuracy needs.",
    )
    noninferiority_margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="How much worse than production a candidate may be, in accuracy or as a "
        "fraction of the RMSE: one that is worse by this or more is promoted in 2.5 % of cases at "
        "most.",
    )
    max_latency_ratio: float = Field(
        2,
        ge=1,
        le=1000,
        description="Largest ratio of the candidate's 95th percentile of latency to production's.",
    )


class AccessOptions(ServeSection):
    """Access control, for a model and for the gateway of several."""

    allowed_hosts: Names = Field(
        (),
        description="Names by which clients may ask for the server, besides this machine's own "
        "name and its addresses: api.example.com, *.example.com; * for every name.",
    )
    api_keys_file: str | None = Field(
        None,
        description="File of hashed API keys (python -m serve.security). Without it, everyone who "
        "reaches the server may send requests, and only its own machine may change what is served.",
    )
    metrics_without_key: bool = Field(
        False, description="Answer /metrics without a key, for a Prometheus that has none."
    )


class SecurityOptions(AccessOptions):
    require_signature: PublicKeys = Field(
        (),
        description="Public keys, PEM files; only bundles that one of them has signed are loaded.",
    )
    tls_cert: str | None = Field(
        None, description="PEM certificate; the server speaks TLS, over HTTP and gRPC."
    )
    tls_key: str | None = Field(None, description="PEM key of the certificate.")
    tls_client_ca: str | None = Field(
        None,
        description="PEM certificates of the authorities that sign those of clients; a client "
        "without one is refused.",
    )

    @property
    def certificates(self) -> Certificates | None:
        if not self.tls_cert or not self.tls_key:
            return None
        return Certificates(self.tls_cert, self.tls_key, self.tls_client_ca)
