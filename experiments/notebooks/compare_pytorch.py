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
# # The same as the authors' PyTorch code?
#
# samjax is SAM (*Spatially-Adaptive Multilayer Selection for GAN Inversion and Editing*, CVPR 2022) in JAX. Here one
# picture goes through the authors' PyTorch code and through ours, with the same weights and the same noise, and the
# results are shown side by side: pictures, largest differences, seconds.
#
# The PyTorch half needs the authors' code and the networks of a category. Both are theirs, for non-commercial use; set
# `FETCH` to get them (2 GB), or give the folders that you have. Without them that half is left out, and ours alone
# inverts a picture of the embedded demo.

# %% tags=["parameters"]
REPOSITORY = "https://github.com/samjax/samjax"  # cloned where samjax is not installed

FETCH = False  # True: fetches what the PyTorch half needs and is not there yet
REFERENCE = "sam_inversion"  # checkout of the authors' code, with its submodules
WEIGHTS = None  # folder with the category's files under their authors' names; None: those of `ckpt_convert get`
DETECTRON2 = None  # checkout of detectron2, for cats; None: the installed one, or one beside REFERENCE

CATEGORY = "cars"  # or "faces" or "cats"
IMAGE = None  # path of your picture; None: one of the authors' samples
THRESHOLD = None  # mean error up to which a segment may use a layer, or "auto"; None: the category's
STEPS = 5  # of the optimisation that is compared: the first ones of the authors' 1001

DEMO_STEPS = None  # of our half alone; None: the demo's 100
OUTPUT = "output/compare_pytorch"  # folder of the pictures and the table

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

# %%
import json

import notebook_tools
from IPython.display import Image, Markdown, display

output = notebook_tools.output_folder(OUTPUT)
if FETCH:
    if not Path(REFERENCE).is_dir():
        authors = "https://github.com/adobe-research/sam_inversion"
        notebook_tools.stream(["git", "clone", "--quiet", "--recurse-submodules", authors, REFERENCE])
    notebook_tools.stream([sys.executable, "-m", "pip", "install", "-q", f"{checkout}[compare]"])
    notebook_tools.stream([sys.executable, "-m", "ckpt_convert", "get", CATEGORY])

# %% [markdown]
# ## Their code and ours, stage by stage
#
# Their script runs first, as it is, in a process of its own. Every stage of ours then starts from what theirs made in
# the stages before it, so that an error shows where it arises. Both run on the CPU in float32, also where there is an
# accelerator. This takes a few minutes. A line that begins with `error` says what is missing.

# %%
samples = sorted(Path(REFERENCE).glob(f"test_images/{CATEGORY}/*.png"))
demo_scene = checkout / "samjax" / "demo" / "samples" / "scene0.png"
code = notebook_tools.run(
    "compare_pytorch.py", ok=(0, 1, 2), reference=REFERENCE, image_category=CATEGORY, weights=WEIGHTS,
    image_path=IMAGE or next(iter(samples), demo_scene), detectron2=DETECTRON2, threshold=THRESHOLD, steps=STEPS,
    output_path=output / CATEGORY,
)  # fmt: skip
both = code != 2
verdicts = {
    0: "Every stage is within its tolerance.",
    1: "A stage is not within its tolerance: see the table.",
    2: "The PyTorch half is off: the line above says what is missing. Ours runs alone, below.",
}
print(verdicts[code])

# %% [markdown]
# Pictures of both sides, where both ran. First the target, the image that the generator draws from the encoder's code,
# and the image after the steps that were compared, which are only the first of 1001; then the error maps of W+, F4, F6,
# F8 and F10, the segments and the layer of each, and an edit at strengths 0, 1, 2 and 3.

# %%
captions = {"images": "Images", "maps": "Error maps", "layers": "Segments and layers", "edits": "Edits"}
for name, caption in captions.items() if both else ():
    display(Markdown(f"**{caption}**"), Image(output / CATEGORY / f"{name}.png"))

# %% [markdown]
# Largest differences. *Of the spread* means relative to the range of their values; what is timed ran once before, and
# compilation is apart.

# %%
if both:
    display(Markdown((output / CATEGORY / "comparison.md").read_text()))

# %% [markdown]
# ## Ours alone
#
# Where the PyTorch half is off: a whole inversion of the embedded demo, which needs no files. W+ edits the car but
# loses the strangers in the scene, F10 keeps them but ignores the edit, SAM keeps both.

# %%
if not both:
    notebook_tools.run("invert.py", invertibility="measured", num_opt_steps=DEMO_STEPS, output_path=output)
    display(Image(output / "scene0" / "comparison.png"))
    (result,) = json.loads((output / "scene0" / "metrics.json").read_text())["thresholds"].values()
    lines = ["| latent | LPIPS | PSNR, dB | SSIM |", "|---|--:|--:|--:|"]
    for name, q in result["metrics"].items():
        lines.append(f"| {name} | {q['LPIPS']:.3f} | {q['PSNR']:.2f} | {q['SSIM']:.3f} |")
    display(Markdown("\n".join(lines)))
