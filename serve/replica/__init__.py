"""A replica: the versions it has loaded, and how requests are divided among them."""
