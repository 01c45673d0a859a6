"""Drawing of a small COCO-format detection dataset: coloured shapes on textured, cluttered backgrounds.

One seed always gives the same files. The colour says nothing about the class, shapes overlap, and the category ids have
gaps on purpose, as COCO's have.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..files import write_json

VERSION = 2  # of the pictures: one seed gives others than in version 1, so what that left is drawn again
CATEGORIES = {"circle": 1, "square": 3, "triangle": 7}
# px. Scaled to a short side of 96, as the demo does, these become 96, 128 and 160: multiples of the coarsest stride.
# Padding masks are sampled at the nearest pixel, as in the official code, and count a cell that is partly image as a
# whole one: with other sides that visibly shifts all boxes, as a map here has three to five cells.
SHORT_SIDE = 144
LONG_SIDES = (144, 192, 240)
MAX_TILT = math.radians(30)
EMPTY_FRACTION = 0.04
MIN_VISIBLE = 0.6  # a shape that would hide more than the rest of another one is not drawn
SUPERSAMPLING = 3  # for smooth edges
JPEG_QUALITY = 92
# What clutter is made of: (corners, how far the inner ones of a star are from its centre).
CLUTTER = ((10, 0.4), (16, 0.6))


@dataclass(frozen=True)
class Scene:
    """What images are like; the default is the demo's, with objects from a few pixels to half the image.

    Attributes:
        short_side, long_sides: of images, in pixels; one of the long sides is drawn, upright or not.
        min_radius: of objects, in pixels.
        max_radius: of objects, in parts of the shorter image side.
        num_objects: fewest and most that are tried; one that hides too much of others is left out.
        clutter: fewest and most stars, which are no objects, below the objects.
    """

    short_side: int = SHORT_SIDE
    long_sides: tuple[int, ...] = LONG_SIDES
    min_radius: float = 13.0
    max_radius: float = 0.32
    num_objects: tuple[int, int] = (2, 7)
    clutter: tuple[int, int] = (0, 0)


DEMO = Scene()


def shape_outline(name: str) -> np.ndarray:
    """Return the corners of an upright shape as an (n, 2) array of (x, y) on the unit circle around the origin.

    Args:
        name: one of ``CATEGORIES``; a circle comes as a polygon of 48 corners.
    """
    num_corners, first_angle = {"circle": (48, 0.0), "square": (4, 45.0), "triangle": (3, -90.0)}[name]
    angles = math.radians(first_angle) + np.arange(num_corners) * 2 * math.pi / num_corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def polygon_area(corners: np.ndarray) -> float:
    """Return the area enclosed by (n, 2) corners (the shoelace formula)."""
    x, y = corners.T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def rasterize(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return how much of each pixel a polygon of (n, 2) corners covers, as (height, width) in [0, 1]."""
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners * SUPERSAMPLING], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Return (height, width, 3) noise of about [-1, 1] whose blobs are a ``cells``-th of the image wide."""
    coarse = rng.uniform(-1, 1, size=(3, cells, cells)).astype(np.float32)
    resized = [Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC) for channel in coarse]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a textured (height, width, 3) float32 image in [0, 255], crossed by a few lines as clutter."""
    image = np.full((height, width, 3), rng.uniform(50, 205, size=3), dtype=np.float32)
    for cells, strength in ((3, 45), (9, 25), (30, 12)):
        image += strength * smooth_noise(rng, height, width, cells)
    image = (image + image.mean(axis=2, keepdims=True)) / 2  # duller than the shapes
    for _ in range(rng.integers(0, 6)):
        start, end = rng.uniform((0, 0), (width, height), size=(2, 2))
        along = (end - start) / (np.linalg.norm(end - start) + 1e-6)
        across = np.array([-along[1], along[0]]) * rng.uniform(0.5, 1.5)
        stroke = rasterize(np.stack([start + across, end + across, end - across, start - across]), height, width)
        image = blend(image, stroke, rng.uniform(0, 255, size=3))
    return image


def blend(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lays a colour, (3,) or (height, width, 3), over an image with alpha ``coverage`` (height, width)."""
    alpha = coverage[..., None]
    return (image * (1 - alpha) + colour * alpha).astype(np.float32)


def contrasting_colour(rng: np.random.Generator, below: np.ndarray) -> np.ndarray:
    """Return that one of four random RGB colours which differs most from the (n, 3) pixels it will cover."""
    candidates = rng.uniform(0, 255, size=(4, 3))
    return candidates[np.argmax(np.linalg.norm(candidates - below.mean(axis=0), axis=1))]


def random_polygon(
    rng: np.random.Generator, outline: np.ndarray, height: int, width: int, scene: Scene = DEMO
) -> np.ndarray:
    """Return the (n, 2) corners, in pixels, of an outline at a random size and tilt, its centre in the image."""
    # Log-uniform, so that small shapes are as common as large ones.
    radius = math.exp(rng.uniform(math.log(scene.min_radius), math.log(scene.max_radius * min(height, width))))
    angle = rng.uniform(-MAX_TILT, MAX_TILT)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = rng.uniform((0, 0), (width, height))
    return radius * outline @ rotation.T + centre


def draw_clutter(rng: np.random.Generator, image: np.ndarray, scene: Scene) -> np.ndarray:
    """Return the image with stars of a scene's clutter on it."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(scene.clutter[0], scene.clutter[1] + 1)):
        corners, inner = CLUTTER[rng.integers(len(CLUTTER))]
        angles = np.arange(corners) * 2 * math.pi / corners
        outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        outline[1::2] *= inner
        coverage = rasterize(random_polygon(rng, outline, height, width, scene), height, width)
        if (covered := coverage > 0.5).any():
            image = blend(image, coverage, contrasting_colour(rng, image[covered]))
    return image


def draw_scene(rng: np.random.Generator, scene: Scene = DEMO) -> tuple[np.ndarray, list[dict]]:
    """Draw one image and lists what is visible in it.

    Returns:
        the uint8 RGB image (height, width, 3), and per object a dict with COCO's ``category_id``, ``bbox``
        (x, y, width, height of the visible part, in pixels), ``area`` (visible pixels) and ``iscrowd``.
    """
    height, width = rng.permutation([scene.short_side, rng.choice(scene.long_sides)])
    image = draw_background(rng, height, width)
    if scene.clutter[1]:
        image = draw_clutter(rng, image, scene)
    fewest, most = scene.num_objects
    num_objects = 0 if rng.random() < EMPTY_FRACTION else rng.integers(fewest, most + 1)
    names, areas, visible = [], [], []
    for name in rng.choice(list(CATEGORIES), size=num_objects):
        corners = random_polygon(rng, shape_outline(name), height, width, scene)
        coverage = rasterize(corners, height, width)
        covered = coverage > 0.5
        remaining = [mask & ~covered for mask in visible] + [covered]
        full_areas = areas + [polygon_area(corners)]
        if any(mask.sum() < MIN_VISIBLE * area for mask, area in zip(remaining, full_areas, strict=True)):
            continue
        colour = contrasting_colour(rng, image[covered])
        image = blend(image, coverage, colour + 12 * smooth_noise(rng, height, width, 5))
        names, areas, visible = names + [name], full_areas, remaining
    image += rng.normal(0, rng.uniform(2, 10), size=image.shape)
    annotations = [annotate(name, mask) for name, mask in zip(names, visible, strict=True)]
    return image.clip(0, 255).astype(np.uint8), annotations


def annotate(name: str, mask: np.ndarray) -> dict:
    """Return the COCO annotation, still without ids, of an object with visible pixels ``mask``."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    return {"category_id": CATEGORIES[name], "bbox": box, "area": int(mask.sum()), "iscrowd": 0}


def scenes(num_images: int, *, seed: int, split: int, scene: Scene = DEMO) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Yield a split's scenes; each has its own random stream, so their number does not change them."""
    for index in range(num_images):
        yield draw_scene(np.random.default_rng([seed, split, index]), scene)


def write_split(output: Path, name: str, num_images: int, *, seed: int, split: int, scene: Scene = DEMO) -> bool:
    """Write ``output/name/*.jpg`` and then ``output/name.json``; the latter stands only where the split is
    complete.

    Returns:
        False where exactly this split was there already and nothing had to be done.
    """
    annotation_file = output / f"{name}.json"
    info = {"description": "coloured shapes", "version": VERSION, "split": name, "num_images": num_images, "seed": seed}
    if scene != DEMO:
        # Lists in place of tuples, as they are read back.
        info["scene"] = json.loads(json.dumps(asdict(scene)))
    if annotation_file.exists() and json.loads(annotation_file.read_text()).get("info") == info:
        return False
    (output / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index, (image, objects) in enumerate(scenes(num_images, seed=seed, split=split, scene=scene)):
        # The split is part of the ids, so that an image of one split is never taken for one of the other.
        image_id = 100_000 * (split + 1) + index
        file_name = f"{image_id}.jpg"
        Image.fromarray(image).save(output / name / file_name, quality=JPEG_QUALITY)
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": id_, "name": category} for category, id_ in CATEGORIES.items()]
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_json(annotation_file, content)
    return True
