"""Write deliveries of a made-up courier as CSV: the data of the quickstart.

    python docs/examples/deliveries.py > deliveries.csv
    python docs/examples/deliveries.py --rows 1000 --seed 1 --rain 0.7 > rainy.csv

A delivery is late more often if it is far, in rain, and at rush hour.
"""

import argparse
import csv
import sys
from datetime import datetime, timedelta

import numpy as np

START, YEAR = datetime(2025, 1, 1), timedelta(days=365)
COURIERS = ("Ada", "Ben", "Cem", "Dot", "Eli")
# Additional risk of delay of each courier, in the logit.
SLOWNESS = (0.0, 0.2, -0.3, 0.9, 0.0)
COLUMNS = ("ordered", "courier", "weather", "distance_km", "items", "delayed")


def make_deliveries(rows: int, seed: int, rain: float) -> list[dict[str, object]]:
    """Return the deliveries of one year, by time. rain: fraction of them in rain."""
    rng = np.random.default_rng(seed)
    deliveries: list[dict[str, object]] = []
    for number in range(rows):
        ordered = START + YEAR * number / rows
        courier = int(rng.integers(len(COURIERS)))
        is_wet = bool(rng.random() < rain)
        distance_km = float(rng.gamma(2.0, 2.5))
        items = int(rng.poisson(2)) + 1
        rush = ordered.hour in (12, 18, 19)
        logit = -3.2 + 0.35 * distance_km + 1.6 * is_wet + 1.1 * rush + SLOWNESS[courier]
        delayed = rng.random() < 1 / (1 + np.exp(-logit))
        deliveries.append(
            {
                "ordered": ordered.isoformat(sep=" ", timespec="minutes"),
                "courier": COURIERS[courier],
                "weather": "rain" if is_wet else str(rng.choice(["sun", "clouds"])),
                # The tracker misses some distances.
                "distance_km": "" if rng.random() < 0.04 else round(distance_km, 1),
                "items": items,
                "delayed": "yes" if delayed else "no",
            }
        )
    return deliveries


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up deliveries as CSV to stdout.")
    parser.add_argument("--rows", type=int, default=3000, help="number of deliveries")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--rain", type=float, default=0.25, help="fraction of them in rain")
    options = parser.parse_args()
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(make_deliveries(options.rows, options.seed, options.rain))


if __name__ == "__main__":
    main()
