"""Generators of MMGeneration, BasicSR, GenForce and Hammer, and sentences for networks that are not StyleGAN2's.

The cases hold random generators of 8 and 16 px as the programs save them, and what the programs' own code computed from
them on a CPU: `w` from `z` (and labels `c`), and `image` (NCHW) from one style for each layer, `ws`, with stored noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ckpt_files
import jax
import numpy as np
import pytest

import ckpt_convert
from ckpt_convert import foreign, stylegan2
from samjax.errors import UserError
from samjax.io.arrays import Loaded
from samjax.nets import stylegan2 as network
from samjax.nets.stylegan2 import StyleGAN2Config

CASES = Path(__file__).parent / "cases" / "foreign"
ALL = {**stylegan2.NAMINGS, **foreign.NAMINGS}
CONFIG = StyleGAN2Config(
    img_resolution=32, z_dim=12, w_dim=12, mapping_layers=3, channel_base=256, channel_max=24, img_channels=3
)


# --- conversion ---


@pytest.mark.parametrize("case", ["mmgeneration", "basicsr", "genforce", "genforce_labels", "hammer", "hammer_labels"])
def test_images_and_styles_are_those_of_the_program(case: str) -> None:
    config, params, _ = ckpt_convert.load(CASES / f"{case}.pt")
    reference = np.load(CASES / f"{case}.npz")

    @jax.jit
    def draw(params: Any, z: jax.Array, c: jax.Array | None, ws: jax.Array) -> tuple[jax.Array, jax.Array]:
        image = network.synthesize(config, params, ws, noise="const").image
        return network.map_z(config, params, z, c)[:, 0], image.transpose(0, 3, 1, 2)

    with jax.default_matmul_precision("highest"):
        styles, image = draw(params, reference["z"], reference.get("c"), reference["ws"])
    # Float32 sums in another order; images and styles have magnitudes around 1.
    np.testing.assert_allclose(image, reference["image"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(styles, reference["w"], rtol=0, atol=1e-5)


def _arrays(program: str, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return stylegan2.to_theirs(foreign.NAMINGS[program], params, CONFIG)


@pytest.mark.parametrize("program", foreign.NAMINGS)
def test_tables_are_inverted_without_loss(program: str) -> None:
    naming, params = foreign.NAMINGS[program], ckpt_files.random_params(CONFIG)
    arrays = _arrays(program, params)
    assert len(arrays) == len(params) + len(naming.filters(CONFIG))  # no name stands for two parameters
    held = {name: Loaded(array) for name, array in arrays.items()}
    config = stylegan2.infer_config(naming, held, {})
    assert config == CONFIG
    back = stylegan2.to_ours(naming, held, config)
    for name, array in params.items():
        # GenForce's table adds 1 to the bias of styles, which rounds.
        np.testing.assert_allclose(back[name], array, rtol=0, atol=3e-7, err_msg=name)


def _names(naming: stylegan2.Naming) -> set[str]:
    return {*stylegan2.to_theirs(naming, ckpt_files.random_params(CONFIG), CONFIG), naming.marker}


def test_a_marker_tells_one_program() -> None:
    namings = {name: naming for name, naming in ALL.items() if naming.marker}
    for program, naming in namings.items():
        names = _names(naming)
        assert [other for other in namings if namings[other].marker in names] == [program]


@pytest.mark.parametrize("program", ["mmgeneration", "hammer"])
def test_filters_other_than_the_usual_one_are_reported(program: str) -> None:
    naming = foreign.NAMINGS[program]
    held = {name: Loaded(array) for name, array in _arrays(program, ckpt_files.random_params(CONFIG)).items()}
    held[next(iter(naming.filters(CONFIG)))] = Loaded(np.ones((4, 4), np.float32))
    with pytest.raises(UserError, match="filter"):
        stylegan2.to_ours(naming, held, CONFIG)


# --- other networks ---

STYLEGAN2 = ("to_rgb1.conv.modulation.weight", "style.1.weight", "convs.0.conv.blur.kernel")
OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("StyleGAN1", ("generator.progression.0.adain1.style.linear.weight_orig", "generator.to_rgb.0.conv.weight_orig")),
    ("StyleGAN1", ("mapping.dense0.weight", "truncation.w_avg", "synthesis.lod", "synthesis.layer17.weight")),
    ("StyleGAN1", ("g_mapping.dense0.weight", "g_synthesis.blocks.4x4.const")),
    ("StyleGAN3", ("synthesis.input.freqs", "synthesis.L0_36_512.weight", "mapping.fc0.weight")),
    ("StyleGAN-XL", ("synthesis.input.freqs", "synthesis.L0_36_512.weight", "mapping.embed_proj.weight")),
    ("StyleGAN3", ("synthesis.early_layer.frequency", "synthesis.layer0.conv.weight")),
    ("EG3D", ("backbone.synthesis.b4.const", "superresolution.block0.conv0.weight", "decoder.net.0.weight")),
    ("FastGAN", ("init.init.0.weight_orig", "feat_8.1.weight_orig", "se_64.main.1.weight_orig")),
    ("FastGAN", ("module.init.init.0.weight_orig", "module.feat_8.1.weight_orig")),
    ("lucidrains' stylegan2-pytorch", ("S.net.0.weight", "G.blocks.0.to_style1.weight", "G.blocks.0.to_noise1.weight")),
    ("lightweight-gan", ("G.initial_conv.0.weight", "G.layers.0.0.1.weight", "G.out_conv.weight")),
    ("adriansahlman", ("const", "conv_blocks.0.conv_block.0.layer.layer.weight")),
    ("GFPGAN,", ("conv_body_first.weight", "stylegan_decoder.style_conv1.bias", "stylegan_decoder.style_mlp.1.weight")),
    ("GFPGAN's clean", ("style_conv1.bias", "style_mlp.1.weight", "style_convs.0.modulated_conv.weight")),
    ("GPEN", (*(f"generator.{name}" for name in STYLEGAN2), "ecd0.0.weight", "ecd1.0.weight")),
    (
        "CodeFormer",
        ("position_emb", "ft_layers.0.linear1.weight", "quantize.embedding.weight", "encoder.blocks.0.weight"),
    ),
    (
        "MobileStyleGAN,",
        ("student.to_img1.conv.weight", "student.layers.0.conv1.conv.weight_dw", "mapping_net.layers.1.bias"),
    ),
    ("MobileStyleGAN's teacher", ("to_rgb1.conv.modulation.weight", "layers.0.conv1.conv.modulation.weight")),
    ("SWAGAN", (*STYLEGAN2, "to_rgbs.0.iwt.ll")),
    ("residual", ("synthesis.b4.const", "synthesis.b8.skip.weight", "synthesis.b8.torgb.weight")),
    ("original", ("synthesis.b4.const", "synthesis.b4.conv1.weight", "synthesis.b8.torgb.weight")),
    ("original", ("synthesis.early_layer.const", "synthesis.layer0.weight", "synthesis.output2.weight")),
    ("1024 pixels", (*STYLEGAN2, "convs.16.conv.weight")),
    ("1024 pixels", ("synthesis.b4.const", "synthesis.b4.torgb.weight", "synthesis.b2048.conv0.weight")),
    ("MSPIE", ("constant_input.input", "convs.0.conv.style_modulation.bias", "to_rgbs.0.upsample.kernel")),
    ("MMagic", ("constant_input.input", "embed.linear.weight_orig", "style_mapping.0.bias")),
    ("progressive GAN", ("scaleLayers.0.0.module.weight", "toRGBLayers.0.module.weight")),
    ("progressive GAN", ("lod", "layer0.weight", "output0.weight")),
    ("BigGAN", ("embeddings.weight", "generator.gen_z.weight_orig")),
    ("BigGAN", ("shared.weight", "linear.weight", "blocks.0.0.bn1.gain.weight")),
    ("StarGAN", ("from_rgb.weight", "encode.0.conv1.weight", "decode.0.conv1.weight")),
    ("CycleGAN", ("model.1.weight", "model.10.conv_block.1.weight")),
    (
        "encoder without",
        ("encoder.input_layer.0.weight", "encoder.body.0.res_layer.1.weight", "encoder.styles.0.convs.0.weight"),
    ),
    ("ArcFace", ("input_layer.0.weight", "body.0.res_layer.1.weight", "output_layer.3.weight")),
    ("Stable Diffusion", ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")),
    ("diffusion model,", ("down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight")),
    ("LoRA", ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",)),
    ("VAE", ("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight")),
    ("VQGAN", ("encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight")),
    ("CLIP", ("visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight")),
    ("LPIPS", ("lin0.model.1.weight", "lin4.model.1.weight")),
    ("Inception", ("Mixed_5b.branch1x1.conv.weight",)),
    ("VGG", ("features.0.weight", "classifier.6.weight")),
    ("ResNet", ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")),
    ("StyleGAN2 discriminator", ("convs.0.0.weight", "convs.1.conv1.0.weight", "final_conv.0.weight")),
    ("StyleGAN2 discriminator", ("b256.fromrgb.weight", "b4.conv.weight", "b4.out.weight")),
    ("a discriminator", ("input0.weight", "layer0.weight", "layer12.weight")),
)


def _is_sentence(text: str | None) -> bool:
    forbidden = r"damage|corrupt|attack|malicious|unsafe|harm|\n"
    return text is not None and not re.search(forbidden, text) and text.startswith("the file holds ") and "; " in text


@pytest.mark.parametrize(("what", "names"), OTHERS)
def test_other_networks_are_named(what: str, names: tuple[str, ...]) -> None:
    sentence = foreign.refusal(names, {})
    assert _is_sentence(sentence)
    assert what in str(sentence)
    assert foreign.refusal([f"module.{name}" for name in names], {}) == sentence


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("g_ema.input.input", (1, 512, 4, 2), "not square.* 4 x 2 "),
        ("synthesis.b4.const", (512, 3, 5), "not square.* 3 x 5 "),
        ("generator.constant_input.input", (1, 512, 8, 8), "other sizes.* 8 x 8 "),
    ],
)
def test_generators_that_do_not_begin_with_4_x_4_are_named(name: str, shape: tuple[int, ...], what: str) -> None:
    sentence = foreign.refusal([name], {name: shape})
    assert _is_sentence(sentence)
    assert re.search(what, str(sentence))


def test_a_dcgan_is_known_by_its_shapes() -> None:
    shapes = {f"main.{i}.weight": (8, 8, 4, 4) for i in (0, 3, 6)}
    assert "DCGAN" in str(foreign.refusal(shapes, shapes))
    assert foreign.refusal(shapes, {}) is None


def test_generators_that_convert_are_not_refused_whatever_is_beside_them() -> None:
    beside = [name for what, names in OTHERS if re.search("discriminator|encoder", what) for name in names]
    for naming in ALL.values():
        if naming.marker:
            names = [*(f"generator.{name}" for name in _names(naming)), *beside]
            assert foreign.refusal(names, dict.fromkeys(names, (1, 8, 4, 4))) is None


def test_unknown_networks_are_not_named() -> None:
    assert foreign.refusal([], {}) is None
    assert foreign.refusal(["weight", "", "a" * 10**6, *(f"layer.{i}" for i in range(100_000))], {}) is None
