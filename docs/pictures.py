"""Make the pictures of the documentation again: python docs/pictures.py

It trains on the made-up deliveries of the quickstart, tunes on handwritten digits, and takes
screenshots of the console in Chromium while the first model is served. The pictures go to
docs/images. It takes about five minutes.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
from playwright.sync_api import Page, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = REPOSITORY / "docs" / "images"
# Ray passes both on to its workers and to the server.
sys.path[0] = os.environ["PYTHONPATH"] = str(REPOSITORY)

from docs.examples.deliveries import make_deliveries  # noqa: E402
from serve import Client, deploy  # noqa: E402
from train import Config, fit  # noqa: E402
from tune import StudyConfig, tune  # noqa: E402

BATCH_ROWS = 20
DATA = {"target": "delayed", "data": {"train": "deliveries.csv"}}
STUDY = {
    "name": "digits",
    "data": {"train": "sklearn:digits"},
    "net": {"widths": [16, 32]},
    "optim": {"epochs": 4},
    "workers": {"num": 1},
    "registry": {"enabled": False},
    "tune": {
        "space": {
            "net.widths": {"choice": [[4, 8], [8, 16], [16, 32], [32, 64], [64, 128]]},
            "optim.lr": {"loguniform": [0.01, 0.3]},
        },
        "objectives": ["valid_loss", "fp32.bytes"],
        "num_trials": 16,
    },
}


def make_orders(rows: int, *, seed: int, rain: float) -> pd.DataFrame:
    """Return made-up deliveries in random order."""
    return pd.DataFrame(make_deliveries(rows, seed, rain)).sample(frac=1, random_state=seed)


def send(client: Client, orders: pd.DataFrame) -> None:
    for start in range(0, len(orders), BATCH_ROWS):
        client.predict(orders[start : start + BATCH_ROWS].drop(columns="delayed"))


def photograph_console(page: Page, client: Client) -> None:
    """Take screenshots of the overview, and of drift once rainy deliveries have been sent."""
    page.goto("http://127.0.0.1:8000/#/deliveries/overview")
    page.get_by_text("deliveries, version").wait_for()
    page.wait_for_load_state("networkidle")
    page.screenshot(path=IMAGES / "console.png")
    page.goto("http://127.0.0.1:8000/#/deliveries/live")
    for seed in range(8):
        send(client, make_orders(200, seed=seed, rain=0.8))
        # The page reads the metrics every few seconds.
        page.wait_for_timeout(3000)
    page.get_by_text("features drift").wait_for()
    page.screenshot(path=IMAGES / "drift.png", full_page=True)


def picture_report() -> None:
    make_orders(3000, seed=0, rain=0.25).to_csv("deliveries.csv", index=False)
    bundle = fit(Config(**DATA))
    shutil.copy(bundle.path / "report" / "data.png", IMAGES / "data-report.png")


def picture_study() -> None:
    result = tune(StudyConfig(**STUDY))
    shutil.copy(Path(result["report"]) / "pareto.png", IMAGES / "pareto.png")


def picture_console() -> None:
    options = {"log": {"sample_rate": 1}, "drift": {"window_rows": 200}}
    with (
        deploy("models:/deliveries@production", **options) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        photograph_console(page, server.client())
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        IMAGES.mkdir(exist_ok=True)
        picture_report()
        picture_study()
        picture_console()
