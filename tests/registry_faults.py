"""Count the outcomes of registry failures and races: python -m tests.registry_faults BUNDLE.

Run it by hand for complete counts; the tests run fewer cases.
"""

import json
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.mlflow_server import FAULTS, SETTINGS, FaultyProxy, mlflow_server
from train.bundle import Bundle, publishing, registry
from train.bundle.bundle import WEIGHTS
from train.bundle.manifest import BundleFile
from train.bundle.mlflow_access import RegistryError

METRIC = "valid_accuracy"
DECISION = {"time": "2026-01-01T00:00:00+00:00", "decision": "promoted"}


def with_metric(bundle: Bundle, value: float, metric: str = METRIC) -> Bundle:
    """Return the bundle with other weights and another metric of its default variant."""
    manifest = bundle.manifest
    name = manifest.default_variant
    variant = manifest.variants[name]
    changed = variant.model_copy(update={"metrics": {**variant.metrics, metric: value}})
    variants = {**manifest.variants, name: changed}
    weights = BundleFile(sha256=secrets.token_hex(32), size_bytes=1)
    update = {"variants": variants, "files": {**manifest.files, WEIGHTS: weights}}
    return replace(bundle, manifest=manifest.model_copy(update=update))


def publish(bundle: Bundle, root: str, value: float, **options: Any) -> dict[str, Any]:
    with publishing.RunRecorder(root, bundle.manifest.name, {}) as recording:
        return publishing.publish(with_metric(bundle, value), recording, root, METRIC, **options)


def aliases(root: str, name: str) -> dict[str, str]:
    model = registry.mlflow_client(root).get_registered_model(name)
    return {alias: str(version) for alias, version in model.aliases.items()}


# Failing requests


def inject_faults(
    bundle: Bundle, proxy: FaultyProxy, root: str, most: int = sys.maxsize
) -> Counter[str]:
    """Make each request of each operation fail, with all later ones; count the outcomes.

    Production has a metric of 0.90. The operations publish a worse version, roll back a candidate
    and look up production. The production version must stay the same throughout.
    most: requests to fail for each operation and fault, spread over its requests.
    """
    name = bundle.manifest.name
    assert publish(bundle, root, 0.90)["alias"] == "production"
    tried = str(publish(bundle, root, 0.95, candidate="to be tried")["version"])
    operations: dict[str, Callable[[], Any]] = {
        "publish": lambda: publish(bundle, root, 0.10),
        "roll back": lambda: registry.roll_back_candidate(root, name, tried, DECISION),
        "look up": lambda: registry.load_bundle(f"models:/{name}@production", root),
    }
    outcomes: Counter[str] = Counter()
    for operation, run in operations.items():
        proxy.inject(None)
        run()
        count = proxy.count
        for first in _spread(count, most):
            for fault in FAULTS:
                before = _retried(proxy, lambda: aliases(root, name)["production"])
                proxy.inject(fault, first)
                try:
                    run()
                    outcome = "done"
                except RegistryError:
                    outcome = "one line"
                # There may be fewer requests than before, e.g. if a name is already registered.
                if proxy.injected:
                    outcomes[f"{operation}: {outcome}"] += 1
                    outcomes["injected"] += proxy.injected
                    outcomes["points"] += 1
                after = _retried(proxy, lambda: aliases(root, name)["production"])
                assert after == before, f"{operation}, request {first}, {fault}"
    return outcomes


def inject_promotion_faults(
    bundle: Bundle, proxy: FaultyProxy, root: str, most: int = sys.maxsize
) -> Counter[str]:
    """Make each request of a promotion fail; see `inject_faults`.

    Afterwards production is the old version or the promoted one; in the second case `previous` is
    the old version.
    """
    name = bundle.manifest.name
    outcomes: Counter[str] = Counter()
    proxy.inject(None)
    publish(bundle, root, 0.90)

    def propose() -> str:
        return str(publish(bundle, root, 0.95, candidate="to be tried")["version"])

    candidate = propose()
    proxy.inject(None)
    registry.promote_candidate(root, name, candidate, aliases(root, name)["production"], DECISION)
    count = proxy.count
    for first in _spread(count, most):
        for fault in FAULTS:
            candidate = propose()
            before = aliases(root, name)["production"]
            proxy.inject(fault, first)
            with suppress(RegistryError):
                registry.promote_candidate(root, name, candidate, before, DECISION)
            outcomes["injected"] += proxy.injected
            outcomes["points"] += 1
            proxy.inject(None)
            found = aliases(root, name)
            assert found["production"] in (before, candidate)
            if found["production"] == candidate:
                assert found["previous"] == before
                outcomes["promotion: done"] += 1
            else:
                outcomes["promotion: one line"] += 1
            # Repeating the promotion completes it.
            registry.promote_candidate(root, name, candidate, before, DECISION)
            found = aliases(root, name)
            assert (found["production"], found["previous"]) == (candidate, before)
            assert "candidate" not in found
    return outcomes


def _spread(count: int, most: int) -> list[int]:
    return sorted({1 + index * count // min(most, count) for index in range(min(most, count))})


def _retried(proxy: FaultyProxy, ask: Callable[[], str]) -> str:
    proxy.inject(None)
    return ask()


# Concurrent registrations


def _register(
    location: str, root: str, uri: str | None, name: str, jobs: Any, results: Any
) -> None:
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    import mlflow  # noqa: F401 - imported before the race begins

    bundle = Bundle.load(location)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"name": name}))
    results.put("ready")
    while (job := jobs.get()) is not None:
        value, folder = job
        try:
            results.put((value, publish(bundle, folder or root, value)["alias"]))
        except BaseException as error:
            results.put((value, f"{type(error).__name__}: {str(error)[:300]}"))


def race(
    location: str,
    root: str,
    uri: str | None,
    pairs: int,
    *,
    first_use: bool,
    name: str = "digits",
) -> Counter[str]:
    """Register a better and a worse bundle concurrently, `pairs` times; count the outcomes.

    first_use: each pair uses a new embedded registry, which it has to create.
    """
    context = multiprocessing.get_context("spawn")
    queues = [(context.Queue(), context.Queue()) for _ in range(2)]
    given = (location, root, uri, name)
    workers = [context.Process(target=_register, args=(*given, *pair)) for pair in queues]
    for worker in workers:
        worker.start()
    for _, results in queues:
        assert results.get(timeout=120) == "ready"
    outcomes: Counter[str] = Counter()
    for pair in range(pairs):
        folder = f"{root}/{pair}" if first_use else root
        # Each pair is better than the previous one.
        base = 0.1 if first_use else 0.1 + 0.8 * pair / pairs
        values = [base + 0.01 / pairs, base + 0.005 / pairs]
        for (jobs, _), value in zip(queues, values[:: 1 if pair % 2 else -1], strict=True):
            jobs.put((value, folder))
        ended = dict(results.get(timeout=120) for _, results in queues)
        problems = [
            str(result) for result in ended.values() if result not in ("production", "candidate")
        ]
        for problem in problems:
            outcomes[problem] += 1
        client = registry.mlflow_client(folder)
        model = client.get_registered_model(name)
        production = client.get_model_version(name, model.aliases["production"])
        best = float(production.tags[METRIC]) == max(values)
        outcomes["the better one" if best else "the worse one"] += 1
    for jobs, _ in queues:
        jobs.put(None)
    for worker in workers:
        worker.join(60)
    return outcomes


def main(location: str) -> None:
    figures: dict[str, Any] = {}
    pairs = 50
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        for label, first_use in (("embedded", False), ("embedded, first use", True)):
            place = Path(folder, label.replace(", ", "-").replace(" ", "-"))
            place.mkdir()
            figures[label] = race(location, str(place), None, pairs, first_use=first_use)
        with mlflow_server(Path(folder)) as server:
            root = str(Path(folder, "root"))
            os.environ["MLFLOW_TRACKING_URI"] = server
            figures["server"] = race(location, root, server, pairs, first_use=False)
        other = Path(folder, "faults")
        other.mkdir()
        with mlflow_server(other) as server, FaultyProxy(server) as proxy:
            os.environ.update({**SETTINGS, "MLFLOW_TRACKING_URI": proxy.address})
            bundle = Bundle.load(location)
            figures["faults"] = inject_faults(bundle, proxy, root)
            figures["promotions"] = inject_promotion_faults(bundle, proxy, root)
        figures["seconds"] = round(time.monotonic() - begun)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
