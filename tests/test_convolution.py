"""The 3x3 convolution against float64, in all its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.nets import convolution


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64: [H, W, I] and [3, 3, I, O] to [H, W, O]."""
    padded = np.pad(x.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    height, width, _ = x.shape
    taps = ((i, j, padded[i : i + height, j : j + width]) for i in range(3) for j in range(3))
    return sum(part @ weight[i, j].astype(np.float64) for i, j, part in taps)


def arrays(height: int, width: int, inputs: int, outputs: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, inputs), np.float32)
    # As after an activation: a mean that is not zero is what rounding shows in.
    return np.maximum(x, 0.2 * x), rng.standard_normal((3, 3, inputs, outputs), np.float32) / np.sqrt(9 * inputs)


def uses_minimal(program: jax.stages.Lowered) -> bool:
    """Six small convolutions instead of one."""
    return program.as_text().count("stablehlo.convolution") == 6


@pytest.mark.parametrize("sizes", [(32, 32, 128, 128), (8, 64, 128, 160), (32, 32, 160, 128)])
def test_minimal_filtering_is_the_convolution(sizes):
    """Within three times the rounding of the plain sum, forward and backward."""
    x, weight = arrays(*sizes, batch=2)
    assert uses_minimal(jax.jit(convolution.conv3x3).lower(x, weight))
    wanted = np.stack([exact(image, weight) for image in x])
    error = lambda y: np.abs(np.asarray(y, np.float64) - wanted).max() / wanted.std()  # noqa: E731
    plain = error(jax.jit(convolution.direct)(x, weight))
    assert error(jax.jit(convolution.conv3x3)(x, weight)) < max(3 * plain, 3e-6)

    def back(form):
        return jax.jit(lambda x, weight, y: jax.vjp(form, x, weight)[1](y))(x, weight, jnp.asarray(wanted, jnp.float32))

    ours, plain = back(convolution.conv3x3), back(convolution.direct)
    for mine, theirs in zip(ours, plain, strict=True):
        assert np.abs(mine - theirs).max() < 1e-5 * np.std(theirs)  # float32, sums over 1152 and over 2048 products


@pytest.mark.parametrize("sizes", [(32, 32, 64, 128), (30, 32, 128, 128), (4, 4, 512, 512), (7, 5, 3, 2), (1, 1, 1, 1)])
def test_where_it_would_not_save_time_it_is_the_plain_one(sizes):
    x, weight = arrays(*sizes)
    program = jax.jit(convolution.conv3x3).lower(x, weight)
    assert not uses_minimal(program)
    wanted = exact(x[0], weight)
    assert np.abs(program.compile()(x, weight)[0] - wanted).max() < 1e-5 * max(wanted.std(), 1.0)


def test_accelerators_have_their_own():
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(32, 32, 128, 128))
    program = jax.jit(convolution.conv3x3).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert not uses_minimal(program)
