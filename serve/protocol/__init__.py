"""Protocols: from bytes on the wire to records and back. They all use the one data plane."""
