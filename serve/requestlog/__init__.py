"""The request log: schema, files, writers and readers."""
