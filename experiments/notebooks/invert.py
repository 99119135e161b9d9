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
# A GAN can edit what it can draw. To edit a photograph, it is first *inverted*: latents are sought from which the
# generator draws that photograph. Styles alone (W+) are easy to edit but lose what the generator has never seen; later
# layers (F4, F6, F8, F10) keep everything but ignore edits. **SAM** (*Spatially-Adaptive Multilayer Selection for GAN
# Inversion and Editing*, CVPR 2022) lets each segment of an image take the earliest layer that still reproduces it.
#
# This notebook inverts and edits a scene of the embedded demo, then yours, on a CPU, a GPU or a TPU. On Colab,
# choose one under *Runtime*, *Change runtime type*, then *Runtime*, *Run all*.

# %% tags=["parameters"]
REPOSITORY = "https://github.com/samjax/samjax"  # cloned where samjax is not installed

IMAGE = None  # path of your image; None: on Colab you are asked for it, elsewhere another scene of the demo
GENERATOR = None  # path of your StyleGAN2: .pkl, .pt, .safetensors, or a folder of ckpt_convert; None: as for IMAGE
CATEGORY = None  # "cars", "faces" or "cats": the authors' networks instead, fetched once, for non-commercial use
EDITS = None  # folder of edit directions for the generator; None: its own, or principal components of its styles

THRESHOLD = None  # of your image; None: the category's. Choose it on the pictures below
STEPS = None  # of an inversion; None: 100 for the demo, 340 for others
STRENGTHS = (0.0, 1.0, 2.0, 3.0)  # of an edit, in multiples of its direction
OUTPUT = "output"  # results go to a folder in it, with the name of your image

# %% [markdown]
# Install samjax, if it is not there; on Colab this takes a minute or two. Should Colab ask you to restart the runtime,
# do so and run all cells again.

# %%
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

spec = importlib.util.find_spec("samjax")
found = spec.origin if spec else None
# The programs are no part of the installed package.
places = [Path.cwd(), *Path.cwd().parents, *(Path(found).parents if found else ())]
checkout = next((x for x in places if (x / "experiments" / "invert.py").is_file()), Path("samjax_checkout").resolve())
if not checkout.is_dir():
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, checkout], check=True)
if found is None:
    driver = re.match(r"\d+", subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader"))
    if driver:
        jax_for_this = "jax[cuda13]" if int(driver[0]) >= 580 else "jax[cuda12]"
    else:
        jax_for_this = "jax[tpu]" if importlib.util.find_spec("libtpu") else "jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{checkout}[train]", jax_for_this], check=True)
    importlib.invalidate_caches()
sys.path[:0] = [str(checkout / "experiments"), str(checkout / "experiments" / "notebooks")]

# %% [markdown]
# The devices in use:

# %%
import dataclasses

import jax
import notebook_tools
import studio
from notebook_tools import running, show, show_row
from studio import invert  # the program of this name, not this notebook

from ckpt_convert import get
from samjax import demo, directions
from samjax.io import images, report

print(*jax.devices(), sep="\n")

# %% [markdown]
# ## The demo
#
# A scene with a car, trees and a house. The demo's generator has learnt cars, roads and hills; trees and house are
# strangers to it. It comes with an encoder, which says where W+ starts, and an invertibility predictor, which says how
# badly each latent layer alone would reproduce each pixel; both are part of samjax, like the segments of this scene.
#
# The same steps are on the page that `experiments/app.py` opens, and in the program `experiments/invert.py`.

# %%
loaded = studio.load(invert.Settings(num_opt_steps=STEPS, edit_strengths=STRENGTHS))
session = studio.open_image(loaded, demo.SAMPLES / "scene0.png", demo.SAMPLES / "scene0_segments.png")
with running() as tell:
    session.look(tell)
show(report.segments_picture(session.preview()))
show(report.invertibility_picture(session.preview()))

# %% [markdown]
# Each segment takes the earliest layer whose mean error is at most a threshold. A low threshold asks for fidelity: more
# segments take late layers. A high one asks for editability, up to where all take W+. Nothing has been inverted yet, so
# trying thresholds costs nothing.


# %%
def show_thresholds(session):
    """The layer of each segment at some thresholds; the session's own is among them."""
    known = session.preview()
    height, width = 160, round(160 * known.image.shape[1] / known.image.shape[0])
    rows = {}
    for session.threshold in report.shown_thresholds(dataclasses.replace(known, thresholds=())):
        rows[f"threshold {session.threshold:.3g}"] = report.layers_overlay(session.preview(), height, width)
    session.threshold = known.threshold
    show_row(rows, height=160)


show_thresholds(session)

# %% [markdown]
# At the demo's own threshold the strangers take late layers, and the car an early one.

# %%
show(report.layers_picture(session.preview()))
with running() as tell:
    session.invert(tell)
print(session.summary())
show(report.comparison_picture(session.result()))

# %% [markdown]
# An edit moves W+ along a direction. Segments in early layers follow, those in late layers stay as they are. Directions
# add up.

# %%
show(report.edit_strip(session.result(), "blue_car"))
show_row({"blue car at dusk": session.edit({"blue_car": 2.0, "dusk": 1.5})})

# %% [markdown]
# ## Your image
#
# On Colab, two dialogs ask for an image and for a generator, where the parameters above name none. A generator is the
# file of a StyleGAN2 as NVIDIA's PyTorch or TensorFlow program or rosinality's writes it, converted here; nothing in it
# is executed. Cancel goes on with the demo's. Large files come faster from Google Drive: mount it, and give the path.
#
# The image must show what the generator draws, framed as its training images were. Without a predictor for this
# generator, an inversion in each layer measures the error maps, which takes as long as five inversions.

# %%
image = Path(IMAGE or notebook_tools.upload("your image") or demo.SAMPLES / "scene1.png")
generator = None if CATEGORY else GENERATOR or notebook_tools.upload("your generator")
if CATEGORY:
    get.get(CATEGORY, notify=print)
settings = invert.Settings(
    image_category=CATEGORY,
    gan_weights=Path(generator) if generator else None,
    edits_folder=Path(EDITS) if EDITS else None,
    preset="fast" if CATEGORY or generator else None,
    num_opt_steps=STEPS,
    threshold=THRESHOLD,
    edit_strengths=STRENGTHS,
)
loaded = studio.load(settings)
if not loaded.directions:  # the first principal components of W; `experiments/find_directions.py` finds others
    config, params = loaded.nets.generator.config, loaded.nets.generator.params
    found = directions.ganspace(directions.sample_styles(config, params, key=jax.random.key(0)), count=4)
    ways = {f"component_{i}": directions.spread_over(vector, config) for i, vector in enumerate(found.vectors)}
    loaded = loaded._replace(directions=ways)

session = studio.open_image(loaded, image)
print(f"{image.name}: {loaded.config.num_opt_steps} steps for an inversion")
with running() as tell:
    session.look(tell)
show(report.segments_picture(session.preview()))
show(report.invertibility_picture(session.preview()))

# %% [markdown]
# Choose on these, write the number into the cell after them, and run from there; nothing above is needed again.

# %%
show_thresholds(session)

# %%
session.threshold = loaded.threshold  # or your number
# session.force(3, "F10")  # gives segment 3 a layer of your choice, whatever the threshold
show(report.layers_picture(session.preview()))

# %%
with running() as tell:
    session.invert(tell)
print(session.summary())
result = session.result()
show(report.comparison_picture(result))

# %%
for name in loaded.directions:
    show(report.edit_strip(result, name))

# %% [markdown]
# ## Results
#
# Latents, images at the generator's size, and `report.html`, which explains the result and opens anywhere, without
# network. `edited.png` has the strengths below.

# %%
strengths = {name: STRENGTHS[-1] if i == 0 else 0.0 for i, name in enumerate(loaded.directions)}
folder = notebook_tools.output_folder(f"{OUTPUT}/{image.stem}")
for path in session.save(folder, strengths):
    print(path)
for name in loaded.directions:
    for strength in STRENGTHS:
        edited = session.full_size(session.edit({name: strength}))
        images.save_png(folder / "edits" / f"{name}_{strength:g}.png", edited)
print(notebook_tools.download(folder))
