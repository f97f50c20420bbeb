"""How much memory ranking takes for a set of any size, on embeddings drawn by chance.

    python -m mammut.evaluation.measure_retrieval --pictures 1000000 --width 128

Prints one line of JSON. The time for all pictures is estimated from some blocks; the memory is that of any block.
"""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from mammut.evaluation.recall import BLOCK, EmbeddingFile, ranks
from mammut_runtime import console

_BATCH = 10_000


class _Enough(Exception):
    """Enough blocks were ranked."""


@click.command()
@click.option(
    "--pictures", "count", type=click.IntRange(1), default=1_000_000, show_default=True, help="And as many texts."
)
@click.option("--width", type=click.IntRange(1), default=128, show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True, help=f"Of {BLOCK} pictures, to rank.")
def cli(count: int, width: int, blocks: int) -> None:
    """Rank pictures among texts, and texts among pictures."""
    before = _peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        places = (Path(folder, "pictures"), Path(folder, "texts"))
        with EmbeddingFile(places[0]) as pictures, EmbeddingFile(places[1]) as texts:
            generator = np.random.default_rng(0)
            for start in range(0, count, _BATCH):
                for file in (pictures, texts):
                    rows = generator.normal(size=(min(_BATCH, count - start), width)).astype(np.float32)
                    file.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
            written, judged = _peak_mb(), min(count, blocks * BLOCK)

            def stop(done: int, _: int) -> None:
                if done >= judged:
                    raise _Enough

            started = time.monotonic()
            with contextlib.suppress(_Enough):
                ranks(pictures, texts, np.arange(count), progress=stop)
            seconds = time.monotonic() - started
    console.echo_json({
        "pictures": count, "texts": count, "width": width, "embeddings_mb": round(2 * count * width * 4 / 2**20),
        "peak_mb": round(_peak_mb()), "peak_before_mb": round(before), "peak_while_writing_mb": round(written),
        "ranked_pictures": judged, "seconds": round(seconds, 1), "seconds_for_all": round(seconds * count / judged),
        "machine": platform.machine(), "numpy": np.__version__,
    })  # fmt: skip


def _peak_mb() -> float:
    """Most memory this process has had, MiB. Linux: getrusage would count the process that started this one as well."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    cli()
