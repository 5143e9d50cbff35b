"""The drawing tools of the demo, and of what its backbone is pretrained on: outlines, and a pen with a steady hand."""

from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 60, 80
FINE = 4  # drawn this much larger, then reduced: smooth edges
METAL, GOLD, DARK, PALE = (176, 180, 186), (214, 164, 60), (34, 34, 38), (250, 250, 248)


def circle(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """The outline of an ellipse, shape `(24, 2)`."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + (rx if ry is None else ry) * np.sin(angle)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def mirrored(half: list) -> list:
    """A symmetric outline from its right half, given from the top to the bottom."""
    return half + [(-x, y) for x, y in reversed(half)]


def rounded(points: list, rounds: int = 2) -> np.ndarray:
    """Chaikin's corner cutting: a closed outline with soft corners."""
    points = np.asarray(points, float)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], axis=1).reshape(-1, 2)
    return points


class Pen:
    """Draws in pixels of the finished picture from its middle, all of it a little moved, stretched and turned."""

    def __init__(self, rng: np.random.Generator, colour: tuple, scale: float):
        self.rng, self.scale = rng, scale
        turn, stretch = rng.normal(0, 0.045), rng.uniform(0.95, 1.05)
        turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        self.matrix = FINE * scale * np.diag([stretch, 1 / stretch]) @ turned
        self.origin = FINE * (np.array([WIDTH, HEIGHT]) / 2 + rng.uniform(-2, 2, 2))
        colour = np.array(colour) * rng.uniform(0.9, 1.08) + rng.normal(0, 5, 3)
        self.colour, self.shade, self.light = self.tone(colour), self.tone(0.74 * colour), self.tone(0.72 * colour + 70)
        self.contrast = DARK if colour.mean() > 135 else PALE
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self.cover = Image.new("L", self.image.size)  # where anything was drawn
        self.layers = [(ImageDraw.Draw(self.image), None), (ImageDraw.Draw(self.cover), 255)]

    @staticmethod
    def tone(colour) -> tuple:
        return tuple(int(c) for c in np.clip(colour, 0, 255))

    def at(self, points) -> list:
        """Where the points lie in the picture: x, y, x, y, …, as Pillow takes them."""
        return (np.asarray(points, float) @ self.matrix + self.origin).ravel().tolist()

    def line(self, points, colour=None, width: float = 0.8):
        points, width = self.at(points), max(1, round(width * self.scale * FINE))
        for layer, value in self.layers:
            layer.line(points, fill=value or colour or self.shade, width=width, joint="curve")

    def fill(self, points, colour=None, edge: bool = True):
        """Fill an outline; with `edge`, border it in a darker tone."""
        colour, corners = colour or self.colour, self.at(points)
        for layer, value in self.layers:
            layer.polygon(corners, fill=value or colour)
        if edge:
            self.line([*points, points[0]], self.tone(0.68 * np.array(colour)), 0.75)

    def pair(self, draw, points, *args):
        """`draw` the points and, left for right, their mirror image."""
        for side in (1, -1):
            draw(np.multiply(points, (side, 1)), *args)

    @contextmanager
    def inside(self, points):
        """What is drawn in this block shows only inside the outline `points`."""
        image, cover, mask = self.image.copy(), self.cover.copy(), Image.new("L", self.image.size)
        yield
        ImageDraw.Draw(mask).polygon(self.at(points), fill=255)
        image.paste(self.image, mask=mask)
        self.image.paste(image)
        self.cover.paste(cover)

    def pattern(self, points, kind: str):
        """Print "hoops", "checks" or "dots" on the inside of an outline, lighter or darker than its colour."""
        colour, gap = (self.light, self.shade)[self.rng.integers(2)], self.rng.uniform(5, 9)
        steps = np.arange(-40, 41, gap)
        with self.inside(points):
            for i, y in enumerate(steps):
                if kind == "dots":
                    for x in steps + gap / 2 * (i % 2):
                        self.fill(circle(x, y, 1.2)[::3], colour, False)
                else:
                    self.line([(-40, y), (40, y)], colour, 1.6)
                if kind == "checks":
                    self.line([(y, -40), (y, 40)], colour, 1.6)

    def finished(self) -> Image.Image:
        """Reduce, round the drawing off towards its edges, light it from one side, set it on a soft shadow."""
        small, cover = self.image.reduce(FINE), self.cover.reduce(FINE)
        soft = np.asarray(cover.filter(ImageFilter.GaussianBlur(2.5)), np.float32)[..., None] / 255
        cover = np.asarray(cover, np.float32)[..., None] / 255
        across, down = np.linspace(-1, 1, WIDTH)[:, None], np.linspace(-1, 1, HEIGHT)[:, None, None]
        slope, fall = self.rng.uniform(-0.09, 0.09), self.rng.uniform(0, 0.09)
        light = self.rng.uniform(0.95, 1.03) - slope * across - fall * down
        lit = np.asarray(small, np.float32) * light * (0.78 + 0.24 * soft)
        shadow = 255 - 38 * np.roll(soft, (2, 1), (0, 1))
        grain = self.rng.normal(0, 1.6, (HEIGHT, WIDTH, 1)) * cover
        return Image.fromarray(np.clip(cover * lit + (1 - cover) * shadow + grain, 0, 255).astype(np.uint8))
