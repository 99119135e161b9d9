"""Runs the authors' script on a CPU and records the results of its stages: their side of `compare_pytorch.py`.

    python experiments/parity/reference_sam.py JOB.json      # a `reference_job.Job`; compare_pytorch.py writes it

Nothing is written into the checkouts. `src/sam_inv_optimization.py` runs unchanged, in a directory of links laid out as
its authors' instructions leave it. Around it:

- Tensors stay on the CPU wherever the code says cuda; files are read to the CPU too.
- The generator uses its stored noise: noise drawn anew at every step, as in their script, cannot be compared.
- Nothing is downloaded: initial weights of backbones, which the networks' own files replace, are left out, and LPIPS
  gets its VGG16 from the job.
- e4e's compiled operations are replaced by stand-ins, because only its decoder uses them: it is loaded, but its image,
  which their script discards, is not computed.
- The functions of each stage are wrapped to record their results and seconds; networks run twice, and the second run is
  timed.

Their loaders execute code from weight files: use files that you trust.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import re
import runpy
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reference_job import NETS, TERMS, Job

LAYERS = ("W+", "F4", "F6", "F8", "F10")
ADE20K = "ckpt/ade20k-resnet50dilated-ppm_deepsup"
PRIOR_SAMPLES = 5000


def balanced_threshold(maps: np.ndarray, segments: np.ndarray) -> float:
    """The threshold at which the layers share the image most evenly, halfway between two means of segments.

    Args:
      maps: [L, h, w] error maps, the most editable layer first.
      segments: [h, w] labels.
    """
    labels, counts = np.unique(segments, return_counts=True)
    means = np.stack([maps[:, segments == label].mean(axis=1) for label in labels], axis=1)  # [L, S]
    steps = np.unique(means)
    best, highest = float(steps[-1]), -1.0
    for tau in (steps[1:] + steps[:-1]) / 2:
        admitted = means <= tau
        layers = np.where(admitted.any(axis=0), admitted.argmax(axis=0), len(maps) - 1)
        shares = np.bincount(layers, counts) / counts.sum()
        entropy = -float(sum(share * np.log(share) for share in shares if share > 0))
        if entropy > highest:
            best, highest = float(tau), entropy
    return best


# --- the environment that the authors' code expects ---


def lay_out(job: Job) -> Path:
    """Links the checkout and the files into `folder/work`, under the paths that the authors' code uses."""
    work, reference = Path(job.folder) / "work", Path(job.reference).resolve()

    def link(path: str, target: str | Path) -> None:
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).symlink_to(Path(target).resolve())

    for file in (reference / "src").glob("*.py"):
        link(f"src/{file.name}", file)
    ade20k = "semantic-segmentation-pytorch"  # weight files are linked into this one
    for name in NETS:
        if name != ade20k:
            link(f"src/nets/{name}", reference / "src/nets" / name)
    for file in (reference / "src/nets" / ade20k).iterdir():
        if file.name != "ckpt":
            link(f"src/nets/{ade20k}/{file.name}", file)
    for name, path in job.weights.items():
        link(f"src/nets/{ade20k}/{ADE20K}/{name}" if name.endswith("_20.pth") else f"ckpt/{name}", path)
    link(f"edits/{job.category}/{Path(job.direction).name}", job.direction)
    return work


def module(name: str, **members: Any) -> types.ModuleType:
    """Creates a module, and makes it importable."""
    made = types.ModuleType(name)
    vars(made).update(members)
    sys.modules[name] = made
    return made


def replace_modules(torch: Any) -> None:
    """Replaces modules that are not installed, no longer exist, or would be compiled for CUDA."""

    def never(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the comparison does not use this function, so it should not have been called")

    module("wget", download=never)
    if importlib.util.find_spec("pkg_resources") is None:  # gone from setuptools
        module(
            "pkg_resources",
            parse_version=lambda text: tuple(map(int, re.findall(r"\d+", text)[:3])),
            resource_filename=lambda package, name: str(
                Path(importlib.import_module(package).__file__ or "").parent / name
            ),
        )
    if importlib.util.find_spec("distutils") is None:  # gone from Python 3.12
        module("distutils").__path__ = []
        module("distutils.util", strtobool=never)

    class FusedLeakyReLU(torch.nn.Module):
        def __init__(self, channels: int, *_: Any) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(channels))

    module("models.stylegan2.op", FusedLeakyReLU=FusedLeakyReLU, fused_leaky_relu=never, upfirdn2d=never)


def replace_downloads(torch: Any, vgg: str) -> None:
    """Replaces functions that download; see the module's description."""
    import torch.utils.model_zoo
    import torchvision  # type: ignore[import-not-found]

    torch.utils.model_zoo.load_url = lambda *_, **__: {}

    def vgg16(**_: Any) -> Any:
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        with np.load(vgg) as file:
            convolutions = [layer for layer in features if isinstance(layer, torch.nn.Conv2d)]
            for layer, name in zip(convolutions, sorted({key.partition(".")[0] for key in file}), strict=True):
                layer.load_state_dict({key: torch.from_numpy(file[f"{name}.{key}"]) for key in ("weight", "bias")})
        return types.SimpleNamespace(features=features)

    torchvision.models.vgg16 = vgg16


def read_to_cpu(torch: Any) -> None:
    """Makes `torch.load` accept any pickle, as when the code was written, and load everything to the CPU."""
    load = torch.load
    torch.load = lambda *args, **options: load(*args, **({"weights_only": False} | options | {"map_location": "cpu"}))


def stay_on_cpu(torch: Any) -> Any:
    """A context in which `.cuda()` does nothing and every CUDA device is the CPU."""
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
            return cpu if torch.device(value).type == "cuda" else value
        return value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.cuda:
                return args[0]
            return func(*map(moved, args), **{key: moved(value) for key, value in (kwargs or {}).items()})

    return OnCpu()


def prepare_detectron2(job: Job) -> None:
    """Makes detectron2 run on the CPU, with its checkout's configurations and the job's weights, not downloads."""
    if job.detectron2:
        sys.path.insert(0, job.detectron2)
    import detectron2.config  # type: ignore[import-not-found]
    from detectron2 import model_zoo  # type: ignore[import-not-found]

    (weights,) = (path for name, path in job.weights.items() if name.startswith("model_final"))
    configs = Path(detectron2.config.__file__).parents[2] / "configs"  # of a checkout
    installed, get_cfg = model_zoo.get_config_file, detectron2.config.get_cfg

    def on_cpu() -> Any:
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        return cfg

    detectron2.config.get_cfg = on_cpu
    model_zoo.get_config_file = lambda name: str(configs / name) if (configs / name).is_file() else installed(name)
    model_zoo.get_checkpoint_url = lambda _: weights


# --- what is recorded ---


class Record:
    """Results and seconds of the stages, by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.steps: list[dict[str, list[float]]] = []
        self.generator: Any = None
        self.latents: Any = None
        self.masks: Any = None
        self.began = 0.0

    def timed(self, stage: str, function: Callable[..., Any], keep: Callable[..., Any], times: int = 1) -> Any:
        """Wraps a function: it runs `times` times, the last run is timed, and `keep` gets its result and arguments."""

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            result = None
            for _ in range(times):
                began = time.perf_counter()
                result = function(*args, **options)
                self.seconds[stage] = time.perf_counter() - began
            keep(result, *args, **options)
            return result

        return wrapped

    def term(self, name: str, value: Any) -> None:
        """Records a value of a loss term at this step."""
        if self.steps:
            self.steps[-1].setdefault(name, []).append(float(value.detach()))

    def terms(self) -> np.ndarray:
        """The terms [steps, 5] without their weights, in the order of `TERMS`; f_rec is summed over the layers."""
        for step in self.steps:
            step["f_rec"] = [sum(step["mse"][1:])]
        return np.array([[step[name][0] for name in TERMS] for step in self.steps])


def to_numpy(tensor: Any) -> np.ndarray:
    """[1, C, H, W] to [H, W, C]; other tensors lose their leading axis of 1."""
    array = tensor.detach().cpu().numpy()[0]
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def watch(record: Record, job: Job, torch: Any) -> None:
    """Wraps the functions that the script will import."""
    import latent_utils  # type: ignore[import-not-found]
    import loss_utils  # type: ignore[import-not-found]
    import lpips  # type: ignore[import-not-found]
    import mask_utils  # type: ignore[import-not-found]
    import model_utils  # type: ignore[import-not-found]

    watch_loaders(record, model_utils, torch)
    watch_start(record, job, latent_utils, torch)
    watch_masks(record, job, mask_utils)
    watch_images(record, model_utils)
    watch_losses(record, loss_utils, lpips, torch)


def watch_start(record: Record, job: Job, latent_utils: Any, torch: Any) -> None:
    """Records the prior's statistics, the samples that they are computed from, and the start of W+."""
    arrays, statistics = record.arrays, latent_utils.get_mvg_stats

    def seeded(*args: Any) -> Any:
        torch.manual_seed(job.seed)
        return statistics(*args)

    def prior(found: Any, *_: Any) -> None:
        torch.manual_seed(job.seed)  # the same samples again; the script draws them one by one
        arrays["z"] = np.concatenate([torch.randn(1, 512).numpy() for _ in range(PRIOR_SAMPLES)])
        arrays.update({f"prior_{name}": value.numpy() for name, value in found.items()})

    def start(latents: Any, *_: Any, img_t: Any, **__: Any) -> None:
        arrays.update(code=latents["W+"][0].numpy(), image=to_numpy(img_t))

    latent_utils.get_mvg_stats = record.timed("prior", seeded, prior)
    latent_utils.init_latent = record.timed("code", latent_utils.init_latent, start, times=2)


def watch_masks(record: Record, job: Job, mask_utils: Any) -> None:
    """Records the layer of each pixel, at the job's threshold, and the masks."""
    arrays, refine = record.arrays, mask_utils.refine

    def at_threshold(maps: Any, segments: Any, tau: float) -> Any:
        if job.threshold is None:
            tau = balanced_threshold(arrays["maps"], segments)
        arrays["threshold"] = np.float64(tau)
        return refine(maps, segments, tau)

    def layer_map(masks: Any, *_: Any) -> None:
        found = np.stack([masks[name][0, 0].numpy() for name in LAYERS])
        assert (found.sum(axis=0) == 1).all()
        arrays["layer_map"] = found.argmax(axis=0)

    def soft(masks: Any, *_: Any) -> None:
        record.masks = masks
        arrays.update({f"mask_{name}": to_numpy(masks[name]) for name in LAYERS[1:]})

    mask_utils.refine = record.timed("layer_map", at_threshold, layer_map)
    mask_utils.resize_binary_masks = record.timed("masks", mask_utils.resize_binary_masks, soft)


def watch_images(record: Record, model_utils: Any) -> None:
    """Records the first image, the beginning of each step, and the edits with the latents that they edit."""
    arrays, form = record.arrays, model_utils.custom_forward
    edits: list[np.ndarray] = []

    def next_step(**options: Any) -> Any:
        record.began = record.began or time.perf_counter()
        record.steps.append({})
        return form(**options)

    def formed(image: Any, **_: Any) -> None:
        arrays.setdefault("first", to_numpy(image))

    def edited(image: Any, _: Any, latents: Any, *__: Any) -> None:
        edits.append(to_numpy(image))
        record.latents = latents
        record.seconds["edits"] = record.seconds.get("edits", 0.0) + record.seconds["edit"]
        arrays.update({f"latent_{name}": to_numpy(latents[name]) for name in LAYERS}, edits=edits)

    model_utils.custom_forward = record.timed("first", next_step, formed)
    model_utils.edit_image = record.timed("edit", model_utils.edit_image, edited)


def watch_loaders(record: Record, model_utils: Any, torch: Any) -> None:
    """Wraps the functions that load networks, and the networks that they return."""
    arrays, timed = record.arrays, record.timed

    def generator(*args: Any, function: Any = model_utils.load_generator) -> Any:
        record.generator = found = function(*args)
        for resolution in found.synthesis.block_resolutions:
            block = getattr(found.synthesis, f"b{resolution}")
            block.forward = functools.partial(block.forward, noise_mode="const", force_fp32=True)
        return found

    def segmenter(*args: Any, function: Any = model_utils.load_segmenter) -> Any:
        found = function(*args)
        keep = lambda labels, *_: arrays.update(segments=np.asarray(labels))  # noqa: E731
        found.segment_pil = timed("segments", found.segment_pil, keep, times=2)
        return found

    def encoder(*args: Any, function: Any = model_utils.load_encoder) -> Any:
        class NoImage(torch.nn.Module):
            def forward(self, codes: Any, **_: Any) -> Any:
                return torch.zeros(1, 3, 1, 1), codes[0]

        found = function(*args)
        found.decoder = NoImage()
        return found

    def invertibility(*args: Any, function: Any = model_utils.load_invertibility) -> Any:
        def maps(found: Any, *_: Any) -> None:
            arrays["maps"] = np.stack([found[name][0, 0].numpy() for name in LAYERS])

        return timed("maps", function(*args), maps, times=2)

    model_utils.load_generator, model_utils.load_segmenter = generator, segmenter
    model_utils.load_encoder, model_utils.load_invertibility = encoder, invertibility


def watch_losses(record: Record, loss_utils: Any, lpips: Any, torch: Any) -> None:
    """Records the loss terms of each step, and when it ends."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def keeping(name: str, function: Any) -> Any:
        inside = False

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:  # inside a function mode, PyTorch calls its own functions a second time
                return function(*args, **options)
            inside = True
            value = function(*args, **options)
            inside = False
            record.term(name, value)
            return value

        return wrapped

    torch.nn.functional.mse_loss = keeping("mse", torch.nn.functional.mse_loss)  # the image, then the four offsets
    loss_utils.compute_mvg = keeping("mvg", loss_utils.compute_mvg)
    loss_utils.delta_loss = keeping("delta", loss_utils.delta_loss)

    def perceptual(*args: Any, function: Any = lpips.LPIPS, **options: Any) -> Any:
        network = function(*args, **options)
        network.register_forward_hook(lambda _, __, value: record.term("lpips", value))
        return network

    lpips.LPIPS = perceptual

    def stepped(*_: Any) -> None:
        record.seconds["losses"] = time.perf_counter() - record.began

    register_optimizer_step_post_hook(stepped)


def run(job: Job) -> None:
    """Runs the script; writes `output.npz` and `seconds.json` to the job's directory."""
    import torch

    torch.set_num_threads(job.threads)
    folder, work, record = Path(job.folder), lay_out(job), Record()
    replace_modules(torch)
    replace_downloads(torch, job.vgg)
    read_to_cpu(torch)
    sys.path[0] = str(work / "src")  # replaces the directory of this file
    with contextlib.chdir(work), stay_on_cpu(torch):
        if job.category == "cats":
            prepare_detectron2(job)
        import model_utils  # type: ignore[import-not-found]

        form = model_utils.custom_forward
        watch(record, job, torch)
        options = {
            "image_path": job.image, "image_category": job.category, "target_H": job.height, "target_W": job.width,
            "output_path": "output", "threshold": job.threshold or 0.0, "num_opt_steps": job.steps,
            "lr_rampup_length": job.lr_rampup_length, "lr_rampdown_length": job.lr_rampdown_length,
        }  # fmt: skip
        sys.argv[1:] = ["--generate_edits", *(f"--{key}={value}" for key, value in options.items())]
        runpy.run_path("src/sam_inv_optimization.py", run_name="__main__")
        final = record.timed("final", form, lambda image, *_: record.arrays.update(final=to_numpy(image)))
        with torch.no_grad():
            final(record.generator, record.latents, "stylegan2", ",".join(LAYERS), record.masks)
    np.savez(folder / "output.npz", **record.arrays, terms=record.terms())
    (folder / "seconds.json").write_text(json.dumps(record.seconds))


if __name__ == "__main__":
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))
