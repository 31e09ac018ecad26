"""A replica: the versions that it has loaded, and the division of requests among them."""
