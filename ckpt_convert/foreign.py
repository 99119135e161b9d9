"""Generators of other programs: tables of names where the network is StyleGAN2's, and sentences for all others.

What the programs store differently, and these tables undo:

- MMGeneration and MMagic keep the weights before their equalized learning rate as `weight_orig`.
- GenForce follows TensorFlow: it flips up-convolutions, and stores the bias of styles without its 1. Hammer, its
  successor, has almost the same names, but stores both like NVIDIA's PyTorch repositories.
- BasicSR does not store the resampling filters; the generator inside the first GFPGAN is BasicSR's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckpt_convert import stylegan2
from ckpt_convert.stylegan2 import FIRST_CONST, MAP, PLUS_ONE, Naming, blur_filters, layer_index, rows_in_lists
from ckpt_convert.tables import CONV, DENSE, SAME, Layout, Row
from samjax.nets.stylegan2 import StyleGAN2Config

FLIPPED = Layout(lambda a: CONV.ours(a)[::-1, ::-1], lambda a: CONV.theirs(a[::-1, ::-1]))


# --- names ---


def _numbered(resolution: str, layer: str) -> str:
    """Name of a layer where all are numbered, as in GenForce's network."""
    return f"synthesis.{'output' if layer == 'torgb' else 'layer'}{layer_index(resolution, layer)}"


def _hammer_filters(config: StyleGAN2Config) -> dict[str, float]:
    levels = range(len(config.block_resolutions) - 1)
    return {"synthesis.filter": 1.0} | {f"synthesis.layer{2 * i + 1}.filter": 1.0 for i in levels}


_BLOCK = r"synthesis/b(\d+)"

MMGENERATION = Naming(
    rows=rows_in_lists(
        w_avg="w_avg",  # MMagic's, if it averages styles
        dense="style_mapping.{}", const="constant_input.input", noise="injected_noise_{}",
        strength="noise_injector.weight", conv="conv", modulation="style_modulation",
        dense_weight="linear.weight_orig", conv_weight="weight_orig",
    ),
    filters=blur_filters,
    marker="constant_input.input",
    format="MMGeneration checkpoint",
    note=(
        "generators that MMGeneration trained itself may draw blue, green, red, in this order; those that it converted"
        " draw red, green, blue; the file does not state which"
    ),
)  # fmt: skip

BASICSR = Naming(
    rows=rows_in_lists(
        w_avg="w_avg",  # never stored
        dense="style_mlp.{}", const="constant_input.weight", noise="noises.noise{}", strength="weight",
        conv="modulated_conv", modulation="modulation", prefix="style_",
    ),
    marker="style_conv1.activate.bias",
    format="BasicSR checkpoint",
    note=(
        "BasicSR's StyleGAN2GeneratorBilinear has the same names, but resamples bilinearly: a generator of that class"
        " draws other images here"
    ),
)  # fmt: skip

_NUMBERED_ROWS = (
    Row(r"mapping/fc(\d+)/weight", lambda i: f"mapping.dense{i}.weight", DENSE),
    Row(r"mapping/fc(\d+)/bias", lambda i: f"mapping.dense{i}.bias", SAME),
    Row(_BLOCK + r"/const", lambda r: "synthesis.early_layer.const", FIRST_CONST),
    Row(_BLOCK + r"/(\w+)/noise_const", lambda r, k: f"{_numbered(r, k)}.noise", MAP),
    Row(_BLOCK + r"/(\w+)/noise_strength", lambda r, k: f"{_numbered(r, k)}.noise_strength", SAME),
    Row(_BLOCK + r"/(\w+)/affine/weight", lambda r, k: f"{_numbered(r, k)}.style.weight", DENSE),
    Row(_BLOCK + r"/(\w+)/affine/bias", lambda r, k: f"{_numbered(r, k)}.style.bias", SAME),
    Row(_BLOCK + r"/(\w+)/weight", lambda r, k: f"{_numbered(r, k)}.weight", CONV),
    Row(_BLOCK + r"/(\w+)/bias", lambda r, k: f"{_numbered(r, k)}.bias", SAME),
)

GENFORCE = Naming(
    rows=(
        Row(r"mapping/w_avg", lambda: "truncation.w_avg", SAME),
        Row(r"mapping/label_matrix", lambda: "mapping.label_weight", SAME),
        Row(_BLOCK + r"/(\w+)/affine/bias", lambda r, k: f"{_numbered(r, k)}.style.bias", PLUS_ONE),
        Row(_BLOCK + r"/(conv0)/weight", lambda r, k: f"{_numbered(r, k)}.weight", FLIPPED),
        *_NUMBERED_ROWS,
    ),
    # The resampling filters, [1, 1, 4, 4]. Its generator has no option for others.
    ignored=r"synthesis\.(layer\d+\.filter|upsample)\.kernel",
    marker="synthesis.upsample.kernel",
    format="GenForce checkpoint",
)

HAMMER = Naming(
    rows=(
        Row(r"mapping/w_avg", lambda: "w_avg", SAME),
        Row(r"mapping/embed/weight", lambda: "mapping.embedding.weight", DENSE),
        Row(r"mapping/embed/bias", lambda: "mapping.embedding.bias", SAME),
        *_NUMBERED_ROWS,
    ),
    filters=_hammer_filters,
    marker="synthesis.filter",
    format="Hammer checkpoint",
    note="a state dict does not state conv_clamp: none is used, which matters for large values only",
)

NAMINGS: Mapping[str, Naming] = {
    "mmgeneration": MMGENERATION,
    "basicsr": BASICSR,
    "genforce": GENFORCE,
    "hammer": HAMMER,
}
"""Tables by program, for state dicts without prefixes such as "generator_ema." or "stylegan_decoder."."""


# --- other networks ---

_USE = "samjax inverts with StyleGAN2 generators only: give it one that was trained on the same kind of images"
_TAKES = "which takes images rather than drawing them"
_SKIP = "samjax has the skip architecture (config-f) only: give it a generator of that kind"
_SMALLER = "samjax draws up to 1024 x 1024 pixels: give it a smaller generator"
_WITH_GENERATOR = "give samjax the generator of the same training, or the whole checkpoint"


class _Kind(NamedTuple):
    """A kind of network, known by the names of its arrays.

    Attributes:
      what: a noun phrase.
      has: patterns, each of which some name has, after any prefix.
      lacks: pattern that no name has; "" for none.
      advice: what to do.
    """

    what: str
    has: tuple[str, ...]
    lacks: str = ""
    advice: str = _USE


_VARIANTS = (
    _Kind(
        "an EG3D generator, which draws through a volume rather than by StyleGAN2 alone",
        (r"backbone\.synthesis\.b4\.const$", r"superresolution\."),
    ),
    _Kind("GPEN, a network that restores faces, whose generator stacks noise as channels", (r"ecd0\.", r"ecd1\.")),
    _Kind(
        "MobileStyleGAN, whose generator draws wavelets with separable convolutions",
        (r"to_img1\.conv\.weight$", r"layers\.0\.conv1\.conv\.weight_dw$"),
        advice="give samjax the StyleGAN2 generator that it was distilled from",
    ),
    _Kind(
        "the synthesis network of MobileStyleGAN's teacher without the mapping network",
        (r"layers\.0\.conv1\.conv\.modulation\.weight$", r"to_rgb1\.conv\.modulation\.weight$"),
        advice="give samjax the rosinality checkpoint that it was extracted from",
    ),
    _Kind("a SWAGAN generator, which draws wavelets", (r"to_rgbs\.0\.iwt\.",)),
    _Kind(
        "a StyleGAN2 generator with the residual architecture",
        (r"synthesis([./]b?8(x8)?[./][sS]kip|\.residual1)[./]weight$",),
        advice=_SKIP,
    ),
    _Kind(
        "a StyleGAN2 generator with the original architecture, which forms RGB at the last resolution only",
        (r"synthesis\.(b4|early_layer)\.const$", r"synthesis\.(b\d+\.torgb|output\d+)\.weight$"),
        lacks=r"synthesis\.(b4\.torgb|output0)\.weight$",
        advice=_SKIP,
    ),
    _Kind(
        "a StyleGAN2 generator of more than 1024 pixels a side",
        (r"(synthesis[./]b?2048(x2048)?[./]|(style_)?convs\.16\.(modulated_)?conv\.weight(_orig)?$)",),
        advice=_SMALLER,
    ),
    _Kind(
        "a StyleGAN2 generator of more than 1024 pixels a side",
        (r"synthesis\.layer17\.weight$", r"synthesis\.early_layer\.const$"),
        advice=_SMALLER,
    ),
    _Kind(
        "a StyleGAN2 generator of MMGeneration with positional encodings (MSPIE)",
        (r"head_pos_enc\.", r"convs\.0\.conv\.style_modulation\."),
    ),
    _Kind(
        "a StyleGAN2 generator of MMGeneration that interpolates instead of filtering (MSPIE)",
        (r"convs\.0\.conv\.style_modulation\.", r"to_rgbs\.0\.upsample\.kernel$"),
        lacks=r"convs\.0\.conv\.blur\.kernel$",
    ),
    _Kind(
        "a class-conditional StyleGAN2 generator of MMagic",
        (r"embed\.linear\.weight_orig$", r"constant_input\.input$"),
        advice="samjax reads MMagic's unconditional ones: give it the NVIDIA pickle that it was converted from",
    ),
)
"""Relatives of StyleGAN2, whose names may include a marker of `stylegan2.NAMINGS` or `NAMINGS`."""

_OTHERS = (
    # Relatives of StyleGAN.
    _Kind("a StyleGAN-XL generator", (r"synthesis\.input\.freqs$", r"mapping\.embed_proj\.")),
    _Kind("a StyleGAN3 generator", (r"synthesis\.(input\.(freqs|affine\.weight)$|L0_\d+_\d+\.)",)),
    _Kind("a StyleGAN3 generator", (r"synthesis\.early_layer\.(frequency|phase)$",)),
    _Kind(
        "a StyleGAN1 generator",
        (
            r"(progression\.\d+\.adain1\.|convs\.0\.adain1\.|g_synthesis\.blocks\.4x4\.|init_block\.epi1\."
            r"|StyleMod[./]|synthesis\.layer0\.apply_noise\.|synthesis\.lod$)",
        ),
    ),
    _Kind(
        "a generator of lucidrains' stylegan2-pytorch, which despite its name is another network (bilinear"
        " upsampling, a noise weight for each channel, no equalized learning rate)",
        (r"blocks\.0\.to_style1\.weight$", r"blocks\.0\.to_noise1\.weight$"),
    ),
    _Kind("a generator of lucidrains' lightweight-gan", (r"G\.initial_conv\.0\.", r"G\.out_conv\.")),
    _Kind("a FastGAN generator", (r"init\.init\.", r"feat_8\.")),
    _Kind(
        "a generator of adriansahlman's stylegan2_pytorch",
        (r"conv_blocks\.0\.conv_block\.0\.",),
        advice="give samjax the NVIDIA pickle that it was converted from, or a generator of another program",
    ),
    _Kind(
        "GFPGAN, a network that restores faces, whose generator resamples bilinearly, unlike StyleGAN2",
        (r"stylegan_decoder\.style_conv1\.bias$",),
        advice="give samjax GFPGANv1.pth, whose generator converts, or another StyleGAN2 of faces",
    ),
    _Kind(
        "a generator of GFPGAN's clean version, which resamples bilinearly, unlike StyleGAN2",
        (r"style_conv1\.bias$", r"style_mlp\.1\.weight$"),
    ),
    _Kind("a StyleSwin generator", (r"layers\.0\.blocks\.0\.attn\.0\.", r"to_rgbs\.0\.")),
    _Kind("a StarGAN v2 generator", (r"from_rgb\.weight$", r"decode\.0\.")),
    _Kind(
        "a progressive GAN generator, which has no styles",
        (
            r"(scaleLayers\.0\.|noise2feat\.|lod$|4x4[./]Dense[./]weight$)",
            r"(toRGBLayers\.|torgb_layers\.|output0\.|ToRGB_lod0[./])",
        ),
    ),
    _Kind("a BigGAN generator, which has no styles", (r"(gen_z\.|blocks\.0\.0\.bn1\.gain\.)",)),
    _Kind("a CycleGAN or pix2pix generator, which translates images", (r"model\.1\d\.conv_block\.1\.weight$",)),
    # Encoders and networks that restore images.
    _Kind("an e4e or pSp encoder without its generator", (r"styles\.0\.convs\.0\.",), advice=_WITH_GENERATOR),
    _Kind(f"ArcFace, a network that recognizes faces, {_TAKES}", (r"input_layer\.0\.weight$", r"body\.0\.res_layer\.")),
    _Kind("CodeFormer, a network that restores faces", (r"quantize\.embedding\.", r"(ft_layers\.|position_emb$)")),
    _Kind("an upscaling network, such as ESRGAN", (r"conv_first\.weight$", r"conv_last\.weight$")),
    # Diffusion, images and text.
    _Kind("a Stable Diffusion checkpoint, which has no styles", (r"model\.diffusion_model\.",)),
    _Kind("a LoRA of a diffusion or language model", (r"(lora_(unet|te\d?)_|lora_(A|B|up|down)\.)",)),
    _Kind("a VQGAN, an autoencoder", (r"quantize\.embedding\.weight$", r"(encoder|decoder|generator)\.")),
    _Kind(
        "a variational autoencoder (VAE) of images",
        (
            r"encoder\.(conv_in\.|down_blocks\.0\.|down\.0\.)",
            r"decoder\.(conv_in\.|conv_out\.|up_blocks\.0\.|up\.0\.)",
        ),
    ),
    _Kind(
        "a network of a diffusion model, which has no styles",
        (
            r"(down_blocks|input_blocks|double_blocks|transformer_blocks)\.0\.",
            r"(mid_block|middle_block|time_embed|time_text_embed|single_blocks|x_embedder)\.",
        ),
    ),
    _Kind(
        f"CLIP, a network of images and text, {_TAKES}",
        (r"(visual|vision_model)\.", r"(token_embedding|text_model|transformer\.resblocks)\."),
    ),
    _Kind(
        "a language model, or a part of one",
        (r"(embed_tokens|wte|word_embeddings|token_embedding)\.weight$",),
    ),
    # Metrics and classifiers.
    _Kind(
        f"the weights of LPIPS, a distance between images, {_TAKES}",
        (r"lin0\.(model\.)?1\.weight$", r"lin4\.(model\.)?1\.weight$"),
    ),
    _Kind(f"an Inception network, {_TAKES}", (r"(Mixed_5b|inception3a)\.",)),
    _Kind(f"a VGG or AlexNet, {_TAKES}", (r"features\.0\.weight$", r"classifier\.\d\.weight$")),
    _Kind(f"a ResNet, {_TAKES}", (r"layer1\.0\.conv1\.weight$", r"fc\.weight$")),
    # Discriminators come last, since the files of other networks may hold one too.
    _Kind(
        "a StyleGAN2 discriminator without its generator",
        (
            r"(convs\.0\.0\.(conv\.)?weight(_orig)?|conv_body\.0\.0\.weight|b\d+\.fromrgb\.weight)$",
            r"(final_conv\.|final_linear\.|b4\.out\.weight$)",
        ),
        advice=_WITH_GENERATOR,
    ),
    _Kind(
        "a discriminator without its generator",
        (r"(input0\.weight$|from_rgb\.0\.|fromRGBLayers\.0\.|FromRGB_lod0[./])",),
        advice=_WITH_GENERATOR,
    ),
)

_MOST_NAMES, _LONGEST_NAME = 5_000, 200
_CONSTANT = re.compile(
    r"(?:^|[./])(input\.input|synthesis\.b4\.const|constant_input\.(input|weight)|early_layer\.const|4x4/Const/const)$"
)


def refusal(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Names a network that is not a StyleGAN2 generator as samjax has it.

    Looks at the first 5,000 names only, so that a file of many names takes no longer.

    Args:
      names: of the arrays of a state dict, with any prefix.
      shapes: of the arrays, as far as they are known.

    Returns:
      One sentence that says what it is and what to do; None for generators that `stylegan2.NAMINGS` or `NAMINGS`
      convert, with whatever is beside them, and for unknown networks.
    """
    held = [name for name in itertools.islice(names, _MOST_NAMES) if len(name) <= _LONGEST_NAME]
    for name in held:
        if _CONSTANT.search(name) and (sentence := _of_constant(shapes.get(name, ()))):
            return sentence
    if sentence := _first(_VARIANTS, held):
        return sentence
    markers = tuple(each.marker for each in (*stylegan2.NAMINGS.values(), *NAMINGS.values()) if each.marker)
    if any(name.endswith(markers) for name in held):
        return None
    return _first(_OTHERS, held) or _of_shapes(held, shapes)


def _first(kinds: Iterable[_Kind], names: list[str]) -> str | None:
    def some(pattern: str) -> bool:
        compiled = re.compile(rf"(?:^|[./]){pattern}")
        return any(compiled.search(name) for name in names)

    for what, has, lacks, advice in kinds:
        if all(map(some, has)) and not (lacks and some(lacks)):
            return f"the file holds {what}; {advice}"
    return None


def _of_constant(shape: tuple[int, ...]) -> str | None:
    """A sentence if the constant [..., height, width] of a StyleGAN2 generator is not 4 x 4."""
    if len(shape) not in (3, 4) or tuple(shape[-2:]) == (4, 4):
        return None
    height, width = shape[-2:]
    kind = "images that are not square" if height != width else "images of other sizes"
    return (
        f"the file holds a StyleGAN2 generator of {kind}, which begins with {height} x {width} values; samjax's begin"
        " with 4 x 4: give it a generator of square images of 2^n pixels"
    )


def _of_shapes(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """A sentence for a DCGAN, whose names say little."""
    kernels = [shapes.get(name, ()) for name in names if re.search(r"(?:^|\.)main\.\d+\.weight$", name)]
    if sum(len(shape) == 4 and shape[-2:] == (4, 4) for shape in kernels) >= 3:
        return f"the file holds a network of a DCGAN, which has no styles; {_USE}"
    return None
