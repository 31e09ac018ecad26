"""The console: its files and routes, and the page itself in a browser."""

import asyncio
import fnmatch
import json
import re
import shutil
import threading
import time
import tomllib
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
import pytest
import uvicorn

from cluster.commit import file_digest as digest
from serve.access import Guard
from serve.config import GatewayConfig
from serve.http import console, model_gateway
from serve.http.routes import ModelAPI
from serve.protocol import v2
from serve.security import APIKey, KeyStore
from serve.telemetry.metrics import SECONDS, VersionMetrics, exposition
from tests import server
from tests.serve.http.test_model_gateway import Application
from tests.serving import client_of, make_host, make_rest
from tests.train.tasks.test_tasks import image_bytes
from train.bundle import Bundle
from train.bundle.manifest import Manifest, TensorMetadata
from train.tasks import Features

CHROMIUM = shutil.which("chromium")
MARKUP = "<img src=x onerror=alert(1)>"
CARD = "<!doctype html><title>Card</title><p>It tells of the model."
SECRET = "hk_" + "a" * 43
# Time limit for an expected element to appear on a page.
PATIENCE_MS = 15_000


def golden_digit(bundle):
    """Return an image, uint8 [H, W], and the index of the class that the model predicts."""
    inputs, outputs = bundle.golden(bundle.manifest.default_variant)
    return inputs["image"][0].squeeze(), int(outputs["logits"][0].argmax())


@pytest.fixture(scope="module")
def marked(bundle, tmp_path_factory):
    """The bundle with a model card, and with HTML markup as the name of one class."""
    copy = tmp_path_factory.mktemp("marked") / "bundle"
    shutil.copytree(bundle.path, copy)
    features = json.loads((copy / "features.json").read_text())
    features["target"]["classes"][golden_digit(bundle)[1]] = MARKUP
    (copy / "features.json").write_text(json.dumps(features))
    (copy / "report" / "card.html").write_text(CARD)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["task"] = features
    for name in ("features.json", "report/card.html"):
        path = copy / name
        manifest["files"][name] = {"sha256": digest(path), "size_bytes": path.stat().st_size}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.load(str(copy))


@pytest.fixture(scope="module")
def client(marked):
    with client_of(make_rest(marked)) as client:
        yield client


def static_files():
    return sorted(console.STATIC.iterdir())


def keys():
    return KeyStore([APIKey(name="team", sha256=sha256(SECRET.encode()).hexdigest())])


@pytest.mark.parametrize("path", ["/", *(f"/console/{path.name}" for path in static_files())])
def test_the_page_and_its_files_allow_no_foreign_scripts(client, path):
    answer = client.get(path)
    if path == "/console/index.html":
        assert answer.status_code == 404
        return
    assert answer.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = {"": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    suffix = path.rpartition(".")[2] if "." in path else ""
    assert answer.headers["content-type"].startswith(kinds[suffix])


@pytest.mark.parametrize("path", static_files(), ids=lambda path: path.name)
def test_the_pages_files_name_no_other_host_and_escape_data(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(", text)
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(", text)
    if path.suffix == ".html":
        assert not re.search(r"\son\w+=|\sstyle=|<script>|<style", text)


def test_every_file_of_the_page_is_packaged():
    project = tomllib.loads((server.REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["serve"]
    for path in static_files():
        name = path.relative_to(server.REPOSITORY / "serve").as_posix()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_the_manifest_is_the_bundles_with_fields_for_the_form(client, marked):
    expected = json.loads((marked.path / "manifest.json").read_text())
    for place in ("", "/versions/3", "/versions/production"):
        assert client.get(f"/v2/models/digits{place}/manifest").json() == expected
    assert expected["task"] == json.loads((marked.path / "features.json").read_text())
    assert client.get("/v2/models/digits/versions/4/manifest").status_code == 404


def test_files_of_the_report_are_returned_unchanged(client, marked):
    names = [name for name in marked.manifest.files if name.startswith("report/")]
    assert {"report/variants.png", "report/card.html"} <= set(names)
    for name in names:
        answer = client.get(f"/v2/models/digits/versions/production/{name}")
        assert answer.content == (marked.path / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert answer.headers["content-type"].split(";")[0] in {
            *("image/png", "text/plain", "text/html", "application/json")
        }


@pytest.mark.parametrize(
    "name",
    [
        *("../features.json", "..%2ffeatures.json", "./card.html", "..", "", "/etc/passwd"),
        *("..\\features.json", "card.html/../../golden.npz", "none.png", "unlisted.txt"),
        *("variants.png\0", "card.html\n", "é.png", "x" * 5000),
    ],
)
def test_only_listed_files_of_the_report_are_returned(marked, name):
    (marked.path / "report" / "unlisted.txt").write_text("not in the manifest")
    path = f"/v2/models/digits/report/{name}"
    # Called directly, because an HTTP client would normalise the path.
    status, _, body = asyncio.run(model_gateway.call_app(make_rest(marked), "GET", path, [], b""))
    assert status == 404
    assert set(json.loads(body)) == {"error"}


def test_a_manifest_cannot_lead_out_of_the_report(marked, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(marked.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["report/../features.json"] = manifest["files"]["features.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with client_of(make_rest(Bundle.load(str(copy)))) as client:
        plane = client.app._handler.endpoint("digits").plane
        with pytest.raises(console.NotFound):
            console.report_file(plane, "../features.json")


def test_a_key_is_needed_for_a_model_but_not_for_the_page(marked):
    with client_of(make_rest(marked, keys=keys())) as client:
        for path in ("/", "/console/console.js"):
            assert client.get(path).status_code == 200
        for path in ("manifest", "report/card.html"):
            path = f"/v2/models/digits/{path}"
            assert client.get(path).status_code == 401
            headers = {"Authorization": f"Bearer {SECRET}"}
            assert client.get(path, headers=headers).status_code == 200
        assert client.get("/console/x/../../v2/models").status_code == 401


def several(*bundles):
    """Return the gateway of several models."""
    models = {bundle.manifest.name: Application(make_host(bundle)) for bundle in bundles}
    config = GatewayConfig(
        models=list(models), limits={"max_body_bytes": 10**6, "body_timeout_s": 5}
    )
    find = models.__getitem__
    return model_gateway.ModelGateway(find, find, Guard(None, loopback=True), config)


def test_the_gateway_of_several_models_has_the_console(marked):
    with client_of(several(marked)) as client:
        assert client.get("/").text == (console.STATIC / "index.html").read_text()
        assert client.get("/console/console.js").status_code == 200
        assert client.get("/v2/models/digits/manifest").json()["name"] == "digits"
        card = client.get("/v2/models/digits/versions/3/report/card.html")
        assert card.text == CARD
        assert card.headers["content-security-policy"].startswith("sandbox")


# Tests of the page in a browser.

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)


class Alone:
    """A single replica that reports its own metrics, without a process that collects them."""

    def __init__(self, bundle, **options):
        host = make_host(bundle, **options)
        self.rest = ModelAPI(host)
        host.repository.metrics = self._metrics

    async def _metrics(self):
        return self.rest.snapshot("r1")


@contextmanager
def listening(application):
    """Serve an ASGI application; yield its URL."""
    config = uvicorn.Config(application, port=0, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not running.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as run:
        # Chromium's sandbox needs privileges that containers rarely have; we open our page only.
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A browser page that records its problems and the URLs of its requests."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(PATIENCE_MS)
        self.problems, self.asked = [], []
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _said(self, kind, text):
        if kind in ("error", "warning"):
            self.problems.append(text)

    def open(self, view=""):
        self.page.goto(f"{self.url}/{view}")
        return self.page

    def check(self):
        """Assert that nothing failed and that no other host was contacted."""
        assert self.problems == []
        others = [url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))]
        assert others == []


@pytest.fixture
def visit(chromium, site):
    visits = []

    def make(url=site, **options):
        visits.append(Visit(chromium, url, **options))
        return visits[-1]

    yield make
    for each in visits:
        each.page.close()


@pytest.fixture(scope="module")
def site(marked):
    with listening(Alone(marked).rest) as url:
        yield url


@pytest.fixture(scope="module")
def digit(marked):
    """A PNG for which the model predicts the class whose name is markup."""
    content = image_bytes(golden_digit(marked)[0])
    return {"name": f"{MARKUP}.png", "mimeType": "image/png", "buffer": content}


def fits(page):
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return wide <= seen


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_overview_shows_the_served_model(visit, marked, width):
    shown = visit(viewport={"width": width, "height": 800}, color_scheme="dark")
    page = shown.open()
    page.wait_for_selector("figure img[src^='blob:']")
    assert page.title() == "Overview · digits · Halyard"
    assert page.locator("html").get_attribute("lang") == "en"
    text = page.inner_text("main")
    variant = marked.manifest.variants[marked.manifest.default_variant]
    assert f"{variant.metrics['test_accuracy']:.4f}" in text
    for name in (*marked.manifest.variants, "production", "default", "accepted"):
        assert name in text
    href = page.get_by_role("link", name="Model card").get_attribute("href")
    assert href == "/v2/models/digits/versions/3/report/card.html"
    for view in ("try", "live", "rollout"):
        page.goto(f"{shown.url}/#/digits/{view}")
        page.wait_for_selector("main .card")
        assert fits(page), view
    shown.check()


@needs_browser
@pytest.mark.slow
def test_a_model_card_is_linked_only_if_it_exists(visit, bundle):
    with listening(Alone(bundle).rest) as url:
        shown = visit(url)
        page = shown.open()
        page.get_by_role("link", name="HTTP interface").wait_for()
        has_card = "report/card.html" in bundle.manifest.files
        assert page.get_by_role("link", name="Model card").count() == int(has_card)


@needs_browser
@pytest.mark.slow
def test_an_image_is_predicted_and_markup_stays_text(visit, digit):
    shown = visit(viewport={"width": 360, "height": 800})
    page = shown.open("#/digits/try")
    page.get_by_label("image").set_input_files([digit])
    bars = page.get_by_role("list", name="Probabilities").get_by_role("listitem")
    bars.first.wait_for()
    assert bars.count() == 10
    assert bars.first.locator(".name").inner_text() == MARKUP
    assert page.locator(".big").inner_text().endswith(MARKUP)
    assert page.locator("main img").count() == 1
    assert fits(page)
    shown.check()


@needs_browser
@pytest.mark.slow
def test_the_servers_error_for_an_input_is_shown(visit):
    shown = visit()
    page = shown.open("#/digits/try")
    wrong = {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
    page.get_by_label("image").set_input_files([wrong])
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "'image'" in alert.inner_text()
    assert "PNG, JPEG" in alert.inner_text()
    assert page.get_by_label("image").get_attribute("aria-invalid") == "true"


@needs_browser
@pytest.mark.slow
def test_every_control_has_a_name_and_keyboard_access(visit):
    shown = visit()
    page = shown.open("#/digits/try")
    page.get_by_role("button", name="Predict").wait_for()
    controls = page.locator("a[href], button, input, select, textarea, [tabindex='0']")
    expected = controls.filter(visible=True).count()
    reached = []
    for _ in range(expected):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => {
                    const { activeElement: now } = document;
                    const style = getComputedStyle(now);
                    const name = now.labels?.[0]?.innerText || now.innerText;
                    return [name, style.outlineStyle !== "none"];
                }"""
            )
        )
    names = [name.split("\n")[0] for name, _ in reached]
    assert names[0] == "Skip to the content"
    assert {"Overview", "Try it", "Live", "Rollout", "version", "image", "Predict"} <= set(names)
    assert len(set(names)) == expected
    assert all(is_seen for _, is_seen in reached)
    page.get_by_role("link", name="Overview").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("text=agreement with fp32")
    assert page.evaluate("document.activeElement.innerText") == "Overview"


@needs_browser
@pytest.mark.slow
def test_a_key_is_requested_and_kept_in_the_tab(visit, marked):
    with listening(Alone(marked, keys=keys()).rest) as url:
        shown = visit(url)
        page = shown.open()
        field = page.get_by_label("Key")
        field.fill("hk_wrong")
        field.press("Enter")
        page.wait_for_selector("text=the key is invalid.")
        field.fill(SECRET)
        field.press("Enter")
        page.wait_for_selector("text=agreement with fp32")
        page.reload()
        page.wait_for_selector("figure img[src^='blob:']")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.get_by_role("button", name="Forget key").click()
        field.wait_for()


@needs_browser
@pytest.mark.slow
def test_metrics_are_requested_only_while_the_page_is_visible(visit, digit):
    shown = visit()
    page = shown.page
    page.clock.install()
    with page.expect_request("**/metrics"):
        shown.open("#/digits/live")
    page.wait_for_selector("text=1 replica.")
    with page.expect_response("**/metrics") as answered:
        page.clock.run_for(2000)
    answered.value.finished()
    page.wait_for_selector("text=0/s")
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    before = len(shown.asked)
    page.clock.run_for(20_000)
    assert len(shown.asked) == before
    with page.expect_request("**/metrics"):
        page.evaluate(hide, False)
    shown.check()


@needs_browser
@pytest.mark.slow
def test_rates_and_percentiles_match_the_metrics(visit, rng):
    page = visit().open()
    seconds = rng.lognormal(-4, 1, 500)

    def text(values, replica, bad=0):
        metrics = VersionMetrics()
        for value in values:
            metrics.answered("v2", 200, value)
        metrics.answered("http", 200, 1)
        for _ in range(bad):
            metrics.answered("v2", 500, 0.001)
        labels = {"model": MARKUP + '"\\', "version": "3", "replica": replica}
        return exposition(metrics.snapshot(labels)).decode()

    # Between the polls, replica a restarts, b continues and c starts.
    polls = [
        text(seconds[:100], "a") + text(seconds[:50], "b"),
        text(seconds[100:160], "a", bad=5) + text(seconds[:250], "b") + text(seconds[250:350], "c"),
    ]
    new = np.sort([*seconds[100:160], *[0.001] * 5, *seconds[50:250], *seconds[250:350]])
    figures = page.evaluate(
        """async ([model, polls]) => {
            const [{ Watch }, { parse }] = await Promise.all(
                [import("/console/live.js"), import("/console/prometheus.js")]);
            const watch = new Watch(model);
            watch.take(parse(polls[0]), 0);
            return watch.take(parse(polls[1]), 2000).figures.values;
        }""",
        [MARKUP + '"\\', polls],
    )
    assert figures["requests"] == [pytest.approx(len(new) / 2)]
    assert figures["errors"] == [pytest.approx(5 / 2)]
    for share, ms in zip((0.5, 0.95, 0.99), figures["latency"], strict=True):
        assert ms / 1e3 == pytest.approx(interpolated(new, share))


def interpolated(values, share):
    """Return the quantile that Prometheus' histogram_quantile gives for values, float64 [N]."""
    rank, low, below = share * len(values), 0.0, 0
    for bound in SECONDS:
        count = int(np.sum(values <= bound))
        if count >= rank and count > below:
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low


@needs_browser
@pytest.mark.slow
def test_a_form_offers_values_of_training_and_sends_valid_json(visit):
    page = visit().open()
    kinds = {
        "age": {"kind": "number"},
        "pickup": {"kind": "date"},
        "dropoff": {"kind": "date"},
        "sound": {"kind": "vector"},
        "tags": {"kind": "set"},
        "fare": {"kind": "number"},
        "adult": {"kind": "boolean"},
        "sex": {"kind": "category"},
        "remark": {"kind": "text"},
    }
    columns = {
        "age": [20.0, 40.0, 33.0],
        "pickup": ["2026-01-01T10:00:00", "2026-01-03T10:00:00", "2026-01-02T10:00:00"],
        "dropoff": ["2026-01-01T11:00:00", "2026-01-03T11:00:00", "2026-01-02T11:00:00"],
        "sound": [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 5.0]],
        "tags": [["calm"], ["calm", "loud"], ["old"]],
        "fare": [7.25, 8.0, 100.0],
        "adult": [True, True, False],
        "sex": [MARKUP, MARKUP, "female"],
        "remark": ["a word", "and more words", "words"],
    }
    features = Features.of(kinds).fit(columns)
    tensors = [TensorMetadata.of(field) for field in features.fields]
    manifest = {
        "task": {"features": features.to_dict()},
        "inputs": [tensor.model_dump() for tensor in tensors],
    }
    script = """async ([manifest, given]) => {
        const { inputsOf, field } = await import("/console/form.js");
        const fields = inputsOf(manifest).map(field);
        for (const each of fields) {
            document.body.append(each.node);
            if (given === null) each.fill();
            else each.control.value = given[each.input.name] ?? "";
        }
        return Promise.all(fields.map((each) => each.tensor()));
    }"""

    def sent(given):
        inputs = page.evaluate(script, [manifest, given])
        body = json.dumps({"inputs": inputs}).encode()
        model = Manifest.model_construct(name="rides", inputs=tensors)
        return v2.decode(body, None, model, 10).columns

    read = {name: values[0] for name, values in sent(None).items()}
    assert read["age"] == 31
    assert read["fare"] == pytest.approx(np.mean(columns["fare"]), rel=1e-2)
    assert read["dropoff"] == b"2026-01-02T11:00:00"
    assert read["sound"].tolist() == [2, 3, 4]
    assert read["tags"] in (b"calm", b"loud", b"old")
    assert (read["adult"], read["sex"]) == (b"true", MARKUP.encode())
    first = {name: values[0] for name, values in columns.items()}
    encoded = features.encode(sent({**first, "adult": "true", "tags": "calm"}))
    for name, array in features.encode_records([first]).items():
        np.testing.assert_array_equal(encoded[name], array)
    missing = features.encode(sent({}))
    for name, array in features.encode_records([dict.fromkeys(kinds)]).items():
        np.testing.assert_array_equal(missing[name], array)


COMPARED = {"accuracy": 0.98, "low": 0.97, "high": 0.99, "p50_ms": 1.9, "p95_ms": 4, "errors": 0}
STATISTICS = {
    "statistics": {"psi": {"score": 0.41, "threshold": 0.1}},
    "missing": 0,
    "out_of_range": 0.5,
    "reference": [0.25] * 4,
    "window": [0.1, 0.2, 0.3, 0.4],
}
ALARM = {"feature": MARKUP, "statistic": "psi", "score": 0.41, "threshold": 0.1}
STATS = {
    "rollout": {
        "candidate": "4",
        "phase": "canary",
        "share": 0.1,
        "compared": 1830,
        "agreement": 0.9721,
        "production": COMPARED,
        "candidate_figures": COMPARED,
        "decision": MARKUP,
    },
    "decisions": [
        {
            "time": "2026-11-23T10:00:00+00:00",
            "version": "2",
            "decision": "refused",
            "reason": MARKUP,
            "figures": {"accuracy": 0.9},
        }
    ],
    "monitor": {
        "3": {
            "windows": [{"rows": 500, "time": "2026-11-23T10:00:00+00:00", "alarms": [ALARM]}],
            "current": {"rows": 120, "of": 500},
            "features": {MARKUP: STATISTICS},
            "feedback": None,
        }
    },
}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, ["No candidate is being compared with production.", "No decisions yet."]),
        ({"rollout": None, "decisions": [], "monitor": {}}, ["No decisions yet."]),
        ({"monitor": {"3": {}}}, ["No complete window yet."]),
        (STATS, ["97.21 %", "0.98 [0.97, 0.99]", "120 of 500 rows", MARKUP]),
    ],
)
def test_a_rollout_is_shown_from_complete_or_partial_stats(visit, said, words):
    shown = visit(viewport={"width": 360, "height": 800})
    shown.page.route("**/stats", lambda route: route.fulfill(json={"model_stats": [], **said}))
    page = shown.open("#/digits/rollout")
    page.wait_for_selector("text=Decisions")
    for each in words:
        assert each in page.inner_text("main")
    assert page.locator("main img").count() == 0
    assert fits(page)
    shown.check()


@needs_browser
@pytest.mark.ray
@pytest.mark.slow
def test_the_console_works_with_several_replicas(
    visit, trained, bundle, storage_path, tmp_path, digit
):
    log = tmp_path / "serve.log"
    with server.running(f"storage={storage_path}", "replicas=2", log=log) as url:
        shown = visit(url)
        page = shown.open("#/digits/try/production")
        page.get_by_label("image").set_input_files([digit])
        page.get_by_role("list", name="Probabilities").wait_for()
        label = bundle.task.target.to_dict()["classes"][golden_digit(bundle)[1]]
        assert page.locator(".big").inner_text().endswith(label)
        page.get_by_role("link", name="Live").click()
        page.wait_for_selector("text=2 replicas.")
        page.get_by_role("link", name="Rollout").click()
        page.wait_for_selector("text=Decisions")
        shown.check()
