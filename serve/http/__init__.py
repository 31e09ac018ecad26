"""The HTTP endpoint: ASGI applications, routes, requests and the Ray Serve middleware."""
