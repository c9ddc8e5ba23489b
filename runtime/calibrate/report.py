"""A calibration for people: measurements.json, report.md and plots beside the profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.costs import save_profile
from servegym.files import write_json, write_text
from servegym.runtime.calibrate.calibration import Calibration
from servegym.runtime.calibrate.fit import predict
from servegym.runtime.calibrate.measure import typical
from servegym.runtime.calibrate.shapes import KINDS, Shape

NEARLY = 16  # tokens apart, where requests on a served engine were to have equal contexts
PLOTS = ("iterations.png", "parts.png", "copies.png")


def write(calibration: Calibration, config: dict[str, Any], folder: Path) -> list[Path]:
    """Write everything; returns the files. Without matplotlib there are no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    save_profile(calibration.profile, folder / "profile.json")
    write_json(folder / "config.json", config)
    write_json(folder / "measurements.json", measurements(calibration))
    try:
        plots = plot(calibration, folder)
    except ImportError:
        plots = []
    write_text(folder / "report.md", markdown(calibration, [path.name for path in plots]))
    names = ("profile.json", "config.json", "measurements.json", "report.md")
    return [*(folder / name for name in names), *plots]


def measurements(calibration: Calibration) -> dict[str, Any]:
    """Every shape with its samples, the model's answer, and the copies."""
    shapes = (*calibration.design.fitted, *calibration.design.held_out)
    predicted = predict(calibration.profile, shapes)
    count = len(calibration.design.fitted)
    return {
        "iterations": [
            {
                "held_out": i >= count,
                "contexts": shape.contexts,
                "chunks": shape.chunks,
                "seconds": samples.tolist(),
                "predicted_s": float(said),
            }
            for i, (shape, samples, said) in enumerate(
                zip(shapes, calibration.seconds, predicted, strict=True)
            )
        ],
        "copies": {
            way: {name: getattr(copies, name).tolist() for name in ("calls", "bytes", "seconds")}
            for way, copies in calibration.copies.items()
        },
        "figures": calibration.figures,
    }


def markdown(calibration: Calibration, plots: list[str]) -> str:
    """The report."""
    profile, origin = calibration.profile, calibration.profile.provenance
    lines = [
        f"# {profile.name}: {profile.model.name} on {profile.device.name}",
        "",
        f"{origin.software}; {origin.date}; KV cache {profile.kv_blocks} x {profile.block_tokens} "
        f"tokens, token budget {profile.token_budget}, at most {profile.max_seqs} sequences.",
        "",
        *(f"- {note}" for note in origin.notes),
        "",
        "## Error on shapes and sizes that the fit did not see",
        "",
        *_table(
            ("part", "shapes", "median %", "P90 %", "largest %", "mean signed %"),
            [
                (part, e.shapes, e.median_percent, e.p90_percent, e.max_percent, _bias(calibration, part))
                for part, e in origin.held_out.items()
            ],
        ),
        "",
        *(_copies(calibration) if calibration.copies else []),
        "## Figures",
        "",
        *_table(("figure", "value"), [(name, f"{value:.4g}") for name, value in calibration.figures.items()]),
        "",
        *(f"![{name}]({name})" for name in plots),
        "",
    ]
    return "\n".join(lines)


def _copies(calibration: Calibration) -> list[str]:
    rows: list[tuple[object, ...]] = [
        (
            way,
            *(f"{x:.3g}" for x in (b[0] / 1e6, s[0] * 1e6, b[0] / s[0] / 1e9)),
            *(f"{x:.3g}" for x in (b[-1] / 1e6, s[-1] * 1e3, b[-1] / s[-1] / 1e9)),
        )
        for way, (b, s) in ((w, (c.bytes, c.seconds)) for w, c in calibration.copies.items())
    ]
    head = ("way", "smallest, MB", "us", "GB/s", "largest, MB", "ms", "GB/s")
    return ["## Copies", "", *_table(head, rows), ""]


def plot(calibration: Calibration, folder: Path) -> list[Path]:
    """Predicted against measured, the parts by their axes, and the copies, if there are any.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, draw in zip(PLOTS, (_plot_iterations, _plot_parts, _plot_copies), strict=True):
        if draw is _plot_copies and not calibration.copies:
            continue
        figure, axes = pyplot.subplots(1, 3 if draw is _plot_parts else 1, squeeze=False, figsize=(12, 5))
        draw(calibration, axes[0])
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        paths.append(folder / name)
    return paths


def _plot_iterations(calibration: Calibration, axes: Any) -> None:
    shapes, seconds = _held_out(calibration)
    predicted, axis = predict(calibration.profile, shapes), axes[0]
    for kind in KINDS:
        mine = np.array([shape.kind == kind for shape in shapes])
        if not mine.any():
            continue
        axis.scatter(1e3 * seconds[mine], 1e3 * predicted[mine], label=kind, s=14)
    ends = [1e3 * seconds.min(), 1e3 * seconds.max()]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(
        xlabel="measured, ms", ylabel="predicted, ms", xscale="log", yscale="log", title="held-out iterations"
    )
    axis.legend()


def _plot_parts(calibration: Calibration, axes: Any) -> None:
    """Measured medians of the grid as points, the profile's answer as lines."""
    count = len(calibration.design.fitted)
    shapes, seconds = calibration.design.fitted, typical(calibration.seconds)[:count]
    knots = calibration.design.axes.contexts

    def knot(shape: Shape) -> int:
        return min(knots, key=lambda context: abs(context - shape.contexts[0]))

    grids: tuple[tuple[str, str, Any], ...] = (
        ("decodes by context", "batch", lambda s: (knot(s), len(s.contexts)) if _is_equal(s) else None),
        ("decodes by batch", "context", lambda s: (len(s.contexts), s.contexts[0]) if _is_equal(s) else None),
        ("a chunk by past", "new tokens", lambda s: s.chunks[0][::-1] if _is_one_chunk(s) else None),
    )
    predicted = predict(calibration.profile, shapes)
    for axis, (title, label, key) in zip(axes, grids, strict=True):
        keys = [key(shape) for shape in shapes]
        sizes = Counter(found[0] for found in keys if found)
        for k, group in enumerate(sorted(group for group, size in sizes.items() if size > 2)):
            rows = sorted((found[1], i) for i, found in enumerate(keys) if found and found[0] == group)
            at, which = [x for x, _ in rows], [i for _, i in rows]
            axis.plot(at, 1e3 * predicted[which], color=f"C{k % 10}", linewidth=0.8)
            axis.scatter(at, 1e3 * seconds[which], color=f"C{k % 10}", s=12, label=str(group))
        axis.set(xlabel=label, ylabel="ms", xscale="log", yscale="log", title=title)
        axis.minorticks_off()
        if axis.has_data():
            axis.legend(fontsize="x-small")


def _plot_copies(calibration: Calibration, axes: Any) -> None:
    for way, copies in calibration.copies.items():
        axes[0].plot(
            copies.bytes / 1e6, copies.bytes / copies.seconds / 1e9, marker="o", markersize=3, label=way
        )
    axes[0].set(xlabel="MB", ylabel="GB/s", xscale="log", yscale="log", title="copies")
    axes[0].legend()


def _is_equal(shape: Shape) -> bool:
    return shape.kind == "decode" and max(shape.contexts) - min(shape.contexts) <= NEARLY


def _is_one_chunk(shape: Shape) -> bool:
    return len(shape.chunks) == 1 and len(shape.contexts) <= 1  # served engines have a decode beside it


def _held_out(calibration: Calibration) -> tuple[tuple[Shape, ...], np.ndarray]:
    return calibration.design.held_out, typical(calibration.seconds)[len(calibration.design.fitted) :]


def _bias(calibration: Calibration, kind: str) -> str:
    """Mean of predicted / measured - 1 over the held-out iterations of a kind: what does not average out."""
    shapes, seconds = _held_out(calibration)
    mine = np.array([shape.kind == kind for shape in shapes])
    if not mine.any():
        return "-"
    return f"{100 * float(np.mean(predict(calibration.profile, shapes)[mine] / seconds[mine]) - 1):+.2f}"


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
