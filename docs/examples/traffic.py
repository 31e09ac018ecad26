"""Send deliveries to a server and report whether they were late: the traffic of the quickstart.

python docs/examples/traffic.py rainy.csv
"""

import sys

import pandas as pd

from serve import Client

BATCH_ROWS = 50


def main(path: str) -> None:
    client = Client("http://127.0.0.1:8000")
    # In random order: by time, each window of the server would contain another season.
    orders = pd.read_csv(path).sample(frac=1, random_state=0)
    correct = 0
    for start in range(0, len(orders), BATCH_ROWS):
        batch = orders[start : start + BATCH_ROWS]
        request_id = f"{path}-{start}"
        predictions = client.predict(batch.drop(columns="delayed"), request_id=request_id)
        client.feedback(request_id, truth=list(batch["delayed"]))
        correct += (predictions["label"] == batch["delayed"]).sum()
    print(f"{correct} of {len(orders)} predictions were right")


if __name__ == "__main__":
    main(sys.argv[1])
