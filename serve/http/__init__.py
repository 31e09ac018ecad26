"""The HTTP endpoint: ASGI application, routes, requests and the gateway behind Ray Serve."""
