"""A question and the cluster that it is about, as text and as a picture.

A picture has a row for each instance: the bar is its KV memory (dark: held by requests, light: idle prefixes;
the tick below: what the router last scraped), squares are requests (blue: decoding, orange: prefilling, red:
waiting), arrows at the right live migrations. A filled triangle marks where the default answer acts, a hollow
one every other instance that some legal answer names. Bars hold the truth; an agent knows the observation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from servegym.envs.cluster.moment import Moment, words
from servegym.envs.cluster.schema import GLOBAL, INSTANCE, KINDS, REQUEST, column

Observation = Mapping[str, np.ndarray]
Box = tuple[int, int, int, int]

WIDTH, HEADER, ROW = 1024, 112, 32  # multiples of 16, as video encoders want them
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT = 64, 320, 18
SQUARES_LEFT, SQUARE, MOST_SQUARES = 456, 8, 36
MARKS_LEFT, MOVES_LEFT = 832, 944
SPARK_LEFT, SPARK_WIDTH, SPARK_HEIGHT = 824, 192, 64

PAPER, INK, FAINT, EMPTY = (255, 255, 255), (30, 30, 30), (150, 150, 150), (228, 228, 228)
HELD, CACHED = (38, 84, 124), (149, 184, 209)
DECODING, PREFILLING, WAITING = (38, 84, 124), (240, 150, 40), (200, 40, 50)
MOVING = (120, 60, 160)

_FONT = ImageFont.load_default(13)
_KV, _CAPACITY = column(INSTANCE, "kv_usage"), column(INSTANCE, "kv_capacity_tokens")
_PROMPT, _PREDICTED = column(REQUEST, "prompt_tokens"), column(REQUEST, "predicted_output_tokens")
_RATE = column(GLOBAL, "arrival_rate")


def text(observation: Observation, moment: Moment, answered: str = "") -> str:
    """The question and a line for each instance.

    Args:
        observation: one lane's arrays of `servegym.envs.cluster.schema`.
        moment: what the cluster truly holds.
        answered: the last answer in words; empty where there was none.
    """
    lines = _headlines(observation, moment, answered)
    for i in range(len(moment.waiting)):
        marks = " ".join(("", *_marks(moment, i)))
        lines.append(
            f"instance {i}: {moment.decoding[i]} decoding, {moment.prefilling[i]} prefilling, "
            f"{moment.waiting[i]} waiting, KV {moment.held[i]:.0%} held, {moment.cached[i]:.0%} cached{marks}"
        )
    lines += [f"{m.copy} {m.stage}: request {m.request}, {m.source} to {m.target}" for m in moment.moves]
    return "\n".join(lines) + "\n"


def picture(observation: Observation, moment: Moment, answered: str = "") -> np.ndarray:
    """The same as `text`, drawn: uint8 [112 + 32 I, 1024, 3] for observations of I instance rows."""
    instances = len(observation["instance_mask"])
    image = Image.new("RGB", (WIDTH, HEADER + ROW * instances), PAPER)
    draw = ImageDraw.Draw(image)
    for line, headline in enumerate(_headlines(observation, moment, answered)):
        draw.text((8, 8 + 20 * line), headline, INK, _FONT)
    _sparkline(draw, observation)
    draw.text((BAR_LEFT, HEADER - 18), "KV held by requests, idle prefixes", FAINT, _FONT)
    draw.text((SQUARES_LEFT, HEADER - 18), "requests decoding + prefilling + waiting", FAINT, _FONT)
    for i in range(len(moment.waiting)):
        _instance(draw, observation, moment, i)
    _triangles(draw, observation, moment)
    for lane, move in enumerate(moment.moves):
        _arrow(draw, MOVES_LEFT + 8 * (lane % 9), move.source, move.target)
    return np.array(image)


def bar_box(i: int) -> Box:
    """Left, top, right and bottom (both excluded) of the KV bar of instance i, pixels."""
    top = HEADER + ROW * i + (ROW - BAR_HEIGHT) // 2
    return BAR_LEFT, top, BAR_LEFT + BAR_WIDTH, top + BAR_HEIGHT


def _headlines(observation: Observation, moment: Moment, answered: str) -> list[str]:
    flying = int((moment.waiting + moment.prefilling + moment.decoding).sum())
    waiting = int(moment.waiting.sum())
    return [
        f"t = {moment.now_s:.3f} s: {flying} requests in flight, {waiting} of them waiting",
        *_question(observation, moment),
        f"last answer: {answered or 'none'}",
    ]


def _question(observation: Observation, moment: Moment) -> list[str]:
    """The question and its default; the same number of lines whatever it is."""
    if not moment.asked:
        return ["nothing to decide", ""]
    kind = KINDS[int(observation["kind"])]
    about = observation["requests"][0]
    request = f"{about[_PROMPT]:.0f} prompt tokens, about {about[_PREDICTED]:.0f} to come"
    rows = sum(bool(row.any()) for row in observation["requests"])
    legal = int(observation["mask"].sum())
    first = f"request {moment.asked[0]}: {request}"
    others = f", and {rows - 1} more" if rows > 1 else ""
    return [
        f"{kind}? {first}{others}",
        f"default: {words(observation, 0, moment.asked)}; {legal} legal answers",
    ]


def _marks(moment: Moment, i: int) -> list[str]:
    marks = ["draining"] if moment.draining[i] else []
    return [*marks, "engaged"] if moment.engaged[i] else marks


def _sparkline(draw: ImageDraw.ImageDraw, observation: Observation) -> None:
    """Arrivals in each of the last seconds, latest at the right."""
    history = observation["history"]
    most = max(float(history.max()), 1.0)
    step = SPARK_WIDTH // len(history)
    floor = 24 + SPARK_HEIGHT
    for k, arrivals in enumerate(history):
        left = SPARK_LEFT + k * step
        top = floor - round(SPARK_HEIGHT * float(arrivals) / most)
        _fill(draw, (left, top, left + step - 2, floor), FAINT)
    draw.line((SPARK_LEFT, floor, SPARK_LEFT + SPARK_WIDTH, floor), INK)
    rate = observation["globals"][_RATE]
    draw.text((SPARK_LEFT, 4), f"arrivals, {len(history)} s: now {rate:.1f}/s, top {most:.0f}", INK, _FONT)


def _instance(draw: ImageDraw.ImageDraw, observation: Observation, moment: Moment, i: int) -> None:
    left, top, right, bottom = bar_box(i)
    middle = (top + bottom) // 2
    draw.text((8, middle), str(i), INK, _FONT, anchor="lm")
    held = left + round(BAR_WIDTH * min(float(moment.held[i]), 1.0))
    cached = left + round(BAR_WIDTH * min(float(moment.held[i] + moment.cached[i]), 1.0))
    for box, color in (
        ((left, top, right, bottom), EMPTY),
        ((left, top, cached, bottom), CACHED),
        ((left, top, held, bottom), HELD),
    ):
        _fill(draw, box, color)
    seen = left + round((BAR_WIDTH - 1) * min(float(observation["instances"][i, _KV]), 1.0))
    draw.line((seen, bottom, seen, bottom + 4), INK, 2)
    capacity = observation["instances"][i, _CAPACITY] / 1000
    draw.text((right + 6, middle), f"{capacity:.0f}k tok", FAINT, _FONT, anchor="lm")
    _squares(draw, moment, i, middle)
    draw.text((MARKS_LEFT, middle), " ".join(_marks(moment, i)), WAITING, _FONT, anchor="lm")


def _squares(draw: ImageDraw.ImageDraw, moment: Moment, i: int, middle: int) -> None:
    """A square a request, as many as there is room for, and their counts."""
    counts = (int(moment.decoding[i]), int(moment.prefilling[i]), int(moment.waiting[i]))
    colors = [c for n, c in zip(counts, (DECODING, PREFILLING, WAITING), strict=True) for _ in range(n)]
    # The queue is what matters most, so where all do not fit the first of the decoding ones are left out.
    for k, color in enumerate(colors[-MOST_SQUARES:]):
        left = SQUARES_LEFT + k * (SQUARE + 1)
        _fill(draw, (left, middle - SQUARE // 2, left + SQUARE, middle + SQUARE // 2), color)
    at = SQUARES_LEFT + min(len(colors), MOST_SQUARES) * (SQUARE + 1) + 4
    draw.text((at, middle), "+".join(map(str, counts)), INK, _FONT, anchor="lm")


def _triangles(draw: ImageDraw.ImageDraw, observation: Observation, moment: Moment) -> None:
    """Filled where the default acts, hollow where another legal answer does."""
    if not moment.asked:
        return
    targets = observation["candidates"][:, 1]
    named = set(targets[1:][observation["mask"][1:] == 1].tolist())
    default = int(targets[0]) if KINDS[int(observation["kind"])] != "migrate" else -1
    for i in (named | {default}) & set(range(len(moment.waiting))):
        left, top, _, bottom = bar_box(i)
        corners = [(left - 18, top + 3), (left - 6, (top + bottom) // 2), (left - 18, bottom - 3)]
        draw.polygon(corners, fill=INK if i == default else PAPER, outline=INK)


def _arrow(draw: ImageDraw.ImageDraw, x: int, source: int, target: int) -> None:
    start, end = (HEADER + ROW * i + ROW // 2 for i in (source, target))
    draw.line((x, start, x, end), MOVING, 2)
    draw.ellipse((x - 3, start - 3, x + 3, start + 3), MOVING)
    back = 7 if end < start else -7
    draw.polygon([(x - 5, end + back), (x + 5, end + back), (x, end)], fill=MOVING)


def _fill(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int]) -> None:
    """Fill up to, not including, the right and bottom edge; an empty box is nothing."""
    left, top, right, bottom = box
    if left < right and top < bottom:
        draw.rectangle((left, top, right - 1, bottom - 1), color)
