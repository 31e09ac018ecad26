"""Run Prometheus with the rules of the manifests in k8s/, and read rules and dashboards."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.server import REPOSITORY

MONITORING = REPOSITORY / "k8s/components/monitoring"
GRAFANA = REPOSITORY / "k8s/components/grafana"
INSTALLED = all(map(shutil.which, ("prometheus", "promtool")))
START_S = 60

# Values for the variables of an expression: Grafana's own, and a match-all for the dashboards'.
RANGES = {"__rate_interval": "5m", "__range": "1h"}
EVERYTHING = ".*"

Sample = dict[str, Any]


def rules() -> dict[str, Any]:
    """Return the groups of rules in the form that Prometheus reads."""
    spec: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    return spec


def each_rule(kind: str) -> dict[str, dict[str, Any]]:
    """Return the rules of one kind, alert or record, by name."""
    found = [rule for group in rules()["groups"] for rule in group["rules"] if kind in rule]
    named = {rule[kind]: rule for rule in found}
    assert len(named) == len(found)
    return named


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def expressions(dashboard: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (title of the panel, expression with variables filled in) for each expression."""
    return [
        (panel["title"], with_variables(target["expr"]))
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def with_variables(expression: str) -> str:
    return re.sub(r"\$(\w+)", lambda found: RANGES.get(found[1], EVERYTHING), expression)


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics in an expression."""
    for clutter in (
        r'"[^"]*"',
        r"\{[^}]*\}",
        r"\[[^]]*\]",
        r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
        r"\boffset \w+",
        r"\b(and|or|unless|bool|by|on|group_left|group_right)\b",
        r"\b\w+\s*(?=\()",  # functions
    ):
        expression = re.sub(clutter, " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", expression))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


class Prometheus:
    """Client for the HTTP API of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def samples(self, expression: str) -> list[Sample]:
        """Return the labels and the current value of each series that an expression selects."""
        result = self.ask("query", query=expression)["result"]
        return [{**each["metric"], "value": float(each["value"][1])} for each in result]

    def value(self, expression: str) -> float:
        """Return the value of the only series, or 0 if there is no series."""
        found = self.samples(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"]) if found else 0.0

    def wait_for(self, look: Callable[[], Any], expected: Any, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (found := look()) != expected:
            assert time.monotonic() < deadline, f"{found} after {seconds} s, not {expected}"
            time.sleep(0.2)


@contextmanager
def running(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Run Prometheus with the rules, scraping every second. targets: job → host:port."""
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [target]}]}
        for job, target in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": jobs,
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules()))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(address):
            said = (folder / "prometheus.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
