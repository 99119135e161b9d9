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
# image goes through the authors' PyTorch code and through samjax, with the same weights and the same noise, and the
# results are shown side by side: images, largest differences, seconds.
#
# The PyTorch half needs the authors' code and the networks of a category. Both are theirs, for non-commercial use; set
# `FETCH` to download them (2 GB), or give the directories that you have. Without them that half is skipped, and samjax
# alone inverts a scene of the embedded demo.
#
# The comparison is a program in samjax's source, `experiments/parity/compare_pytorch.py`, which the installed package
# does not contain: open this notebook in a checkout, or set `CHECKOUT`.

# %% tags=["parameters"]
SAMJAX = None  # what to install if samjax is missing: a git address, or the path of a wheel that you upload
CHECKOUT = None  # directory of samjax's source; None: the one that this notebook lies in

FETCH = False  # True: downloads what the PyTorch half needs and is missing
REFERENCE = "sam_inversion"  # checkout of the authors' code, with its submodules
WEIGHTS = None  # directory with the category's files under their authors' names; None: those of `ckpt_convert get`
DETECTRON2 = None  # checkout of detectron2, for cats; None: the installed one, or one beside REFERENCE

CATEGORY = "cars"  # or "faces" or "cats"
IMAGE = None  # path of your image; None: one of the authors' samples
THRESHOLD = None  # mean error up to which a segment may use a layer, or "auto"; None: the category's
STEPS = 5  # of the optimization that is compared: the first ones of the authors' 1001

DEMO_STEPS = None  # steps of the inversion with samjax alone; None: the demo's 30
OUTPUT = "output/compare_pytorch"  # directory of the figures and the table

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

program = Path("experiments") / "parity" / "compare_pytorch.py"
places = [Path.cwd(), *Path.cwd().parents] if CHECKOUT is None else [Path(CHECKOUT).resolve()]
checkout = next((place for place in places if (place / program).is_file()), None)
if checkout is None:
    raise MissingError(
        f"{places[0]} does not lie in a checkout of samjax: set the parameter CHECKOUT to the directory that contains "
        f"{program}, then run the notebook again"
    )

# %%
from IPython.display import Image, Markdown, display

from samjax import Pipeline, demo, notebook, report

output = notebook.output_directory(OUTPUT)
if FETCH:
    if not Path(REFERENCE).is_dir():
        authors = "https://github.com/adobe-research/sam_inversion"
        notebook.run_command(["git", "clone", "--quiet", "--recurse-submodules", authors, REFERENCE])
    notebook.run_command([sys.executable, "-m", "pip", "install", "-q", f"{checkout}[compare]"])
    notebook.run_command([sys.executable, "-m", "ckpt_convert", "get", CATEGORY])

# %% [markdown]
# ## Both, stage by stage
#
# The authors' script runs first, unmodified, in a process of its own. Every stage of samjax then starts from the
# authors' results of the stages before it, so that an error shows where it arises. Both run on the CPU in float32, also
# if there is an accelerator. This takes a few minutes. A line that begins with `error` says what is missing.

# %%
samples = sorted(Path(REFERENCE).glob(f"test_images/{CATEGORY}/*.png"))
code = notebook.run_program(
    checkout / program, ok=(0, 1, 2), reference=REFERENCE, image_category=CATEGORY, weights=WEIGHTS,
    image_path=IMAGE or next(iter(samples), demo.SAMPLES / "scene0.png"), detectron2=DETECTRON2, threshold=THRESHOLD,
    steps=STEPS, output_path=output / CATEGORY,
)  # fmt: skip
both = code != 2
verdicts = {
    0: "Every stage is within its tolerance.",
    1: "A stage is not within its tolerance: see the table.",
    2: "The PyTorch half was skipped: the line above says what is missing. samjax runs alone, below.",
}
print(verdicts[code])

# %% [markdown]
# Images of both sides, if both ran. First the target, the generator's image of the encoder's code, and the image after
# the steps that are compared, which are only the first of 1001; then the error maps of W+, F4, F6, F8 and F10, the
# segments and their layers, and an edit at strengths 0, 1, 2 and 3.

# %%
captions = {"images": "Images", "maps": "Error maps", "layers": "Segments and layers", "edits": "Edits"}
for name, caption in captions.items() if both else ():
    display(Markdown(f"**{caption}**"), Image(output / CATEGORY / f"{name}.png"))

# %% [markdown]
# Largest differences. *Of the spread* means relative to the range of the authors' values. Seconds are those of a second
# run; compilation is listed separately.

# %%
if both:
    display(Markdown((output / CATEGORY / "comparison.md").read_text()))

# %% [markdown]
# ## samjax alone
#
# If the PyTorch half was skipped: a whole inversion of the demo, which needs no files. W+ edits the car but loses
# the objects that the generator has not learned, F10 preserves them but ignores the edit, SAM does both.

# %%
if not both:
    pipeline = Pipeline.from_pretrained("demo", invertibility="measured", num_opt_steps=DEMO_STEPS)
    analysis = pipeline.analyze(
        demo.SAMPLES / "scene0.png",
        segments=demo.SAMPLES / "scene0_segments.png",
        segment_names=demo.SEGMENT_NAMES,
    )
    inversion = pipeline.invert(analysis)
    edits = pipeline.edit_sweep(inversion, names=["blue_car"])
    content = report.save_summary(output / "scene0", [inversion], inversion, edits, seed=0, seconds={})
    notebook.show(report.comparison_figure(content))
    lines = ["| latent | LPIPS | PSNR, dB | SSIM |", "|---|--:|--:|--:|"]
    for name, quality in content.metrics.items():
        lines.append(f"| {name} | {quality['LPIPS']:.3f} | {quality['PSNR']:.2f} | {quality['SSIM']:.3f} |")
    display(Markdown("\n".join(lines)))
