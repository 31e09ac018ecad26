"""The console: the static files of the page at `/`."""
