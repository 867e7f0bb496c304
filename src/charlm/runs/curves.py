"""The curves of a run: its losses, and a panel for each selected metric, over characters."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Keys of a line of metrics.jsonl that get no panel of their own. Every other number is a selected metric.
_NO_PANEL = {
    *("step", "epoch", "chars", "seconds", "split", "nats_per_char", "bits_per_char"),
    *("nats_per_byte", "bits_per_byte"),
    *("learning_rate", "grad_norm", "chars_per_second", "skipped_updates"),
}
# Split -> colour of its curves.
COLORS = {"train": "#9bb8d3", "val": "#c2410c"}
Points = list[tuple[float, float]]


def metric_panels(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Return {metric: {curve: [(million characters, value), ...]}} of the selected metrics in the lines of metrics.jsonl.

    A metric such as `accuracy` has a curve for each split. A metric with parts, such as `grad_norm_by_layer/head`, has a curve
    for each part.
    """
    panels: dict[str, dict[str, Points]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in _NO_PANEL and isinstance(value, (int, float)):
                metric, _, part = key.partition("/")
                curve = panels.setdefault(metric, {}).setdefault(part or line["split"], [])
                curve.append((line["chars"] / 1e6, value))
    return panels


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of `curves_figure` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(curves_figure(lines)).print_png(str(path))


def curves_figure(lines: Sequence[Mapping[str, Any]]) -> "Figure":
    """Return a figure of training and validation loss over characters, and a panel below for each selected metric.

    Args:
        lines: the lines of metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Curves(Figure):
        """A figure that a notebook shows, whether or not pyplot is in use."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            FigureCanvasAgg(self).print_png(buffer)
            return buffer.getvalue()

    panels = metric_panels(lines)
    figure = Curves(figsize=(7, 4.2 + 2.2 * len(panels)), dpi=150, layout="constrained")
    heights = [4.2, *[2.2] * len(panels)]
    all_axes = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    _draw_losses(all_axes[0], lines)
    for axes, (metric, curves) in zip(all_axes[1:], panels.items()):
        for name, points in curves.items():
            style = "o-" if name == "val" else "-"
            axes.plot(*zip(*points), style, color=COLORS.get(name), label=name, markersize=4, linewidth=1.6)
        axes.set_ylabel(metric)
        axes.legend(frameon=False)
    for axes in all_axes:
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    all_axes[-1].set_xlabel("million characters")
    return figure


def _draw_losses(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for split, style in (("train", "-"), ("val", "o-")):
        points = [(line["chars"] / 1e6, line["nats_per_char"]) for line in lines if line["split"] == split]
        if points:
            axes.plot(*zip(*points), style, color=COLORS[split], label=split, markersize=4, linewidth=1.6)
    validation = [line for line in lines if line["split"] == "val"]
    if validation:
        best = min(validation, key=lambda line: line["nats_per_char"])
        axes.annotate(
            f"{best['nats_per_char']:.3f}",
            (best["chars"] / 1e6, best["nats_per_char"]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=COLORS["val"],
        )
    values = sorted(line["nats_per_char"] for line in lines if math.isfinite(line["nats_per_char"]))
    if values:
        # The first few losses would squeeze all others into the lowest tenth of the picture.
        top = values[min(len(values) - 1, int(0.97 * len(values)))]
        margin = 0.06 * (top - values[0]) + 0.02
        axes.set_ylim(values[0] - margin, top + margin)
    axes.set_ylabel("nats per character")
    if lines:
        axes.legend(frameon=False)
