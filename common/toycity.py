"""A procedural city in three domains, written in the layouts of the real data sets.

    python -m common.toycity ROOT [--seed 0] [--train 240] [--val 60] [--size 256x128]

    game     saturated, clean and crisp, from high above a wide street: gta5/ and, with the same pictures, synthia/
    camera   a greyish-green cast, haze, blur and sensor noise, from a low car in a narrow street: cityscapes/
    rome     a mild, warm variation of the camera with more motorcycles: crosscity/Rome/

It replaces real data if there is none. A street is a small three-dimensional scene of flat polygons, which a pinhole
camera draws from far to near. The drawing holds the polygons' numbers; they give each pixel its class, colours, texture
and distance, so image and label cannot disagree. The inverse distance of a plane is linear in image coordinates, so
each pixel's place in the world is known: it gives textures their perspective and haze its depth. Image i of a domain
depends on (seed, domain, i) alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.cli import Size, command
from common.files import UserError, progress, write_json

VERSION = 1                                             # of the pictures: each version is another data set
MARKER = "toycity.json"
SIZE = Size(256, 128)
SUPERSAMPLE = 2                                         # colours are averaged, labels never
NEAR = 1.0                                              # metres; nearer parts are cut off

# Cityscapes ids; EGO to GROUND and RAILS are void in training.
EGO, ROI, STATIC, GROUND, ROAD, SIDEWALK, RAILS, BUILDING, WALL, FENCE = 1, 3, 4, 6, 7, 8, 10, 11, 12, 13
POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER = 17, 19, 20, 21, 22, 23, 24, 25
CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 26, 27, 28, 31, 32, 33
MARKING = 34                                            # not an id: road in Cityscapes, a class of its own in SYNTHIA
PALETTE = {
    GROUND: "510051", ROAD: "804080", SIDEWALK: "f423e8", RAILS: "e6968c", BUILDING: "464646", WALL: "66669c",
    FENCE: "be9999", POLE: "999999", LIGHT: "faaa1e", SIGN: "dcdc00", VEGETATION: "6b8e23", TERRAIN: "98fb98",
    SKY: "4682b4", PERSON: "dc143c", RIDER: "ff0000", CAR: "00008e", TRUCK: "000046", BUS: "003c64", TRAIN: "005064",
    MOTORCYCLE: "0000e6", BICYCLE: "770b20",
}
SYNTHIA_IDS = {
    SKY: 1, BUILDING: 2, ROAD: 3, SIDEWALK: 4, FENCE: 5, VEGETATION: 6, POLE: 7, CAR: 8, SIGN: 9, PERSON: 10,
    BICYCLE: 11, MOTORCYCLE: 12, LIGHT: 15, TERRAIN: 16, RIDER: 17, TRUCK: 18, BUS: 19, TRAIN: 20, WALL: 21,
    MARKING: 22,
}

Color = tuple[float, float, float]                      # RGB in 0..1, or the factors of a cast
Point = tuple[float, float, float]                      # metres: x to the right, y up from the ground, z ahead
Shape = Sequence[tuple[float, float]]                   # a flat polygon
Range = tuple[float, float]
Place = tuple[float, float, float]                      # x, z and yaw of a solid; without yaw its length runs along z


@dataclass(frozen=True)
class Style:
    """How one domain looks: the camera's position, the street, the number of objects in it, photometry."""

    eye: Range                                          # camera height, metres
    horizon: Range                                      # from the top, as a share of the image's height
    focal: Range                                        # as a share of the image's width
    road: Range                                         # half width, metres
    texture: float                                      # factor on the size of textures
    mean: dict[str, float]                              # mean number of objects per picture
    roadside: dict[str, float]                          # probability of a train, wall, ... on each side
    greenery: float                                     # share of blocks with trees instead of a building
    floors: Range                                       # of a building
    grass: Color
    foliage: Color
    sky: tuple[Color, Color]                            # blue and clouds
    haze: float                                         # distance at which haze is 63 % of the colour, metres
    haze_color: Color
    cast: Color
    gamma: float
    saturation: float
    contrast: float
    blur: float                                         # pixels, in an image of width 256
    noise: float
    hood: bool                                          # whether the picture shows the camera car's hood


GAME = Style(
    eye=(1.9, 2.6), horizon=(0.36, 0.44), focal=(0.62, 0.72), road=(5.5, 8.0), texture=1.0,
    mean=dict(car=3.2, truck=0.75, bus=0.5, person=2.2, cyclist=0.4, motorcyclist=0.4, bicycle=0.2, motorcycle=0.2,
              light=0.9, sign=0.9, lamp=1.0, tree=1.0, bin=0.4),
    roadside=dict(train=0.15, wall=0.20, fence=0.30, terrain=0.55), greenery=0.35, floors=(2, 12),
    grass=(0.50, 0.52, 0.20), foliage=(0.18, 0.45, 0.13), sky=((0.28, 0.52, 0.92), (0.86, 0.90, 0.96)),
    haze=450, haze_color=(0.70, 0.80, 0.95), cast=(1.04, 1.0, 0.95), gamma=0.9, saturation=1.3, contrast=1.1,
    blur=0, noise=0.004, hood=False,
)
CAMERA = Style(
    eye=(1.25, 1.5), horizon=(0.43, 0.50), focal=(0.74, 0.86), road=(3.8, 5.5), texture=1.7,
    mean=dict(car=3.6, truck=0.4, bus=0.35, person=3.2, cyclist=0.55, motorcyclist=0.35, bicycle=0.5, motorcycle=0.2,
              light=1.0, sign=1.5, lamp=0.7, tree=1.4, bin=0.4),
    roadside=dict(train=0.13, wall=0.16, fence=0.22, terrain=0.35), greenery=0.45, floors=(3, 6),
    grass=(0.36, 0.50, 0.22), foliage=(0.26, 0.40, 0.20), sky=((0.66, 0.75, 0.84), (0.93, 0.94, 0.94)),
    haze=95, haze_color=(0.76, 0.79, 0.77), cast=(0.92, 1.01, 0.94), gamma=1.1, saturation=0.6, contrast=0.78,
    blur=0.8, noise=0.02, hood=True,
)
ROME = replace(
    CAMERA, eye=(1.5, 1.9), horizon=(0.40, 0.48),
    mean=CAMERA.mean | dict(cyclist=0.4, motorcyclist=0.7, motorcycle=0.6, bus=0.5),
    roadside=dict(train=0.1, wall=0.3, fence=0.15, terrain=0.35), sky=((0.50, 0.68, 0.88), (0.93, 0.94, 0.94)),
    haze=150, cast=(1.05, 1.0, 0.88), gamma=1.0, saturation=0.8, contrast=0.88, blur=0.6, noise=0.012, hood=False,
)
DOMAINS = {"game": (0, GAME), "camera": (1, CAMERA), "camera-val": (2, CAMERA), "rome": (3, ROME),
           "rome-val": (4, ROME)}


def _rgb(text: str) -> list[Color]:
    """Colours from hexadecimal, e.g. "ff8000 ffffff"."""
    return [tuple(value / 255 for value in bytes.fromhex(word)) for word in text.split()]


LACQUER = _rgb("bf1414 1a3399 d9d9db 14141a 8c9199 e6bf26 1f6640 731a4c")
FACADES = _rgb("b89e80 9e5c47 b2b2ad ccbd94 80858f a3806b")
CLOTHES = _rgb("cc2626 e6e6e0 33804c d9a633 2640a6 1a1a1f")
SKIN = _rgb("e0ad8c b27a59 6b4733")
HAIR = _rgb("1a120d 805926")
GLASS, BLACK, GREY, WHITE, RED, AMBER, GREEN, LAMP = _rgb("1f2b38 0d0d0f 808287 ebebe6 e6140f ffbf1a 1aff66 fff2bf")
PLAIN, CLOUDS, ASPHALT, SLABS, WINDOWS, BRICK, BARS, LEAVES, GRASS, CLADDING, STRIPE = range(11)


@dataclass(frozen=True)
class Paint:
    """A surface: its class, two colours and the texture that mixes them."""

    id: int
    color: Color
    second: Color | None = None                         # None: the first, darker
    texture: int = PLAIN
    period: float = 0.3                                 # metres


@functools.cache
def _grain() -> np.ndarray:
    """(512, 512) float32 of smooth periodic noise in 0..1 with four samples per cell."""
    noise = np.kron(np.random.default_rng(0).random((128, 128)), np.ones((4, 4)))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(4)) / 4
    return noise.astype(np.float32)


def _noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _grain()[np.floor(4 * u).astype(np.int32) & 511, np.floor(4 * v).astype(np.int32) & 511]


def _texture(kind: int, x: np.ndarray, y: np.ndarray, z: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Share of the second colour, 0..1, at world points (n,) in metres; upright planes are textured along x + z."""
    across, u, v, w, h = x + z, (x + z) / period, y / period, x / period, z / period
    if kind == ASPHALT:
        return 0.5 * _noise(w, h) + 0.5 * _noise(w / 9, h / 20)
    if kind == SLABS:
        return np.where((w % 1 < 0.1) | (h % 1 < 0.1), 0.9, 0.35 * _noise(w, h))
    if kind == WINDOWS:                                 # each window has its own reflection
        glass = (u % 1 > 0.28) & (u % 1 < 0.78) & (v % 1 > 0.3) & (v % 1 < 0.8)
        return np.where(glass, 0.6 + 0.4 * _noise(np.floor(u), np.floor(v)), 0.2 * _noise(6 * u, 6 * v))
    if kind == BRICK:
        u = u + 0.5 * (np.floor(2 * v) % 2)
        return np.where((u % 1 < 0.12) | (2 * v % 1 < 0.2), 0.9, 0.45 * _noise(np.floor(u), np.floor(2 * v)))
    if kind == BARS:
        return np.where((u % 1 < 0.45) | (y % 1.1 < 0.14), 0.05, 0.95)
    if kind == LEAVES:
        return 0.6 * _noise(u, v) + 0.4 * _noise(2.7 * u, 2.7 * v)
    if kind == GRASS:
        return 0.5 * _noise(3 * w, h) + 0.5 * _noise(w / 5, h / 5)
    if kind == CLADDING:
        return np.where(v % 1 < 0.3, 0.7, 0.1 * _noise(u, v))
    if kind == STRIPE:                                  # one stripe, one period above the ground
        return np.where((v > 1) & (v < 1.35), 1.0, 0.1 * _noise(u, v))
    return 0.3 * _noise(6 * across, 6 * y)              # PLAIN


class Scene:
    """A picture in progress: later shapes cover earlier ones."""

    def __init__(self, style: Style, size: Size, rng: np.random.Generator):
        self.style, self.size, self.rng = style, size, rng
        self.width, self.height = size.width * SUPERSAMPLE, size.height * SUPERSAMPLE
        self.eye = rng.uniform(*style.eye)
        self.horizon = rng.uniform(*style.horizon) * self.height
        self.focal = rng.uniform(*style.focal) * self.width
        self.centre = rng.uniform(0.42, 0.58) * self.width
        self.instances = 0
        self.numbers = Image.new("I", (self.width, self.height), 0)
        self.pen = ImageDraw.Draw(self.numbers)
        blue, cloud = style.sky
        weather = rng.uniform(0, 0.6)
        blue = tuple(a + weather * (b - a) for a, b in zip(blue, cloud))
        self.rows = [(0, 0, 0, *blue, *cloud, CLOUDS, 1, SKY, 0)]   # number 0: the background

    def thing(self) -> int:
        """The number of a new instance."""
        self.instances += 1
        return self.instances

    def pick(self, colors: Sequence[Color], spread: float = 0.04) -> Color:
        """A random one of the colours, slightly changed."""
        color = np.asarray(colors[self.rng.integers(len(colors))]) + self.rng.normal(0, spread, 3)
        return tuple(np.clip(color, 0, 1).tolist())

    def _fill(self, points: Sequence[Point], plane: Point, light: float, paint: Paint, instance: int) -> None:
        colors = (*paint.color, *(paint.second or (0.72 * value for value in paint.color)))
        colors = (light * value for value in colors)
        self.rows.append((*plane, *colors, paint.texture, paint.period, paint.id, instance))
        cx, cy, f, eye = self.centre, self.horizon, self.focal, self.eye
        self.pen.polygon([(cx + f * x / z, cy - f * (y - eye) / z) for x, y, z in points], fill=len(self.rows) - 1)

    def polygon(self, points: Sequence[Point], paint: Paint, instance: int = 0) -> None:
        """Paint a flat polygon; its direction decides how bright it is."""
        normal = nx, ny, nz = _normal(points)
        offset = nx * points[0][0] + ny * (points[0][1] - self.eye) + nz * points[0][2]
        length = math.hypot(*normal)
        points = _clip(points)
        if len(points) < 3 or abs(offset) <= 1e-6 * length:         # behind the camera, or seen from the edge
            return
        light = 0.86 - math.copysign(1, offset) * (0.10 * nx + 0.30 * ny) / length
        self._fill(points, (nx / offset, ny / offset, nz / offset), light, paint, instance)

    def upright(self, x: float, z: float, parts: Sequence[tuple[Shape, Paint]], instance: int = 0,
                turn: float = 1.0) -> None:
        """Paint flat shapes that face the camera at distance z; `turn` scales their width; below 0 it mirrors them."""
        for shape, paint in parts:
            self._fill([(x + turn * a, b, z) for a, b in shape], (0, 0, 1 / z), 0.9, paint, instance)

    def ground(self, x0: float, x1: float, z0: float, z1: float, paint: Paint) -> None:
        """Paint a rectangle that lies on the ground."""
        self.polygon([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], paint)

    def box(self, place: Place, u: Range, v: Range, w: Range, paint: Paint, instance: int = 0,
            taper: Range = (0, 0)) -> dict[str, list[Point]]:
        """Paint a box of length u, height v, width w, its top shorter by `taper` at each end.

        Returns: the visible faces by name, each as bottom left, bottom right, top right, top left.
        """
        (x, z, yaw), faces = place, {}
        cos, sin = math.cos(yaw), math.sin(yaw)
        for name, corners in (("top", ("010", "011", "111", "110")), ("front", ("101", "100", "110", "111")),
                              ("left", ("100", "000", "010", "110")), ("right", ("001", "101", "111", "011")),
                              ("back", ("000", "001", "011", "010"))):
            quad = []
            for i, j, k in ((int(c) for c in corner) for corner in corners):
                a, c = u[i] + j * taper[0] * (1 - 2 * i), w[k] + j * taper[1] * (1 - 2 * k)
                quad.append((x + c * cos + a * sin, v[j], z + a * cos - c * sin))
            nx, ny, nz = _normal(quad)
            if nx * quad[0][0] + ny * (quad[0][1] - self.eye) + nz * quad[0][2] > 0:    # faces the camera
                self.polygon(quad, paint, instance)
                faces[name] = quad
        return faces

    def panel(self, face: Sequence[Point], shape: Shape, paint: Paint, instance: int = 0) -> None:
        """Paint a shape on a face of a box; its coordinates are fractions of the face's width and height."""
        self.polygon([tuple((1 - b) * ((1 - a) * p + a * q) + b * ((1 - a) * s + a * r) for p, q, r, s in zip(*face))
                      for a, b in shape], paint, instance)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The picture without camera effects, float32 (h,w,3) in about 0..1; classes uint8 (h,w); instances uint16 (h,w)."""
        table, numbers, n = np.array(self.rows, np.float32), np.asarray(self.numbers), SUPERSAMPLE
        samples = [np.take(table[:, 3:9], numbers[i::n, j::n], axis=0) for i in range(n) for j in range(n)]
        colors, numbers = sum(samples) / len(samples), numbers[::n, ::n]
        a, b, c, *_, kinds, periods, ids, instances = np.moveaxis(table[numbers], 2, 0)
        ys, xs = np.indices(numbers.shape, np.float32) * n + 0.5
        xs, ys = (xs - self.centre) / self.focal, (self.horizon - ys) / self.focal
        z = 1 / np.maximum(a * xs + b * ys + c, 1 / 400)
        mix = np.zeros_like(z)
        for kind in np.unique(table[:, 9]):
            pixels = np.nonzero(kinds == kind)
            if kind == CLOUDS:
                mix[pixels] = 0.5 * np.clip(1 - 2.2 * ys[pixels], 0, 1) + 0.5 * _noise(xs[pixels] * 6, ys[pixels] * 18)
                continue
            period = periods[pixels] * np.float32(self.style.texture)
            share = _texture(int(kind), xs[pixels] * z[pixels], ys[pixels] * z[pixels] + self.eye, z[pixels], period)
            fade = np.clip(period * self.focal / (2 * n) / z[pixels] - 0.4, 0, 1)       # too fine to resolve: use the mean
            mix[pixels] = 0.3 + (share - 0.3) * fade
        image = colors[..., :3] + (colors[..., 3:] - colors[..., :3]) * mix[..., None]
        haze = np.where(kinds == CLOUDS, 0.15, 1 - np.exp(-z / self.style.haze)).astype(np.float32)[..., None]
        image += (np.float32(self.style.haze_color) - image) * haze
        return image, ids.astype(np.uint8), instances.astype(np.uint16)


def _normal(points: Sequence[Point]) -> Point:
    """Newell's normal of a polygon; its length is twice the area."""
    nx = ny = nz = 0.0
    ax, ay, az = points[-1]
    for bx, by, bz in points:
        nx += (ay - by) * (az + bz)
        ny += (az - bz) * (ax + bx)
        nz += (ax - bx) * (ay + by)
        ax, ay, az = bx, by, bz
    return nx, ny, nz


def _clip(points: Sequence[Point]) -> Sequence[Point]:
    """The part of a polygon that is farther than NEAR."""
    if all(p[2] >= NEAR for p in points):
        return points
    out: list[Point] = []
    for a, b in zip(points, (*points[1:], points[0])):
        if a[2] >= NEAR:
            out.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            t = (NEAR - a[2]) / (b[2] - a[2])
            out.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), NEAR))
    return out


def _rect(a0: float, a1: float, b0: float, b1: float) -> Shape:
    return [(a0, b0), (a1, b0), (a1, b1), (a0, b1)]


def _disc(a: float, b: float, ra: float, rb: float, corners: int = 12) -> Shape:
    turn = 2 * math.pi / corners
    return [(a + ra * math.cos((i + 0.5) * turn), b + rb * math.sin((i + 0.5) * turn)) for i in range(corners)]


def _limb(a0: float, b0: float, a1: float, b1: float, width: float) -> Shape:
    """A bar from (a0, b0) to (a1, b1)."""
    n = width / 2 / math.hypot(a1 - a0, b1 - b0)
    da, db = (b0 - b1) * n, (a1 - a0) * n
    return [(a0 + da, b0 + db), (a0 - da, b0 - db), (a1 - da, b1 - db), (a1 + da, b1 + db)]


@dataclass(frozen=True)
class Part:
    """A box of a vehicle, in metres; its length u runs in the direction of travel."""

    u: Range
    v: Range
    half: float                                         # half its width
    paint: Paint
    sides: tuple[int, float, float] = (0, 0, 0)         # windows: count, and their range as fractions of v
    ends: Range = (0, 0)                                # the same range for windows at the ends
    axles: tuple[float, ...] = ()                       # as fractions of the length; they add lamps and bumpers
    taper: Range = (0, 0)


def _vehicle(scene: Scene, place: Place, parts: Sequence[Part]) -> None:
    """Paint the shadow, then the parts in this order; the vehicle's rear is at the place."""
    n, id, (x, z, yaw), half = scene.thing(), parts[0].paint.id, place, parts[0].half + 0.2
    corners = [(u, w) for u, w in ((-0.2, -half), (-0.2, half), (max(p.u[1] for p in parts), half))]
    corners.append((corners[2][0], -half))
    scene.polygon([(x + w * math.cos(yaw) + u * math.sin(yaw), 0, z + u * math.cos(yaw) - w * math.sin(yaw))
                   for u, w in corners], Paint(RAILS if id == TRAIN else ROAD, (0.13, 0.13, 0.15)))
    glass, tyre, rim = Paint(id, GLASS), Paint(id, BLACK), Paint(id, GREY)
    for part in parts:
        wheel = 0.38 / (part.u[1] - part.u[0]), 0.38 / (part.v[1] - part.v[0])
        for name, face in scene.box(place, part.u, part.v, (-part.half, part.half), part.paint, n, part.taper).items():
            if name in ("left", "right"):
                count, low, high = part.sides
                for i in range(count):
                    scene.panel(face, _rect((i + 0.1) / count, (i + 0.9) / count, low, high), glass, n)
                for axle in part.axles:
                    a = axle if name == "right" else 1 - axle
                    scene.panel(face, _disc(a, 0, *wheel), tyre, n)
                    scene.panel(face, _disc(a, 0, wheel[0] / 2, wheel[1] / 2), rim, n)
            elif name != "top":
                scene.panel(face, _rect(0.07, 0.93, *part.ends), glass, n)
                for a in (0.04, 0.76) if part.axles else ():
                    lamp = 0.6 * wheel[1]
                    scene.panel(face, _rect(a, a + 0.2, -wheel[1], 0.05), tyre, n)
                    color = LAMP if name == "front" else RED
                    scene.panel(face, _rect(a, a + 0.18, lamp, 1.8 * lamp), Paint(id, color), n)


def _car(scene: Scene, place: Place) -> None:
    length, paint = scene.rng.uniform(3.9, 4.7), Paint(CAR, scene.pick(LACQUER))
    _vehicle(scene, place, (
        Part((0, length), (0.32, 0.95), 0.9, paint, axles=(0.2, 0.8), taper=(0.08, 0.05)),
        Part((0.15 * length, 0.72 * length), (0.95, 1.52), 0.85, paint, (2, 0.1, 0.87), (0.1, 0.87), (), (0.4, 0.15))))


def _truck(scene: Scene, place: Place) -> None:
    length = scene.rng.uniform(5, 7.5)
    color = scene.pick((WHITE, (0.80, 0.55, 0.20), (0.30, 0.45, 0.60), (0.65, 0.66, 0.68)))
    load = Paint(TRUCK, color, None if length < 6.5 else GLASS, CLADDING, 0.45)
    parts = (Part((0, length), (0.85, 3.4), 1.2, load, axles=(0.12, 0.3, 0.85)),
             Part((length + 0.15, length + 1.9), (0.6, 2.75), 1.15, Paint(TRUCK, scene.pick(LACQUER)), (1, 0.5, 0.9),
                  (0.5, 0.9), (0.5,), (0.12, 0.05)))
    _vehicle(scene, place, parts if math.cos(place[2]) < 0 else parts[::-1])        # the farther part first


def _bus(scene: Scene, place: Place) -> None:
    paint = Paint(BUS, scene.pick(_rgb("f2b21a cc261f 3373bf e0e0d9")))
    length = scene.rng.uniform(8.5, 11.5)
    _vehicle(scene, place, [Part((0, length), (0.4, 3.1), 1.25, paint, (7, 0.42, 0.8), (0.4, 0.82), (0.22, 0.78))])


def _train(scene: Scene, x: float, z: float) -> None:
    color = scene.pick(_rgb("dbdbd6 cc1f1f 408059"))
    stripe = scene.pick(_rgb("bf1a1a f2cc33"))
    paint = Paint(TRAIN, color, stripe, STRIPE, 1.1)
    _vehicle(scene, (x, z, 0), [
        Part((9.2 * i, 9.2 * i + 9), (0.2, 3.7), 1.3, paint, (4, 0.5, 0.86), (0.5, 0.86), taper=(0.25, 0.12))
        for i in reversed(range(scene.rng.integers(2, 4)))])


# People, two-wheelers, poles and plants: flat shapes that face the camera, in metres.


def _person(scene: Scene, x: float, z: float) -> None:
    rng, step = scene.rng, scene.rng.uniform(0.04, 0.32)
    top, trousers, skin, hair = (Paint(PERSON, scene.pick(c)) for c in (CLOTHES, CLOTHES[-3:], SKIN, HAIR))
    scale, turn = rng.uniform(0.92, 1.08), rng.choice((-1, 1)) * rng.uniform(0.8, 1.1)
    parts = [
        (_limb(-0.22, 1.4, -0.3 - step / 3, 0.82, 0.13), top), (_limb(-0.09, 0.9, -step, 0, 0.19), trousers),
        (_limb(0.09, 0.9, step, 0, 0.19), trousers), ([(-0.2, 0.8), (0.2, 0.8), (0.28, 1.48), (-0.28, 1.48)], top),
        (_limb(0.22, 1.4, 0.3 + step / 3, 0.82, 0.13), top), (_disc(0, 1.66, 0.15, 0.17), skin),
        (_disc(0, 1.74, 0.15, 0.1), hair),
    ]
    scene.upright(x, z, [([(a, scale * b) for a, b in shape], paint) for shape, paint in parts], scene.thing(), turn)


def _two_wheeler(scene: Scene, x: float, z: float, id: int, ridden: bool) -> None:
    """A bicycle or motorcycle, with or without a rider, seen from the side or at an angle."""
    turn = scene.rng.choice((-1, 1)) * scene.rng.uniform(0.5, 1.0)
    color, tyre, metal = Paint(id, scene.pick(LACQUER)), Paint(id, BLACK), Paint(id, GREY)
    motor = id == MOTORCYCLE
    base, r, rim = (0.72, 0.34, 0.15) if motor else (0.56, 0.37, 0.27)
    parts = [(_disc(a, r, q, q), paint) for q, paint in ((r, tyre), (rim, metal)) for a in (-base, base)]
    if motor:
        body = [(-0.5, 0.3), (0.4, 0.25), (0.62, 0.8), (0.4, 1.0), (-0.1, 0.8), (-0.85, 0.95), (-0.8, 0.7)]
        seat = [(-0.8, 0.82), (0, 0.78), (0, 0.9), (-0.85, 0.98)]
        parts += [(_limb(base, r, 0.42, 1.05, 0.12), metal), (body, color), (seat, tyre),
                  (_limb(-0.9, 0.35, 0, 0.3, 0.12), metal), (_disc(0.62, 0.92, 0.13, 0.13), Paint(id, LAMP)),
                  (_limb(0.3, 1.12, 0.5, 1.05, 0.1), tyre)]
    else:
        frame = ((-base, r, -0.1, 0.35), (-0.1, 0.35, 0.38, 0.88), (-0.22, 0.9, 0.38, 0.88), (-base, r, -0.22, 0.9),
                 (-0.1, 0.35, -0.25, 1.0), (base, r, 0.36, 1.05))
        parts += [(_limb(*bar, 0.09), color) for bar in frame]
        parts += [(_limb(-0.4, 1.0, -0.1, 1.0, 0.1), tyre), (_limb(0.3, 1.08, 0.5, 1.08, 0.08), tyre)]
    scene.upright(x, z, parts, scene.thing(), turn)
    if ridden:
        top, trousers, skin, helmet = (Paint(RIDER, scene.pick(c)) for c in (CLOTHES, CLOTHES[-3:], SKIN, CLOTHES))
        hip = 0.95 if motor else 1.02
        scene.upright(x, z, [
            (_limb(-0.25, hip, 0.15, 0.75, 0.2), trousers), (_limb(0.15, 0.75, 0.1, 0.3, 0.16), trousers),
            (_limb(-0.25, hip - 0.08, 0.05, 1.58, 0.4), top), (_limb(0.08, 1.48, 0.42, 1.1, 0.13), top),
            (_disc(0.14, 1.78, 0.17, 0.18), skin), (_disc(0.12, 1.86, 0.19, 0.13), helmet)], scene.thing(), turn)


def _pole(scene: Scene, x: float, z: float, head: str) -> None:
    """A pole at the roadside with a lamp, a sign, or traffic lights that may hang over the road."""
    rng, n, turn, grey = scene.rng, scene.thing(), -1 if x > 0 else 1, Paint(POLE, scene.pick(_rgb("808287 404745")))
    b, kind, lit, arm = rng.uniform(2.2, 2.9), rng.integers(4), rng.integers(3), rng.random() < 0.4
    if head == "lamp":
        shapes = _rect(-0.12, 0.12, 0, 6.5), _rect(0, 2, 6.4, 6.6), _rect(1.2, 2, 6.25, 6.6)
        scene.upright(x, z, [(shape, grey) for shape in shapes], 0, turn)
    elif head == "light":
        shapes = [_rect(-0.13, 0.13, 0, 5.3), _rect(0, 3.2, 5.1, 5.3)] if arm else [_rect(-0.13, 0.13, 0, 3.2)]
        scene.upright(x, z, [(shape, grey) for shape in shapes], 0, turn)
        for a, b in ((0, 2.5), (3, 4.5)) if arm else ((0, 2.7),):
            lamps = [(_rect(a - 0.31, a + 0.31, b, b + 1.25), Paint(LIGHT, BLACK))]
            for i, color in enumerate((GREEN, AMBER, RED)):
                color = color if i == lit else tuple(0.3 * value for value in color)
                lamps.append((_disc(a, b + 0.24 + 0.38 * i, 0.17, 0.17), Paint(LIGHT, color)))
            scene.upright(x, z - 0.05, lamps, n, turn)
    else:
        red, blue, white, yellow = (Paint(SIGN, c) for c in (RED, (0.08, 0.25, 0.75), WHITE, AMBER))
        plates = (
            [(_disc(0, b, 0.5, 0.5), red), (_disc(0, b, 0.33, 0.33), white)],
            [(_disc(0, b, 0.5, 0.5), blue), (_limb(-0.25, b, 0.3, b, 0.16), white)],
            [([(-0.58, b - 0.45), (0.58, b - 0.45), (0, b + 0.55)], red),
             ([(-0.32, b - 0.3), (0.32, b - 0.3), (0, b + 0.25)], white)],
            [(_disc(0, b, 0.55, 0.55, 4), white), (_disc(0, b, 0.4, 0.4, 4), yellow)],
        )
        scene.upright(x, z, [(_rect(-0.1, 0.1, 0, b + 0.4), grey)])
        scene.upright(x, z - 0.05, plates[kind], n)


def _foliage(scene: Scene, x: float, z: float, y: float, spread: float, height: float, blobs: int) -> None:
    """Blobs of leaves around (x, y), brighter at the top."""
    tone = scene.pick((scene.style.foliage,), 0.05)
    for a, b, r, change in scene.rng.uniform(-1, 1, (blobs, 4)).tolist():
        r, shade = 0.48 + 0.12 * r, 1 + 0.3 * b + 0.1 * change
        paint = Paint(VEGETATION, tuple(shade * c for c in tone), tuple(0.5 * shade * c for c in tone), LEAVES, 0.22)
        reach = 0.7 * spread * math.sqrt(1 - 0.5 * b * b)
        scene.upright(x, z, [(_disc(a * reach, y + 0.6 * b * height, r * spread, r * height, 9), paint)])


def _tree(scene: Scene, x: float, z: float) -> None:
    height, spread, tall = scene.rng.uniform((3.5, 1.5, 1.5), (5.5, 2.4, 2.3)).tolist()
    scene.upright(x, z, [(_rect(-0.2, 0.2, 0, height), Paint(VEGETATION, (0.28, 0.20, 0.13)))])
    _foliage(scene, x, z, height, spread, tall, 12)


def _litter_bin(scene: Scene, x: float, z: float) -> None:
    scene.box((x, z, 0), (0, 0.6), (0, 1.1), (-0.35, 0.35), Paint(STATIC, scene.pick(_rgb("404c40 804c1a"))))


# The street.


def _building(scene: Scene, x0: float, x1: float, z0: float, z1: float, floors: int) -> None:
    color, height = scene.pick(FACADES, 0.06), 3.1 * floors
    glass = scene.pick(_rgb("29384c 1a1c21 597385"))
    shop = Paint(BUILDING, scene.pick(_rgb("4c4038 333847 803326")), None, CLADDING, 0.8)
    paint = Paint(BUILDING, color, glass, WINDOWS, scene.rng.uniform(2.8, 3.4))
    for name, face in scene.box((0, z0, 0), (0, z1 - z0), (0, height), (x0, x1), paint).items():
        if name != "top":
            scene.panel(face, _rect(0, 1, 0, 2.4 / height), shop)
            scene.panel(face, _rect(0, 1, 1 - 0.5 / height, 1), Paint(BUILDING, tuple(0.6 * c for c in color)))


def _roadside(scene: Scene, side: int, edge: float, crossing: Range) -> None:
    """Buildings and trees on one side, with a gap for the cross street; a wall or fence may stand before them."""
    rng, style, z, blocks = scene.rng, scene.style, scene.rng.uniform(-12, 2), []
    while z < 105:
        length = rng.uniform(8, 20)
        if z < crossing[1] and z + length > crossing[0]:
            z = crossing[1]
            continue
        blocks.append((z, z + length, rng.random()))
        z += length + (rng.uniform(1, 5) if rng.random() < 0.3 else 0)
    for near, far, kind in reversed(blocks):
        x = edge + rng.uniform(0.2, 1.7)
        if kind > style.greenery:
            _building(scene, *sorted((side * x, side * (x + 14))), near, far, int(rng.integers(*style.floors)))
        elif kind > 0.25 * style.greenery:              # otherwise an empty plot
            for i in range(3):
                z = max(far - i * (far - near) / 3, 3)
                _foliage(scene, side * (x + 2.5), z, rng.uniform(1.5, 3.5), 3.2, rng.uniform(1.8, 4), 9)
    barrier, height = rng.random(), rng.uniform(1.3, 2.2)
    if barrier < style.roadside["wall"]:
        color = scene.pick(_rgb("9e6652 9e998f b2a385"))
        paint, height = Paint(WALL, color, tuple(0.55 * c for c in color), BRICK, 0.5), height + 0.4
    elif barrier < style.roadside["wall"] + style.roadside["fence"]:
        paint = Paint(FENCE, scene.pick(_rgb("334038 bfbfba 735233")), (0.30, 0.34, 0.24), BARS, 0.32)
    else:
        return
    for near, far in ((crossing[1], 90), (rng.uniform(1, 8), crossing[0])):
        if near < far:
            x = side * edge
            scene.polygon([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)], paint)


def _street(scene: Scene) -> None:
    """Paint the ground, the skyline, both roadsides, then the objects in the street, from far to near."""
    rng, style, far = scene.rng, scene.style, 400
    half, offset = rng.uniform(*style.road), rng.uniform(0.3, 0.6)
    curbs = {-1: half * (1 + offset), 1: half * (1 - offset)}       # the own car drives on the right
    left, right = -curbs[-1], curbs[1]
    asphalt = Paint(ROAD, scene.pick(_rgb("47474c 5c5959"), 0.02), (0.44, 0.44, 0.45), ASPHALT, 0.15)
    slabs = Paint(SIDEWALK, scene.pick(_rgb("9e948a 948075"), 0.03), None, SLABS, 0.9)
    curbstone = Paint(SIDEWALK, (0.75, 0.74, 0.72))
    grass = Paint(TERRAIN, scene.pick((style.grass,)), tuple(0.6 * c for c in style.grass), GRASS, 0.5)
    paving = Paint(GROUND, (0.50, 0.48, 0.46), None, ASPHALT, 0.4)
    rails = Paint(RAILS, (0.40, 0.36, 0.34), (0.20, 0.18, 0.17), SLABS, 0.7)
    white = Paint(MARKING, WHITE, (0.70, 0.70, 0.68), ASPHALT, 0.3)
    start = rng.uniform(22, 60) if rng.random() < 0.4 else far
    crossing = (start, start + rng.uniform(7, 11))
    walks, edges, trams = {}, {}, []
    for side in (-1, 1):
        walks[side] = walk = curbs[side] + rng.uniform(1.8, 3.2)
        tram, terrain = rng.random() < style.roadside["train"], rng.random() < style.roadside["terrain"]
        edges[side] = walk + 3.6 * tram + (rng.uniform(2, 6) if terrain else 0.1)
        scene.ground(side * walk, side * 200, 0.5, far, grass if terrain else paving)
        scene.ground(side * curbs[side], side * walk, 0.5, far, slabs)
        scene.ground(side * (curbs[side] - 0.15), side * (curbs[side] + 0.15), 0.5, far, curbstone)
        if tram:
            scene.ground(side * (walk + 0.2), side * (walk + 3.4), 0.5, far, rails)
            trams.append((side * (walk + 1.8), rng.uniform(11, 35)))
    scene.ground(left, right, 0.5, far, asphalt)
    scene.ground(-250, 250, *crossing, asphalt)
    middle, phase = (left + right) / 2, rng.uniform(0, 6)
    for i in range(14):
        scene.ground(middle - 0.1, middle + 0.1, phase + 6 * i, phase + 6 * i + 3, white)
    for x in (left + 0.5, right - 0.5):
        scene.ground(x - 0.08, x + 0.08, 0.5, min(start, 100), white)
    zebra = start - 4.5 if start < far else rng.uniform(9, 30)
    for i in range(int(2 * half) if start < far or rng.random() < 0.3 else 0):
        scene.ground(left + i + 0.25, left + i + 0.75, zebra, zebra + 3.5, white)
    for z in (160, 120):                                # the skyline
        x = -1.0 * z
        while x < z:
            width, kind = rng.uniform(8, 24), rng.random()
            if kind < 0.7 * (1 - style.greenery):
                _building(scene, x, x + width, z, z + 8, int(rng.integers(2, style.floors[1] + 4)))
            elif kind < 0.8:
                _foliage(scene, x, z, 2.5, width * 0.8, 4.5, 5)
            x += width
    for side in (-1, 1):
        _roadside(scene, side, edges[side], crossing)
    for tram in trams:
        _train(scene, *tram)
    for _, paint, args in sorted(_things(scene, curbs, walks, crossing), key=lambda thing: -thing[0]):
        paint(scene, *args)


def _things(scene: Scene, curbs: dict, walks: dict, crossing: Range) -> list[tuple[float, Callable, tuple]]:
    """(distance, function, its arguments) of the objects in the street."""
    rng, mean, left, right = scene.rng, scene.style.mean, -curbs[-1], curbs[1]
    middle, things, taken = (left + right) / 2, [], []

    def distance(x: float, near: float, far: float) -> float:
        """A random distance at which x is in the picture; near ones are more likely."""
        near = max(near, 2.4 * abs(x) * scene.focal / scene.width)
        return near * (max(far, 1.3 * near) / near) ** rng.random()

    def beside(depth: float) -> float:
        """A random x on a sidewalk, at most the fraction `depth` of its width from the curb."""
        side = int(rng.choice((-1, 1)))
        return side * (curbs[side] + 0.5 + (walks[side] - curbs[side] - 0.6) * rng.uniform(0, depth))

    def lane(spread: float) -> float:
        return float(rng.choice((left + middle, middle + right))) / 2 + rng.uniform(-spread, spread)

    for name, paint, length, near, far in (
            ("bus", _bus, 11, 11, 40), ("truck", _truck, 9, 11, 40), ("car", _car, 5, 8, 60)):
        for _ in range(rng.poisson(mean[name])):
            parked = name == "car" and rng.random() < 0.45
            x = float(rng.choice((left + 1, right - 1))) if parked else lane(0.3)
            z, yaw = distance(x, near, far), 0.0 if x > middle else math.pi
            if crossing[0] < 60 and rng.random() < 0.25:            # in the cross street
                x, z, yaw = rng.uniform(-0.5, 0.4) * crossing[0], rng.uniform(*crossing), math.pi / 2
            if all(abs(x - other) > 2 or z > end + 1 or z + length + 1 < start for other, start, end in taken):
                taken.append((x, z, z + length))
                things.append((z, paint, ((x, z + length if yaw == math.pi else z, yaw),)))
    for name, id, ridden in (("cyclist", BICYCLE, True), ("motorcyclist", MOTORCYCLE, True),
                             ("bicycle", BICYCLE, False), ("motorcycle", MOTORCYCLE, False)):
        for _ in range(rng.poisson(mean[name])):
            x = lane(1.2) if ridden else beside(0.8)
            z = distance(x, 6, 18)
            things.append((z, _two_wheeler, (x, z, id, ridden)))
    for name, paint, depth, near, far in (
            ("person", _person, 1.0, 6, 25), ("light", _pole, 0.1, 8, 22), ("sign", _pole, 0.1, 8, 20),
            ("lamp", _pole, 0.1, 10, 40), ("tree", _tree, 1.0, 12, 60), ("bin", _litter_bin, 0.8, 7, 25)):
        for _ in range(rng.poisson(mean[name])):
            x = rng.uniform(left, right) if name == "person" and rng.random() < 0.2 else beside(depth)
            z = distance(x, near, far)
            things.append((z, paint, (x, z, name) if paint is _pole else (x, z)))
    return things


def _photograph(image: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """Apply the camera effects of a domain: float32 (h,w,3) -> uint8 (h,w,3)."""
    gamma, contrast, brightness = rng.uniform((0.9, 0.93, -0.04), (1.1, 1.07, 0.04)) * (style.gamma, style.contrast, 1)
    image = np.clip(image, 0, 1) ** np.float32(gamma)
    grey = image.mean(2, keepdims=True)
    image = grey + (image - grey) * np.float32(style.saturation)
    image = ((image - 0.5) * np.float32(contrast) + np.float32(0.5 + brightness)) * np.float32(style.cast)
    if style.blur:
        soft = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
        image = np.asarray(soft.filter(ImageFilter.GaussianBlur(style.blur * image.shape[1] / 256)), np.float32) / 255
    image = image + rng.standard_normal(image.shape, np.float32) * np.float32(style.noise)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw(domain: str, index: int, seed: int = 0, size: Size = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render one picture.

    Args:
        domain: a key of `DOMAINS`: game, camera, camera-val, rome or rome-val.
        index, seed: integers >= 0; the same values give the same picture.
        size: of the picture.
    Returns: image uint8 (h,w,3), RGB; classes uint8 (h,w), Cityscapes ids or `MARKING`; instances uint16 (h,w), 0 for
        classes without instances.
    """
    number, style = DOMAINS[domain]
    rng = np.random.default_rng((seed, number, index))
    scene = Scene(style, size, rng)
    _street(scene)
    if style.hood:
        top = scene.height * rng.uniform(0.88, 0.94)
        scene.rows.append((0, 0, 1, 0.10, 0.11, 0.13, 0.30, 0.32, 0.34, PLAIN, 0.3, EGO, 0))
        scene.pen.ellipse((-0.15 * scene.width, top, 1.15 * scene.width, scene.height * 1.3), fill=len(scene.rows) - 1)
    image, ids, instances = scene.finish()
    if style.hood:                                      # rectified images have no data at their borders
        border = max(size.width // 128, 1)
        ids[:, :border] = ids[:, -border:] = ROI
    return _photograph(image, style, rng), ids, instances


# Files.


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """Write uint16 (h,w,3) as a 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 6 * width), np.uint8)  # each row begins with its filter, 0: none
    rows[:, 1:] = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    data, header = b"\x89PNG\r\n\x1a\n", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)


def _files(domain: str, index: int) -> dict[str, str]:
    """Path below the root -> kind of content, for the files of one picture."""
    if domain == "game":
        return {f"gta5/images/{index + 1:05d}.png": "image", f"gta5/labels/{index + 1:05d}.png": "palette",
                f"synthia/RGB/{index:07d}.png": "image", f"synthia/GT/LABELS/{index:07d}.png": "synthia"}
    if domain.startswith("camera"):
        city = "seestadt" if domain == "camera-val" else ("altstadt", "kleinstadt", "neustadt")[index % 3]
        name = f"{'val' if domain == 'camera-val' else 'train'}/{city}/{city}_{index:06d}_000019"
        return {f"cityscapes/leftImg8bit/{name}_leftImg8bit.png": "image",
                f"cityscapes/gtFine/{name}_gtFine_labelIds.png": "ids"}
    name = f"pano_{index:05d}"
    if domain == "rome":
        return {f"crosscity/Rome/Images/Train/{name}.png": "image"}
    return {f"crosscity/Rome/Images/Test/{name}.png": "image", f"crosscity/Rome/Labels/Test/{name}_eval.png": "ids"}


def _write(root: Path, domain: str, index: int, seed: int, size: Size) -> None:
    image, ids, instances = draw(domain, index, seed, size)
    for name, content in _files(domain, index).items():
        (root / name).unlink(missing_ok=True)           # a hard link may lead to a file elsewhere
        if content == "image":
            Image.fromarray(image).save(root / name, compress_level=1)
        elif content == "synthia":
            table = np.zeros(256, np.uint16)
            table[list(SYNTHIA_IDS)] = list(SYNTHIA_IDS.values())
            write_png16(root / name, np.stack((table[ids], instances, np.zeros_like(instances)), 2))
        else:
            label = Image.fromarray(np.where(ids == MARKING, np.uint8(ROAD), ids))
            if content == "palette":
                label.putpalette(bytes.fromhex("".join(PALETTE.get(id, "000000") for id in range(256))))
            label.save(root / name)


def _marker(root: Path) -> dict:
    """The content of the city's marker; {} if it is missing or invalid."""
    try:
        return dict(json.loads((root / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _check_free(root: Path, planned: set[Path]) -> None:
    """Refuse a folder that may hold other files. Only the marker identifies a toy city; file names do not."""
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise UserError(f"{root} is not empty and has no {MARKER}, so it is not a toy city and stays unchanged: give "
                        "another folder, for example --data data/toycity")
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise UserError(f"{path} is a link, and a toy city does not write through links: remove it or give "
                                "another folder")
            if path.is_file() and path not in planned:
                raise UserError(f"{path} does not belong to this toy city: delete {root} or give another folder")


def render(root: str | Path, seed: int = 0, train: int = 240, val: int = 60, size: Size = SIZE) -> None:
    """Write a toy city into a missing or empty folder or over a toy city; its marker says whether it is complete.

    Args:
        root: the folder, created if missing; existing files of the city are written again.
        seed: >= 0.
        train: number of game images, and of the camera's training images; Rome has a sixth as many.
        val: number of the camera's validation images; Rome has a third as many.
        size: of all images, at least 16x16.
    Raises: UserError if a value is invalid, the folder holds other files or a link, or a file cannot be written.
    """
    root = Path(root)
    if min(train, val) < 1 or seed < 0 or min(size) < 16:
        raise UserError("a toy city needs --train and --val >= 1, --seed >= 0 and --size >= 16x16, "
                        f"not {train}, {val}, {seed} and {size}")
    counts = {"game": train, "camera": train, "camera-val": val, "rome": (train + 5) // 6, "rome-val": (val + 2) // 3}
    jobs = [(domain, index) for domain, count in counts.items() for index in range(count)]
    planned = {root / name for job in jobs for name in _files(*job)}
    facts = {"version": VERSION, "seed": seed, "train": train, "val": val, "size": str(size)}
    _check_free(root, planned | {root / MARKER})
    print(f"rendering the toy city in {root}: {len(jobs)} pictures", flush=True)
    try:
        for folder in {root, *(path.parent for path in planned)}:
            folder.mkdir(parents=True, exist_ok=True)
        write_json(root / MARKER, {**facts, "complete": False})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in progress("toy city: picture", pool.map(lambda job: _write(root, *job, seed, size), jobs), len(jobs)):
                pass
        write_json(root / MARKER, facts)
    except OSError as error:
        raise UserError(f"cannot write below {root}: {error}; give a writable folder") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; others wait, and find a complete city. Without file locks (Windows) they do not wait."""
    handle = None
    try:
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)                            # unlocks, as does the end of a process


def ensure(root: str | Path, seed: int = 0, train: int = 240, val: int = 60, size: Size = SIZE) -> None:
    """Render the toy city unless the folder holds a complete one of this version and seed, of any counts and size."""
    root = Path(root)
    while os.environ.get("LOCAL_RANK", "0") != "0" and not _marker(root).get("complete", (root / MARKER).exists()):
        time.sleep(0.1)                                 # the first process of a machine renders
    with _alone(root.parent):
        marker = _marker(root)
        if not (root / MARKER).exists() or not marker.get("complete", True):
            return render(root, seed, train, val, size)
    if (marker.get("version"), marker.get("seed")) != (VERSION, seed):
        raise UserError(f"{root / MARKER} is of version {marker.get('version')} and seed {marker.get('seed')} of the toy city, "
                        f"not of {VERSION} and {seed}: delete the folder {root} to render it again")


@command
def main(argv: list[str] | None = None) -> None:
    """Render the toy city of the command line; one sentence and exit status 2 if that is impossible."""
    parser = argparse.ArgumentParser("python -m common.toycity", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="each seed gives another city [0]")
    parser.add_argument("--train", type=int, default=240, help="training images per domain [240]")
    parser.add_argument("--val", type=int, default=60, help="validation images [60]")
    parser.add_argument("--size", type=Size.parse, default=SIZE, help="of the images [256x128]")
    args = parser.parse_args(argv)
    render(args.root, args.seed, args.train, args.val, args.size)
    print(f"{args.root}: 2 x {args.train} training images, {args.val} validation images, {args.size}")


if __name__ == "__main__":
    main()
