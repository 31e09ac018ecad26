"""Rollouts: rules checked by simulation, and candidates that cannot harm clients."""

import asyncio

import numpy as np
import pytest

from serve.config import RolloutOptions, ServeConfig
from serve.errors import BadRequest, Overloaded
from serve.inference.request_options import RequestOptions
from serve.replica.report_buffer import ReportBuffer
from serve.replica.traffic_split import TrafficSplitter
from serve.requestlog import sampling
from serve.requestlog.sampling import ROLLOUT, in_fraction
from serve.rollout.latency_sketch import RELATIVE_ERROR, LatencySketch
from serve.rollout.verdict import (
    ALPHA,
    MAX_ERRORS,
    PROMOTED,
    ROLLED_BACK,
    ArmComparison,
    LabelEvidence,
    judge_rollout,
)
from serve.state import Rollout

RULES = RolloutOptions(min_labels=100, noninferiority_margin=0.01, max_latency_ratio=2.0)


def test_a_growing_share_of_keys_keeps_the_chosen_keys():
    keys = [f"client-{number}" for number in range(20_000)]
    few = {key for key in keys if in_fraction(key, 0.1, ROLLOUT)}
    assert abs(len(few) - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)
    assert few < {key for key in keys if in_fraction(key, 0.2, ROLLOUT)}
    assert not any(in_fraction(key, 0, ROLLOUT) for key in keys)
    assert all(in_fraction(key, 1, ROLLOUT) for key in keys)


def test_a_client_cannot_influence_the_choice(monkeypatch):
    """Whether a key is chosen depends on a secret and on the purpose."""
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


@pytest.mark.parametrize("spread", [0.01, 0.5, 2])
def test_a_quantile_of_latencies_is_off_by_one_percent_at_most(rng, spread):
    values = rng.lognormal(-5, spread, 5001)
    merged = LatencySketch()
    for part in np.array_split(values, 3):
        sketch = LatencySketch()
        for value in part:
            sketch.observe(value)
        merged.add(sketch)
    assert merged.count == len(values)
    for share in (0.001, 0.5, 0.95, 1):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert merged.quantile(share) == pytest.approx(exact, rel=RELATIVE_ERROR + 1e-9)


def compared(errors=0, ms=1.0, requests=1000):
    result = ArmComparison("4")
    for name, seconds in (("production", 1e-3), ("candidate", ms / 1e3)):
        for _ in range(requests):
            result.arms[name].answered(seconds)
    for _ in range(errors):
        result.arms["candidate"].failed()
    return result


def labels(losses, rules=RULES, *, classes=True):
    evidence = LabelEvidence(rules, classes=classes)
    for pair in losses:
        evidence.add(*pair)
    return evidence


def losses(both_right, candidate_right, production_right):
    kinds = [[0, 0]] * both_right + [[1, 0]] * candidate_right + [[0, 1]] * production_right
    return np.random.default_rng(0).permutation(np.array(kinds, float).reshape(-1, 2))


@pytest.mark.parametrize(
    ("comparison", "pairs", "decision", "word"),
    [
        (compared(), losses(700, 80, 20), PROMOTED, "gain +0.0750 in 800 labelled requests"),
        (compared(), losses(700, 20, 80), ROLLED_BACK, "gain -0.0750"),
        # Equally good in very many requests.
        (compared(), losses(20_000, 40, 40), PROMOTED, "worse by 0.01 or more has p = "),
        # Too few differences for a decision.
        (compared(), losses(100, 8, 6), None, ""),
        (compared(), losses(60, 9, 0), None, ""),
        (compared(errors=2), losses(700, 80, 20), PROMOTED, "accuracy"),
        (compared(errors=40), losses(700, 80, 20), ROLLED_BACK, "failed for 40 of 1040"),
        # Every request fails.
        (compared(errors=3, requests=0), losses(0, 0, 0), ROLLED_BACK, "failed for 3 of 3"),
        (compared(ms=9.0), losses(700, 80, 20), ROLLED_BACK, "95th percentile latency is 9.0"),
        (compared(ms=2.1), losses(0, 0, 0), ROLLED_BACK, "95th percentile latency is 2.09 ms"),
        (compared(ms=1.95), losses(0, 0, 0), None, ""),
        # Too few requests to judge the latency.
        (compared(ms=9.0, requests=50), losses(60, 0, 0), None, ""),
    ],
)
def test_rules_decide_by_errors_latency_and_labels(comparison, pairs, decision, word):
    verdict = judge_rollout(comparison, labels(pairs), RULES)
    assert (verdict.decision if verdict else None) == decision
    assert word in (verdict.reason if verdict else "")


@pytest.mark.parametrize(("scale", "decision"), [(0.8, PROMOTED), (1.3, ROLLED_BACK)])
def test_rules_decide_by_errors_of_values(rng, scale, decision):
    errors = rng.normal(size=(1000, 2)) * [1, scale]
    verdict = labels(errors**2, classes=False).judge()
    assert verdict.decision == decision
    gain = 1 - np.sqrt((errors[:, 1] ** 2).mean() / (errors[:, 0] ** 2).mean())
    assert f"gain {gain:+.4f} in 1000 labelled requests" in verdict.reason


# Number of simulated rollouts, and of requests in each; ALPHA plus 4 standard deviations of it.
RUNS, REQUESTS = 1000, 3000
BOUND = ALPHA + 4 * np.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def simulated(draw, *, classes=True):
    """Return the shares of rollouts that are ever promoted and ever called worse.

    draw: returns the losses, float64 [2, RUNS], of the next request of each rollout.
    """
    evidence = LabelEvidence(RULES, classes=classes)
    for _ in range(REQUESTS):
        evidence.add(*draw())
    promoted, worse = evidence.evidence()
    return np.mean(promoted >= 1 / ALPHA), np.mean(worse >= 1 / ALPHA)


@pytest.mark.parametrize("discordant", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_candidate_worse_by_the_margin_is_seldom_promoted(rng, discordant, rows):
    """rows: number of rows of a request, which are all right or all wrong together."""
    gain = -RULES.noninferiority_margin

    def draw():
        chances = [1 - discordant, (discordant + gain) / 2, (discordant - gain) / 2]
        kinds = np.repeat(rng.choice(3, p=chances, size=(RUNS, 1)), rows, axis=1)
        return (kinds == 1).mean(axis=1), (kinds == 2).mean(axis=1)

    assert simulated(draw)[0] <= BOUND


@pytest.mark.parametrize("discordant", [0.01, 0.3])
def test_an_equally_good_candidate_is_seldom_called_worse(rng, discordant):
    def draw():
        kinds = rng.choice(3, p=[1 - discordant, discordant / 2, discordant / 2], size=RUNS)
        return kinds == 1, kinds == 2

    assert simulated(lambda: np.array(draw(), float))[1] <= BOUND


@pytest.mark.parametrize("correlation", [0.5, 0.99])
@pytest.mark.parametrize(("ratio", "which"), [(1 + RULES.noninferiority_margin, 0), (1, 1)])
def test_errors_of_values_are_seldom_misjudged(rng, correlation, ratio, which):
    def draw():
        one, other = rng.standard_t(5, size=(2, RUNS))
        other = ratio * (correlation * one + np.sqrt(1 - correlation**2) * other)
        return one**2, other**2

    assert simulated(draw, classes=False)[which] <= BOUND


def test_a_better_candidate_is_promoted_in_800_requests(rng):
    def draw():
        kinds = rng.choice(3, p=[0.9, 0.08, 0.02], size=RUNS)
        return np.array([kinds == 1, kinds == 2], float)

    evidence = LabelEvidence(RULES, classes=True)
    for _ in range(800):
        evidence.add(*draw())
    assert np.mean(evidence.evidence()[0] >= 1 / ALPHA) > 0.9


def test_equal_distributions_of_latency_seldom_roll_back(rng):
    """Both arms have the same distribution, the accepted ratio is 1; rules run often."""
    rules = RolloutOptions(max_latency_ratio=1)
    empty = LabelEvidence(rules, classes=True)
    rolled_back = 0
    for _ in range(200):
        comparison = ArmComparison("4")
        for number, seconds in enumerate(rng.lognormal(-5, 0.5, 2000)):
            comparison.arms["candidate" if number % 2 else "production"].answered(seconds)
            if number % 50 == 49 and judge_rollout(comparison, empty, rules):
                rolled_back += 1
                break
    assert rolled_back <= 200 * ALPHA + 4 * np.sqrt(200 * ALPHA)


def test_errors_at_the_accepted_rate_seldom_roll_back(rng):
    empty = LabelEvidence(RULES, classes=True)
    rolled_back = 0
    for _ in range(300):
        comparison = ArmComparison("4")
        arm = comparison.arms["candidate"]
        for failed in rng.random(1000) < MAX_ERRORS:
            arm.requests += 1
            arm.errors += int(failed)
            if failed and judge_rollout(comparison, empty, RULES):
                rolled_back += 1
                break
    assert rolled_back <= 300 * ALPHA + 4 * np.sqrt(300 * ALPHA)


class Plane:
    """A plane that predicts its version after some seconds, or raises an error."""

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
    """Send requests of 2 records; return (versions of responses, comparison, logged copies)."""
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
def test_a_failing_or_slow_candidate_fails_no_request(candidate, phase):
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


def test_a_record_that_both_versions_refuse_is_a_bad_request():
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
            "remove candidate from extra_versions",
        ),
    ],
)
def test_a_rollout_that_cannot_be_decided_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ServeConfig(**options)
