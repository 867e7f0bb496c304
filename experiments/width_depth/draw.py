"""Print the table of the sweep, and draw validation loss over the number of parameters for each cell and depth.

    python experiments/width_depth/draw.py

The script reads results.jsonl and writes curves.png.
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLORS = {"rnn": "#8a8f98", "lstm": "#1f4e79", "gru": "#c2410c"}
STYLES = {1: ":", 2: "--", 3: "-"}


def read_curves():
    """Return {(cell, layers): [(parameters, width, loss)]} of the record, in ascending order of parameters."""
    curves = {}
    with open(HERE / "results.jsonl", encoding="utf-8") as file:
        for record in map(json.loads, file):
            model, result = record["config"]["model"], record["result"]
            point = result["num_params"], model["hidden_size"], result["val_nats_per_char"]
            curves.setdefault((model["cell"], model["num_layers"]), []).append(point)
    return {key: sorted(points) for key, points in curves.items()}


def draw_curves(curves, path):
    """Draw the curves into a PNG file."""
    figure = Figure(figsize=(7, 4.4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for (cell, layers), points in curves.items():
        label = f"{cell.upper()}, {layers} layer{'s' * (layers > 1)}"
        style = {"color": COLORS[cell], "linestyle": STYLES[layers], "marker": "o", "markersize": 4}
        axes.plot([point[0] for point in points], [point[2] for point in points], label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("validation, nats per character")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def main():
    curves = read_curves()
    draw_curves(curves, HERE / "curves.png")
    print("| layers | parameters | RNN | LSTM | GRU |\n| --- | --- | --- | --- | --- |")
    for layers in STYLES:
        for rnn, lstm, gru in zip(*(curves[cell, layers] for cell in COLORS)):
            cells = " | ".join(f"{loss:.3f} ({width})" for _, width, loss in (rnn, lstm, gru))
            print(f"| {layers} | {lstm[0]:,} | {cells} |")


if __name__ == "__main__":
    main()
