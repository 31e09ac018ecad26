"""Rollouts: rules against references, and a candidate that cannot harm those who ask."""

import asyncio

import numpy as np
import pytest

from serve.config import RolloutOptions, ServeConfig
from serve.errors import BadRequest, Overloaded
from serve.inference.admission import RequestOptions
from serve.replica.report_buffer import ReportBuffer
from serve.replica.traffic_split import TrafficSplitter
from serve.requestlog import sampling
from serve.requestlog.sampling import ROLLOUT, in_fraction
from serve.rollout.verdict import (
    PROMOTED,
    ROLLED_BACK,
    ArmComparison,
    judge_rollout,
)
from serve.state import Rollout
from serve.telemetry.metrics import SECONDS, Histogram

RULES = RolloutOptions(min_labels=100, noninferiority_margin=0.01, max_latency_ratio=2.0)


def test_a_share_of_keys_is_chosen_and_stays_chosen_as_it_grows():
    keys = [f"client-{number}" for number in range(20_000)]
    few = {key for key in keys if in_fraction(key, 0.1, ROLLOUT)}
    assert abs(len(few) - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)
    assert few < {key for key in keys if in_fraction(key, 0.2, ROLLOUT)}
    assert not any(in_fraction(key, 0, ROLLOUT) for key in keys)
    assert all(in_fraction(key, 1, ROLLOUT) for key in keys)


def test_a_client_cannot_choose_what_is_chosen(monkeypatch):
    """The same key is chosen or not by a secret, and for one purpose or another."""
    keys = [f"client-{number}" for number in range(4000)]

    def chosen(purpose, secret):
        monkeypatch.setattr(sampling.auth, "derive_secret", lambda purpose: f"{secret} {purpose}")
        sampling._key.cache_clear()
        found = np.array([in_fraction(key, 0.5, purpose) for key in keys])
        sampling._key.cache_clear()
        return found

    one = chosen(ROLLOUT, "a")
    assert (chosen(ROLLOUT, "a") == one).all()
    for other in (chosen(ROLLOUT, "b"), chosen(sampling.LOG, "a")):
        assert abs((one == other).mean() - 0.5) < 5 * np.sqrt(0.25 / len(keys))


def test_a_quantile_is_that_of_the_values_within_a_bin():
    values = np.random.default_rng(0).lognormal(-5, 0.5, 5000)
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    for share in (0.5, 0.95):
        exact = np.quantile(values, share)
        low = max(bound for bound in (0, *SECONDS) if bound <= exact)
        high = min(bound for bound in SECONDS if bound >= exact)
        assert low <= histogram.quantile(share) <= high


def compared(errors=0, ms=1.0, requests=1000):
    result = ArmComparison("4")
    for name, seconds in (("production", 1e-3), ("candidate", ms / 1e3)):
        for _ in range(requests):
            result.arms[name].answered(seconds)
    for _ in range(errors):
        result.arms["candidate"].failed()
    return result


def losses(both_right, candidate_right, production_right):
    rows = [[0, 0]] * both_right + [[1, 0]] * candidate_right + [[0, 1]] * production_right
    return np.array(rows, float)


@pytest.mark.parametrize(
    ("comparison", "pairs", "decision", "word"),
    [
        (compared(), losses(700, 80, 20), PROMOTED, "0.075"),
        (compared(), losses(700, 20, 80), ROLLED_BACK, "accuracy"),
        # As good, of very many records.
        (compared(), losses(20_000, 40, 40), PROMOTED, "accuracy"),
        # It cannot be told yet.
        (compared(), losses(100, 8, 6), None, ""),
        (compared(), losses(60, 9, 0), None, ""),
        (compared(errors=2), losses(700, 80, 20), PROMOTED, "accuracy"),
        (compared(errors=20), losses(700, 80, 20), ROLLED_BACK, "failed for 20 of 1020"),
        (compared(ms=9.0), losses(700, 80, 20), ROLLED_BACK, "95th percentile"),
        # Too few to tell of latency.
        (compared(ms=9.0, requests=50), losses(60, 0, 0), None, ""),
    ],
)
def test_rules(comparison, pairs, decision, word):
    verdict = judge_rollout(comparison, pairs, RULES, classes=True)
    assert (verdict.decision if verdict else None) == decision
    assert word in (verdict.reason if verdict else "")


@pytest.mark.parametrize(("scale", "decision"), [(0.8, PROMOTED), (1.3, ROLLED_BACK)])
def test_rules_of_values(scale, decision):
    generator = np.random.default_rng(0)
    errors = generator.normal(size=(1000, 2)) * [1, scale]
    assert judge_rollout(compared(), errors**2, RULES, classes=False).decision == decision


class Plane:
    """Answers with its version; or fails, or takes its time."""

    def __init__(self, version, error=None, seconds=0.0):
        self.version, self.error, self.seconds = version, error, seconds
        self.asked = 0

    async def predict(self, columns, terms):
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return {"label": np.array([self.version] * len(columns["x"]), dtype=object)}


async def ask(planes, phase, *, count=50, timeout_s=10.0):
    """Send requests of 2 records; return (versions that answered, comparison, what copies said)."""
    copies = []
    reports = ReportBuffer()
    splitter = TrafficSplitter(
        Rollout("4", phase, 0.5), *planes, reports, lambda *copy: copies.append(copy), timeout_s
    )
    loop = asyncio.get_running_loop()
    answers = []
    for number in range(count):
        options = RequestOptions(loop.time() + timeout_s, client=f"client-{number % 10}")
        plane, _ = await splitter.split({"x": [1, 2]}, options, f"r{number}")
        answers.append(plane.version)
        async with asyncio.timeout(10):
            while splitter._copies:
                await asyncio.gather(*splitter._copies)
    return answers, reports.drain({}).comparison, copies


def test_requests_in_progress_count_in_the_next_report():
    reports = ReportBuffer()

    class Reporting(Plane):
        async def predict(self, columns, terms):
            reports.drain({})
            return await super().predict(columns, terms)

    async def scenario():
        splitter = TrafficSplitter(
            Rollout("4", "canary", 0.0), Reporting("3"), Plane("4"), reports, print, 10
        )
        for number in range(2):
            options = RequestOptions(asyncio.get_running_loop().time() + 10)
            await splitter.split({"x": [1]}, options, f"r{number}")
        return reports.drain({}).comparison

    assert asyncio.run(scenario()).arms["production"].requests == 1


def test_in_shadow_production_answers_and_copies_are_compared():
    production, candidate = Plane("3"), Plane("4")
    answers, comparison, copies = asyncio.run(ask((production, candidate), "shadow"))
    assert set(answers) == {"3"}
    assert 10 <= candidate.asked <= 40
    assert (comparison.rows, comparison.agreed) == (2 * candidate.asked, 0)
    assert [(version, name) for name, version, _ in copies] == [
        ("4", f"r{number}") for number in range(50) if in_fraction(f"r{number}", 0.5, ROLLOUT)
    ]


def test_a_canary_answers_the_same_clients_and_is_compared():
    answers, comparison, copies = asyncio.run(ask((Plane("3"), Plane("4")), "canary"))
    by_client = [set(answers[number::10]) for number in range(10)]
    assert all(len(versions) == 1 for versions in by_client)
    assert set(answers) == {"3", "4"}
    assert {version for _, version, _ in copies} == {"3"}
    assert comparison.rows == 2 * answers.count("4")


@pytest.mark.parametrize("candidate", [Plane("4", RuntimeError("broken")), Plane("4", seconds=0.3)])
@pytest.mark.parametrize("phase", ["shadow", "canary"])
def test_a_candidate_that_fails_or_is_slow_fails_nobody(candidate, phase):
    answers, comparison, _ = asyncio.run(
        ask((Plane("3"), candidate), phase, count=6, timeout_s=0.2)
    )
    assert answers == ["3"] * 6
    if candidate.error is not None or phase == "canary":
        assert comparison.arms["candidate"].errors > 0
    assert comparison.arms["production"].errors == 0


@pytest.mark.parametrize("error", [Overloaded("full"), BadRequest("no")])
def test_errors_of_requests_do_not_count_against_the_candidate(error):
    planes = Plane("3"), Plane("4", error)
    answers, comparison, _ = asyncio.run(ask(planes, "canary"))
    assert set(answers) == {"3"}
    assert comparison.arms["candidate"].errors == 0


def test_a_record_that_neither_takes_is_the_clients_error():
    planes = Plane("3", BadRequest("no")), Plane("4", ValueError("no"))
    with pytest.raises(BadRequest):
        asyncio.run(ask(planes, "canary"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shadow": 0.1, "model": "models:/digits/3", "log": {"sample_rate": 1}}, "@production"),
        ({"canary": 0.1}, "log.sample_rate"),
        (
            {"shadow": 0.1, "log": {"sample_rate": 1}, "extra_versions": "2, candidate"},
            "leave it out",
        ),
    ],
)
def test_a_rollout_that_could_not_be_decided_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ServeConfig(**options)
