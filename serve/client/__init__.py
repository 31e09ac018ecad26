"""Python clients: `Client` sends requests to a server, `deploy` starts one."""
