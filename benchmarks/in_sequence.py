"""Time of layers in sequence against their number, with passes that wait and without.

``python -m benchmarks.in_sequence`` walks through a stand-in for a speech enhancer, small
convolutions (half of them depthwise) and recurrent layers with batch norms, 64 clips of 3 s in
frames of 10 ms, at several depths: once with passes that wait at the layer whose turn it is, once
with passes that begin anew for each layer. Both give the same moments (``tests/calibrate/
test_lockstep.py``). Processor seconds, in one process; a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import describe
from dither.calibrate import Layerwise
from dither.calibrate.lockstep import MOST_KEPT
from dither.encoders import Nearest
from dither.formats import Affine

RESULTS = Path(__file__).parent / "results"
BINS, WIDTH, FRAMES, CLIPS, BATCH = 64, 24, 300, 64, 8
DEPTHS = (2, 4, 8, 13, 26)


class Block(nn.Module):
    """Two convolutions along time, a batch norm, a recurrent layer, around which inputs go."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.deep = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, frames: Tensor) -> Tensor:
        """``(clips, WIDTH, frames)`` in and out."""
        seen = self.norm(self.deep(self.wide(frames))).relu()
        out: Tensor = frames + self.gru(seen.transpose(1, 2))[0].transpose(1, 2)
        return out


def enhancer(blocks: int) -> nn.Sequential:
    """Three layers for each block, and two at the ends."""
    torch.manual_seed(0)
    made = [Block() for _ in range(blocks)]
    return nn.Sequential(nn.Conv1d(BINS, WIDTH, 1), *made, nn.Conv1d(WIDTH, BINS, 1)).eval()


def seconds(model: nn.Module, clips: list[Tensor], kept: int = MOST_KEPT) -> tuple[float, int]:
    """Processor seconds of a walk in which each weight is rounded, and how many groups it has."""
    layers = Layerwise(model, clips, most_kept=kept)
    begun = time.process_time()
    with layers.walk(layers.order.names, biases=True) as walk:
        for layer in walk:
            layer.commit(Nearest(Affine(None), 0.05).encode(layer.weight))
    return time.process_time() - begun, len(layers.order.groups)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both ways, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4))
    for key, label in (("again", "from the beginning for each layer"), ("waiting", "passes wait")):
        shown = [row for row in rows if row[key] is not None]
        axis.loglog([r["layers"] for r in shown], [r[key] for r in shown], marker="o", label=label)
    axis.set_xlabel("layers")
    axis.set_ylabel("processor time, s")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "in_sequence.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames = torch.randn(CLIPS, BINS, FRAMES, generator=torch.Generator().manual_seed(0))
    clips = list(frames.split(BATCH))
    rows: list[dict[str, Any]] = []
    for depth in DEPTHS:
        model = enhancer(depth)
        waiting, groups = seconds(model, clips)
        again = seconds(model, clips, 0)[0] if depth < DEPTHS[-1] else None
        rows.append({"layers": groups, "waiting": round(waiting, 2), "again": again})
        print(rows[-1], flush=True)
    logs = [(math.log(row["layers"]), math.log(row["waiting"])) for row in rows]
    slope = (logs[-1][1] - logs[0][1]) / (logs[-1][0] - logs[0][0])
    result = {"environment": describe(), "rows": rows, "slope": round(slope, 2)}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, RESULTS / "plots" / "in_sequence.png")


if __name__ == "__main__":
    main()
