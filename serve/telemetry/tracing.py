"""OpenTelemetry traces: one span per request, if an endpoint is configured."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Tracer:
    """Exports spans that continue the client's trace (W3C traceparent)."""

    def __init__(self, exporter: "SpanExporter", service: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("halyard.serve")

    def request(
        self,
        name: str,
        headers: Mapping[str, str],
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, str | int | float],
    ) -> None:
        """Record a finished request. Times are nanoseconds since 1970."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(
            name, parent, SpanKind.SERVER, dict(attributes), start_time=start_ns
        )
        if int(attributes.get("http.response.status_code", 0)) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def flush(self) -> None:
        """Export the buffered spans now."""
        self._provider.force_flush()


def create_tracer(endpoint: str | None, service: str) -> Tracer | None:
    """Return a tracer that exports to an OTLP endpoint; None if `endpoint` is None.

    Raises UserError if the exporter's package is not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError(
            "option traces needs opentelemetry-exporter-otlp-proto-http; install it with: "
            "pip install 'halyard[traces]'"
        ) from None
    return Tracer(OTLPSpanExporter(endpoint), service)
