"""Pass some requests through HAProxy twice, so that they survive the death of their replica.

A replica may die before it has read a request, such as a large one. On a connection that has
already carried a response, HAProxy 2.8 then neither retries the request nor responds: it closes the
connection. In the second pass, each request has a connection of its own, so the first pass receives
an error response and can retry once. The second pass also serves a HAProxy that is stopping: its
list of replicas is out of date, so it forwards requests to the HAProxy that replaced it.
"""

import re

SECOND_PASS = "    use_backend second-pass if { stopping } or { req.body_size gt 8192 }"
ROUTING = re.compile(r"\s+(acl is_\S+ path|use_backend \S+ if is_|default_backend )")
FIRST_SECTION = (
    "backend second-pass",
    "    retry-on conn-failure empty-response 502",
    "    balance first",
    "    http-reuse never",
    "    option http-server-close",
    # The second one is used for the retry, after the first one has failed.
    "    server inner unix@{folder}/inner.sock",
    "    server later unix@{folder}/later.sock",
)
# These names are as long as that of Ray's socket: HAProxy limits socket paths to 97 bytes.
SECOND_SECTIONS = (
    (
        "frontend second-pass",
        "    bind unix@{folder}/inner.sock mode 600",
        # Otherwise a request that killed one replica would be sent to two others.
        "    http-request disable-l7-retry",
    ),
    (
        "frontend second-pass-later",
        "    bind unix@{folder}/later.sock mode 600",
        "    http-request disable-l7-retry",
        # The kernel accepts connections to a killed replica until it has freed its memory.
        "    tcp-request inspect-delay 200ms",
        "    tcp-request content accept if WAIT_END",
    ),
)
# Each of these requests uses a second connection; the limit of connections is raised by one in so
# many for them.
SHARE = 4
SECTION = re.compile(r"[a-z]")


def add_to(lines: list[str], frontend: str, folder: str) -> list[str]:
    """Return the configuration with a second pass for some requests, by sockets in a folder.

    lines: Ray's configuration. frontend: the first line of its section for HTTP.
    """
    changed: list[str] = []
    uses: list[str] = []
    section = ""
    for line in lines:
        if SECTION.match(line):
            section = line.strip()
        if section == frontend and ROUTING.match(line):
            if not uses:
                changed.append(SECOND_PASS)
            uses.append(line)
        changed.append(line)
    changed += [line.format(folder=folder) for line in FIRST_SECTION]
    for given in SECOND_SECTIONS:
        changed += [*(line.format(folder=folder) for line in given), *uses]
    return changed
