"""The generator against the reference's numbers, and the properties that inversion and editing need."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_weights import golden_generator
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from samjax.nets import convolution, stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config, map_z, synthesize

# Of an array's spread. Float32 sums of up to 9 x 48 terms through 10 layers differ by some 1e-6.
TOLERANCE = 1e-4
TINY = StyleGAN2Config(16, z_dim=8, w_dim=12, mapping_layers=2, channel_base=96, channel_max=10)

SCALES = {"bias": 0.5, "noise_strength": 0.3, "w_avg": 0.1}


def error(ours, reference) -> float:
    """Largest error relative to the spread of `reference`."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.ptp(reference))


def nhwc(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def tiny_params(config: StyleGAN2Config = TINY):
    """Random parameters like those at the start of training, but none is zero."""
    shapes = jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0)))
    fill = lambda path, x: jnp.asarray(SCALES.get(path[-1].key, 1.0) * normal(x.size, *x.shape))  # noqa: E731
    with jax.ensure_compile_time_eval():  # arrays, not tracers, also where the first call is inside a jitted function
        return jax.tree_util.tree_map_with_path(fill, shapes)


tiny_synthesize = jax.jit(functools.partial(synthesize, TINY), static_argnames="noise")


def tiny_image(ws, **options) -> np.ndarray:
    return np.asarray(tiny_synthesize(tiny_params(), ws, **options).image)


# --- the reference ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ws", {}),
        ("ws_psi07", {"truncation_psi": 0.7}),
        ("ws_psi05_cut4", {"truncation_psi": 0.5, "truncation_cutoff": 4}),
    ],
)
def test_styles_match_reference(golden, name, options):
    case = golden("stylegan2_A")
    assert error(map_z(*golden_generator(case), case["z"], **options), case[name]) < TOLERANCE


def test_images_and_features_match_reference(golden):
    case = golden("stylegan2_A")
    config, params = golden_generator(case)
    run = jax.jit(functools.partial(synthesize, config), static_argnames="noise")
    const, none = (run(params, case["ws_in"], noise=noise) for noise in ("const", "none"))
    assert error(const.image, nhwc(case["img_const"])) < TOLERANCE
    assert error(none.image, nhwc(case["img_none"])) < TOLERANCE
    for resolution in (4, 8, 16, 32):  # stored for the pass without noise
        assert error(none.features[resolution], nhwc(case[f"feat_{resolution}"])) < TOLERANCE


def test_labels_and_clamp_match_reference(golden):
    case = golden("stylegan2_labels_A")
    config, params = golden_generator(case)
    assert config.c_dim == 5
    assert config.conv_clamp == 0.7
    assert error(map_z(config, params, case["z"], case["c"]), case["ws"]) < TOLERANCE
    ws = map_z(config, params, case["z"], case["c"], truncation_psi=0.6, truncation_cutoff=3)
    assert error(ws, case["ws_psi06_cut3"]) < TOLERANCE
    assert error(jax.jit(functools.partial(synthesize, config))(params, ws).image, nhwc(case["img_const"])) < TOLERANCE


def test_init_has_the_tree_of_a_converted_generator(golden):
    for name in ("stylegan2_A", "stylegan2_labels_A"):
        config, params = golden_generator(golden(name))
        expected = jax.eval_shape(lambda config=config: stylegan2.init(config, key=jax.random.key(0)))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)


# --- operations, against PyTorch ---


def torch_upfirdn(x: torch.Tensor) -> torch.Tensor:
    """The filter [1, 3, 3, 1] in both directions, with the gain for upsampling."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


@jax.jit
def both_forms(x, weight, cotangent):
    """Results and gradients of both forms of the up-convolution."""
    results = []
    for form in (stylegan2.up_conv, stylegan2.up_conv_folded):
        y, vjp = jax.vjp(form, x, weight)
        results.append((y, *vjp(cotangent)))
    return results


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(channels=3, features=5, batch=2, height=4, width=7, seed=1)
@given(*(st.integers(1, n) for n in (9, 9, 3, 6, 6)), st.integers(0, 99))
def test_up_convolution(channels, features, batch, height, width, seed):
    """Values and gradients of both forms are those of PyTorch's transposed convolution, filtered."""
    x, weight = normal(seed, batch, height, width, channels), normal(seed + 1, 3, 3, channels, features)
    cotangent = normal(seed + 2, batch, 2 * height, 2 * width, features)
    x_, weight_ = nchw(x).requires_grad_(), torch.tensor(np.asarray(weight)).requires_grad_()
    y = torch_upfirdn(F.conv_transpose2d(x_, weight_.permute(2, 3, 0, 1), stride=2))
    y.backward(nchw(cotangent))
    expected = nhwc(y.detach()), nhwc(x_.grad), weight_.grad.numpy()
    for results in both_forms(x, weight, cotangent):
        for ours, theirs in zip(results, expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()  # sums of some hundred products


def test_upsample():
    x = normal(0, 2, 5, 4, 3)
    stuffed = torch.zeros(2, 3, 11, 9)
    stuffed[:, :, 1::2, 1::2] = nchw(x)
    assert error(stylegan2.upsample(x), nhwc(torch_upfirdn(F.pad(stuffed, (0, 1, 0, 1))))[:, :10, :8]) < 1e-6


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(*(st.integers(1, n) for n in (9, 9, 3)), st.booleans(), st.integers(0, 99))
def test_modulated_convolution_is_that_of_modulated_weights(channels, features, batch, up, seed):
    """The definition of the paper: each image has its own kernel, scaled and normalized before the convolution."""
    x, styles = normal(seed, batch, 4, 6, channels), 1 + normal(seed + 1, batch, channels)
    weight = normal(seed + 2, 3, 3, channels, features)
    convolve = stylegan2.up_conv if up else convolution.conv3x3
    ours = jax.jit(stylegan2.modulated_conv, static_argnums=3)(x, weight, styles, convolve)
    for i in range(batch):
        kernel = np.asarray(weight) * np.asarray(styles)[i, :, None]
        kernel = torch.tensor(kernel / np.sqrt(np.square(kernel).sum((0, 1, 2)) + 1e-8))
        if up:
            y = torch_upfirdn(F.conv_transpose2d(nchw(x[i : i + 1]), kernel.permute(2, 3, 0, 1), stride=2))
        else:
            y = F.conv2d(nchw(x[i : i + 1]), kernel.permute(3, 2, 0, 1), padding=1)
        assert np.abs(ours[i : i + 1] - nhwc(y)).max() < 1e-5 * np.abs(nhwc(y)).max()


class TestModulatedConvolution(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_forms_agree(self):
        """With jit and without; prepacked or not."""
        x, weight, styles = normal(0, 2, 8, 5, 3), jnp.asarray(normal(1, 3, 3, 3, 4)), 1 + normal(2, 2, 3)
        kinds = ((convolution.conv3x3, convolution.prepack), (stylegan2.up_conv, convolution.prepack_up))
        for convolve, prepack in kinds:
            expected = stylegan2.modulated_conv(x, weight, styles, convolve)
            run = self.variant(functools.partial(stylegan2.modulated_conv, convolve=convolve))
            energy = stylegan2.kernel_energy(weight)
            packed = (stylegan2.PrepackedConv(prepack(weight, 8, 5, minimal=m), energy) for m in (None, False, True))
            for kernel in (weight, *packed):
                chex.assert_trees_all_close(run(x, kernel, styles), expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_modulated_convolution_names_a_wrong_rank():
    x, weight, styles = normal(0, 2, 8, 5, 3), normal(1, 3, 3, 3, 4), normal(2, 2, 3)
    for bad in ((x[0], weight, styles), (x, weight, styles[0])):
        with pytest.raises(AssertionError, match="rank"):
            stylegan2.modulated_conv(*bad)


# --- prepacked, and in half precision ---


FIVE = dataclasses.replace(TINY, img_resolution=64)  # blocks of 4 to 64 px, of which the first stays in float32


@functools.partial(jax.jit, static_argnames="half_precision")
def render_and_differentiate(params, ws, half_precision=False):
    """The image, the features, and a gradient with respect to the styles."""

    def loss(ws):
        image, features = synthesize(FIVE, params, ws, half_precision=half_precision)
        return jnp.square(image).mean(), (image, features)

    gradient, (image, features) = jax.grad(loss, has_aux=True)(ws)
    return image, features, gradient


@pytest.mark.parametrize("half_precision", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prepacking_changes_nothing(half_precision):
    ws, params = normal(0, 2, FIVE.num_ws, FIVE.w_dim), tiny_params(FIVE)
    prepacked = stylegan2.prepack(FIVE, params, half_precision=half_precision)
    theirs = jax.tree.leaves(render_and_differentiate(params, ws, half_precision))
    ours = jax.tree.leaves(render_and_differentiate(prepacked, ws, half_precision))
    for mine, its in zip(ours, theirs, strict=True):
        # The same products, summed in another order; bfloat16 sometimes rounds the sums differently.
        assert np.abs(mine - its).max() < (2e-2 if half_precision else 1e-5) * np.ptp(its)


def test_without_minimal_filtering_all_convolutions_are_plain():
    """One for each conv1, four for each conv0, forward and backward; by default there are more on a CPU."""
    config = StyleGAN2Config(64, channel_base=128 * 64, channel_max=128)
    params = jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0)))
    ws = jax.ShapeDtypeStruct((1, config.num_ws, config.w_dim), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda ws, params: jnp.square(synthesize(config, params, ws).image).sum()))

    def convolutions(minimal: bool | None) -> int:
        prepacked = jax.eval_shape(lambda p: stylegan2.prepack(config, p, minimal=minimal), params)
        return step.lower(ws, prepacked).as_text().count("stablehlo.convolution")

    assert convolutions(False) == 2 * (5 + 4 * 4)
    assert convolutions(None) > 2 * (5 + 4 * 4)


@pytest.mark.slow  # compiles a program of its own
def test_half_precision_is_close():
    ws, params = normal(0, 2, FIVE.num_ws, FIVE.w_dim), tiny_params(FIVE)
    image, features, gradient = render_and_differentiate(params, ws)
    half_image, half_features, half_gradient = render_and_differentiate(params, ws, half_precision=True)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((half_image, half_features, half_gradient)))
    difference = lambda half, full: float(np.sqrt(np.mean(np.square(half - full))) / np.std(full))  # noqa: E731
    assert difference(half_features[4], features[4]) < 1e-6
    # bfloat16 has eight bits: each rounding is 2^-9, about ten of them forward and again backward.
    assert all(1e-4 < difference(half_features[r], features[r]) < 2e-2 for r in (8, 16, 32, 64))
    assert 1e-4 < difference(half_image, image) < 2e-2
    assert 1e-4 < difference(half_gradient, gradient) < 5e-2


# --- sizes ---


@pytest.mark.parametrize("resolution", [8, 1024])
def test_sizes(resolution):
    config = StyleGAN2Config(resolution)
    params = jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0)))
    ws = jax.eval_shape(functools.partial(map_z, config), params, jax.ShapeDtypeStruct((2, 512), jnp.float32))
    image, features = jax.eval_shape(functools.partial(synthesize, config), params, ws)
    blocks = int(np.log2(resolution)) - 1
    chex.assert_shape([ws, image], [(2, 2 * blocks, 512), (2, resolution, resolution, 3)])
    assert {r: x.shape for r, x in features.items()} == {
        r: (2, r, r, min(512, 32768 // r)) for r in (2 ** (i + 2) for i in range(blocks))
    }
    if resolution == 1024:  # the published FFHQ generator has as many, without noise buffers and average style
        kinds = jax.tree_util.tree_flatten_with_path(params)[0]
        count = sum(x.size for path, x in kinds if path[-1].key not in ("noise_const", "w_avg"))
        assert count == 30_370_060


@pytest.mark.parametrize("resolution", [0, 4, 48, 2048])
def test_impossible_size(resolution):
    with pytest.raises(ValueError, match="power of two from 8 to 1024"):
        StyleGAN2Config(resolution)


def test_only_the_first_blocks():
    ws = normal(0, 2, TINY.num_ws, TINY.w_dim)
    full = tiny_synthesize(tiny_params(), ws)
    run = functools.partial(stylegan2.Generator(TINY).apply, max_resolution=8, method="synthesize")
    part = jax.jit(run)({"params": tiny_params()}, ws)
    chex.assert_shape(part.image, (2, 8, 8, 3))
    assert error(part.features[8], full.features[8]) < 1e-6
    assert set(part.features) == {4, 8}


# --- batches and transforms ---


def test_one_and_many_agree():
    ws = normal(0, 3, TINY.num_ws, TINY.w_dim)
    many = tiny_image(ws)
    for i in range(3):
        assert error(tiny_image(ws[i : i + 1]), many[i : i + 1]) < 1e-5
    one = lambda ws: synthesize(TINY, tiny_params(), ws[None]).image[0]  # noqa: E731
    assert error(jax.jit(jax.vmap(one))(ws), many) < 1e-5


def test_other_values_compile_nothing():
    """Other styles, offsets, masks and parameters."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, ws, offsets, masks):
        return synthesize(TINY, params, ws, offsets=offsets, masks=masks).image

    first = run(tiny_params(), normal(0, 1, TINY.num_ws, TINY.w_dim), random_offset(8), mask(8, 1.0))
    scaled = jax.tree.map(lambda x: 2 * x, tiny_params())
    second = run(scaled, normal(1, 1, TINY.num_ws, TINY.w_dim), random_offset(8, 6), mask(8, 0.5))
    assert error(first, second) > 0.01


def test_styles_of_one_and_many_agree():
    z = normal(0, 3, TINY.z_dim)
    many = map_z(TINY, tiny_params(), z)
    assert error(map_z(TINY, tiny_params(), z[1:2]), many[1:2]) < 1e-6


def test_gradient_reaches_every_style():
    ws = normal(0, 2, TINY.num_ws, TINY.w_dim)
    loss = jax.jit(lambda ws: jnp.sum(jnp.square(tiny_synthesize(tiny_params(), ws).image)))
    gradient = np.asarray(jax.jit(jax.grad(loss))(ws))
    chex.assert_tree_all_finite(gradient)
    assert (np.abs(gradient).max(-1) > 0).all()
    # Against a difference quotient, in the direction of the gradient.
    step = 1e-3 * gradient / np.linalg.norm(gradient)
    slope = (loss(ws + step) - loss(ws - step)) / 2e-3
    assert abs(slope / np.linalg.norm(gradient) - 1) < 1e-2


# --- truncation and labels ---


def test_truncation():
    z, params = normal(0, 2, TINY.z_dim), tiny_params()
    average = params["mapping"]["w_avg"]
    none = map_z(TINY, params, z, truncation_psi=0.0)
    assert np.abs(none - average).max() < 1e-6
    assert error(map_z(TINY, params, z, truncation_psi=1.0), map_z(TINY, params, z)) < 1e-6
    cut = map_z(TINY, params, z, truncation_psi=0.0, truncation_cutoff=2)
    assert np.abs(cut[:, :2] - average).max() < 1e-6
    assert error(cut[:, 2:], map_z(TINY, params, z)[:, 2:]) < 1e-6


def test_labels_change_styles_and_are_required():
    config = dataclasses.replace(TINY, c_dim=3)
    params, z = tiny_params(config), normal(0, 1, TINY.z_dim)
    styles = [map_z(config, params, z, jnp.eye(3)[i : i + 1]) for i in range(2)]
    assert error(*styles) > 0.01
    with pytest.raises(ValueError, match=r"conditional: pass labels c of shape \[N, 3\]"):
        map_z(config, params, z)


# --- noise ---


def test_random_noise_is_keyed():
    ws = normal(0, 2, TINY.num_ws, TINY.w_dim)
    same = np.concatenate([ws[:1]] * 2)
    drawn = lambda seed: tiny_image(same, noise="random", noise_key=jax.random.key(seed))  # noqa: E731
    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert error(drawn(1), drawn(2)) > 0.01
    assert error(drawn(1)[:1], drawn(1)[1:]) > 0.01, "each image of a batch has noise of its own"


@pytest.mark.parametrize(("options", "message"), [({"noise": "random"}, "noise_key"), ({"noise": "some"}, "'some'")])
def test_wrong_noise(options, message):
    with pytest.raises(ValueError, match=message):
        synthesize(TINY, tiny_params(), normal(0, 1, TINY.num_ws, TINY.w_dim), **options)


def test_noise_has_unit_variance():
    """With everything else zero, the last block's output is the leaky ReLU of noise times its strength."""
    params = jax.tree.map(jnp.zeros_like, tiny_params())
    layer = {**params["synthesis"]["b16"]["conv1"], "noise_strength": jnp.float32(2.0)}
    params["synthesis"]["b16"] = {**params["synthesis"]["b16"], "conv1": layer}
    ws = jnp.zeros((2, TINY.num_ws, TINY.w_dim))
    x = tiny_synthesize(params, ws, noise="random", noise_key=jax.random.key(0)).features[16]
    assert (x == x[..., :1]).all(), "one value for all channels"
    noise = np.asarray(x[..., 0]) / np.where(x[..., 0] > 0, 1, 0.2) / np.sqrt(2) / 2
    assert abs(noise.std() - 1) < 0.1  # of 512 numbers: 3 standard errors
    assert abs(noise.mean()) < 0.15


# --- offsets, features, masks ---


def random_offset(resolution: int, seed: int = 5) -> dict[int, np.ndarray]:
    return {resolution: normal(seed, 1, resolution, resolution, TINY.channels(resolution))}


def mask(resolution: int, value: float) -> dict[int, np.ndarray]:
    return {resolution: np.full((1, resolution, resolution, 1), value, np.float32)}


WS = normal(0, 1, TINY.num_ws, TINY.w_dim)


def test_zero_mask_changes_nothing_and_stops_every_gradient():
    offsets, off = random_offset(8), mask(8, 0.0)
    plain = tiny_synthesize(tiny_params(), WS)
    for options in ({"offsets": offsets}, {"features": offsets}):
        masked = tiny_synthesize(tiny_params(), WS, masks=off, **options)
        assert error(masked.image, plain.image) < 1e-6, "another program may only round differently"

    def loss(offsets, masks):
        return jnp.sum(jnp.square(tiny_synthesize(tiny_params(), WS, offsets=offsets, masks=masks).image))

    gradient = jax.jit(jax.grad(loss))
    assert (gradient(offsets, off)[8] == 0).all()
    assert (jnp.abs(gradient(offsets, mask(8, 1.0))[8]).max(-1) > 0).all(), "an active offset acts in every pixel"


def test_offset_acts_on_later_blocks_only():
    plain = tiny_synthesize(tiny_params(), WS)
    shifted = tiny_synthesize(tiny_params(), WS, offsets=random_offset(8))
    assert error(shifted.features[4], plain.features[4]) < 1e-6
    assert error(shifted.features[8], plain.features[8] + random_offset(8)[8]) < 1e-6
    assert error(shifted.features[16], plain.features[16]) > 0.01
    assert error(shifted.image, plain.image) > 0.01
    # The RGB of its own block is not affected: in the last block an offset changes no pixel.
    assert error(tiny_image(WS, offsets=random_offset(16)), plain.image) < 1e-6


def test_offset_is_scaled_by_its_mask():
    half = tiny_image(WS, offsets=random_offset(8), masks=mask(8, 0.5))
    assert error(half, tiny_image(WS, offsets={8: 0.5 * random_offset(8)[8]})) < 1e-5


def test_features_hide_earlier_styles():
    """Where features replace the output of a block everywhere, earlier styles only change the RGB before it."""
    feature = {8: normal(6, 1, 8, 8, TINY.channels(8))}
    other = np.concatenate(
        [normal(7, 1, 4, TINY.w_dim), WS[:, 4:]], 1
    )  # the 4 and 8 px blocks' own, the 8 px ToRGB's not
    results = [tiny_synthesize(tiny_params(), ws, features=feature) for ws in (WS, other)]
    np.testing.assert_array_equal(results[0].features[8], feature[8])
    assert error(results[0].features[4], results[1].features[4]) > 0.01
    assert error(*(tiny_synthesize(tiny_params(), ws).features[16] for ws in (WS, other))) > 0.01
    # Style 3 is also the first of the 16 px block: with it unchanged, all later outputs are the same.
    kept = tiny_synthesize(tiny_params(), np.where(np.arange(TINY.num_ws)[:, None] == 3, WS, other), features=feature)
    np.testing.assert_array_equal(kept.features[16], results[0].features[16])


def test_recorded_features_reproduce_the_image():
    offsets, soft = random_offset(8), {8: np.random.default_rng(8).random((1, 8, 8, 1), np.float32)}
    recorded = tiny_synthesize(tiny_params(), WS, offsets=offsets, masks=soft)
    replaced = tiny_synthesize(tiny_params(), WS, features={8: recorded.features[8]}, masks=mask(8, 1.0))
    assert error(replaced.image, recorded.image) < 1e-5
    blended = tiny_synthesize(tiny_params(), WS, features={8: offsets[8]}, masks=soft).features[8]
    plain = tiny_synthesize(tiny_params(), WS).features[8]
    assert error(blended, plain * (1 - soft[8]) + offsets[8] * soft[8]) < 1e-6


# --- clamp ---


def test_clamp_limits_every_layer():
    config = dataclasses.replace(TINY, conv_clamp=0.5)
    result = jax.jit(functools.partial(synthesize, config))(tiny_params(), WS)
    for x in result.features.values():
        assert jnp.abs(x).max() == 0.5
    rgb = tiny_synthesize(tiny_params(), WS).image
    assert jnp.abs(rgb).max() > 1.5  # three blocks' RGB of 0.5 each
    assert jnp.abs(result.image).max() <= 1.5
