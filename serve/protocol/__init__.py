"""Protocols: decoding of request bodies to records, and encoding of predictions to responses."""
