"""The console: the static files of the web page at `/`."""
