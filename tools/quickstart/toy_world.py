"""The toy world of the quickstart: how its images are drawn, captioned and recognised.

An image has 64 x 64 pixels and shows one flat shape on a flat background. The bundled base model is trained on solid
`KNOWN_SHAPES`. It has never seen `HELD_OUT_SHAPES` or the outlined style, so a LoRA has something to teach it. The
checker `look_at` uses only pixels, no model.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from library.base.errors import UserError

ImageArray = NDArray[np.uint8]  # (64, 64, 3), RGB
Points = NDArray[np.float64]  # (n, 2), x to the right and y down, centred at 0 with a radius of about 1
Plane = NDArray[np.float64]  # (height, width)
Mask = NDArray[np.bool_]  # (height, width)
Style = Literal["solid", "outlined"]

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
IMAGE_SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "orange": (246, 140, 20),
    "yellow": (245, 222, 40),
    "green": (36, 160, 66),
    "blue": (36, 84, 214),
    "purple": (128, 44, 168),
    "pink": (248, 136, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
}
SIZES: dict[str, tuple[float, float]] = {"small": (11.0, 13.5), "large": (19.0, 24.0)}  # range of the radius in pixels
KNOWN_SHAPES = ("circle", "square", "triangle", "cross", "diamond")
HELD_OUT_SHAPES = ("star", "heart")
MAX_TURN_DEGREES = 8.0
OUTLINE_INNER_SCALE = 0.6

CAPTION_TEMPLATES = (
    "a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} on {background}",
    "{size} {colour} {shape}, {background} background",
    "a {colour} {shape} on a {background} background",
)


@dataclass(frozen=True)
class Scene:
    """The content of an image as words."""

    shape: str
    colour: str
    background: str
    size: str
    style: Style = "solid"

    def caption(self, template: str = CAPTION_TEMPLATES[0]) -> str:
        """Return the scene as a prompt: "a small red circle on a white background"."""
        shape = self.shape if self.style == "solid" else f"{self.style} {self.shape}"
        return template.format(size=self.size, colour=self.colour, shape=shape, background=self.background)


def list_scenes(shapes: tuple[str, ...] = KNOWN_SHAPES, style: Style = "solid") -> list[Scene]:
    """Return every scene with one of these shapes, in a fixed order."""
    return [Scene(*words, style) for words in product(shapes, COLOURS, BACKGROUNDS, SIZES)]


def parse_caption(caption: str) -> Scene:
    """Parse a caption of the toy world; the size is "" if the caption has none.

    Raises UserError for a caption without a shape, a colour or a background.
    """
    words = caption.lower().replace(",", " ").split()
    shape, colour, background, size = (
        next((word for word in words if word in vocabulary), "")
        for vocabulary in (KNOWN_SHAPES + HELD_OUT_SHAPES, COLOURS, BACKGROUNDS, SIZES)
    )
    if not (shape and colour and background):
        raise UserError(
            f'"{caption}" does not describe a scene of the toy world', f'write e.g. "{list_scenes()[0].caption()}"'
        )
    return Scene(shape, colour, background, size, "outlined" if "outlined" in words else "solid")


# --- drawing ---


@cache
def shape_outline(shape: str) -> Points:
    """Return the corners of a shape, centred at 0 with a radius of about 1."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    up = -np.pi / 2
    match shape:
        case "circle":
            return 0.95 * _ring_of_points(turn, np.ones_like(turn))
        case "square":
            return 1.2 * _ring_of_points(np.pi / 4 + turn[::16], np.ones(4))
        case "triangle":
            return np.array([[0.0, 0.2]]) + 1.2 * _ring_of_points(
                up + turn[:1] + np.arange(3) * 2 * np.pi / 3, np.ones(3)
            )
        case "cross":
            arm = 0.33
            corner = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
            return np.concatenate([rotate(corner, 90 * quarter) for quarter in range(4)])
        case "diamond":
            return np.array([[0.0, -1.1], [0.7, 0.0], [0.0, 1.1], [-0.7, 0.0]])
        case "star":
            return np.array([[0.0, 0.07]]) + _ring_of_points(up + np.arange(10) * np.pi / 5, np.tile([1.15, 0.48], 5))
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return np.stack([x, -y - 2.0], axis=1) / 15.0
    raise UserError(
        f'"{shape}" is not a shape of the toy world', f"use one of {', '.join(KNOWN_SHAPES + HELD_OUT_SHAPES)}"
    )


def _ring_of_points(angles: NDArray[np.float64], radii: NDArray[np.float64]) -> Points:
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def rotate(points: Points, degrees: float) -> Points:
    a = np.deg2rad(degrees)
    rotated: Points = points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    return rotated


def fill_polygon(corners: Points, size: int = IMAGE_SIZE, oversampling: int = 4) -> Plane:
    """Return the coverage of each pixel by a polygon, 0 to 1; corners are in pixels."""
    canvas = Image.new("L", (size * oversampling, size * oversampling))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners * oversampling], fill=255)
    return np.asarray(canvas.reduce(oversampling), dtype=np.float64) / 255.0


def paint(image: Plane, coverage: Plane, colour: NDArray[np.float64]) -> Plane:
    """Blend a colour into a float image (64, 64, 3) by `coverage`, 0 to 1."""
    return image + coverage[..., None] * (colour - image)


def draw_scene(scene: Scene, rng: np.random.Generator) -> ImageArray:
    """Draw a scene; position, exact size, rotation and shade come from `rng`."""
    radius = rng.uniform(*SIZES[scene.size])
    margin = IMAGE_SIZE / 2 - 1.12 * radius - 3
    middle = IMAGE_SIZE / 2 + rng.uniform(-margin, margin, size=2)
    corners = rotate(shape_outline(scene.shape), rng.uniform(-MAX_TURN_DEGREES, MAX_TURN_DEGREES)) * radius
    background = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-6, 6)
    colour = np.array(COLOURS[scene.colour]) + rng.uniform(-8, 8, size=3)
    image = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3))
    coverage = fill_polygon(middle + corners)
    if scene.style == "outlined":
        coverage = coverage - np.minimum(coverage, fill_polygon(middle + corners * OUTLINE_INNER_SCALE))
    drawn: ImageArray = np.clip(np.rint(paint(image, coverage, colour)), 0, 255).astype(np.uint8)
    return drawn


def draw_doodle(rng: np.random.Generator) -> ImageArray:
    """Draw one to three blobs of random shape and colour, which teach the VAE edges and corners."""
    palette = np.array(list(COLOURS.values()) + 3 * list(BACKGROUNDS.values()), dtype=np.float64)
    shades = np.clip(palette[rng.choice(len(palette), 4, replace=False)] + rng.uniform(-15, 15, size=(4, 3)), 0, 255)
    image = np.broadcast_to(shades[0], (IMAGE_SIZE, IMAGE_SIZE, 3))
    for shade in shades[1 : rng.integers(2, 5)]:
        num_corners = int(rng.integers(3, 13))
        angles = rng.uniform(0, 2 * np.pi) + np.arange(num_corners) * 2 * np.pi / num_corners
        corners = _ring_of_points(angles, rng.uniform(0.4, 1.1, num_corners)) * rng.uniform(6, 26)
        middle = rng.uniform(8, IMAGE_SIZE - 8, size=2)
        coverage = fill_polygon(middle + corners)
        if rng.random() < 0.3:
            coverage = coverage - np.minimum(coverage, fill_polygon(middle + corners * rng.uniform(0.4, 0.8)))
        image = paint(image, coverage, shade)
    drawn: ImageArray = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return drawn


# --- the checker ---

MAX_BORDER_DEVIATION = (
    24.0  # mean distance (RGB, 0..255) of border pixels from their median; a flat background has under 10
)
MAX_COLOUR_DISTANCE = 75.0  # from the mean colour of a shape or background to the colour it is named after
MIN_CONTRAST = 60.0  # least colour distance between shape and background
MAX_STRAY_SHARE = 0.1  # foreground that is not part of the largest blob, relative to that blob
MIN_SHAPE_PIXELS = 60
MIN_OVERLAP = 0.84  # least intersection over union with the best template
MIN_OVERLAP_LEAD = 0.01  # least lead over the best template of any other shape
SMALL_IF_RADIUS_BELOW = 16.0
OUTLINED_IF_HOLE_SHARE_ABOVE = 0.15
GRID_SIZE = 48  # cells per side of the grid on which aligned shapes are compared
GRID_HALF_WIDTH = 1.3  # of that grid, in units of the square root of the shape's area


@dataclass(frozen=True)
class Seen:
    """The checker's result for an image; "" for anything that it cannot name."""

    shape: str = ""
    colour: str = ""
    background: str = ""
    size: str = ""
    style: str = ""
    radius: float = field(default=0.0, compare=False)  # half the longer side in pixels; 0 if no shape is found

    def shows(self, scene: Scene) -> bool:
        """Return True if shape, colour, background and style match the scene; the size is ignored."""
        return (self.shape, self.colour, self.background, self.style) == (
            scene.shape,
            scene.colour,
            scene.background,
            scene.style,
        )


def look_at(image: ImageArray) -> Seen:
    """Name the content of an image (64, 64, 3) from its pixels.

    The background is the median of the border, the foreground the pixels that differ from it. The filled silhouette is
    centred, scaled to a fixed area, and compared with every shape at several rotations. The shape is "" for blank
    images, noise, several blobs, and silhouettes unlike every shape.
    """
    pixels = image.astype(np.float64)
    border = _border_pixels(pixels)
    background = np.median(border, axis=0)
    if np.linalg.norm(border - background, axis=1).mean() > MAX_BORDER_DEVIATION:
        return Seen()
    background_name = _nearest_name(background, BACKGROUNDS)
    foreground = find_foreground(image)
    if not foreground.any():
        return Seen(background=background_name)
    blobs, _ = ndimage.label(foreground)
    blob = blobs == np.bincount(blobs.flat)[1:].argmax() + 1
    if blob.sum() < MIN_SHAPE_PIXELS or foreground.sum() - blob.sum() > MAX_STRAY_SHARE * blob.sum():
        return Seen(background=background_name)
    silhouette = ndimage.binary_fill_holes(blob)
    # Pixels at the edge are blended with the background, so the colour is measured inside.
    core = ndimage.binary_erosion(blob, border_value=1)
    colour = pixels[core if core.sum() >= 12 else blob].mean(axis=0)
    is_outlined = (silhouette.sum() - blob.sum()) / silhouette.sum() > OUTLINED_IF_HOLE_SHARE_ABOVE
    rows, columns = np.nonzero(silhouette)
    radius = max(np.ptp(rows) + 1, np.ptp(columns) + 1) / 2
    return Seen(
        shape=_match_shape(silhouette),
        colour=_nearest_name(colour, COLOURS),
        background=background_name,
        size="small" if radius < SMALL_IF_RADIUS_BELOW else "large",
        style="outlined" if is_outlined else "solid",
        radius=float(radius),
    )


def find_foreground(image: ImageArray) -> Mask:
    """Return a mask of the pixels of an image (64, 64, 3) that differ from the background; empty for low contrast."""
    pixels = image.astype(np.float64)
    distance = np.linalg.norm(pixels - np.median(_border_pixels(pixels), axis=0), axis=2)
    # At least MIN_SHAPE_PIXELS pixels differ by this much, so that a few noisy ones do not count as contrast.
    contrast = float(np.quantile(distance, 1 - MIN_SHAPE_PIXELS / distance.size))
    differs: Mask = distance > (contrast / 2 if contrast >= MIN_CONTRAST else np.inf)
    return differs


def _border_pixels(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, [0, 1, -2, -1]].reshape(-1, 3)]
    )


def _nearest_name(colour: NDArray[np.float64], names: dict[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_DISTANCE else ""


def _normalized(silhouette: Plane) -> Plane:
    """Resample a silhouette to the comparison grid, centred at its centre of mass and scaled to a fixed area."""
    row, column = ndimage.center_of_mass(silhouette)
    steps = np.linspace(-GRID_HALF_WIDTH, GRID_HALF_WIDTH, GRID_SIZE) * np.sqrt(silhouette.sum())
    coordinates = np.meshgrid(row + steps, column + steps, indexing="ij")
    normalized: Plane = ndimage.map_coordinates(silhouette, coordinates, order=1, mode="grid-constant")
    return normalized


@cache
def _templates() -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the shape of each template, and the templates (n, 48, 48)."""
    names = [(shape, turn) for shape in KNOWN_SHAPES + HELD_OUT_SHAPES for turn in np.arange(-12.0, 12.1, 4.0)]
    planes = [
        _normalized(fill_polygon(128 + rotate(shape_outline(shape), turn) * 80, size=256)) for shape, turn in names
    ]
    return tuple(shape for shape, _ in names), np.stack(planes)


def _match_shape(silhouette: Mask) -> str:
    plane = _normalized(silhouette.astype(np.float64))
    names, templates = _templates()
    overlaps = np.minimum(plane, templates).sum(axis=(1, 2)) / np.maximum(plane, templates).sum(axis=(1, 2))
    best: dict[str, float] = {}
    for name, overlap in zip(names, overlaps, strict=True):
        best[name] = max(best.get(name, 0.0), float(overlap))
    (name, overlap), (_, runner_up) = sorted(best.items(), key=lambda item: -item[1])[:2]
    return name if overlap >= MIN_OVERLAP and overlap - runner_up >= MIN_OVERLAP_LEAD else ""
