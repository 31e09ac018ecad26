"""Training on more data than fits in memory.

`python tests/bench/large.py --folder FOLDER --gigabytes 12.5`

Writes about that many gigabytes of incompressible images as Parquet, trains on them for one epoch
with `train/main.py`, and prints the peak memory of all of its processes together. Anonymous and
shared memory count; pages of mapped files do not, because the kernel can reclaim them. To run under
a limit, put this command's shell into a memory cgroup first.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE, ROWS_PER_FILE, ROWS_PER_GROUP = 96, 16_384, 2048
POLL_S = 0.5
# Ray takes a share of the machine's memory and ignores a limit that holds for this command alone.
ENVIRONMENT = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(400 << 20)}
TRAINING = [
    *("--target", "label", "--features", '{"image": "image"}', "--task_type", "classification"),
    *("--workers.num", "1", "--optim.epochs", "1", "--optim.batch_size", "64"),
    *("--net.widths", "[4,8]", "--registry.enabled", "false", "--data.test_fraction", "0.01"),
    *("--data.valid_fraction", "0.01"),
]


def write(folder: Path, size_bytes: int) -> int:
    """Write Parquet files of random images; return the number of bytes written."""
    draws = np.random.default_rng(0)
    written, number = 0, 0
    folder.mkdir(parents=True)
    while written < size_bytes:
        files, labels = [], []
        for _ in range(ROWS_PER_FILE):
            buffer = io.BytesIO()
            pixels = draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
            files.append(buffer.getvalue())
            labels.append(int(pixels[0, 0, 0]) % 4)
        path = folder / f"{number:04}.parquet"
        table = pa.table({"image": pa.array(files, pa.binary()), "label": labels})
        pa.parquet.write_table(
            table, path, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False
        )
        written, number = written + path.stat().st_size, number + 1
    return written


def held(root: int) -> int:
    """Return the anonymous and shared bytes of a process and all of its descendants."""
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                lines = (folder / "status").read_text().splitlines()
            except OSError:
                continue
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            parents[int(folder.name)] = int(fields["PPid"])
            sizes[int(folder.name)] = sum(
                int(fields.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssShmem")
            )

    def below(process: int) -> bool:
        while process > 1:
            if process == root:
                return True
            process = parents.get(process, 0)
        return False

    return sum(size for process, size in sizes.items() if below(process))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, required=True)
    arguments = parser.parse_args()
    images = arguments.folder / "images"
    size_bytes = write(images, int(arguments.gigabytes * 1e9))
    print(f"wrote {size_bytes / 1e9:.1f} GB", file=sys.stderr)
    started, peak = time.perf_counter(), 0
    options = ["--data.train", str(images), "--storage.path", str(arguments.folder / "runs")]
    process = subprocess.Popen(
        [sys.executable, "train/main.py", *options, *TRAINING],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        time.sleep(POLL_S)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    result = {
        "parquet_gb": round(size_bytes / 1e9, 2),
        "peak_memory_gb": round(peak / 1e9, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "exit": process.returncode,
        "result": json.loads(lines[-1])["metrics"] if lines else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
