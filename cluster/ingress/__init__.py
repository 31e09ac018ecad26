"""HAProxy, which passes requests to the replicas: its configuration and certificates."""
