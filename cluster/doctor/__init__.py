"""python -m cluster doctor: check this machine and its cluster, and show how to fix problems."""

from collections.abc import Iterator

from cluster.doctor.finding import Finding
from cluster.doctor.listeners import listening
from cluster.doctor.machine import (
    accelerators,
    bundle_signatures,
    haproxy,
    machine,
    number_formats,
    packages,
    ports,
    python,
    storage_place,
)
from cluster.doctor.nodes import ray_cluster, token_check
from cluster.nodes import node_checks


def examine(storage_path: str) -> Iterator[Finding]:
    """Run all checks, in the order in which a user needs their results."""
    yield from python()
    yield from packages()
    yield machine()
    yield accelerators()
    yield number_formats()
    yield haproxy()
    yield from ports()
    yield from listening(node_checks.listeners(), "here")
    yield token_check()
    yield bundle_signatures()
    yield storage_place(storage_path)
    yield from ray_cluster(storage_path)


def show_findings(findings: Iterator[Finding]) -> bool:
    """Print a table of the findings on stderr; return whether no required part is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "check", "found", "how to fix", title="Halyard doctor")
    colours = {"ok": "green", "missing": "red", "optional": "yellow"}
    healthy = True
    for finding in findings:
        healthy &= finding.mark != "missing"
        mark = f"[{colours[finding.mark]}]{finding.mark}[/]"
        table.add_row(mark, finding.subject, finding.found, finding.remedy)
    Console(stderr=True).print(table)
    return healthy
