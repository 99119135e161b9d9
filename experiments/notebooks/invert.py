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
# # Invert an image into a StyleGAN2, and edit it
#
# A GAN can edit the images that it generates. To edit another image, it is first *inverted*: latents are optimized from
# which the generator reproduces it. Styles alone (W+) are easy to edit, but lose everything that the generator has not
# learned; later layers (F4, F6, F8, F10) preserve it, but do not follow edits. **SAM** (*Spatially-Adaptive Multilayer
# Selection for GAN Inversion and Editing*, CVPR 2022) chooses for each segment of an image the earliest layer that
# still reproduces it.
#
# This notebook inverts and edits a scene of the embedded demo, then an image of yours, on a CPU, a GPU or a TPU. On
# Colab, choose one under *Runtime*, *Change runtime type*, then *Runtime*, *Run all*.

# %% tags=["parameters"]
SAMJAX = None  # what to install if samjax is missing: a git address, or the path of a wheel that you upload

IMAGE = None  # path of your image; None: on Colab you are asked for it, elsewhere another scene of the demo
GENERATOR = None  # path of your StyleGAN2: .pkl, .pt, .safetensors, or a converted directory; None: as for IMAGE
CATEGORY = None  # "cars", "faces" or "cats": the authors' networks instead, downloaded once, for non-commercial use
EDITS = None  # directory of directions for the generator; None: its own, or principal components of its styles

THRESHOLD = None  # threshold for your image; None: the category's. The figures below help to choose it
STEPS = None  # number of optimization steps; None: 30 for the demo, 60 for other generators
STRENGTHS = (0.0, 1.0, 2.0, 3.0)  # strengths of the edits, as multiples of the direction
OUTPUT = "output"  # results go to a subdirectory named after your image

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
from pathlib import Path

import jax

from ckpt_convert import get
from samjax import Pipeline, demo, directions, notebook, report
from samjax.config import Options
from samjax.io import files, images
from samjax.session import Session

# %% [markdown]
# ## The demo
#
# A scene with a car, trees and a house. The demo's generator has learned cars, roads and hills, but no trees and
# houses. The demo also has an encoder, which gives the start of W+, and an invertibility predictor, which predicts the
# error of each latent layer at each pixel. All of these are part of samjax, and so are the segments of this scene.
#
# In a checkout of samjax, the page of `experiments/app/app.py` and the program `experiments/invert.py` do the same.

# %%
pipeline = Pipeline.from_pretrained("demo", num_opt_steps=STEPS, edit_strengths=STRENGTHS)
print(*jax.devices(), sep="\n")
session = Session(
    pipeline,
    demo.SAMPLES / "scene0.png",
    demo.SAMPLES / "scene0_segments.png",
    segment_names=demo.SEGMENT_NAMES,
)
with notebook.progress() as on_progress:
    session.analyze(on_progress)
notebook.show(report.segments_figure(session.preview()))
notebook.show(report.invertibility_figure(session.preview()))

# %% [markdown]
# Each segment takes the earliest layer whose mean error is at most the threshold. A low threshold favors fidelity: more
# segments take late layers. A high one favors editability, up to where all segments take W+. Nothing has been inverted
# yet, so trying thresholds takes no time.


# %%
def show_thresholds(session):
    """Shows the layer of each segment at several thresholds, including that of the session."""
    chosen, content = session.threshold, session.preview()
    height, width = 160, round(160 * content.image.shape[1] / content.image.shape[0])
    overlays = {}
    for threshold in report.shown_thresholds(content):
        session.threshold = threshold
        overlays[f"threshold {threshold:.3g}"] = report.layers_overlay(session.preview(), height, width)
    session.threshold = chosen
    notebook.show_row(overlays, height=height)


show_thresholds(session)

# %% [markdown]
# At the demo's own threshold, trees and house take late layers, and the car an early one.

# %%
notebook.show(report.layers_figure(session.preview()))
with notebook.progress() as on_progress:
    session.invert(on_progress)
print(session.summary())
content = session.describe()
notebook.show(report.comparison_figure(content))

# %% [markdown]
# An edit moves W+ along a direction. Segments in early layers follow, those in late layers stay as they are. Several
# directions can be combined.

# %%
notebook.show(report.edit_strip(content, "blue_car"))
notebook.show_row({"blue car at dusk": session.full_size(session.edit({"blue_car": 2.0, "dusk": 1.5}))})

# %% [markdown]
# ## Your image
#
# On Colab, two dialogs ask for an image and a generator, unless the parameters above name them. A generator is the file
# of a StyleGAN2 as NVIDIA's PyTorch or TensorFlow code or rosinality's writes it. It is converted here; nothing in it
# is executed. Cancel continues with the demo's. For large files, mounting Google Drive and giving the path is faster.
#
# The image must show what the generator generates, framed as its training images were. Unless there is a predictor for
# this generator, the error maps are measured by an inversion in each layer, which takes as long as five inversions.

# %%
image = Path(IMAGE or notebook.upload("your image") or demo.SAMPLES / "scene1.png")
generator = None if CATEGORY else GENERATOR or notebook.upload("your generator")
if CATEGORY:
    get.get(CATEGORY, notify=print)
options = Options(
    image_category=CATEGORY,
    gan_weights=Path(generator) if generator else None,
    edits_folder=Path(EDITS) if EDITS else None,
    preset="fast" if CATEGORY or generator else None,
    num_opt_steps=STEPS,
    threshold=THRESHOLD,
    edit_strengths=STRENGTHS,
)
pipeline = Pipeline.from_options(
    get.prepare(options),
    name=Path(generator).name if generator else None,
    notify=print,
)
if not pipeline.directions:  # the first principal components of W (GANSpace); `samjax.directions` has other methods
    config, params = pipeline.generator.config, pipeline.generator.params
    found = directions.ganspace(directions.sample_styles(config, params, key=jax.random.key(0)), count=4)
    pipeline.directions = {
        f"component_{i}": directions.spread_over(vector, config) for i, vector in enumerate(found.vectors)
    }

session = Session(pipeline, image)
print(f"{image.name}: {pipeline.config.num_opt_steps} steps for an inversion")
with notebook.progress() as on_progress:
    session.analyze(on_progress)
notebook.show(report.segments_figure(session.preview()))
notebook.show(report.invertibility_figure(session.preview()))

# %% [markdown]
# Choose a threshold from these figures, write it into the cell after them, and run from there. The cells above need not
# run again.

# %%
show_thresholds(session)

# %%
session.threshold = pipeline.category.threshold  # or another number
# session.force(3, "F10")  # chooses the layer of segment 3 by hand
notebook.show(report.layers_figure(session.preview()))

# %%
with notebook.progress() as on_progress:
    session.invert(on_progress)
print(session.summary())
content = session.describe()
notebook.show(report.comparison_figure(content))

# %%
for name in pipeline.directions:
    notebook.show(report.edit_strip(content, name))

# %% [markdown]
# ## Results
#
# Latents, images at the generator's size, and a report, one HTML file that explains the result and opens anywhere,
# also offline. The edited image has the strengths below.

# %%
strengths = {name: STRENGTHS[-1] if i == 0 else 0.0 for i, name in enumerate(pipeline.directions)}
directory = notebook.output_directory(f"{OUTPUT}/{session.name}")
for path in session.save(directory, strengths):
    print(path)
for name in pipeline.directions:
    for strength in STRENGTHS:
        edited = session.full_size(session.edit({name: strength}))
        images.save_png(directory / "edits" / f"{files.safe_name(name)}_{strength:g}.png", edited)
print(notebook.download(directory))
