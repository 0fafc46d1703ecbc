"""The demo's picture: accuracy against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dither.core import DitherError

_STYLES = {
    "dither": {"color": "black", "marker": "o", "linestyle": "-"},
    "plain rounding": {
        "color": "0.5",
        "marker": "s",
        "linestyle": "--",
        "markerfacecolor": "white",
    },
}


def require_matplotlib() -> None:
    """Say early, before any work, that the picture cannot be drawn.

    Raises:
        DitherError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise DitherError(
            'the demo draws with matplotlib; run: pip install "dither[demo]"'
        ) from error
    mpl.use("Agg")  # draws into files, on machines without a screen too


def plot(results: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the results into files; the picture is readable in grey."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    original = results["original"]
    with mpl.rc_context({"svg.hashsalt": "dither", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        axes.axhline(
            100 * original["accuracy"], color="0.3", linewidth=1, linestyle=":",
            label=f"float32, {original['nbytes'] / 1000:.0f} kB",
        )  # fmt: skip
        for method, style in _STYLES.items():
            rows = sorted(
                (row for row in results["rows"] if row["method"] == method),
                key=lambda row: int(row["nbytes"]),
            )
            axes.plot(
                [row["nbytes"] / 1000 for row in rows],
                [100 * row["accuracy"] for row in rows],
                label=method,
                **style,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("size in kB (1,000 bytes), logarithmic")
        axes.set_ylabel("test accuracy in %")
        axes.set_title(f"Handwritten digits, {original['parameters']:,} parameters")
        axes.grid(color="0.9")
        axes.legend(loc="lower right")
        for path in paths:
            # Without a date, the same results give the same file.
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=160, metadata=metadata)
        plt.close(figure)
