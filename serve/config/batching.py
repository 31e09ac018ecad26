"""Options of batches: `batching.option` on a command line."""

from pydantic import Field

from serve.config.sections import ServeSection


class BatchingOptions(ServeSection):
    """How waiting rows are combined into batches for the engine."""

    max_rows: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Maximum rows per batch. By default the size with the highest measured "
        "throughput of the variant.",
    )
    wait_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="Milliseconds that an idle engine waits for a batch to fill. With 0 it runs "
        "the waiting rows at once, which suits most models; raise it only if large batches cost "
        "much less per row than small ones.",
    )
    by_length: bool = Field(
        True,
        description="Whether requests that differ in length, such as texts, share a batch with "
        "others of about their length, and short ones may overtake long ones. If not, they are "
        "batched in order of arrival.",
    )
