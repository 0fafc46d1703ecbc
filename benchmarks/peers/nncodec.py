"""NNCodec 2 (ISO/IEC 15938-17), by Fraunhofer HHI: the settings of ``nncodec_peer.py``.

Dependent quantization and DeepCABAC without data; the label is the QP of weights. Its stream is
entropy coded, and leaves integer tensors out, which the model here makes itself.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.peers import nncodec_peer
from benchmarks.peers.contract import Peer, Task, run, version_of

FILE = "model.nnc"
FINE = -75  # QP of biases and norms, its default
SETTINGS = {f"qp{qp}": (qp, FINE) for qp in range(-32, -15, 2)}
SETTINGS["qp-18-nonweight-32"] = (-18, -32)
ONLY = {
    "resnet20_cifar10": ["qp-30", "qp-26", "qp-22", "qp-18", "qp-18-nonweight-32"],
    "minilm_stsb": ["qp-28", "qp-24", "qp-20", "qp-16"],
    "minilm_sst2": ["qp-28", "qp-24", "qp-20", "qp-16"],
    "lm_ptb": ["qp-32", "qp-28", "qp-24", "qp-20"],
}


def compress(task: Task, setting: str, folder: Path) -> None:
    """Write the coded stream."""
    qp, fine = SETTINGS[setting]
    options: dict[str, Any] = {"qp": qp, "nonweight_qp": fine}
    options |= {"opt_qp": True, "dq": True, "row_skipping": True}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model.safetensors"
        save_file({k: v.contiguous() for k, v in task.load().state_dict().items()}, source)
        given = argparse.Namespace(source=source, target=folder / FILE, **options)
        nncodec_peer.encode(nncodec_peer.import_nncodec(), given)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Decode the stream and fill a model; integer tensors are the model's own."""
    model = task.blank()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.safetensors"
        given = argparse.Namespace(source=folder / FILE, target=target)
        nncodec_peer.decode(nncodec_peer.import_nncodec(), given)
        found = load_file(target)
    missing, unexpected = model.load_state_dict(found, strict=False)
    state = model.state_dict()
    if unexpected or any(state[name].is_floating_point() for name in missing):
        raise ValueError(f"the stream lacks {missing} or has too much: {unexpected}")
    return model


PEER = Peer("nncodec", version_of("nncodec"), SETTINGS, compress, restore, only=ONLY)

if __name__ == "__main__":
    run(PEER)
