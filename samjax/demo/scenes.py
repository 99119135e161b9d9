"""The demo's domain: cars in scenes, drawn from a vector of factors by signed distances.

`render` draws a scene of the domain and its true segments. `render_hard` adds what a generator of the domain has never
seen: objects in front of the car, busy backgrounds, other lighting. Both are pure functions of arrays, and can be
transformed by `jit` and `vmap`.

Signed distances and their rounding follow Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.stats import norm

FACTORS = (
    "horizon", "zenith", "brightness", "warmth",
    "hill_height", "hill_phase", "hill_color", "field_color", "road",
    "red", "green", "blue", "position", "scale", "body", "roof", "bonnet",
)  # fmt: skip
"""Names of the entries of a factor vector, in order."""

NUM_FACTORS = len(FACTORS)

LABELS = ("sky", "hills", "field", "road", "car")
"""Names of the labels 0 to 4 of a scene; hard scenes add OCCLUDER and BACKDROP."""

CAR = LABELS.index("car")
OCCLUDER = 5
BACKDROP = 6


class Scene(NamedTuple):
    """A drawn scene.

    Attributes:
      image: [R, R, 3] in [-1, 1].
      labels: [R, R] int32; see `LABELS`.
    """

    image: Array
    labels: Array


def normalize_factors(z: Array) -> Array:
    """Scales `z` [..., K] to a mean square of 1, as StyleGAN2's mapping network does with its input.

    Scenes are drawn from the normalized vector, so that an image depends on nothing that the generator cannot see.
    """
    return z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)


# --- signed distances (negative inside), in units of the image size ---


def _box(x: Array, y: Array, cx: float, cy: float, hx: float, hy: float, r: float) -> Array:
    qx, qy = jnp.abs(x - cx) - hx + r, jnp.abs(y - cy) - hy + r
    outside = jnp.hypot(jnp.maximum(qx, 0), jnp.maximum(qy, 0))
    return outside + jnp.minimum(jnp.maximum(qx, qy), 0) - r


def _circle(x: Array, y: Array, cx: Array | float, cy: Array | float, r: Array | float) -> Array:
    return jnp.hypot(x - cx, y - cy) - r


def _convex(x: Array, y: Array, corners: Array, r: float) -> Array:
    """A convex polygon with corners rounded by about `r`; `corners` [V, 2] are clockwise, with y pointing down."""
    start, edge = corners, jnp.roll(corners, -1, axis=0) - corners
    normal = jnp.stack([edge[:, 1], -edge[:, 0]], -1) / jnp.linalg.norm(edge, axis=-1, keepdims=True)
    distance = (x[..., None] - start[:, 0]) * normal[:, 0] + (y[..., None] - start[:, 1]) * normal[:, 1]
    rounded = jnp.sqrt(jnp.sum(jnp.square(jnp.maximum(distance + r, 0)), -1) + 1e-12) - r
    return jnp.where(jnp.max(distance, -1) < -r, jnp.max(distance, -1), rounded)


def _mix(a: tuple[float, ...] | Array, b: tuple[float, ...] | Array, t: Array) -> Array:
    return jnp.asarray(a) + (jnp.asarray(b) - jnp.asarray(a)) * t


class _Canvas:
    """An image in [0, 1] and its labels; each `paint` returns a new canvas with a shape on top."""

    def __init__(self, image: Array, labels: Array, pixel: Array | float):
        self.image, self.labels, self.pixel = image, labels, pixel

    def paint(self, distance: Array, color: Array, label: int | None = None) -> _Canvas:
        cover = jnp.clip(0.5 - distance / self.pixel, 0, 1)[..., None]
        image = self.image * (1 - cover) + color * cover
        labels = self.labels if label is None else jnp.where(distance < 0, label, self.labels)
        return _Canvas(image, labels, self.pixel)

    def shade(self, distance: Array, width: float, alpha: float) -> _Canvas:
        cover = alpha * jnp.clip(0.5 - distance / width, 0, 1)[..., None]
        return _Canvas(self.image * (1 - cover), self.labels, self.pixel)


def _grid(resolution: int) -> tuple[Array, Array]:
    ticks = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    y, x = jnp.meshgrid(ticks, ticks, indexing="ij")
    return x, y


def _values(z: Array) -> dict[str, Array]:
    """Factors by name, each uniform in (0, 1)."""
    u = norm.cdf(normalize_factors(z))
    return {name: u[i] for i, name in enumerate(FACTORS)}


def _paint_backdrop(f: dict[str, Array], x: Array, y: Array) -> _Canvas:
    horizon = 0.51 + 0.06 * f["horizon"]
    zenith = _mix((0.22, 0.42, 0.78), (0.50, 0.38, 0.62), f["zenith"]) * (0.7 + 0.3 * f["brightness"])
    low = _mix((0.82, 0.90, 0.96), (0.99, 0.80, 0.62), f["warmth"])
    height = jnp.clip(y / horizon, 0, 1)[..., None]
    canvas = _Canvas(zenith * (1 - height) + low * height, jnp.zeros(x.shape, jnp.int32), 1.0 / x.shape[0])
    # Two waves of fixed length whose crests move with the phase make a smooth ridge.
    phase = 2 * jnp.pi * 0.45 * (f["hill_phase"] - 0.5)
    wave = (
        0.5 + 0.35 * jnp.sin(2 * jnp.pi * 1.05 * x + 1.2 + phase) + 0.15 * jnp.sin(2 * jnp.pi * 2.3 * x - 0.4 + phase)
    )
    ridge = horizon - 0.03 - (0.04 + 0.10 * f["hill_height"]) * wave
    hill = _mix((0.42, 0.55, 0.34), (0.47, 0.50, 0.62), f["hill_color"])
    haze = jnp.clip((y - ridge) / 0.16, 0, 1)[..., None]
    canvas = canvas.paint(ridge - y, hill * (1 - 0.35 * haze) + low * 0.35 * haze, 1)
    field = _mix((0.40, 0.56, 0.26), (0.72, 0.62, 0.36), f["field_color"])
    canvas = canvas.paint(horizon - y, field * (1.04 - 0.9 * jnp.clip(y - horizon, 0, 0.2)[..., None]), 2)
    kerb = horizon + 0.085
    road = _mix((0.30, 0.30, 0.33), (0.50, 0.49, 0.48), f["road"])
    canvas = canvas.paint(kerb - y, road * (0.92 + 0.5 * jnp.clip(y - kerb, 0, 0.4)[..., None]), 3)
    canvas = canvas.paint(jnp.abs(y - kerb) - 0.008, road + 0.28)
    return canvas.paint(jnp.abs(y - horizon - 0.315) - 0.009, jnp.asarray((0.86, 0.83, 0.70)))


def _corners(body: Array, roof: Array, bonnet: Array) -> Array:
    """The corners of the cabin, from a saloon (body 0) to a van (body 1)."""
    saloon = jnp.asarray([(-0.225, -0.11), (-0.125, -0.245), (0.050, -0.245), (0.165, -0.11)])
    van = jnp.asarray([(-0.322, -0.11), (-0.305, -0.290), (0.095, -0.290), (0.215, -0.11)])
    corners = saloon + (van - saloon) * body
    corners = corners.at[1:3, 1].add(-0.035 * roof)
    return corners.at[2:, 0].add(0.05 * (bonnet - 0.5))


def _paint_car(canvas: _Canvas, f: dict[str, Array], x: Array, y: Array) -> _Canvas:
    size = 1.0 + 0.20 * f["scale"]
    ground = 0.51 + 0.06 * f["horizon"] + 0.225
    x, y = (x - 0.5 - 0.12 * (f["position"] - 0.5)) / size, (y - ground) / size
    pixel = canvas.pixel / size
    canvas = _Canvas(canvas.image, canvas.labels, pixel)
    color = 0.07 + 0.86 * jnp.stack([f["red"], f["green"], f["blue"]])
    canvas = canvas.shade(_box(x, y, 0.0, 0.060, 0.33, 0.018, 0.018), 0.06, 0.5)
    cabin = _convex(x, y, _corners(f["body"], f["roof"], f["bonnet"]), 0.03)
    lit = (1.0 - 0.9 * jnp.clip(y + 0.20, -0.1, 0.25))[..., None]
    canvas = canvas.paint(cabin, color * lit, CAR)
    pillar = jnp.abs(x + 0.045 + 0.055 * f["body"]) - 0.010
    glass = jnp.maximum(jnp.maximum(cabin + 0.024, y + 0.135), -pillar)
    sheen = jnp.clip((-y - 0.13) / 0.16, 0, 1)[..., None]
    canvas = canvas.paint(glass, _mix((0.14, 0.18, 0.23), (0.50, 0.60, 0.68), sheen))
    body = _box(x, y, 0.0, -0.070, 0.335, 0.068, 0.045)
    canvas = canvas.paint(body, color * lit, CAR)
    canvas = canvas.paint(jnp.maximum(jnp.abs(y + 0.105) - 0.005, body + 0.012), color * 0.6 + 0.36)
    canvas = canvas.paint(jnp.maximum(jnp.abs(y + 0.018) - 0.012, body), color * 0.45)
    canvas = canvas.paint(_box(x, y, 0.313, -0.085, 0.018, 0.016, 0.01), jnp.asarray((1.0, 0.95, 0.74)))
    canvas = canvas.paint(_box(x, y, -0.318, -0.085, 0.013, 0.016, 0.01), jnp.asarray((0.80, 0.12, 0.10)))
    for center in (-0.195, 0.200):
        wheel = lambda radius, c=center: _circle(x, y, c, 0.0, radius)  # noqa: E731
        canvas = canvas.paint(jnp.maximum(wheel(0.080), body), color * 0.25)
        canvas = canvas.paint(wheel(0.068), jnp.full(3, 0.10), CAR)
        canvas = canvas.paint(wheel(0.040), jnp.full(3, 0.68))
        canvas = canvas.paint(wheel(0.014), jnp.full(3, 0.30))
    return canvas


def render(z: Array, resolution: int = 256) -> Scene:
    """Draws a scene of the domain.

    Args:
      z: factor vector [NUM_FACTORS], standard normal; see `FACTORS`.
      resolution: image size.
    """
    f = _values(z)
    x, y = _grid(resolution)
    canvas = _paint_car(_paint_backdrop(f, x, y), f, x, y)
    return Scene(jnp.clip(canvas.image, 0, 1) * 2 - 1, canvas.labels)


# --- hard scenes ---

# Mixes three independent noise channels, mostly into brightness, a little into green against brown.
_LEAFY = np.array([[0.8, 0.9, 0.5], [-0.35, 0.3, -0.15], [0.15, 0.0, -0.1]], np.float32)


def _noise(key: Array, cells: int, resolution: int, method: str) -> Array:
    """Noise [resolution, resolution, 3] in (-1, 1), interpolated by `method`."""
    grid = jax.random.uniform(key, (cells, cells, 3), minval=-1.0, maxval=1.0)
    return jax.image.resize(grid, (resolution, resolution, 3), method)


def _paint_texture(canvas: _Canvas, key: Array, region: Array, strength: Array, cells: int, label: int) -> _Canvas:
    texture = canvas.image + strength * (_noise(key, cells, canvas.image.shape[0], "cubic") @ _LEAFY)
    return canvas.paint(region, jnp.clip(texture, 0, 1), label)


def _paint_house(canvas: _Canvas, key: Array, ground: Array, x: Array, y: Array) -> _Canvas:
    """A house front with a grid of windows, on the horizon behind the car."""
    keys = jax.random.split(key, 5)
    left = jax.random.uniform(keys[0], (), minval=-0.05, maxval=0.55)
    width = jax.random.uniform(keys[1], (), minval=0.30, maxval=0.50)
    top = ground - jax.random.uniform(keys[2], (), minval=0.24, maxval=0.36)
    wall = jax.random.uniform(keys[3], (3,), minval=0.35, maxval=0.85)
    front = jnp.maximum(jnp.maximum(left - x, x - left - width), jnp.maximum(top - y, y - ground))
    canvas = canvas.paint(front, wall, BACKDROP)
    u, v = (x - left - 0.02) % 0.062 - 0.022, (y - top - 0.02) % 0.072 - 0.025
    pane = jnp.maximum(jnp.maximum(jnp.abs(u) - 0.015, jnp.abs(v) - 0.020), front + 0.014)
    row, column = (y - top - 0.02) // 0.072, (x - left - 0.02) // 0.062
    lit = jnp.sin(37.0 * row + 91.0 * column + 6.28 * jax.random.uniform(keys[4], ()))[..., None] > 0.2
    return canvas.paint(pane, jnp.where(lit, jnp.asarray((0.98, 0.88, 0.55)), jnp.asarray((0.16, 0.20, 0.28))))


def _paint_post(canvas: _Canvas, key: Array, foot: Array, x: Array, y: Array) -> _Canvas:
    """A striped post with a round sign."""
    keys = jax.random.split(key, 2)
    center = jax.random.uniform(keys[0], (), minval=0.22, maxval=0.78)
    color = jax.random.uniform(keys[1], (3,), minval=0.1, maxval=0.95)
    stripe = jnp.where(((y * 14) % 1 < 0.5)[..., None], color, jnp.asarray((0.95, 0.95, 0.93)))
    canvas = canvas.paint(_box(x, y, center, foot - 0.20, 0.017, 0.20, 0.004), stripe, OCCLUDER)  # type: ignore[arg-type]
    canvas = canvas.paint(_circle(x, y, center, foot - 0.43, 0.062), jnp.asarray((0.93, 0.93, 0.90)), OCCLUDER)
    canvas = canvas.paint(_circle(x, y, center, foot - 0.43, 0.050), color)
    return canvas.paint(_box(x, y, center, foot - 0.43, 0.033, 0.009, 0.002), jnp.full(3, 0.97))  # type: ignore[arg-type]


def _paint_tree(canvas: _Canvas, key: Array, foot: Array, x: Array, y: Array) -> _Canvas:
    """A trunk with bark and a crown of leaves."""
    keys = jax.random.split(key, 4)
    center = jax.random.uniform(keys[0], (), minval=0.18, maxval=0.82)
    size = canvas.image.shape[0]
    bark = jnp.asarray((0.36, 0.26, 0.18)) * (1 + 0.5 * jnp.sin(x * 420 + 3 * jnp.sin(y * 40)))[..., None]
    trunk = jnp.abs(x - center - 0.01 * jnp.sin(y * 20)) - 0.018 - 0.012 * jnp.clip((y - foot + 0.10) / 0.10, 0, 1)
    canvas = canvas.paint(jnp.maximum(jnp.maximum(trunk, y - foot), foot - 0.46 - y), bark, OCCLUDER)
    ragged = 0.02 * _noise(keys[1], 20, size, "cubic")[..., 0]
    crown = jnp.minimum(
        _circle(x, y, center, foot - 0.52, 0.125),
        jnp.minimum(
            _circle(x, y, center - 0.085, foot - 0.46, 0.075), _circle(x, y, center + 0.085, foot - 0.47, 0.08)
        ),
    )
    tint = jax.random.uniform(keys[3], (3,), minval=0.0, maxval=1.0) * jnp.asarray((0.45, 0.15, 0.05))
    leaves = jnp.asarray((0.20, 0.38, 0.15)) + tint + 0.20 * _noise(keys[2], 26, size, "cubic")[..., :1]
    return canvas.paint(crown + ragged, leaves, OCCLUDER)


def _paint_person(canvas: _Canvas, key: Array, foot: Array, x: Array, y: Array) -> _Canvas:
    """A person in a checked coat, in front of the car."""
    keys = jax.random.split(key, 4)
    center = jax.random.uniform(keys[0], (), minval=0.2, maxval=0.8)
    coat = jax.random.uniform(keys[1], (3,), minval=0.1, maxval=0.9)
    trousers = jax.random.uniform(keys[2], (3,), minval=0.08, maxval=0.4)
    skin = jnp.asarray((0.45, 0.30, 0.22)) + jnp.asarray((0.50, 0.44, 0.40)) * jax.random.uniform(keys[3], ())
    for side in (-0.020, 0.020):
        canvas = canvas.paint(_box(x, y, center + side, foot - 0.075, 0.015, 0.08, 0.008), trousers, OCCLUDER)  # type: ignore[arg-type]
        canvas = canvas.paint(_box(x, y, center + 2.6 * side, foot - 0.20, 0.011, 0.065, 0.011), coat * 0.8, OCCLUDER)  # type: ignore[arg-type]
    check = jnp.where((((x - center) * 45 % 1 < 0.5) ^ (y * 45 % 1 < 0.5))[..., None], coat, 0.5 * coat + 0.45)
    canvas = canvas.paint(_box(x, y, center, foot - 0.205, 0.044, 0.075, 0.022), check, OCCLUDER)  # type: ignore[arg-type]
    canvas = canvas.paint(_circle(x, y, center, foot - 0.315, 0.033), skin, OCCLUDER)
    hat = jnp.maximum(_circle(x, y, center, foot - 0.322, 0.036), y - foot + 0.326)
    return canvas.paint(hat, coat[::-1])


def render_hard(z: Array, *, key: Array, resolution: int = 256) -> Scene:
    """Draws a scene with objects that no generator of the domain has seen.

    There is a house behind the car, or a forest on the hills; one or two of a post, a tree and a person in front of
    the car; and the light has another color.

    Args:
      z: factor vector [NUM_FACTORS], standard normal, of the scene without these objects.
      key: random key of the objects.
      resolution: image size.

    Returns:
      The scene. Labels OCCLUDER and BACKDROP mark the objects, CAR the visible part of the car.
    """
    keys = jax.random.split(key, 8)
    f = _values(z)
    x, y = _grid(resolution)
    horizon = 0.51 + 0.06 * f["horizon"]
    plain = _paint_backdrop(f, x, y)
    hills = jnp.where(plain.labels == LABELS.index("hills"), -1.0, 1.0)
    forest = _paint_texture(plain, keys[0], hills, jnp.asarray(0.30), 32, BACKDROP)
    house = _paint_house(plain, keys[1], horizon + 0.012, x, y)
    with_house = jax.random.bernoulli(keys[2])
    choose = lambda pick, a, b: _Canvas(  # noqa: E731
        jnp.where(pick, a.image, b.image), jnp.where(pick, a.labels, b.labels), plain.pixel
    )
    canvas = _paint_car(choose(with_house, house, forest), f, x, y)
    canvas = _Canvas(canvas.image, canvas.labels, plain.pixel)
    foot = horizon + 0.30
    painters = (_paint_post, _paint_tree, _paint_person)
    first = jax.random.randint(keys[3], (), 0, 3)
    second = jax.random.randint(keys[4], (), 0, 6)  # half of the scenes have only one
    for which, draw in ((first, keys[5]), (second, keys[6])):
        for i, painter in enumerate(painters):
            canvas = choose(which == i, painter(canvas, draw, foot, x, y), canvas)
    light = 1 + jax.random.uniform(keys[7], (3,), minval=-0.12, maxval=0.12)
    return Scene(jnp.clip(canvas.image * light, 0, 1) * 2 - 1, canvas.labels)
