"""The demo's domain: cars in scenes, drawn from a vector of factors by signed distances.

`render` draws a scene of the domain and the true segment labels; `render_hard` adds what a generator
of the domain has never seen: things in front of the car, busy backgrounds, other lighting. Both are pure
functions of arrays: they run under `jit` and `vmap`, on any device.

Signed distances and their rounding follow Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

FACTORS = (
    "horizon", "zenith", "brightness", "warmth",
    "hill_height", "hill_phase", "hill_colour", "field_colour", "road",
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
    """A drawn scene: `image` [R, R, 3] in [-1, 1], `labels` [R, R] int32 (see `LABELS`)."""

    image: Array
    labels: Array


def normalize_factors(z: Array) -> Array:
    """Scales `z` [..., K] to a mean square of 1, as StyleGAN2's mapping does with its input.

    Scenes are drawn from the normalised vector, so that a generator of this domain can tell all that decides
    the picture.
    """
    return z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)


# --- signed distances (negative inside), in units of the image's side ---


def _box(x: Array, y: Array, cx: float, cy: float, hx: float, hy: float, r: float) -> Array:
    qx, qy = jnp.abs(x - cx) - hx + r, jnp.abs(y - cy) - hy + r
    outside = jnp.hypot(jnp.maximum(qx, 0), jnp.maximum(qy, 0))
    return outside + jnp.minimum(jnp.maximum(qx, qy), 0) - r


def _circle(x: Array, y: Array, cx: Array | float, cy: Array | float, r: Array | float) -> Array:
    return jnp.hypot(x - cx, y - cy) - r


def _convex(x: Array, y: Array, corners: Array, r: float) -> Array:
    """A convex polygon with corners rounded by about `r`; `corners` [V, 2] clockwise on a screen (y down)."""
    start, edge = corners, jnp.roll(corners, -1, axis=0) - corners
    normal = jnp.stack([edge[:, 1], -edge[:, 0]], -1) / jnp.linalg.norm(edge, axis=-1, keepdims=True)
    distance = (x[..., None] - start[:, 0]) * normal[:, 0] + (y[..., None] - start[:, 1]) * normal[:, 1]
    rounded = jnp.sqrt(jnp.sum(jnp.square(jnp.maximum(distance + r, 0)), -1) + 1e-12) - r
    return jnp.where(jnp.max(distance, -1) < -r, jnp.max(distance, -1), rounded)


def _mix(a: tuple[float, ...] | Array, b: tuple[float, ...] | Array, t: Array) -> Array:
    return jnp.asarray(a) + (jnp.asarray(b) - jnp.asarray(a)) * t


class _Canvas:
    """Paints shapes in order; each `paint` gives a new canvas. Colours are in [0, 1] until `scene`."""

    def __init__(self, image: Array, labels: Array, pixel: float):
        self.image, self.labels, self.pixel = image, labels, pixel

    def paint(self, distance: Array, colour: Array, label: int | None = None, alpha: float = 1.0) -> _Canvas:
        cover = jnp.clip(0.5 - distance / self.pixel, 0, 1)[..., None] * alpha
        image = self.image * (1 - cover) + colour * cover
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
    horizon = 0.50 + 0.08 * f["horizon"]
    zenith = _mix((0.22, 0.42, 0.78), (0.50, 0.38, 0.62), f["zenith"]) * (0.7 + 0.3 * f["brightness"])
    low = _mix((0.82, 0.90, 0.96), (0.99, 0.80, 0.62), f["warmth"])
    height = jnp.clip(y / horizon, 0, 1)[..., None]
    canvas = _Canvas(zenith * (1 - height) + low * height, jnp.zeros(x.shape, jnp.int32), 1.0 / x.shape[0])
    # Two waves of fixed length whose crests slide with the phase: one ridge, never a jagged one.
    phase = 2 * jnp.pi * 0.45 * (f["hill_phase"] - 0.5)
    wave = 0.5 + 0.35 * jnp.sin(2 * jnp.pi * 1.05 * x + 1.2 + phase) + 0.15 * jnp.sin(2 * jnp.pi * 2.3 * x - 0.4 + phase)
    ridge = horizon - 0.03 - (0.04 + 0.10 * f["hill_height"]) * wave
    hill = _mix((0.42, 0.55, 0.34), (0.47, 0.50, 0.62), f["hill_colour"])
    haze = jnp.clip((y - ridge) / 0.16, 0, 1)[..., None]
    canvas = canvas.paint(ridge - y, hill * (1 - 0.35 * haze) + low * 0.35 * haze, 1)
    field = _mix((0.40, 0.56, 0.26), (0.72, 0.62, 0.36), f["field_colour"])
    canvas = canvas.paint(horizon - y, field * (1.04 - 0.9 * jnp.clip(y - horizon, 0, 0.2)[..., None]), 2)
    kerb = horizon + 0.085
    road = _mix((0.30, 0.30, 0.33), (0.50, 0.49, 0.48), f["road"])
    canvas = canvas.paint(kerb - y, road * (0.92 + 0.5 * jnp.clip(y - kerb, 0, 0.4)[..., None]), 3)
    canvas = canvas.paint(jnp.abs(y - kerb) - 0.008, road + 0.28)
    return canvas.paint(jnp.abs(y - horizon - 0.315) - 0.009, jnp.asarray((0.86, 0.83, 0.70)))


def _corners(body: Array, roof: Array, bonnet: Array) -> Array:
    """The cabin's corners: from a saloon (body 0) over a hatchback to a van (body 1)."""
    saloon = jnp.asarray([(-0.225, -0.11), (-0.125, -0.245), (0.050, -0.245), (0.165, -0.11)])
    van = jnp.asarray([(-0.322, -0.11), (-0.305, -0.290), (0.095, -0.290), (0.215, -0.11)])
    corners = saloon + (van - saloon) * body
    corners = corners.at[1:3, 1].add(-0.035 * roof)
    return corners.at[2:, 0].add(0.05 * (bonnet - 0.5))


def _paint_car(canvas: _Canvas, f: dict[str, Array], x: Array, y: Array) -> _Canvas:
    size = 0.98 + 0.24 * f["scale"]
    ground = 0.50 + 0.08 * f["horizon"] + 0.225
    x, y = (x - 0.5 - 0.12 * (f["position"] - 0.5)) / size, (y - ground) / size
    pixel = canvas.pixel / size
    canvas = _Canvas(canvas.image, canvas.labels, pixel)
    colour = 0.07 + 0.86 * jnp.stack([f["red"], f["green"], f["blue"]])
    canvas = canvas.shade(_box(x, y, 0.0, 0.060, 0.33, 0.018, 0.018), 0.06, 0.5)
    cabin = _convex(x, y, _corners(f["body"], f["roof"], f["bonnet"]), 0.03)
    lit = (1.0 - 0.9 * jnp.clip(y + 0.20, -0.1, 0.25))[..., None]
    canvas = canvas.paint(cabin, colour * lit, CAR)
    pillar = jnp.abs(x + 0.045 + 0.055 * f["body"]) - 0.010
    glass = jnp.maximum(jnp.maximum(cabin + 0.024, y + 0.135), -pillar)
    sheen = jnp.clip((-y - 0.13) / 0.16, 0, 1)[..., None]
    canvas = canvas.paint(glass, _mix((0.14, 0.18, 0.23), (0.50, 0.60, 0.68), sheen))
    body = _box(x, y, 0.0, -0.070, 0.335, 0.068, 0.045)
    canvas = canvas.paint(body, colour * lit, CAR)
    canvas = canvas.paint(jnp.maximum(jnp.abs(y + 0.105) - 0.005, body + 0.012), colour * 0.6 + 0.36)
    canvas = canvas.paint(jnp.maximum(jnp.abs(y + 0.018) - 0.012, body), colour * 0.45)
    canvas = canvas.paint(_box(x, y, 0.313, -0.085, 0.018, 0.016, 0.01), jnp.asarray((1.0, 0.95, 0.74)))
    canvas = canvas.paint(_box(x, y, -0.318, -0.085, 0.013, 0.016, 0.01), jnp.asarray((0.80, 0.12, 0.10)))
    for centre in (-0.195, 0.200):
        wheel = lambda radius, c=centre: _circle(x, y, c, 0.0, radius)  # noqa: E731
        canvas = canvas.paint(jnp.maximum(wheel(0.080), body), colour * 0.25)
        canvas = canvas.paint(wheel(0.068), jnp.full(3, 0.10), CAR)
        canvas = canvas.paint(wheel(0.040), jnp.full(3, 0.68))
        canvas = canvas.paint(wheel(0.014), jnp.full(3, 0.30))
    return canvas


def render(z: Array, resolution: int = 256) -> Scene:
    """Draws the scene of the factor vector `z` [NUM_FACTORS] (standard normal) at `resolution` pixels a side."""
    f = _values(z)
    x, y = _grid(resolution)
    canvas = _paint_car(_paint_backdrop(f, x, y), f, x, y)
    return Scene(jnp.clip(canvas.image, 0, 1) * 2 - 1, canvas.labels)
