"""What all recognition networks have in common: their files, sizes, arguments, and the segmenters' reference numbers.

The other tests of each network are in its own file.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from network_cases import ADE20K, BISENET, E4E, MASK_RCNN, PREDICTOR, TOLERANCE, Case, claimed, convert, tensor

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import ade20k, bisenet, deeplab, e4e, mask_rcnn


def ade20k_probabilities(variables: Any, images: Any, config: Any) -> jax.Array:
    """The reference case holds probabilities."""
    return jax.nn.softmax(ade20k.logits(variables, images, config))


SCORES = {ADE20K: (ade20k_probabilities, "probs_area16"), BISENET: (bisenet.logits, "logits_area8")}
"""The segmenters' scores of classes, and the name of their means over squares in the reference case."""


def cases(*names: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, ids=[case.network.name for case in names])


# --- the reference ---


@pytest.fixture(scope="module", params=SCORES, ids=[case.network.name for case in SCORES])
def segmenter(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def outputs(golden, segmenter) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of the image of the reference case, which stores it normalized."""
    case, (scores, _) = golden(segmenter.golden), SCORES[segmenter]
    config, flat = convert(segmenter, *segmenter.files(network_cases.published(segmenter, case)))
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = (case["x"].transpose(0, 2, 3, 1) * deviation + mean) * np.float32(2) - np.float32(1)

    @jax.jit
    def both(variables, images):
        return scores(variables, images, config), segmenter.module.labels(variables, images, config)

    found, labels = both(checkpoints.unflatten(flat), images)
    return np.asarray(found), np.asarray(labels)


def test_scores_match_reference(golden, segmenter, outputs):
    theirs = golden(segmenter.golden)[SCORES[segmenter][1]]
    (_, classes, rows, columns), (_, height, width, _) = theirs.shape, outputs[0].shape
    squares = outputs[0].reshape(1, rows, height // rows, columns, width // columns, classes)
    ours = squares.mean((2, 4)).transpose(0, 3, 1, 2)
    # Against each class's own spread, since classes differ more from each other than within.
    assert np.all(np.abs(ours - theirs).max((0, 2, 3)) < TOLERANCE * np.ptp(theirs, axis=(0, 2, 3)))


def test_labels_match_reference(golden, segmenter, outputs):
    labels = outputs[1]
    assert labels.dtype == np.int32
    assert np.mean(labels == golden(segmenter.golden)["argmax"]) >= 0.999  # rounding decides ties between classes


# --- files ---


@cases(ADE20K, BISENET, MASK_RCNN, PREDICTOR)
def test_conversion_round_trip_keeps_every_array(case, golden):
    """From the published names and shapes; also, the published config is recognized."""
    state = network_cases.published(case, golden(case.golden), numbered=True)
    config, flat = convert(case, *case.files(state))
    assert config == case.config
    back = network_cases.their_arrays(case, flat)
    assert back.keys() == {name for name in state if not any(part in name for part in case.unused)}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name].array(), err_msg=name)


def parallel(state: dict[str, Any]) -> dict[str, Any]:
    """As `torch.nn.DataParallel` names arrays."""
    return {f"module.{name}": array for name, array in state.items()}


def ade20k_files(encoder: dict[str, Any], decoder: dict[str, Any]) -> list[tuple[Any, ...]]:
    """In any order, with the classifier of the ResNet, and from `DataParallel`."""
    fc = {"fc.weight": tensor(np.zeros((5, 128), np.float32)), "fc.bias": tensor(np.zeros(5, np.float32))}
    return [(encoder, decoder), (decoder, encoder), ({**encoder, **fc}, parallel(decoder))]


def bisenet_files(file: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Without the auxiliary heads, with the classifier of the ResNet, and from `DataParallel`."""
    file = {**file, "cp.resnet.fc.weight": tensor(np.zeros((5, 32), np.float32))}
    return [(file,), (parallel(file),)]


@pytest.mark.parametrize(
    ("case", "variants"),
    [(ADE20K, ade20k_files), (BISENET, bisenet_files), (PREDICTOR, lambda file: [(file,)])],
    ids=["ade20k", "bisenet", "invertibility"],
)
def test_small_networks_are_recognized(case, variants):
    for files in variants(*case.files(network_cases.state_dict(case))):
        config, flat = convert(case, *files)
        assert config == case.small
        for path, values in network_cases.random_variables(case).items():
            np.testing.assert_array_equal(flat[path], values, err_msg=path)


def other_ade20k(encoder: dict[str, Any], _: Any) -> list[list[Any]]:
    shallow = {name: array for name, array in encoder.items() if name not in ("conv2.weight", "conv3.weight")}
    return [[shallow], [{"state_dict": encoder}], [{"a": tensor(np.zeros(3))}]]


def other_bisenet(file: dict[str, Any]) -> list[list[Any]]:
    resnet = {name.removeprefix("cp.resnet."): array for name, array in file.items() if name.startswith("cp.resnet.")}
    return [[resnet], [resnet, resnet], [{"state_dict": file}]]


def other_mask_rcnn(file: dict[str, Any]) -> list[list[Any]]:
    model = file["model"]
    backbone = {name: array for name, array in model.items() if name.startswith("backbone.")}
    return [[backbone], [{"model": backbone}], [{"model": None}], [{"model": [1]}], [{"state_dict": model}],
            [{**model, "model": 3}]]  # fmt: skip


def other_predictors(_: Any) -> list[list[Any]]:
    return [[{"state_dict": {}}], [{"a.weight": tensor(np.zeros(2))}]]


def other_e4e(_: Any) -> list[list[Any]]:
    average = claimed(8, 512)
    return [[[]], [3], [{"state_dict": None}], [{"state_dict": {"encoder.input_layer.0.weight": 1}}], [{1: average}],
            [{"g_ema": {"input.input": average}, "latent_avg": average}],
            [{"input_layer.0.weight": average}]]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "others"),
    [(ADE20K, other_ade20k), (BISENET, other_bisenet), (MASK_RCNN, other_mask_rcnn), (PREDICTOR, other_predictors),
     (E4E, other_e4e)],
    ids=["ade20k", "bisenet", "mask_rcnn", "invertibility", "e4e"],
)  # fmt: skip
def test_other_files_are_not_recognized(case, others):
    files = case.files(network_cases.state_dict(case))
    for objects in ([], [None], [{}], [[1]], *others(*files)):
        assert case.network.find(objects) is None, objects


FAULTS: list[tuple[Case, dict[str, tuple[int, ...] | None], tuple[str, ...]]] = [
    (
        ADE20K,
        {
            "encoder.layer2.0.conv2.weight": None,
            "encoder.layer2.0.conv9.weight": (8, 8, 3, 3),
            "decoder.ppm.0.2.bias": (3,),
            "decoder.conv_last.4.bias": (8,),
        },
        (
            "missing: encoder.layer2.0.conv2.weight",
            "unexpected: encoder.layer2.0.conv9.weight",
            "decoder.ppm.0.2.bias [3] instead of [32]",
            "decoder.conv_last.4.bias [8] instead of [7]",
        ),
    ),
    (
        BISENET,
        {
            "cp.arm16.conv_atten.weight": None,
            "cp.arm16.conv9.weight": (8, 8, 1, 1),
            "ffm.conv1.weight": (4, 16, 3, 3),
        },
        (
            "missing: cp.arm16.conv_atten.weight",
            "unexpected: cp.arm16.conv9.weight",
            "ffm.conv1.weight [4, 16, 3, 3] instead of [4, 16, 1, 1]",
        ),
    ),
    (
        MASK_RCNN,
        {
            "roi_heads.mask_head.mask_fcn4.bias": None,
            "roi_heads.mask_head.mask_fcn5.bias": (8,),
            "backbone.bottom_up.res3.1.conv2.norm.bias": (3,),
            "roi_heads.box_head.fc1.weight": (16, 8 * 49 + 1),
        },
        (
            "missing: roi_heads.mask_head.mask_fcn4.bias",
            "unexpected: roi_heads.mask_head.mask_fcn5.bias",
            "backbone.bottom_up.res3.1.conv2.norm.bias [3] instead of [8]",
            "roi_heads.box_head.fc1.weight [16, 393] instead of [16, 392]",
        ),
    ),
    (
        PREDICTOR,
        {
            "sd_base.decoder.last_conv.8.bias": None,
            "sd_base.aspp.aspp9.bn.bias": (8,),
            "sd_base.backbone.layer4.1.bn2.weight": (5,),
            "W+.m.0.weight": (4, 3, 3, 3),
        },
        (
            "1 missing: sd_base.decoder.last_conv.8.bias",
            "1 unexpected: sd_base.aspp.aspp9.bn.bias",
            "sd_base.backbone.layer4.1.bn2.weight [5] instead of [32]",
            "W+.m.0.weight [4, 3, 3, 3] instead of [3, 4, 3, 3]",
        ),
    ),
]
"""Shapes of wrong arrays, None for missing ones, and what the message has."""


def changed(case: Case, shapes: dict[str, tuple[int, ...] | None]) -> tuple[Any, ...]:
    """The small network's files with arrays of these shapes, without those of None."""
    state = network_cases.state_dict(case)
    for name, shape in shapes.items():
        if shape is None:
            del state[name]
        else:
            state[name] = claimed(*shape)
    return case.files(state)


@pytest.mark.parametrize(("case", "shapes", "parts"), FAULTS, ids=[case.network.name for case, *_ in FAULTS])
def test_conversion_lists_all_faults(case, shapes, parts):
    with pytest.raises(UserError) as error:
        convert(case, *changed(case, shapes))
    for part in parts:
        assert part in str(error.value)


IMPOSSIBLE: dict[Case, list[tuple[str, tuple[int, ...] | None, str]]] = {
    ADE20K: [
        ("encoder.conv1.weight", (4,), r"encoder\.conv1\.weight is not a convolution"),
        ("encoder.conv1.weight", (1025, 0, 3, 3), "features must be"),
        ("decoder.conv_last.4.weight", (0, 4, 1, 1), "num_classes must be"),
        ("encoder.layer3.0.conv1.weight", None, "blocks must be"),
    ],
    BISENET: [
        ("cp.resnet.conv1.weight", (4,), r"cp\.resnet\.conv1\.weight is not a convolution"),
        ("cp.resnet.conv1.weight", (1025, 0, 7, 7), "features must be"),
        ("conv_out.conv_out.weight", (0, 16, 1, 1), "num_classes must be"),
    ],
    MASK_RCNN: [
        ("backbone.bottom_up.stem.conv1.weight", (4,), r"no layer backbone\.bottom_up\.stem\.conv1"),
        ("backbone.bottom_up.stem.conv1.weight", (0, 3, 7, 7), "features must be"),
        ("backbone.fpn_output2.weight", None, r"no layer backbone\.fpn_output2"),
        ("backbone.bottom_up.res4.0.conv1.weight", None, "blocks must be"),
        ("roi_heads.mask_head.predictor.weight", (70000, 0, 1, 1), "num_classes must be"),
        ("roi_heads.box_head.fc1.weight", (), r"no layer roi_heads\.box_head\.fc1"),
    ],
    PREDICTOR: [
        ("sd_base.backbone.conv1.weight", None, "backbone.conv1.weight is missing"),
        ("sd_base.backbone.layer3.0.conv1.weight", None, "layer3.0.conv1.weight is missing"),
        ("sd_base.aspp.conv1.weight", (3,), r"aspp.conv1.weight has the shape \[3\]"),
        ("sd_base.decoder.conv1.weight", (0, 16, 1, 1), r"decoder.conv1.weight has the shape \[0, 16, 1, 1\]"),
        ("sd_base.decoder.last_conv.8.weight", (2**40, 8, 1, 1), "decoder.last_conv.8.weight has the shape"),
    ],
}


@pytest.mark.parametrize(
    ("case", "name", "shape", "message"),
    [
        pytest.param(case, name, shape, message, id=f"{case.network.name}-{name}-{shape}")
        for case, rows in IMPOSSIBLE.items()
        for name, shape, message in rows
    ],
)
def test_shapes_of_no_config_are_refused(case, name, shape, message):
    with pytest.raises(UserError, match=message):
        convert(case, *changed(case, {name: shape}))


# --- sizes ---


@cases(ADE20K, BISENET)
def test_one_and_many_agree_at_any_size(case):
    variables = checkpoints.unflatten(network_cases.random_variables(case))
    images = network_cases.random_images(3, 37, 50, 3, seed=1)
    size = (37, 50)

    @jax.jit
    def both(variables, images):
        scores = SCORES[case][0](variables, images, case.small)
        return scores, case.module.labels(variables, images, case.small)

    many, labels = (np.asarray(array) for array in both(variables, images))
    chex.assert_shape(many, (3, *size, case.small.num_classes))
    chex.assert_type(many, np.float32)
    spread = np.ptp(many)
    if case is ADE20K:  # probabilities
        np.testing.assert_allclose(many.sum(-1), 1, atol=1e-6)  # float32 rounding
        spread = 1
    assert np.abs(many[1] - many[0]).max() > 1e-2 * spread  # or the comparison below would show nothing
    assert np.abs(both(variables, images[1:2])[0][0] - many[1]).max() < TOLERANCE * spread
    chex.assert_type(labels, np.int32)
    assert len(np.unique(labels)) > 1
    assert np.mean(labels == many.argmax(-1)) > 0.999  # rounding decides ties between classes


@pytest.mark.parametrize("size", [(1, 2), (9, 5), (40, 24), (33, 64)])
@cases(ADE20K, BISENET)
def test_labels_have_the_size_of_the_images_by_default(case, size):
    variables = checkpoints.unflatten(network_cases.shapes(case, case.small))
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    shape = jax.eval_shape(lambda v, x: case.module.labels(v, x, case.small), variables, images).shape
    assert shape == (2, *size)


# --- bad arguments ---


def train_maps(variables: Any, images: jax.Array, config: Any) -> Any:
    return deeplab.train_maps(variables, images, config, key=jax.random.key(0))


CALLS: list[tuple[Case, Callable[..., Any]]] = [
    (ADE20K, ade20k.labels),
    (BISENET, bisenet.labels),
    (MASK_RCNN, mask_rcnn.features),
    (MASK_RCNN, mask_rcnn.detect),
    (PREDICTOR, deeplab.base),
    (PREDICTOR, deeplab.predict),
    (PREDICTOR, train_maps),
    (E4E, e4e.encode),
]


@pytest.mark.parametrize(("case", "call"), CALLS, ids=[f"{case.network.name}-{call.__name__}" for case, call in CALLS])
def test_bad_images_are_refused(case, call):
    single = case is MASK_RCNN
    good = np.zeros((16, 16, 3) if single else (2, 16, 16, 3), np.float32)
    bad = [good[0], good[None], good[..., :2], good[..., [0, 1, 2, 2]], np.moveaxis(good, -1, -3)]
    if case in (ADE20K, BISENET, MASK_RCNN):
        bad.append(good[:0])
    for images in bad:
        with pytest.raises(ValueError, match=r"must be \[H, W, 3\]" if single else r"must be \[N, H, W, 3\]"):
            call({}, images, case.small)
    with pytest.raises(ValueError, match="floating point"):
        call({}, good.astype(np.uint8), case.small)


BAD_SETTINGS: list[tuple[Case, tuple[dict[str, Any], ...]]] = [
    (ADE20K, ({"num_classes": 0}, {"features": 0}, {"blocks": (3, 4, 6)}, {"blocks": (3, 4, 6, 0)})),
    (BISENET, ({"num_classes": 0}, {"features": 0}, {"features": 1025})),
    (MASK_RCNN, ({"num_classes": 0}, {"features": 0}, {"blocks": (3, 4, 6)}, {"blocks": (3, 4, 6, 0)}, {"channels": 0},
                 {"hidden": 0}, {"proposals": 0}, {"detections": 0})),
    (PREDICTOR, ({"latent_names": ()}, {"latent_names": ("W+", "W+")}, {"latent_names": ("W+", "F12")},
                 {"blocks": (3, 4, 23)}, {"blocks": (3, 4, 0, 3)}, {"features": 0}, {"width": 0},
                 {"decoder_width": -1}, {"low_level_width": 0})),
    (E4E, ({"num_styles": 2}, {"num_styles": 15}, {"num_styles": 20}, {"style_dim": 0}, {"head_width": 0},
           {"head_depth": 0}, {"widths": (8, 8, 8)}, {"widths": (8, 8, 8, 0)}, {"blocks": (1, 1, 0, 1)},
           {"blocks": ()})),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        pytest.param(case, settings, id=f"{case.network.name}-{settings}")
        for case, rows in BAD_SETTINGS
        for settings in rows
    ],
)
def test_bad_configs_are_refused(case, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be"):
        type(case.small)(**settings)
