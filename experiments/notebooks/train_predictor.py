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
# SAM needs to know how badly each latent layer (W+, F4, F6, F8, F10) would reproduce each part of a picture. Without
# help it measures that: an inversion in each layer, for every new picture. An **invertibility predictor** looks at the
# picture and tells at once. It is trained on a folder of photographs that were inverted in each layer alone; an
# **encoder**, which says where W+ starts, may be trained before.
#
# From a StyleGAN2 and a folder of photographs of what it draws, this notebook makes both, and then inverts a picture
# with them. By default the domain is the embedded demo, its photographs drawn on the spot.
#
# ## How long it takes
#
# Nearly all of the time goes into inverting the photographs: photographs x layers x steps. The demo as it stands here
# takes about half an hour on two CPU cores, by the README's figures for the demo's own networks: 46 seconds a
# photograph (five layers of 100 steps), and 1.25 seconds a step of the predictor's training. An encoder would take 2.5
# seconds a step.
#
# For a generator of the usual size (config-f, 256 px) a photograph is 5 x 340 steps:
#
# | | a step | a photograph |
# |---|--:|--:|
# | two threads of a CPU core, measured | 1.32 s | 37 min |
# | T4 GPU, on paper | 0.11 s | 3 min |
# | one TPU v5e chip, on paper | 0.03 s | 48 s |
#
# On paper is the reckoning of `docs/scale.md`: the operations or the bytes of a step, whichever take longer, at 30% of
# a device's stated peaks (T4: 8.1 TFLOP/s, 320 GB/s). A free runtime ends after some hours: keep `OUTPUT` in Google
# Drive, and run the notebook again. Every program here goes on where it was stopped.

# %% tags=["parameters"]
REPOSITORY = "https://github.com/samjax/samjax"  # cloned where samjax is not installed

OUTPUT = "output/my_domain"  # everything goes here; "/content/drive/MyDrive/my_domain" outlives a Colab runtime
GENERATOR = None  # path of your StyleGAN2: .pkl, .pt, .safetensors, or a folder of ckpt_convert; None: the demo's
PHOTOGRAPHS = None  # folder of photographs, dozens at least; None: scenes of the demo

SCENES = 24  # to draw for the demo
INVERSION_STEPS = None  # of each inversion; None: 100 for the demo, 340 for others
TRAIN_ENCODER = False  # True: trains an encoder first, on the same photographs
ENCODER_STEPS = 300  # of the encoder's training
PREDICTOR_STEPS = 300  # of the predictor's training
SIZE = "small"  # of both networks: a megabyte or two; "full": the authors', for much data on an accelerator

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
# The devices that the programs below will use. Each is a process of its own, and so is this question: a TPU serves one
# process at a time.

# %%
import shutil

import cli
import notebook_tools
from IPython.display import Image, display
from notebook_tools import run, show_row

from samjax.config import LATENT_NAMES
from samjax.io import images

output = notebook_tools.output_folder(OUTPUT)
_ = notebook_tools.stream([sys.executable, "-c", "import jax; print(*jax.devices(), sep='\\n')"])

demo = checkout / "samjax" / "demo"
if GENERATOR is None:  # the demo's, as if it were a stranger's: its own encoder and predictor are not used
    domain = {"gan_weights": demo / "generator.safetensors", "image_category": "demo"}
else:
    domain = {"gan_weights": GENERATOR, "image_category": "custom"}

# %% [markdown]
# ## Photographs
#
# They must show what the generator draws, framed as its training images were; other sizes are brought to its size.
# Every fifth is kept for validation: no network is trained on it. Add none later: give another `OUTPUT` instead.

# %%
if PHOTOGRAPHS is None:
    run("make_demo_scenes.py", output_path=output / "scenes", count=SCENES, seed=40)
found = cli.image_files(Path(PHOTOGRAPHS or output / "scenes"))
parts = {name: output / "photographs" / name for name in ("train", "val")}
for i, path in enumerate(found):
    copy = parts["val" if i % 5 == 1 else "train"] / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        shutil.copyfile(path, copy)
print(f"{len(found)} photographs, {len(found[1::5])} of them for validation")
show_row({path.name: images.read_image(path) for path in found[:5]}, height=160)

# %% [markdown]
# ## Encoder (optional)
#
# Trained through the generator: the image drawn from its code must resemble the photograph, by pixels and LPIPS; and
# for the generator's own samples it must give the styles they were drawn from. The picture shows photographs of the
# validation and what the generator draws from their codes.

# %%
if TRAIN_ENCODER:
    run(
        "train_encoder.py", image_folder=parts["train"], image_folder_val=parts["val"], preset=SIZE,
        output_folder=output / "encoder", num_steps=ENCODER_STEPS, val_frequency=max(ENCODER_STEPS // 5, 1),
        batch_size=8, lr=2e-3 if SIZE == "small" else None, **domain,
    )  # fmt: skip
    domain["e4e_path"] = output / "encoder" / "encoder"
    display(Image(output / "encoder" / "curve.png"))
    display(Image(max((output / "encoder" / "pictures").iterdir())))

# %% [markdown]
# ## Every photograph in every layer
#
# The long part, and the training data of the predictor: `data/PART/LAYER/NAME/final` holds a photograph and its
# inversion in that layer alone, as the authors' program lays them out.

# %%
for name, folder in parts.items():
    run(
        "invert_folder.py", image_folder=folder, output_path=output / "data" / name,
        preset=None if GENERATOR is None else "fast", num_opt_steps=INVERSION_STEPS, **domain,
    )  # fmt: skip
done = output / "data" / "val"
example = min((done / "W+").iterdir()).name
shown = {"input": images.read_image(done / "W+" / example / "final" / "input.png")}
for layer in (name for name in LATENT_NAMES if (done / name).is_dir()):
    shown[layer] = images.read_image(done / layer / example / "final" / "reconstruction.png")
show_row(shown, height=200)

# %% [markdown]
# ## Predictor
#
# It learns the LPIPS map between each photograph and its inversions. The picture shows photographs of the validation
# with their true maps and the predicted ones. What counts is said last: the share of the area whose segment gets the
# layer that the true maps give. Of a few photographs in validation it says little.

# %%
size = min(256, *images.image_size(done / "W+" / example / "final" / "input.png"))  # at which inversions compare
run(
    "train_invertibility.py", dataset_folder_train=output / "data" / "train", preset=SIZE, cache_targets=True,
    dataset_folder_val=output / "data" / "val", output_folder=output / "predictor", batch_size=8,
    num_steps=PREDICTOR_STEPS, val_frequency=max(PREDICTOR_STEPS // 5, 1), image_category=domain["image_category"],
    target_H=size, target_W=size, lr=2e-3 if SIZE == "small" else None,
)  # fmt: skip
display(Image(output / "predictor" / "curve.png"))
display(Image(max((output / "predictor" / "pictures").iterdir())))

# %% [markdown]
# ## An inversion that uses them
#
# A photograph of the validation, inverted with predicted maps: no inversion in each layer any more.

# %%
photograph = min(parts["val"].iterdir())
run(
    "invert.py", image_path=photograph, inv_model_path=output / "predictor" / "predictor",
    num_opt_steps=INVERSION_STEPS, edits_folder=demo / "edits" if GENERATOR is None else None,
    output_path=output / "inversions", **domain,
)  # fmt: skip
for name in ("invertibility", "comparison"):
    display(Image(output / "inversions" / photograph.stem / f"{name}.png"))

# %% [markdown]
# `experiments/invert.py` and `app.py` take the predictor by `--inv_model_path`, and the encoder by `--e4e_path`.

# %%
print(notebook_tools.download(output / "predictor" / "predictor"))
if TRAIN_ENCODER:
    print(notebook_tools.download(output / "encoder" / "encoder"))
