"""Reads a picture back from its SVG: what is called on what, and what lies on what.

Nothing here knows how pictures are made. It follows lines on paper, as a reader does.
"""

import dataclasses
import itertools
import re
from collections import Counter
from xml.etree import ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"
LETTER = 0.62
MARGIN = 16


@dataclasses.dataclass(frozen=True)
class Rect:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other):
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other):
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclasses.dataclass(frozen=True)
class Words:
    text: str
    place: Rect


@dataclasses.dataclass(frozen=True)
class Box:
    """A box, with its lines of text; the tip is what a pointer that rests on it shows."""

    kind: str
    place: Rect
    words: tuple[Words, ...]
    tip: str


@dataclasses.dataclass(frozen=True)
class Wire:
    """A path: its letters, its ends, and points along it."""

    letters: str
    points: tuple[tuple[float, float], ...]

    @property
    def start(self):
        return self.points[0]

    @property
    def end(self):
        return self.points[-1]

    @property
    def is_straight(self):
        return self.letters == "MV"

    @property
    def turns_in(self):
        return self.letters == "MVQH"


class Drawn:
    """A picture as it is seen."""

    def __init__(self, svg):
        root = ET.fromstring(svg)
        self.root = root
        x, y, width, height = map(float, root.get("viewBox").split())
        self.canvas = Rect(x, y, x + width, y + height)
        groups = [g for g in root.findall(f"{SVG}g") if g.get("class") != "wire"]
        self.boxes = [_box(g) for g in groups]
        (lines,) = [g for g in root.findall(f"{SVG}g") if g.get("class") == "wire"]
        self.wires = [_wire(path.get("d")) for path in lines]
        self.words = [_words(text) for text in root.findall(f"{SVG}text")]
        rects = root.findall(f"{SVG}rect")
        self.frames = [_rect(r) for r in rects if r.get("class") == "frame"]
        self.dots = _circles(root, "dot")
        self.rings = _circles(root, "end")

    # What is called on what

    def inputs_of(self, box):
        """The wires that end at a box, from left to right."""
        ends = [w for w in self.wires if w.is_straight and _within(w.end[0], box)]
        straight = [w for w in ends if w.end[1] == box.place.top]
        turned = [w for w in self.wires if w.turns_in and _turns_into(w, box.place)]
        return sorted(straight, key=_first_x) + sorted(turned, key=_first_x)

    def outputs_of(self, box):
        """The wires that begin at a box, from left to right."""
        starts = [w for w in self.wires if w.start[1] == box.place.bottom]
        return sorted((w for w in starts if _within(w.start[0], box)), key=_first_x)

    @property
    def inputs(self):
        return sorted((w for w in self.wires if w.start[1] == 0), key=_first_x)

    @property
    def outputs(self):
        bottom = self.canvas.bottom - MARGIN
        return sorted((w for w in self.wires if w.end[1] == bottom), key=_first_x)

    def evaluate(self, call, inputs):
        """What flows out at the bottom, and what each box gives; ``call(box, items, n_out)``."""
        known = {}

        def value(wire):
            if wire.start not in known:
                known[wire.start] = found(wire)
            return known[wire.start]

        def found(wire):
            if wire.start[1] == 0:
                return inputs[self.inputs.index(wire)]
            for box in self.boxes:
                outputs = self.outputs_of(box)
                if wire in outputs:
                    return given(box)[outputs.index(wire)]
            (before,) = [w for w in self.wires if w.end == wire.start]
            if before.is_straight:
                return value(before)
            (source,) = [w for w in self.wires if _on(before.start, w)]
            return value(source)

        boxes = {}

        def given(box):
            if box not in boxes:
                outputs = self.outputs_of(box)
                items = tuple(map(value, self.inputs_of(box)))
                boxes[box] = call(box, items, len(outputs))
            return boxes[box]

        for box in self.boxes:
            given(box)
        return tuple(map(value, self.outputs))

    # What lies on what

    def faults(self):
        """What makes it hard to read, or wrong."""
        parts = (self._overlaps, self._touched, self._merged, self._nesting, self._signs)
        return [fault for part in parts for fault in part()]

    def _overlaps(self):
        captions = [w for box in self.boxes for w in box.words]
        for box in self.boxes:
            for words in box.words:
                if not box.place.holds(words.place):
                    yield f"{words.text!r} does not fit its box"
        solid = [*((b.tip, b.place) for b in self.boxes), *((w.text, w.place) for w in self.words)]
        for (a, one), (b, other) in itertools.combinations(solid, 2):
            if one.meets(other):
                yield f"{a!r} lies on {b!r}"
        for words in [*self.words, *captions]:
            if not self.canvas.holds(words.place):
                yield f"{words.text!r} is cut off"

    def _touched(self):
        solid = [*((b.tip, b.place) for b in self.boxes), *((w.text, w.place) for w in self.words)]
        for wire, (text, place) in itertools.product(self.wires, solid):
            for (x0, y0), (x1, y1) in itertools.pairwise(wire.points):
                part = Rect(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
                if wire.turns_in and _turns_into(wire, place):
                    continue
                if _crosses(part, place):
                    yield f"a wire runs through {text!r}"
                    break

    def _merged(self):
        """Wires on one another, which the eye cannot tell apart."""
        parts = [
            (wire, a, b)
            for wire in self.wires
            if wire.letters != "MC"
            for a, b in itertools.pairwise(wire.points)
        ]
        for (wire, a, b), (other, c, d) in itertools.combinations(parts, 2):
            if wire is other or wire.start == other.start:
                continue
            for axis in (0, 1):
                across = 1 - axis
                if a[axis] == b[axis] == c[axis] == d[axis]:
                    low = max(min(a[across], b[across]), min(c[across], d[across]))
                    high = min(max(a[across], b[across]), max(c[across], d[across]))
                    if high > low:
                        yield f"two wires are one between {low} and {high}"

    def _nesting(self):
        for one, other in itertools.combinations(self.frames, 2):
            if one.meets(other) and not (one.holds(other) or other.holds(one)):
                yield "two frames cross"
        for frame, box in itertools.product(self.frames, self.boxes):
            if frame.meets(box.place) and not frame.holds(box.place):
                yield f"{box.tip!r} is half in a frame"

    def _signs(self):
        """A dot is where a wire splits, and a ring is where one ends; there are no others."""
        straight = [w for w in self.wires if w.is_straight]
        leaving = Counter(w.start for w in self.wires if w.letters in ("MHQ", "MC"))
        for point in leaving:
            leaving[point] += sum(_on(point, w) and w.end != point for w in self.wires)
        splits = {point for point, count in leaving.items() if count > 1}
        if splits != self.dots:
            yield f"splits at {splits} and dots at {self.dots}"
        starts = {w.start for w in self.wires}
        taken = {w.end for box in self.boxes for w in self.inputs_of(box)}
        bottom = {w.end for w in self.outputs}
        ends = {w.end for w in straight} - starts - taken - bottom
        if ends != self.rings:
            yield f"wires end at {ends} and rings are at {self.rings}"


def _circles(root, kind):
    found = [c for c in root.findall(f"{SVG}circle") if c.get("class") == kind]
    return {(float(c.get("cx")), float(c.get("cy"))) for c in found}


def _rect(element):
    x, y, width, height = (float(element.get(k)) for k in ("x", "y", "width", "height"))
    return Rect(x, y, x + width, y + height)


def _words(element):
    size, x, y = (float(element.get(k)) for k in ("font-size", "x", "y"))
    width = len(element.text) * size * LETTER
    left = x - width / 2 if element.get("text-anchor") == "middle" else x
    return Words(element.text, Rect(left, y - 0.8 * size, left + width, y + 0.2 * size))


def _box(group):
    rect = group.find(f"{SVG}rect")
    words = tuple(_words(text) for text in group.findall(f"{SVG}text"))
    return Box(rect.get("class"), _rect(rect), words, group.findtext(f"{SVG}title"))


def _wire(d):
    points, letters = [], ""
    for letter, rest in re.findall(r"([MVHQC])([^MVHQC]*)", d):
        letters += letter
        numbers = [float(n) for n in rest.split()]
        if letter in "VH":
            x, y = points[-1]
            numbers = [x, numbers[0]] if letter == "V" else [numbers[0], y]
        if letter == "C":
            points += _curve(points[-1], numbers)
        points.append(tuple(numbers[-2:]))
    return Wire(letters, tuple(points))


def _curve(start, numbers):
    corners = [start, *zip(numbers[::2], numbers[1::2], strict=True)]
    for step in range(1, 12):
        t = step / 12
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        pairs = list(zip(weights, corners, strict=True))
        yield sum(w * x for w, (x, _) in pairs), sum(w * y for w, (_, y) in pairs)


def _first_x(wire):
    return wire.start[0]


def _within(x, box):
    return box.place.left < x < box.place.right


def _turns_into(wire, place):
    """Whether a wire ends on the edge of a round box."""
    width, height = place.right - place.left, place.bottom - place.top
    across, down = wire.end[0] - (place.left + place.right) / 2, wire.end[1] - place.top
    on_edge = abs((across**2 + (down - height / 2) ** 2) ** 0.5 - height / 2) < 0.5
    return width == height and on_edge


def _on(point, wire):
    """Whether a point lies on the upright part that a wire begins with."""
    (x, top), (_, bottom) = wire.points[:2]
    return wire.letters[1] == "V" and x == point[0] and top <= point[1] <= bottom


def _crosses(part, place):
    """Whether a line, which has no width, has points inside of a rectangle."""
    return (
        part.left < place.right
        and place.left < part.right
        and part.top < place.bottom
        and place.top < part.bottom
    )
