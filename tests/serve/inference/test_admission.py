"""Admission of requests: deadlines, priorities, fair shares, and the model of latencies."""

import time
from collections import Counter

import numpy as np
import pytest

from serve.errors import BadRequest
from serve.inference.fair_queue import FairQueue
from serve.inference.latency_model import LatencyModel
from serve.inference.request_options import RequestOptions, request_options

LIMITS = {"now": 100.0, "timeout_s": 30.0, "priorities": 3, "client": "a"}


@pytest.mark.parametrize(
    ("parameters", "asked_s", "deadline", "priority"),
    [
        ({}, None, 130, 2),
        ({"timeout": 500_000}, None, 100.5, 2),
        ({"timeout": 0, "priority": 0}, None, 130, 2),
        ({"timeout": 90_000_000}, None, 130, 2),
        ({"priority": 1}, 2.0, 102, 1),
        ({"timeout": 5_000_000}, 2.0, 102, 2),
        ({}, -1.0, 100, 2),
    ],
)
def test_a_client_can_set_a_shorter_timeout_and_its_priority(
    parameters, asked_s, deadline, priority
):
    granted = request_options(parameters, asked_s=asked_s, **LIMITS)
    assert granted == RequestOptions(pytest.approx(deadline), priority, "a")


@pytest.mark.parametrize(
    "parameters",
    [{"timeout": "1"}, {"timeout": -1}, {"timeout": True}, {"priority": 4}, {"priority": "high"}],
)
def test_invalid_request_options_are_refused(parameters):
    with pytest.raises(BadRequest, match="parameter"):
        request_options(parameters, **LIMITS)


class Job:
    def __init__(self, count, client="", priority=1):
        self.terms = RequestOptions(0, priority, client)
        self.rows_left = count
        self.gone = False
        self.delay = 0

    @property
    def work_left(self):
        return self.rows_left

    def refuse(self, error):
        self.gone = True

    def drop(self):
        self.rows_left = 0


def served_rows(shares, total):
    """Return the rows of each client among the first `total`, if all have enough rows waiting."""
    queue = FairQueue()
    for client, size in shares.items():
        for _ in range(total // size):
            queue.push(Job(size, client))
    got = dict.fromkeys(shares, 0)
    while sum(got.values()) < total:
        job = queue.first()
        queue.took(job, job.rows_left, job.rows_left)
        got[job.terms.client] += job.rows_left
    return got


def test_clients_get_equal_rows_for_any_request_size():
    got = served_rows({"small": 1, "large": 16, "middle": 4}, 960)
    assert all(abs(rows - 320) <= 16 for rows in got.values())


def test_the_queue_counts_the_waiting_rows():
    queue = FairQueue()
    first, second = Job(4, "a"), Job(2, "b", priority=2)
    queue.push(first)
    queue.push(second)
    assert queue.rows == 6
    assert queue.ahead(RequestOptions(0, 1, "c"), 1) <= 4
    assert queue.ahead(RequestOptions(0, 2, "a"), 100) == 6
    assert queue.first() is first
    queue.took(first, 1, 1)
    first.rows_left = 3
    assert queue.rows == 5
    first.gone = True
    queue.leave(first)
    queue.leave(first)
    assert queue.first() is second
    queue.took(second, 2, 2)
    assert queue.rows == 0
    assert queue.first() is None


def test_a_large_request_takes_turns_with_small_ones():
    queue = FairQueue()
    large = Job(100, "a")
    queue.push(large)
    queue.took(large, 10, 10)
    large.rows_left = 90
    small = Job(1, "b")
    queue.push(small)
    assert queue.first() is small


def test_rows_that_were_never_served_are_not_charged():
    queue = FairQueue()
    cancelled = [Job(1, "a") for _ in range(500)]
    for job in cancelled:
        queue.push(job)
    waiting = [Job(1, "b") for _ in range(500)]
    for job in waiting:
        queue.push(job)
    for job in cancelled:
        job.gone = True
        queue.leave(job)
    late = Job(1, "a")
    queue.push(late)
    ahead = 0
    while (job := queue.first()) is not late:
        queue.took(job, 1, 1)
        ahead += 1
    assert ahead <= 2


def test_cancelled_requests_take_no_room():
    queue = FairQueue()
    queue.push(Job(1, "kept", priority=1))
    for number in range(10_000):
        job = Job(1, f"client {number}", priority=3)
        queue.push(job)
        job.gone = True
        queue.leave(job)
    assert queue.rows == 1
    assert len(queue) == 1
    assert len(queue._next) <= 1024


def test_less_urgent_requests_are_evicted_first():
    queue = FairQueue()
    jobs = [Job(2, "", priority) for priority in (3, 2, 3)]
    for job in jobs:
        queue.push(job)
    assert queue.evictable(RequestOptions(0, 2, ""), 2, 2) == [jobs[2]]
    assert queue.evictable(RequestOptions(0, 3, ""), 2, 2) == []


def test_evicted_requests_are_the_latest_of_the_queue(rng):
    """Compare with an exhaustive search through all waiting requests."""
    queue, waiting = FairQueue(), []
    for _ in range(600):
        client, priority = str(rng.integers(0, 9)), int(rng.integers(1, 4))
        terms, count = RequestOptions(0, priority, client), int(rng.integers(1, 6))
        assert queue.evictable(terms, count, count) == latest_of(waiting, terms, count)
        if rng.random() < 0.3 and waiting:
            job = waiting.pop(int(rng.integers(len(waiting))))[3]
            job.gone = True
            queue.leave(job)
        elif rng.random() < 0.3 and waiting:
            place = min(waiting, key=lambda each: each[:3])
            assert queue.first() is place[3]
            queue.took(place[3], place[3].rows_left, place[3].rows_left)
            waiting.remove(place)
        job = Job(count, client, priority)
        queue.push(job)
        waiting.append((*queue._place_of[id(job)], job))


def latest_of(waiting, terms, count):
    rows = Counter()
    for *_, job in waiting:
        rows[job.terms.client] += job.rows_left
    most, greediest = max(((rows[name], name) for name in rows), default=(0, ""))
    less_urgent = [each for each in waiting if each[0] > terms.priority]
    if sum(job.rows_left for *_, job in less_urgent) >= count:
        candidates = less_urgent
    elif greediest == terms.client or most - rows[terms.client] < 2 * count:
        return []
    else:
        of_it = [each for each in waiting if each[3].terms.client == greediest]
        candidates = [each for each in of_it if each[0] >= terms.priority]
    chosen = []
    for *_, job in sorted(candidates, key=lambda each: each[:3], reverse=True):
        if sum(each.rows_left for each in chosen) < count:
            chosen.append(job)
    return chosen if sum(each.rows_left for each in chosen) >= count else []


def test_a_job_costs_the_same_among_many_clients():
    """Clients choose their names, so a single client can use any number of names."""
    few, many = cost_of_a_full_line(8), cost_of_a_full_line(12_000)
    assert many < 5 * few, (few, many)


def cost_of_a_full_line(num_clients):
    """Return the seconds for a thousand more jobs in a queue of 13,000; the least of five runs."""
    seconds = []
    for _ in range(5):
        queue = FairQueue()
        for number in range(13_000):
            queue.push(Job(1, str(number % num_clients)))
        began = time.perf_counter()
        for number in range(1_000):
            newcomer = Job(1, str(number % num_clients))
            for job in queue.evictable(newcomer.terms, 1, 1):
                queue.leave(job)
            queue.push(newcomer)
            queue.took(queue.first(), 1, 1)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_the_latency_model_is_linear_between_measurements():
    sizes, seconds = [1, 4, 16], [0.01, 0.02, 0.05]
    profile = LatencyModel(sizes, seconds)
    for rows in range(1, 17):
        assert profile.seconds(rows) == pytest.approx(np.interp(rows, sizes, seconds))
    assert profile.seconds(32) == pytest.approx(0.1)


def test_the_latency_model_adapts_to_this_machine():
    profile = LatencyModel([1, 8], [0.01, 0.02])
    for _ in range(100):
        profile.observe(8, 0.06)
    assert profile.seconds(1) == pytest.approx(0.03, rel=0.01)


def test_one_very_slow_batch_hardly_changes_the_estimate():
    profile = LatencyModel([1], [0.01])
    profile.observe(1, 60)
    assert profile.seconds(1) < 0.015


def test_batch_sizes_follow_throughput_and_the_time_left():
    assert LatencyModel([1, 8, 32, 64], [0.001, 0.004, 0.0120, 0.0239]).best_rows == 32
    assert LatencyModel([1, 2], [0.001, 0.002]).best_rows == 1
    profile = LatencyModel([1, 10], [0.1, 1.0])
    assert profile.rows_within(0.55, 64) == 5
    assert profile.rows_within(0.01, 64) == 1
    assert profile.rows_within(100, 64) == 64
