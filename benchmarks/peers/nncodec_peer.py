"""Compress a checkpoint with NNCodec 2 (ISO/IEC 15938-17), for comparison.

Run it with the interpreter of NNCodec's own environment (README.md beside this file says how to
make one); it imports nothing of dither:

    PYTHON nncodec_peer.py encode IN.safetensors OUT.nnc --qp QP
    PYTHON nncodec_peer.py decode OUT.nnc BACK.safetensors

Each call prints one line of JSON: the bytes of the coded file, the seconds of encoding or decoding
by the clock and of processor time (without imports and without reading or writing safetensors), the
peak resident memory in bytes before and after, and the settings.

The defaults are the strongest data-free settings found: dependent (trellis-coded) quantization,
adaptive probability models, row skipping, and a QP per layer that depends on its share of the
parameters (``opt_qp``). QP is the step size on a logarithmic scale: four more double it.
"""

import argparse
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a checkpoint with NNCodec 2.")
    commands = parser.add_subparsers(dest="command", required=True)
    encoder = commands.add_parser("encode", help="safetensors to NNC")
    encoder.add_argument("source", type=Path)
    encoder.add_argument("target", type=Path)
    encoder.add_argument("--qp", type=int, required=True, help="-32 is fine, -12 is coarse")
    encoder.add_argument("--nonweight-qp", type=int, default=-75, help="of biases and batch norms")
    encoder.add_argument("--opt-qp", action=argparse.BooleanOptionalAction, default=True)
    encoder.add_argument("--dq", action=argparse.BooleanOptionalAction, default=True)
    encoder.add_argument("--row-skipping", action=argparse.BooleanOptionalAction, default=True)
    decoder = commands.add_parser("decode", help="NNC to safetensors")
    decoder.add_argument("source", type=Path)
    decoder.add_argument("target", type=Path)
    for command in (encoder, decoder):
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    nn = import_nncodec()
    result = encode(nn, options) if options.command == "encode" else decode(nn, options)
    print(json.dumps(result))


def import_nncodec() -> Any:  # noqa: ANN401
    """Import ``nncodec.nn``, with stand-ins for packages it imports but does not use here.

    Run as a script, Python looks for packages beside it first, and finds ``nncodec.py``.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "cv2", "pandas"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    return importlib.import_module("nncodec.nn")


def encode(nn: Any, options: argparse.Namespace) -> dict[str, object]:  # noqa: ANN401
    """Code all floating-point tensors of a file; others (index buffers) are left out."""
    import numpy as np
    from safetensors.numpy import load_file

    tensors = load_file(options.source)
    weights = {
        k: v.astype(np.float32, copy=False) for k, v in tensors.items() if v.dtype.kind == "f"
    }
    del tensors
    before = peak()
    with tempfile.TemporaryDirectory() as scratch:  # NNCodec also writes the stream to a file
        settings = {
            "qp": options.qp,
            "nonweight_qp": options.nonweight_qp,
            "opt_qp": options.opt_qp,
            "use_dq": options.dq,
            "row_skipping": options.row_skipping,
            "verbose": False,
            "results": scratch,
        }
        start, cpu_start = time.perf_counter(), time.process_time()
        stream = nn.encode(weights, args=settings)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = peak()
    options.target.write_bytes(stream)
    del settings["results"], settings["verbose"]
    return {
        "command": "encode",
        "bytes": len(stream),
        "parameters": sum(v.size for v in weights.values()),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_rss_before": before,
        "peak_rss": after,
        "settings": settings,
    }


def decode(nn: Any, options: argparse.Namespace) -> dict[str, object]:  # noqa: ANN401
    """Decode a stream to fp32 tensors."""
    from safetensors.numpy import save_file

    stream = bytearray(options.source.read_bytes())
    size = len(stream)
    before = peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    weights = nn.decode(stream)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = peak()
    save_file(weights, options.target)
    return {
        "command": "decode",
        "bytes": size,
        "parameters": sum(v.size for v in weights.values()),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_rss_before": before,
        "peak_rss": after,
    }


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
