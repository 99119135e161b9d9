"""The 3x3 convolutions in all their forms, against float64."""

import chex
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


FORMS = {  # the convolution, the same in float64, what prepacks its kernel, the plain form
    "same size": (convolution.conv3x3, exact, convolution.prepack, convolution.direct),
    "up": (convolution.up_conv3x3, exact_up, convolution.prepack_up, convolution._up_direct),
}


def arrays(height: int, width: int, inputs: int, outputs: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, inputs), np.float32)
    # A nonzero mean, as after an activation, makes rounding visible.
    return np.maximum(x, 0.2 * x), rng.standard_normal((3, 3, inputs, outputs), np.float32) / np.sqrt(9 * inputs)


def convolutions(program: jax.stages.Lowered) -> int:
    return program.as_text().count("stablehlo.convolution")


MINIMAL = {"same size": 6, "up": 12}  # convolutions in the program: one per product, for "up" also per column parity
PLAIN = {"same size": 1, "up": 4}


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("same size", (32, 32, 128, 128)), ("same size", (8, 64, 128, 160)), ("same size", (32, 32, 160, 128)),
     ("up", (24, 32, 128, 160)), ("up", (4, 150, 144, 128))],
)  # fmt: skip
def test_minimal_filtering_is_the_convolution(form, sizes):
    """Within three times the rounding of the plain sum, forward and backward, prepacked or not."""
    convolve, reference, prepack, direct = FORMS[form]
    x, weight = arrays(*sizes, batch=2)
    kernel = jax.jit(prepack, static_argnums=(1, 2))(weight, *sizes[:2])
    assert convolutions(jax.jit(convolve).lower(x, weight)) == MINIMAL[form]
    assert convolutions(jax.jit(convolve).lower(x, kernel)) == MINIMAL[form]
    wanted = np.stack([reference(image, weight) for image in x])
    error = lambda y: np.abs(np.asarray(y, np.float64) - wanted).max() / wanted.std()  # noqa: E731
    plain = error(jax.jit(direct)(x, weight))
    assert error(jax.jit(convolve)(x, weight)) < max(3 * plain, 3e-6)
    assert error(jax.jit(convolve)(x, kernel)) < max(3 * plain, 3e-6)

    def backward(form, kernel):
        return jax.jit(lambda x, w, y: jax.vjp(form, x, w)[1](y))(x, kernel, jnp.asarray(wanted, jnp.float32))

    expected, ours, prepacked = backward(direct, weight), backward(convolve, weight), backward(convolve, kernel)
    for mine, its in zip((*ours, prepacked[0]), (*expected, expected[0]), strict=True):
        assert np.abs(mine - its).max() < 1e-5 * np.std(its)  # float32, sums over some hundred to 2048 products
    assert not any(np.any(part) for part in prepacked[1]), "prepacked kernels have no gradient"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(32, 32, 96, 128), (30, 32, 128, 128), (4, 4, 256, 512), (7, 5, 3, 2), (1, 1, 1, 1)])
def test_convolution_is_plain_where_minimal_filtering_saves_no_time(form, sizes):
    convolve, reference, prepack, _ = FORMS[form]
    x, weight = arrays(*sizes)
    for kernel in (weight, prepack(jnp.asarray(weight), *sizes[:2])):
        program = jax.jit(convolve).lower(x, kernel)
        assert convolutions(program) == PLAIN[form]
        wanted = reference(x[0], weight)
        assert np.abs(program.compile()(x, kernel)[0] - wanted).max() < 1e-5 * max(wanted.std(), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_plain_prepacked_kernels_have_the_same_gradient(form):
    convolve, _, prepack, direct = FORMS[form]
    x, weight = arrays(5, 6, 3, 4)
    kernel = prepack(jnp.asarray(weight), 5, 6)
    assert isinstance(kernel, Kernel)
    y, backward = jax.vjp(convolve, x, kernel)
    expected = jax.vjp(direct, x, weight)[1](2 * y)[0]
    np.testing.assert_allclose(backward(2 * y)[0], expected, rtol=0, atol=1e-5 * np.std(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("minimal", [None, False, True])
def test_minimal_filtering_can_be_chosen(form, minimal):
    """By default it is used here; without it, only plain convolutions are left, forward and backward."""
    convolve, _, prepack, _ = FORMS[form]
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(32, 32, 128, 128))
    kernel = jax.eval_shape(lambda w: prepack(w, 32, 32, minimal=minimal), weight)
    chex.assert_shape(list(kernel), (3 if minimal is False else 6, 3, 128, 128))
    forward = jax.jit(convolve).lower(x, kernel)
    gradient = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.square(convolve(x, kernel)).sum())).lower(x, kernel)
    count = (PLAIN if minimal is False else MINIMAL)[form]
    assert (convolutions(forward), convolutions(gradient)) == (count, 2 * count)


@pytest.mark.parametrize("form", FORMS)
def test_minimal_filtering_is_left_out_where_it_is_impossible(form):
    _, _, prepack, _ = FORMS[form]
    for height, dtype in ((6, jnp.float32), (8, jnp.bfloat16)):
        chex.assert_shape(list(prepack(jnp.zeros((3, 3, 2, 4), dtype), height, 8, minimal=True)), (3, 3, None, None))


class TestTransforms(chex.TestCase):
    """With jit and without; on sizes where minimal filtering has to be asked for."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_forms_agree(self):
        x, weight = arrays(8, 5, 3, 4, batch=2)
        for convolve, reference, prepack, _ in FORMS.values():
            wanted = np.stack([reference(image, weight) for image in x])
            gradients = []
            for minimal in (False, True):
                kernel = prepack(jnp.asarray(weight), 8, 5, minimal=minimal)
                y = self.variant(convolve)(x, kernel)
                chex.assert_shape(y, wanted.shape)
                chex.assert_trees_all_close(y, np.float32(wanted), rtol=0, atol=1e-5 * wanted.std())
                gradients.append(self.variant(jax.grad(lambda x, k, f=convolve: jnp.square(f(x, k)).sum()))(x, kernel))
            chex.assert_trees_all_close(*gradients, rtol=0, atol=1e-5 * np.std(gradients[0]))


@pytest.mark.parametrize("form", FORMS)
def test_other_values_compile_nothing(form):
    convolve, _, prepack, _ = FORMS[form]
    x, weight = arrays(8, 5, 3, 4)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(lambda x, kernel: convolve(x, kernel), n=1))
    results = [run(scale * x, prepack(scale * jnp.asarray(weight), 8, 5)) for scale in (1, 2)]
    chex.assert_trees_all_close(4 * results[0], results[1])  # powers of two are exact


@pytest.mark.parametrize("form", FORMS)
def test_wrong_ranks_are_named(form):
    convolve = FORMS[form][0]
    x, weight = arrays(8, 5, 3, 4)
    with pytest.raises(AssertionError, match="rank 3"):
        convolve(x[0], weight)
    with pytest.raises(AssertionError, match="shape"):
        convolve(x, weight[:, :, :2])


@pytest.mark.parametrize("form", FORMS)
def test_accelerators_use_plain_convolutions(form, monkeypatch):
    convolve, _, prepack, _ = FORMS[form]
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(32, 32, 128, 128))
    program = jax.jit(convolve).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert convolutions(program) == PLAIN[form]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel = jax.eval_shape(lambda w: prepack(w, 32, 32), weight)
    chex.assert_shape(list(kernel), (3, 3, 128, 128))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_bfloat16(form):
    """In the plain form: the transforms of minimal filtering would lose the precision that bfloat16 has left."""
    convolve, reference, prepack, _ = FORMS[form]
    x, weight = arrays(32, 32, 128, 128)
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    wanted = reference(np.asarray(half[0][0], np.float32), np.asarray(half[1], np.float32))
    for kernel in (half[1], prepack(half[1], 32, 32)):
        program = jax.jit(convolve).lower(half[0], kernel)
        assert convolutions(program) == PLAIN[form]
        y = program.compile()(half[0], kernel)
        assert y.dtype == jnp.bfloat16
        # bfloat16 rounds by 2^-9; with four phases in one program XLA rounds some sums once more.
        assert np.abs(np.asarray(y[0], np.float32) - wanted).max() < 2**-8 * np.abs(wanted).max()
