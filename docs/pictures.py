"""Make the pictures of the documentation again: python docs/pictures.py

It trains, tunes and serves the made-up deliveries of the quickstart, which takes about three
minutes, and takes screenshots of the console in Chromium. The pictures go to docs/images.
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
    "space": {
        "net.widths": {"choice": [[8], [32], [128, 64], [512, 256]]},
        "optim.lr": {"loguniform": [1e-4, 1e-1]},
    },
    "objectives": ["valid_loss", "fp32.p50_ms@256"],
    "num_trials": 16,
}


def make_orders(rows: int, *, seed: int, rain: float) -> pd.DataFrame:
    return pd.DataFrame(make_deliveries(rows, seed, rain))


def send(client: Client, orders: pd.DataFrame) -> None:
    for start in range(0, len(orders), BATCH_ROWS):
        client.predict(orders[start : start + BATCH_ROWS].drop(columns="delayed"))


def photograph_console(page: Page, client: Client) -> None:
    """Take screenshots of the overview, and of drift once rainy deliveries have been sent."""
    page.goto("http://127.0.0.1:8000/#/deliveries/overview")
    page.get_by_text("deliveries").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.screenshot(path=IMAGES / "console.png")
    page.goto("http://127.0.0.1:8000/#/deliveries/live")
    for seed in range(8):
        send(client, make_orders(200, seed=seed, rain=0.8))
        # The page reads the metrics every few seconds.
        page.wait_for_timeout(3000)
    page.get_by_text("features drift").wait_for()
    page.screenshot(path=IMAGES / "drift.png", full_page=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    make_orders(3000, seed=0, rain=0.25).to_csv("deliveries.csv", index=False)
    bundle = fit(Config(**DATA))
    shutil.copy(bundle.path / "report" / "data.png", IMAGES / "data-report.png")
    result = tune(StudyConfig(**DATA, tune=STUDY, registry={"enabled": False}))
    shutil.copy(Path(result["report"]) / "pareto.png", IMAGES / "pareto.png")
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
        main()
