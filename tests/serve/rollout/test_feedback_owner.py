"""Which keys may send feedback for a request, and limits on its size."""

import hashlib
import re
import time
import tracemalloc

import pytest

from serve.requestlog.reader import read_feedback
from serve.rollout.aggregator import ReplicaReport
from serve.rollout.feedback import FeedbackStore
from serve.security import APIKey, KeyStore
from tests.serving import client_of, make_rest
from train.tasks import ClassTarget

IMAGE = {"instances": [{"image": [[0] * 8] * 8}]}


def key(name, **options):
    return APIKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **options)


@pytest.fixture
def ask(bundle, tmp_path):
    """A function that sends a request with a key and then the replica's report."""
    keys = KeyStore([key("team"), key("other"), key("admin", admin=True)])
    rest = make_rest(bundle, keys=keys, log={"sample_rate": 1}, storage=str(tmp_path))
    handler = rest._handler
    with client_of(rest) as client:
        client.portal.call(handler.repository._tick)

        def ask(path, body, name, request_id=None):
            headers = {"Authorization": f"Bearer {name}"}
            headers |= {} if request_id is None else {"X-Request-ID": request_id}
            response = client.post(path, json=body, headers=headers)
            client.portal.call(handler.repository.collect, handler._served.report())
            return response

        yield ask
        client.portal.call(handler.repository.close)


def predict(ask, name, request_id=None):
    response = ask("/v1/models/digits:predict", IMAGE, name, request_id)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


def give(ask, name, request_id, **more):
    body = {"id": request_id, "truth": ["7"], **more}
    return ask("/v2/models/digits/feedback", body, name)


def test_ids_generated_by_the_server_cannot_be_guessed(ask):
    made = [predict(ask, "team") for _ in range(3)]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)
    assert len({each[:8] for each in made}) == 3


@pytest.mark.parametrize("chosen", [None, "order-1", "team/order-1", "a/b"])
def test_feedback_needs_the_requests_key_or_an_admin_key(ask, tmp_path, chosen):
    request_id = predict(ask, "team", chosen)
    for guess in (request_id, f"team/{request_id}", "never"):
        refused = give(ask, "other", guess)
        assert (refused.status_code, "is known for this key" in refused.text) == (404, True)
    refused = give(ask, "other", request_id, client="team")
    assert (refused.status_code, "--admin" in refused.text) == (403, True)
    for name, more in (("team", {}), ("admin", {"client": "team"}), ("admin", {})):
        given = give(ask, name, request_id, **more)
        assert (given.status_code, given.json()["counted"]) == (200, True), given.text


def test_equal_ids_of_two_keys_are_two_requests(ask):
    for name in ("team", "other"):
        predict(ask, name, "1")
    assert give(ask, "team", "1").json()["changed"]
    assert give(ask, "other", "1").json()["changed"]
    ambiguous = give(ask, "admin", "1")
    assert (ambiguous.status_code, "name one of them in 'client'" in ambiguous.text) == (400, True)


def test_many_labels_for_one_record_are_refused_at_once(ask, tmp_path):
    request_id = predict(ask, "team")
    began = time.perf_counter()
    tracemalloc.start()
    response = ask(
        "/v2/models/digits/feedback", {"id": request_id, "truth": ["7"] * 200_000}, "team"
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 400
    assert "200000 values; at most 1024 are accepted" in response.text
    assert peak < 100e6
    assert time.perf_counter() - began < 30
    assert read_feedback(str(tmp_path), "digits").num_rows == 0


def test_rows_in_memory_are_bounded_for_any_request_size():
    store = FeedbackStore(ClassTarget("kind", ("cat", "dog")), most=100, most_rows=1000)
    for number in range(50):
        store.predicted(f"{number}", "1", ["cat"] * 300)
    assert [number for number in range(50) if store.knows(f"{number}")] == [47, 48, 49]
    store.predicted("49", "2", ["dog"] * 300)
    assert [number for number in range(50) if store.knows(f"{number}")] == [48, 49]
    store.predicted("huge", "1", ["cat"] * 1001)
    assert not any(store.knows(each) for each in ("48", "49", "huge"))
    assert ReplicaReport().is_empty()
