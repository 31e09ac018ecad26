"""Rules and dashboards use metrics that exist, and alerts fire when something is wrong.

They are checked with promtool and with a Prometheus that scrapes a running server.
"""

import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from serve.drift.sampler import BLOCK_ROWS
from serve.drift.windows import DriftMonitor
from serve.telemetry.metrics import SECONDS, VersionMetrics, exposition
from tests import prometheus, server
from tests.prometheus import (
    MONITORING,
    Prometheus,
    each_rule,
    expressions,
    metric_names,
    promtool,
    rules,
)
from train.bundle.feature_statistics import Quantity
from train.telemetry.prometheus import PREFIX, WORDS

needs_prometheus = pytest.mark.skipif(
    not prometheus.INSTALLED, reason="prometheus and promtool are not installed"
)

# Metrics of Ray Serve, and `up`, which Prometheus itself adds.
OTHERS = {
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_deployment_replica_healthy",
    "up",
}


def served() -> set[str]:
    """Return the names of the series at the server's /metrics."""
    metrics = VersionMetrics()
    metrics.answered("v2", 200, 0.02)
    metrics.refused["deadline"] += 1
    metrics.cache["hit"] += 1
    text = exposition(metrics.snapshot({})).decode()
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


def watched_of_a_version() -> set[str]:
    """Return the names of the series that the drift monitor exports."""
    quantity = Quantity("number", "inputs", np.array([0, 0, 30, 20, 0]), edges=(0.0, 1.0, 2.0))
    windows = DriftMonitor({"age": quantity}, BLOCK_ROWS, 0.5)
    windows.add({"age": quantity.counts})
    text = exposition(windows.snapshot({"model": "m", "version": "1"})).decode()
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


def known() -> set[str]:
    """Return the names of all metrics that are exported or recorded by rules."""
    trained = {f"ray_{PREFIX}{name}" for name in WORDS}
    nodes = {f"ray_{name}" for name in METRICS_GAUGES}
    return served() | watched_of_a_version() | trained | nodes | set(each_rule("record")) | OTHERS


def every_expression() -> dict[str, str]:
    """Return the expressions of the rules and of the dashboards' panels, by their location."""
    found = {rule.get("alert", rule.get("record")): rule["expr"] for rule in every_rule()}
    for name, dashboard in prometheus.dashboards().items():
        for number, (title, expression) in enumerate(expressions(dashboard)):
            found[f"{name}, {title} ({number})"] = expression
    return found


def every_rule():
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def test_names_are_found_in_an_expression():
    expression = """
        histogram_quantile(0.9, sum by (le, a_b) (rate(x_bucket{a="by (y)"}[5m])))
        / on (namespace) group_left scalar(a:b:rate5m) or 0 * (up offset 30m) unless time() > bool z
    """
    assert metric_names(expression) == {"x_bucket", "a:b:rate5m", "up", "z"}


def test_rules_and_dashboards_use_existing_metrics():
    exported = known()
    unknown = {
        where: names - exported
        for where, expression in every_expression().items()
        if (names := metric_names(expression)) - exported
    }
    assert unknown == {}


def test_latency_bounds_of_rules_are_histogram_bounds():
    bounds = {repr(float(bound)) for bound in SECONDS}
    asked = re.findall(r'le="([^"]+)"', str(rules()))
    assert asked
    assert set(asked) <= bounds


@needs_prometheus
def test_promtool_accepts_the_rules(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    done = promtool("check", "rules", "--lint-fatal", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_each_alert_fires_only_in_its_firing_cases(tmp_path):
    without = rules()
    for group in without["groups"]:
        for rule in group["rules"]:
            # Without annotations, because the test cases would have to repeat their text.
            rule.pop("annotations", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(without))
    shutil.copy(MONITORING / "rules_test.yaml", tmp_path)
    done = promtool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_firing_a_pending_and_a_quiet_case():
    cases = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    assert [case["name"] for case in cases] == list(each_rule("alert"))
    for case in cases:
        tests = case["alert_rule_test"]
        assert {test["alertname"] for test in tests} == {case["name"]}
        assert {bool(test["exp_alerts"]) for test in tests} == {True, False}
        assert "well" in str(case["input_series"])
        assert "well" not in str(tests)


@pytest.mark.parametrize("name", each_rule("alert"))
def test_each_alert_states_its_severity_and_what_to_do(name):
    alert = each_rule("alert")[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert "{{" in alert["annotations"]["summary"]
    assert len(alert["annotations"]["description"].split()) > 20
    # With `for`, a condition that lasts for one evaluation only does not notify anyone.
    assert alert["for"]


@pytest.mark.parametrize("name", prometheus.dashboards())
def test_a_dashboard_is_complete_and_consistent(name):
    dashboard = prometheus.dashboards()[name]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert "datasource" in variables
    used = {"datasource"}
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            used |= set(re.findall(r"\$(\w+)", target["expr"])) - prometheus.RANGES.keys()
    assert used == variables


@needs_prometheus
def test_prometheus_parses_each_expression_of_the_dashboards(tmp_path):
    recorded = [
        {"record": f"expression:{number}", "expr": expression}
        for dashboard in prometheus.dashboards().values()
        for number, (_, expression) in enumerate(expressions(dashboard))
    ]
    groups = {"groups": [{"name": "expressions", "rules": recorded}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    done = promtool("check", "rules", "--lint=none", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def infer(url, shade, **parameters):
    """Request the digit of a grey image; return the HTTP status."""
    image = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": [shade] * 64}
    body = {"inputs": [image], "parameters": parameters}
    return httpx.post(f"{url}/v2/models/digits/infer", json=body).status_code


def send(url, first_shade):
    """Send requests of each kind; return the number of responses by HTTP status."""
    statuses = [infer(url, first_shade + number) for number in range(30)]
    # Other images than before, because those are in the cache.
    statuses += [infer(url, first_shade + number, timeout=1) for number in range(30, 35)]
    statuses += [httpx.post(f"{url}/v2/models/digits/infer", json={}).status_code for _ in range(4)]
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def metrics_port(folder):
    """Return the metrics port of the Ray session whose files are below a folder."""
    (file,) = Path(folder).glob("ray/session_latest/metrics_export_port_*")
    return int(file.read_text())


class Watched(NamedTuple):
    """A Prometheus that scraped a running server, and the number of requests sent, by status."""

    asked: Prometheus
    sent: dict[int, int]


@pytest.fixture(scope="module")
def watched(trained, storage_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitoring")
    # A short path, because paths of Unix sockets are limited to about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions:
        options = (f"storage={storage_path}", "cache.max_bytes=1000000")
        environment = {"RAY_TMPDIR": sessions}
        with server.running(*options, log=folder / "log", environment=environment) as url:
            targets = {"halyard": "127.0.0.1:8000", "ray": f"127.0.0.1:{metrics_port(sessions)}"}
            with prometheus.running(folder, targets) as asked:
                once = send(url, 0)
                asked.wait_for(lambda: counted(asked), once)
                # A counter's first value is not an increase, so rates start with the second.
                again = send(url, 100)
                yield Watched(asked, {status: once[status] + again[status] for status in once})


def counted(asked):
    """Return the number of predictions by status that Prometheus has recorded."""
    every = 'sum by (status) (halyard_requests_total{model="digits", protocol="v2"})'
    return {int(sample["status"]): sample["value"] for sample in asked.samples(every)}


@pytest.mark.ray
@pytest.mark.slow
@needs_prometheus
def test_prometheus_counts_the_requests_that_were_sent(watched):
    asked, sent = watched
    assert sent == {200: 60, 400: 8, 503: 10}
    asked.wait_for(lambda: counted(asked), sent)
    assert asked.value('sum(halyard_refused_total{reason="deadline"})') == 10
    # 10 of 78; a rate starts when its series is first scraped, which differs between series.
    failed = "sum(halyard:predictions_failed:rate5m) / sum(halyard:predictions:rate5m)"
    asked.wait_for(lambda: 0.06 < asked.value(failed) < 0.26, True)
    busy = 'halyard:engine_busy:ratio5m{model="digits"}'
    asked.wait_for(lambda: 0 < asked.value(busy) < 1, True)
    asked.wait_for(lambda: asked.value('halyard:replicas:count{deployment="digits"}'), 1)


# These panels may be empty: nothing drifts, there may be no GPU, and no training runs.
MAY_BE_EMPTY = {
    "Drift by feature",
    "GPUs",
    "GPU memory",
    "CPU of the workers",
    "Memory of the workers",
}


@pytest.mark.ray
@pytest.mark.slow
@needs_prometheus
def test_each_panel_has_data(watched):
    asked, _ = watched
    shown = [
        (title, expression)
        for dashboard in prometheus.dashboards().values()
        for title, expression in expressions(dashboard)
        if title not in MAY_BE_EMPTY and not re.search("halyard.train_", expression)
    ]
    assert len(shown) > 25

    def missing():
        return [
            title
            for title, expression in shown
            if not any(math.isfinite(each["value"]) for each in asked.samples(expression))
        ]

    asked.wait_for(missing, [])


@pytest.mark.ray
@pytest.mark.slow
@needs_prometheus
def test_rules_evaluate_and_raise_the_expected_alerts(watched):
    asked, _ = watched

    def ill():
        groups = asked.ask("rules")["groups"]
        return [
            f"{rule['name']}: {rule.get('lastError', '')}"
            for group in groups
            for rule in group["rules"]
            if rule["health"] != "ok"
        ]

    asked.wait_for(ill, [])

    def raised():
        groups = asked.ask("rules", type="alert")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return {rule["name"] for rule in rules if rule["state"] != "inactive"}

    # An eighth of the requests was refused; the error budget is a thousandth.
    expected = {
        "HalyardAvailabilityBurnsFast",
        "HalyardAvailabilityBurnsSlowly",
        "HalyardRefuses",
    }
    asked.wait_for(raised, expected)
