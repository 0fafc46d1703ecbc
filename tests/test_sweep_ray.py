"""A sweep on a Ray cluster of two nodes; needs the extra `ray` (`make test-ray`)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dither.cli.cells import Cell, run_cell
from dither.cli.console import Printer
from dither.cli.sweep import sweep
from dither.core import DitherError

PARTS = """
import os, time
import dither, ray

def noted(model, nbytes, data, seed):
    node = ray.get_runtime_context().get_node_id()
    with open(f"node-{seed}-{nbytes}", "w") as file:
        file.write(f"{node} {os.getpid()}")
    time.sleep(2)
    return dither.compress(model, nbytes)

def dies(model, nbytes, data, seed):
    os._exit(1)

def build():
    from torch import nn
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))
"""

DRIVER = """
import subprocess, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
command = [sys.executable, "-m", "dither", "sweep", "model.safetensors", "--ray", cluster.address]
command += ["--methods", "data-free,parts:noted,parts:dies", "--sizes", "4x,6x", "--seeds", "0,1"]
command += ["--model", "parts:build", "--json"]
codes = [subprocess.run(command).returncode for _ in range(2)]
cluster.shutdown()
sys.exit(0 if codes == [1, 1] else 1)
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`: make test-ray")
def test_a_sweep_on_two_nodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "parts.py").write_text(PARTS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, again = map(json.loads, done.stdout.splitlines()[-2:])
    assert first == again  # nothing was done twice
    rows = {(row["method"], row["size"], row["seed"]): row for row in first["rows"]}
    assert len(rows) == 2 + 4 + 4
    assert all(("error" in row) == (method == "parts:dies") for (method, *_), row in rows.items())
    here = [path.read_text().split() for path in tmp_path.glob("node-*")]
    assert len({node for node, _ in here}) == 2
    assert len({process for _, process in here}) == 4  # each in a process of its own
    own = run_cell(Cell(str(tmp_path / "model.safetensors"), "data-free", "4x", 0))
    assert rows["data-free", "4x", 0]["sha256"] == own["sha256"]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    cells = [Cell("none.safetensors", "data-free", "4x", 0)]
    with pytest.raises(DitherError, match=r"dither\[ray\]"):
        sweep(
            Printer(as_json=False, quiet=True),
            cells,
            tmp_path / "rows.jsonl",
            jobs=1,
            ray="auto",
            retry=False,
            plot=None,
        )
