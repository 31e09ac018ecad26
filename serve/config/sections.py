"""Sections of a server's options: `section.option` on a command line, nested in a config file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cluster.ingress.certificates import Certificates


def _split(value: Any) -> Any:
    """Split a comma-separated string of a command line; a config file has a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Make paths absolute, because replicas may run in another current directory."""
    return tuple(str(Path(path).resolve()) for path in paths)


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
PublicKeys = Annotated[Names, AfterValidator(_absolute)]


class ServeSection(BaseModel):
    """Base of all options; unknown ones are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingOptions(ServeSection):
    """When replicas are added and removed; for replicas=MIN-MAX."""

    target_rows: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Rows in progress per replica that autoscaling aims at. By default two batches "
        "of the size with the highest measured throughput. Lower it to add replicas earlier.",
    )
    upscale_delay_s: float = Field(
        1,
        ge=0,
        le=3600,
        description="Seconds of overload before replicas are added. Raise it to ignore bursts.",
    )
    downscale_delay_s: float = Field(
        60,
        ge=0,
        le=86_400,
        description="Seconds of low load before replicas are removed. Raise it to bridge pauses.",
    )


class BodyLimits(ServeSection):
    """Limits on request bodies, for a model and for the gateway of several models."""

    max_body_bytes: int = Field(
        64 * 2**20,
        ge=1,
        le=2**31,
        description="Maximum request body in bytes, by default 64 MiB; larger ones get 413.",
    )
    body_timeout_s: float = Field(
        10,
        gt=0,
        le=3600,
        description="Seconds for a body to arrive, then 408. Raise it for slow networks.",
    )
    max_pending_bytes: int = Field(
        2**29,
        ge=1,
        le=2**40,
        description="Memory of each replica for request bodies that are arriving, in bytes, by "
        "default 512 MiB; requests beyond it get 503.",
    )


class LimitOptions(BodyLimits):
    """Limits on requests and on the queue; a request beyond one is refused."""

    max_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Maximum rows in one request; more get 413."
    )
    max_json_bytes: int = Field(
        16 * 2**20,
        ge=1,
        le=2**31,
        description="Maximum JSON in a request in bytes, by default 16 MiB; larger ones get 413. "
        "Lower than max_body_bytes, because JSON takes far longer to parse than binary tensors.",
    )
    max_pixels: int = Field(
        2**26,
        ge=1,
        le=2**40,
        description="Maximum pixels of all images in a request, by default 2^26; more get 413.",
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="What to do with fields that the model does not use: ignore them, or refuse "
        "the request with 400. Choose refuse to detect misspelt field names.",
    )
    max_queue_rows: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Maximum rows waiting in the queue of a replica; requests beyond it get 503. "
        "Raise it for larger bursts; lower it to refuse requests sooner.",
    )
    timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="Seconds within which a request must be answered; clients may set a shorter "
        "time. A request that cannot finish in time gets 503 at once; one that times out gets 504.",
    )
    priorities: int = Field(
        3,
        ge=1,
        le=100,
        description="Number of priority levels. A request's priority parameter sets its level: 1 "
        "is served first; the middle level is the default.",
    )


class CacheOptions(ServeSection):
    """The response cache: identical records get the stored prediction."""

    max_bytes: int = Field(
        0,
        ge=0,
        le=2**40,
        description="Memory of each replica for cached responses, in bytes; 0 turns the cache off. "
        "Turn it on if clients repeat identical requests.",
    )
    ttl_s: float = Field(
        300, gt=0, le=1e9, description="Seconds after which a cached response expires."
    )


class DriftOptions(ServeSection):
    """Drift monitoring: samples of the traffic are compared with the bundle's baseline."""

    rows_per_s: float = Field(
        200,
        ge=0,
        le=1e6,
        description="Maximum rows per second that each replica samples; 0 turns monitoring off.",
    )
    window_rows: int = Field(
        500,
        ge=50,
        le=1_000_000,
        multiple_of=50,
        description="Sampled rows, of all replicas, that are compared with the baseline at a time. "
        "Smaller windows detect strong drift sooner and miss weak drift.",
    )
    alarm_rate: float = Field(
        0.001,
        ge=0.001,
        le=0.5,
        description="Fraction of windows that may raise a false alarm, over all statistics "
        "together. Raise it to detect weaker drift.",
    )


class LogOptions(ServeSection):
    """The request log: Parquet files of requests and feedback below the storage path."""

    sample_rate: float = Field(
        0,
        ge=0,
        le=1,
        description="Fraction of requests that are logged and accept feedback; 0 turns both off. "
        "Rollouts and retraining need it.",
    )
    max_bytes: int = Field(
        2**30,
        ge=1,
        le=2**50,
        description="Maximum size of a model's logs in bytes, by default 1 GiB; the oldest files "
        "are deleted.",
    )
    retention_days: float = Field(
        30, gt=0, le=36_500, description="Days after which log files are deleted."
    )
    exclude_fields: Names = Field(
        (), description="Fields that are not logged, such as name,email. Retraining lacks them."
    )
    hash_fields: Names = Field(
        (),
        description="Fields of which only an HMAC-SHA256 digest is logged. The key is in the "
        "environment variable HALYARD_LOG_KEY; without it, each replica draws a random key when "
        "it starts.",
    )
    flush_s: float = Field(
        10,
        gt=0,
        le=3600,
        description="Maximum seconds before rows are written; a killed server loses those rows.",
    )
    file_rows: int = Field(
        2000, ge=1, le=10**6, description="Maximum rows of a log file; then a new file begins."
    )


class RolloutOptions(ServeSection):
    """When a candidate is promoted or rolled back; for shadow and canary."""

    min_labels: int = Field(
        200,
        ge=10,
        le=10_000_000,
        description="Minimum number of requests with feedback before accuracy can decide a phase.",
    )
    noninferiority_margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="How much worse than production a candidate may be, in accuracy or as a "
        "fraction of the RMSE. A candidate that is worse by this much or more is promoted in at "
        "most 2.5 % of rollouts. Smaller margins need more feedback.",
    )
    max_latency_ratio: float = Field(
        2,
        ge=1,
        le=1000,
        description="Maximum ratio of the candidate's 95th percentile latency to production's; a "
        "slower candidate is rolled back.",
    )


class AccessOptions(ServeSection):
    """Access control, for a model and for the gateway of several models."""

    allowed_hosts: Names = Field(
        (),
        description="Host names that clients may use for the server, in addition to its addresses "
        "and this machine's name: api.example.com, *.example.com, or * for every name. Requests "
        "with another Host get 403. Set it for a server behind a gateway or DNS name.",
    )
    api_keys_file: str | None = Field(
        None,
        description="File of hashed API keys, made by python -m serve.security. Without it, every "
        "client that reaches the server may request predictions; load, unload and feedback are "
        "then accepted only by a server that listens on this machine's loopback address.",
    )
    metrics_without_key: bool = Field(
        False,
        description="Serve /metrics without an API key, for a Prometheus that cannot send one.",
    )


class SecurityOptions(AccessOptions):
    """Access control, signatures and TLS of a model's server."""

    require_signature: PublicKeys = Field(
        (),
        description="Public keys, PEM files; only bundles signed by one of these keys are loaded. "
        "By default signatures are not checked.",
    )
    tls_cert: str | None = Field(
        None,
        description="PEM certificate; turns on TLS for HTTP and gRPC. Renewed files are reloaded.",
    )
    tls_key: str | None = Field(None, description="PEM private key of tls_cert.")
    tls_client_ca: str | None = Field(
        None,
        description="PEM certificates of the authorities that sign client certificates; clients "
        "without such a certificate are refused. By default clients need none.",
    )

    @property
    def certificates(self) -> Certificates | None:
        """The files of the server's TLS; None without TLS."""
        if not self.tls_cert or not self.tls_key:
            return None
        return Certificates(self.tls_cert, self.tls_key, self.tls_client_ca)
