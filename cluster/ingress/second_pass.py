"""Requests that pass HAProxy twice, so that none is lost with the replica that had it.

A request that a replica has not read when it dies, as a large one, HAProxy 2.8 neither sends to
another replica nor answers, on a connection that has had an answer before: it closes that. In the
second pass each request has a connection of its own, so that the first gets an answer and may ask
once more. And a HAProxy that is stopping, which knows the replicas of the time when it was
replaced, asks the one that runs.
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
    # The second is asked where the first has failed.
    "    server inner unix@{folder}/inner.sock",
    "    server later unix@{folder}/later.sock",
)
# Names as long as that of Ray's socket: paths of sockets have at most 97 bytes.
SECOND_SECTIONS = (
    (
        "frontend second-pass",
        "    bind unix@{folder}/inner.sock mode 600",
        # Else what ended one replica would be sent to two others.
        "    http-request disable-l7-retry",
    ),
    (
        "frontend second-pass-later",
        "    bind unix@{folder}/later.sock mode 600",
        "    http-request disable-l7-retry",
        # A replica that is killed answers connections until its memory has been given back.
        "    tcp-request inspect-delay 200ms",
        "    tcp-request content accept if WAIT_END",
    ),
)
# Each of these requests has a second connection: so many, of those that clients may have.
SHARE = 4
SECTION = re.compile(r"[a-z]")


def add_to(lines: list[str], frontend: str, folder: str) -> list[str]:
    """Return a configuration whose frontend sends some requests by way of listeners in a folder.

    lines: of Ray's configuration. frontend: the first line of its section for HTTP.
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
