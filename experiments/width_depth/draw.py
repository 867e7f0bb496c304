"""Draw the record: validation loss over the number of parameters, a line for each cell and depth; and print the table.

python experiments/width_depth/draw.py
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLORS = {"rnn": "#8a8f98", "lstm": "#1f4e79", "gru": "#c2410c"}
STYLES = {1: ":", 2: "--", 3: "-"}


def lines_of_record():
    """{(cell, layers): [(parameters, width, loss)], the smallest first}."""
    lines = {}
    with open(HERE / "results.jsonl", encoding="utf-8") as file:
        for record in map(json.loads, file):
            model, result = record["config"]["model"], record["result"]
            point = result["num_params"], model["hidden_size"], result["val_nats_per_char"]
            lines.setdefault((model["cell"], model["num_layers"]), []).append(point)
    return {key: sorted(points) for key, points in lines.items()}


def draw(lines, path):
    figure = Figure(figsize=(7, 4.4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for (cell, layers), points in lines.items():
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
    lines = lines_of_record()
    draw(lines, HERE / "curves.png")
    print("| layers | parameters | RNN | LSTM | GRU |\n| --- | --- | --- | --- | --- |")
    for layers in STYLES:
        for rnn, lstm, gru in zip(*(lines[cell, layers] for cell in COLORS)):
            cells = " | ".join(f"{loss:.3f} ({width})" for _, width, loss in (rnn, lstm, gru))
            print(f"| {layers} | {lstm[0]:,} | {cells} |")


if __name__ == "__main__":
    main()
