"""From decoded inputs to outputs: batching, admission, caching and the latency model."""
