"""A Ray cluster of two nodes on this machine, one made-up GPU on each, until the standard input is closed.

    python -m tests.integrations.verl.two_nodes

The address is printed. Environment variables of this process reach all processes of the cluster.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_on_cpu.run import end_all, make_environment

ROOT = Path(__file__).resolve().parents[3]
CPUS = 7  # verl's processes reserve them


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """In here such a cluster runs, for a training in ``folder``; its address."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", __name__]
    environment = make_environment(mark, folder / "metrics.jsonl", {})
    try:
        with (folder / "cluster.txt").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, (folder / "cluster.txt").read_text()[-3000:]
        yield address
        process.stdin.close()
        process.wait(timeout=120)
    finally:
        end_all(mark)


def main() -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": CPUS, "num_gpus": 1, "object_store_memory": 200_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
