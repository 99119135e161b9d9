"""The 3x3 convolutions against float64, in all their forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.nets import convolution
from samjax.nets.convolution import Kernel


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64: [H, W, I] and [3, 3, I, O] to [H, W, O]."""
    padded = np.pad(x.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    height, width, _ = x.shape
    taps = ((i, j, padded[i : i + height, j : j + width]) for i in range(3) for j in range(3))
    return sum(part @ weight[i, j].astype(np.float64) for i, j, part in taps)


def exact_up(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64: [H, W, I] and [3, 3, I, O] to [2H + 4, 2W + 4, O]."""
    height, width, _ = x.shape
    y = np.zeros((2 * height + 4, 2 * width + 4, weight.shape[3]))
    for i in range(3):
        for j in range(3):
            y[1 + i : 1 + i + 2 * height : 2, 1 + j : 1 + j + 2 * width : 2] += x.astype(np.float64) @ weight[i, j]
    return y


FORMS = {  # the convolution, the same in float64, how a kernel is frozen, the plain one
    "same size": (convolution.conv3x3, exact, convolution.freeze, convolution.direct),
    "up": (convolution.up_conv3x3, exact_up, convolution.freeze_up, convolution._up_direct),
}


def arrays(height: int, width: int, inputs: int, outputs: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, inputs), np.float32)
    # As after an activation: a mean that is not zero is what rounding shows in.
    return np.maximum(x, 0.2 * x), rng.standard_normal((3, 3, inputs, outputs), np.float32) / np.sqrt(9 * inputs)


def convolutions(program: jax.stages.Lowered) -> int:
    return program.as_text().count("stablehlo.convolution")


MINIMAL = {"same size": 6, "up": 12}  # convolutions in the program: one a product, and column parity
PLAIN = {"same size": 1, "up": 4}


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("same size", (32, 32, 128, 128)), ("same size", (8, 64, 128, 160)), ("same size", (32, 32, 160, 128)),
     ("up", (24, 32, 128, 160)), ("up", (4, 150, 144, 128))],
)  # fmt: skip
def test_minimal_filtering_is_the_convolution(form, sizes):
    """Within three times the rounding of the plain sum, forward and backward, frozen or not."""
    convolve, reference, freeze, direct = FORMS[form]
    x, weight = arrays(*sizes, batch=2)
    kernel = jax.jit(freeze, static_argnums=(1, 2))(weight, *sizes[:2])
    assert convolutions(jax.jit(convolve).lower(x, weight)) == MINIMAL[form]
    assert convolutions(jax.jit(convolve).lower(x, kernel)) == MINIMAL[form]
    wanted = np.stack([reference(image, weight) for image in x])
    error = lambda y: np.abs(np.asarray(y, np.float64) - wanted).max() / wanted.std()  # noqa: E731
    plain = error(jax.jit(direct)(x, weight))
    assert error(jax.jit(convolve)(x, weight)) < max(3 * plain, 3e-6)
    assert error(jax.jit(convolve)(x, kernel)) < max(3 * plain, 3e-6)

    def back(form, kernel):
        return jax.jit(lambda x, w, y: jax.vjp(form, x, w)[1](y))(x, kernel, jnp.asarray(wanted, jnp.float32))

    theirs, ours, frozen = back(direct, weight), back(convolve, weight), back(convolve, kernel)
    for mine, its in zip((*ours, frozen[0]), (*theirs, theirs[0]), strict=True):
        assert np.abs(mine - its).max() < 1e-5 * np.std(its)  # float32, sums over some hundred to 2048 products
    assert not any(np.any(part) for part in frozen[1]), "what is frozen has no gradient"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(32, 32, 96, 128), (30, 32, 128, 128), (4, 4, 256, 512), (7, 5, 3, 2), (1, 1, 1, 1)])
def test_where_it_would_not_save_time_it_is_the_plain_one(form, sizes):
    convolve, reference, freeze, _ = FORMS[form]
    x, weight = arrays(*sizes)
    for kernel in (weight, freeze(jnp.asarray(weight), *sizes[:2])):
        program = jax.jit(convolve).lower(x, kernel)
        assert convolutions(program) == PLAIN[form]
        wanted = reference(x[0], weight)
        assert np.abs(program.compile()(x, kernel)[0] - wanted).max() < 1e-5 * max(wanted.std(), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_kernels_go_back_too(form):
    convolve, _, freeze, direct = FORMS[form]
    x, weight = arrays(5, 6, 3, 4)
    kernel = freeze(jnp.asarray(weight), 5, 6)
    assert isinstance(kernel, Kernel)
    y, back = jax.vjp(convolve, x, kernel)
    theirs = jax.vjp(direct, x, weight)[1](2 * y)[0]
    np.testing.assert_allclose(back(2 * y)[0], theirs, rtol=0, atol=1e-5 * np.std(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_accelerators_have_their_own(form, monkeypatch):
    convolve, _, freeze, _ = FORMS[form]
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(32, 32, 128, 128))
    program = jax.jit(convolve).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert convolutions(program) == PLAIN[form]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel = jax.eval_shape(lambda w: freeze(w, 32, 32), weight)
    assert kernel.there.shape == kernel.back.shape == (3, 3, 128, 128)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_so(form):
    """In the plain form: the other's transforms would lose what bfloat16 has left."""
    convolve, reference, freeze, _ = FORMS[form]
    x, weight = arrays(32, 32, 128, 128)
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    wanted = reference(np.asarray(half[0][0], np.float32), np.asarray(half[1], np.float32))
    for kernel in (half[1], freeze(half[1], 32, 32)):
        program = jax.jit(convolve).lower(half[0], kernel)
        assert convolutions(program) == PLAIN[form]
        y = program.compile()(half[0], kernel)
        assert y.dtype == jnp.bfloat16
        # Its own rounding is 2^-9; of four phases in one program XLA rounds some sums once more.
        assert np.abs(np.asarray(y[0], np.float32) - wanted).max() < 2**-8 * np.abs(wanted).max()
