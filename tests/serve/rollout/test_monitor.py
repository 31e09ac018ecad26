"""Drift, feedback, retraining, promotion and rollback in sequence on a real server."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import numpy as np
import pytest

from serve.requestlog import reader
from tests import server
from tests.conftest import run_main
from tests.load import wait_for
from tests.server import REPOSITORY
from train.bundle import Bundle, publishing, registry
from train.config import validate_config
from train.data import dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 90


class Clients:
    """Clients that send requests and feedback continuously and count the response statuses."""

    def __init__(self, url, images, truths, num=4):
        self._url, self._num = url, num
        self.images, self._truths = images, truths
        self.statuses = Counter()
        self.feedback = Counter()
        self._ended, self._sending = threading.Event(), threading.Event()
        self._sending.set()

    def __enter__(self):
        self._pool = ThreadPoolExecutor(self._num)
        self._futures = [self._pool.submit(self._run, number) for number in range(self._num)]
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._sending.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()

    @contextlib.contextmanager
    def paused(self):
        """Send nothing within the block."""
        self._sending.clear()
        yield
        self._sending.set()

    def _run(self, number):
        generator = np.random.default_rng(number)
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while self._sending.wait() and not self._ended.is_set():
                rows = generator.choice(len(self.images), 4, replace=False)
                image = {
                    "name": "image",
                    "shape": [4, 8, 8, 1],
                    "datatype": "UINT8",
                    "data": self.images[rows].ravel().tolist(),
                }
                answer = client.post("/v2/models/digits/infer", json={"inputs": [image]})
                self.statuses[answer.status_code] += 1
                truth = [str(self._truths[row]) for row in rows]
                body = {"id": answer.headers["x-request-id"], "truth": truth}
                given = client.post("/v2/models/digits/feedback", json=body)
                self.feedback[given.status_code] += 1


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A separate storage path whose registry has the trained digits model in production."""
    root = str(tmp_path_factory.mktemp("monitor"))
    bundle = Bundle.load(trained["bundle"])
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        publishing.publish(bundle, recording, root, None)
    return root


@pytest.fixture(scope="module")
def unseen(trained):
    """Images, uint8 [N, 8, 8, 1], and class indices [N] that were not trained on."""
    config = validate_config(Bundle.load(trained["bundle"]).manifest.config)
    splits = [
        dataset.prepare_dataset(config, config.storage.path).open(name)
        for name in ("valid", "test")
    ]
    images, truths = zip(*((inputs["image"], targets) for inputs, targets in splits), strict=True)
    return np.concatenate(images), np.concatenate(truths)


def stats(url):
    return httpx.get(f"{url}/v2/models/digits/stats", timeout=30).raise_for_status().json()


def feedback(url, **body):
    """Send feedback; return the status and the JSON of the response."""
    answer = httpx.post(f"{url}/v2/models/digits/feedback", json=body, timeout=30)
    return answer.status_code, answer.json()


def ask(url, images):
    """Send images, uint8 [N, 8, 8, 1]; return the request's id and the predicted labels."""
    image = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
    }
    body = {"inputs": [image]}
    answer = httpx.post(f"{url}/v2/models/digits/infer", json=body, timeout=30)
    label = next(out for out in answer.json()["outputs"] if out["name"] == "label")
    return answer.headers["x-request-id"], label["data"]


def check_feedback(url, images):
    """Check the responses to wrong feedback and to feedback that is sent twice."""
    status, answer = feedback(url, id="never-asked", truth=["1"])
    assert (status, "no request 'never-asked' is known" in answer["error"]) == (404, True)
    request_id, labels = ask(url, images[:2])
    status, answer = feedback(url, id=request_id, truth=["<b>eleven</b>", "1"])
    assert (status, "classes are 0, 1" in answer["error"]) == (400, True)
    status, answer = feedback(url, id=request_id, truth=["1"])
    assert (status, "has 1 values" in answer["error"]) == (400, True)
    for changed in (True, False):
        expected = {"id": request_id, "counted": True, "changed": changed}
        assert feedback(url, id=request_id, truth=labels) == (200, expected)


def check_late_feedback(url, root):
    """Check that a restarted server finds earlier requests in the log."""
    row = reader.read_requests(root, "digits").slice(0, 1).to_pylist()[0]
    status, answer = feedback(url, id=row["id"], truth=[row["prediction"]] * 4)
    assert (status, answer.get("counted")) == (200, True)


def retrain(root, *options):
    arguments = ["--model", "digits", "--storage", root, "--epochs", "4", *options]
    command = [sys.executable, "-m", "serve.retrain", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def num_of_new_kind(root, changed):
    """Return the number of labelled rows since a time, or 0 unless they are the majority."""
    rows = reader.read_labelled(root, "digits")
    new = sum(time >= changed for time in rows["time"].to_pylist())
    return new if new > len(rows) / 2 else 0


def publish_damaged(root, folder):
    """Register a candidate whose self-test fails."""
    location, _ = registry.resolve_model("models:/digits@production", root)
    copy = folder / "copy"
    shutil.copytree(location, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        variant["golden_tolerance"] = -1.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle.load(str(copy))
    with publishing.RunRecorder(root, "digits", bundle.manifest.config) as recording:
        publishing.publish(bundle, recording, root, None, candidate="to be refused")


@pytest.mark.timeout(900)  # five trainings and rollouts, one after the other
def test_drift_leads_to_a_better_model_and_a_worse_rolls_back(place, unseen, tmp_path):
    options = [
        *(f"storage={place}", "replicas=2", "drift.window_rows=200", "log.sample_rate=1"),
        *("shadow=0.5", "rollout.min_labels=150"),
    ]
    with server.running(*options, log=tmp_path / "log") as url, Clients(url, *unseen) as clients:
        check_feedback(url, clients.images)

        def windows():
            return stats(url)["monitor"].get("1", {}).get("windows", [])

        wait_for(lambda: len(windows()) >= 2, WAIT_S)
        assert not any(window["alarms"] for window in windows())
        with clients.paused():
            assert retrain(place)["due"] is False

        changed = datetime.now(UTC)
        clients.images = 255 - clients.images
        wait_for(lambda: sum(bool(window["alarms"]) for window in windows()) >= 3, WAIT_S)
        drifted = {alarm["feature"] for window in windows() for alarm in window["alarms"]}
        assert "image.brightness" in drifted

        def live(version):
            return (stats(url)["monitor"].get(version) or {}).get("feedback") or {"count": 0}

        wait_for(lambda: live("1")["count"] > 800, WAIT_S)
        # Wait until most training records are of the new kind, on a machine of any speed. The
        # server writes records some seconds after it has counted them.
        wait_for(lambda: num_of_new_kind(place, changed) > 800, WAIT_S)
        result = retrain(place)
        assert result.get("outcome") == "registered", result
        assert (result["alias"], result["version"]) == ("candidate", 2)

        wait_for(lambda: stats(url)["decisions"], WAIT_S)
        (decision,) = stats(url)["decisions"]
        assert (decision["version"], decision["decision"]) == ("2", "promoted"), decision
        assert (
            decision["figures"]["candidate_figures"]["low"]
            > (decision["figures"]["production"]["high"])
        )
        assert registry.resolve_model("models:/digits@production", place)[1] == "2"
        assert registry.resolve_model("models:/digits@previous", place)[1] == "1"
        wait_for(lambda: live("2")["count"] > 400, WAIT_S)
        assert live("2")["low"] > decision["figures"]["production"]["high"]

        # A model that has learned almost nothing is registered only as a candidate.
        worse = ["--storage.path", place, "--optim.epochs", "1", "--optim.lr", "1e-9"]
        done = run_main([*worse, "--workers.num", "1", "--compress.variants", "[]"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["alias"] == "candidate"
        wait_for(lambda: len(stats(url)["decisions"]) == 2, WAIT_S)
        decision = stats(url)["decisions"][1]
        assert (decision["version"], decision["decision"]) == ("3", "rolled back"), decision
        assert registry.resolve_model("models:/digits@production", place)[1] == "2"
        assert registry.pending_candidate(place, "digits") is None
        assert httpx.get(f"{url}/v2/models/digits").json()["versions"] == ["2"]

        publish_damaged(place, tmp_path)
        wait_for(lambda: len(stats(url)["decisions"]) == 3, WAIT_S)
        decision = stats(url)["decisions"][2]
        assert (decision["version"], decision["decision"]) == ("4", "refused"), decision
        assert "golden" in decision["reason"]
    assert set(clients.statuses) == {200}, clients.statuses
    assert set(clients.feedback) == {200}, clients.feedback
    with server.running(f"storage={place}", "log.sample_rate=1", log=tmp_path / "log") as url:
        check_late_feedback(url, place)
