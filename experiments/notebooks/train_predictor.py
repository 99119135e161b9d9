# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train an invertibility predictor for a domain of your own
#
# SAM needs to know how well each latent layer (W+, F4, F6, F8, F10) reproduces each part of an image. By default it
# measures this, by an inversion in each layer, for every new image. An **invertibility predictor** predicts it from the
# image at once. It is trained on a directory of images that were inverted in each layer alone; an **encoder**, which
# gives the start of W+, may be trained before.
#
# From a StyleGAN2 and a directory of images of its domain, this notebook makes both, and then inverts an image with
# them. By default the domain is the embedded demo, whose images are drawn here.
#
# ## How long it takes
#
# Nearly all of the time goes into inverting the images: images x layers x steps. The demo as set below takes less than
# half an hour on two CPU cores: 20 seconds an image (five layers of 30 steps), and 1.25 seconds a step of the
# predictor's training. A step of an encoder's training takes 2.5 seconds.
#
# For a generator of the usual size (config-f, 256 px) an image takes 5 x 60 steps:
#
# | | a step | an image |
# |---|--:|--:|
# | two hardware threads of one CPU core, measured | 1.32 s | 7 min |
# | T4 GPU, estimated | 0.11 s | 33 s |
# | one TPU v5e chip, estimated | 0.03 s | 9 s |
#
# The estimates are those of `docs/scale.md`: the operations or the bytes of a step, whichever take longer, at 30% of a
# device's stated peaks (T4: 8.1 TFLOP/s, 320 GB/s). A free runtime ends after some hours: keep `OUTPUT` in Google
# Drive, and run the notebook again. Every step resumes where it was interrupted.

# %% tags=["parameters"]
SAMJAX = None  # what to install if samjax is missing: a git address, or the path of a wheel that you upload

OUTPUT = "output/my_domain"  # directory for everything; "/content/drive/MyDrive/…" is kept after a Colab runtime ends
GENERATOR = None  # path of your StyleGAN2: .pkl, .pt, .safetensors, or a converted directory; None: the demo's
IMAGES = None  # directory of images, dozens at least; None: scenes of the demo

SCENES = 24  # number of scenes to draw for the demo
INVERSION_STEPS = None  # steps of each inversion; None: 30 for the demo, 60 for other generators
TRAIN_ENCODER = False  # True: trains an encoder first, on the same images
ENCODER_STEPS = 300  # steps of encoder training
PREDICTOR_STEPS = 300  # steps of predictor training
SIZE = "small"  # size of both networks ("small": a megabyte or two; "full": the authors', for much data)

# %% [markdown]
# Install samjax if it is missing; on Colab this takes a minute or two. If Colab asks you to restart the runtime, do so
# and run all cells again.

# %%
import importlib.util
import re
import subprocess
import sys


class MissingError(Exception):
    def _render_traceback_(self):  # Jupyter shows these lines in place of a traceback
        return [f"error: {self}"]


if importlib.util.find_spec("samjax") is None:
    if SAMJAX is None:
        raise MissingError(
            "samjax is not installed: set the parameter SAMJAX to its git address (https://HOST/OWNER/samjax.git), or "
            "upload its wheel and set SAMJAX to the path of the file, then run the notebook again"
        )
    package = f"samjax[train] @ git+{SAMJAX.removeprefix('git+')}" if "://" in SAMJAX else f"{SAMJAX}[train]"
    driver = re.match(r"\d+", subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader"))
    if driver:
        accelerated = "jax[cuda13]" if int(driver[0]) >= 580 else "jax[cuda12]"
    else:
        accelerated = "jax[tpu]" if importlib.util.find_spec("libtpu") else "jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, accelerated], check=True)
    importlib.invalidate_caches()

# %%
import shutil
from pathlib import Path

import jax
from IPython.display import Image, display

from ckpt_convert import get
from samjax import Pipeline, demo, notebook, report, runtime, training
from samjax.config import Options
from samjax.io import files, images

runtime.configure()  # before the first computation
output = notebook.output_directory(OUTPUT)
if GENERATOR is None:  # as a generator without an encoder and a predictor: the demo's own are not used
    domain = {"gan_weights": demo.GENERATOR, "image_category": "demo"}
else:
    domain = {"gan_weights": get.ready(Path(GENERATOR), "generator", notify=print), "image_category": "custom"}

# %% [markdown]
# ## Images
#
# They must show what the generator generates, framed as its training images were; other sizes are resized. Every fifth
# image is kept for validation: no network is trained on it. To add images later, choose another `OUTPUT`.

# %%
if IMAGES is None:
    demo.draw_scenes(output / "scenes", SCENES, seed=40)
paths = images.list_images(Path(IMAGES or output / "scenes"))
parts = {name: output / "images" / name for name in ("train", "val")}
for i, path in enumerate(paths):
    copy = parts["val" if i % 5 == 1 else "train"] / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        shutil.copyfile(path, copy)
print(f"{len(paths)} images, {len(paths[1::5])} of them for validation")
notebook.show_row({path.name: images.read_image(path) for path in paths[:5]}, height=160)

# %% [markdown]
# ## Encoder (optional)
#
# It is trained through the generator: the generator's image of its code must resemble the image, by pixels and LPIPS;
# and for samples of the generator it must give their styles. The figure shows images of the validation and the
# generator's images of their codes.

# %%
e4e_path = None
if TRAIN_ENCODER:
    e4e_path = training.train_encoder(
        training.EncoderOptions(
            image_folder=parts["train"], image_folder_val=parts["val"], preset=SIZE, output_folder=output / "encoder",
            num_steps=ENCODER_STEPS, val_frequency=max(ENCODER_STEPS // 5, 1), batch_size=8,
            lr=2e-3 if SIZE == "small" else 1e-3, **domain,
        )
    )  # fmt: skip
    display(Image(output / "encoder" / "curve.png"))
    display(Image(max((output / "encoder" / "figures").iterdir())))

# %% [markdown]
# ## Every image in every layer
#
# This takes longest, and makes the training data of the predictor: `data/PART/LAYER/NAME/final` contains an image and
# its inversion in that layer alone, laid out as by the authors' program.

# %%
print(*jax.devices(), sep="\n")
results = {}
for name, directory in parts.items():
    results[name] = training.invert_directory(
        training.DirectoryOptions(
            image_folder=directory, output_path=output / "data" / name, e4e_path=e4e_path,
            preset=None if GENERATOR is None else "fast", num_opt_steps=INVERSION_STEPS, **domain,
        )
    )  # fmt: skip
    for path, reason in results[name].failed.items():
        print(f"skipped {path}: {reason}")
data = output / "data" / "val"
example = min((data / "W+").iterdir()).name
shown = {"input": images.read_image(data / "W+" / example / "final" / "input.png")}
for layer in results["val"].latent_names:
    shown[layer] = images.read_image(data / layer / example / "final" / "reconstruction.png")
notebook.show_row(shown, height=200)

# %% [markdown]
# ## Predictor
#
# It learns the LPIPS map between each image and its inversions. The figure shows images of the validation with their
# true maps and the predicted ones. The last line is the measure that matters: the share of the area whose segment gets
# the same layer as from the true maps. It is a rough estimate if there are few images for validation.

# %%
size = min(256, *images.image_size(data / "W+" / example / "final" / "input.png"))  # at which inversions compare
inv_model_path = training.train_predictor(
    training.PredictorOptions(
        dataset_folder_train=output / "data" / "train", dataset_folder_val=data, output_folder=output / "predictor",
        preset=SIZE, cache_targets=True, batch_size=8, num_steps=PREDICTOR_STEPS,
        val_frequency=max(PREDICTOR_STEPS // 5, 1), image_category=domain["image_category"], target_H=size,
        target_W=size, lr=2e-3 if SIZE == "small" else None,
    )
)  # fmt: skip
display(Image(output / "predictor" / "curve.png"))
display(Image(max((output / "predictor" / "figures").iterdir())))

# %% [markdown]
# ## An inversion with both
#
# An image of the validation, inverted with predicted maps: there are no more inversions in each layer.

# %%
path = min(parts["val"].iterdir())
options = Options(
    e4e_path=e4e_path,
    inv_model_path=inv_model_path,
    num_opt_steps=INVERSION_STEPS,
    edits_folder=demo.EDITS if GENERATOR is None else None,
    **domain,
)
pipeline = Pipeline.from_options(options, notify=print)
directory = output / "inversions" / files.safe_name(path.stem)
inversion = pipeline.invert(path, directory=directory)
content = report.save_summary(
    directory, [inversion], inversion, pipeline.edit_sweep(inversion), seed=options.seed, seconds={}
)
notebook.show(report.invertibility_figure(content))
notebook.show(report.comparison_figure(content))

# %% [markdown]
# `samjax.Pipeline` and the programs in `experiments/` use the predictor as `inv_model_path`, and the encoder as
# `e4e_path`.

# %%
print(notebook.download(inv_model_path))
if e4e_path is not None:
    print(notebook.download(e4e_path))
