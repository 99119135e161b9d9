"""Trains the demo's generator: a small StyleGAN2 that draws the scenes of `samjax.demo.scenes`.

    python experiments/demo/train_generator.py --output_path runs/demo_generator

Writes `generator.safetensors` and `preview.png` (renderer above, generator below) in about an hour and a half on two
CPU cores. After an interruption the same command resumes.

There is no discriminator: z is the vector of factors, the renderer draws the image that belongs to it, and the network
learns it by regression, from coarse to fine. It learns most at 32 and 64 px, where images are cheap. Convolutions and
square matrices are trained by Muon (Jordan et al. 2024; orthogonalized momentum), all other parameters by Adam.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from samjax import cli
from samjax.demo import scenes
from samjax.io import checkpoints, files, images
from samjax.nets import stylegan2

CONFIG = stylegan2.StyleGAN2Config(
    img_resolution=256, z_dim=scenes.NUM_FACTORS, w_dim=128, mapping_layers=2, channel_base=2048, channel_max=128
)
MAPPING_SPEED = 30.0  # equalized learning rates slow the mapping down by 100, which only adversarial training needs


class Stage(NamedTuple):
    resolution: int
    batch: int
    steps: int
    lr: float  # initial learning rate of Muon; falls to a tenth, in the last stage to almost 0
    lr_adam: float
    fade: int = 0  # steps in which the RGB outputs of all blocks but the last fade to 0; 0: they do not fade
    mix: bool = False  # whether half of the images take the last block's styles from another scene


STAGES = (
    Stage(32, 16, 1200, 0.3, 2e-2),
    Stage(64, 8, 1000, 0.2, 1e-2),
    Stage(128, 8, 900, 0.1, 5e-3),
    Stage(256, 4, 880, 0.06, 3e-3),
    Stage(256, 4, 1500, 0.08, 4e-3, fade=300),
    Stage(256, 4, 1000, 0.08, 4e-3, fade=1, mix=True),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = Path("runs/demo_generator")
    """Directory of the result and of the state from which a run resumes."""
    seed: int = 0
    """Seed of the initial parameters and of the scenes."""
    save_seconds: float = 120.0
    """Seconds between saved states."""
    eval_scenes: int = 32
    """Number of held-out scenes on which PSNR is measured."""
    stages: tuple[Stage, ...] = STAGES
    """Resolution, batch size, steps and learning rates (of Muon and Adam) of each stage."""


class State(NamedTuple):
    params: Any
    optimizer: Any
    step: Array


def pool(x: Array) -> Array:
    """Averages 2 x 2 pixels; [N, H, W, C] to [N, H / 2, W / 2, C]."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def targets(z: Array, resolution: int) -> Array:
    """Scenes [N, R, R, 3] of `z` [N, K]; those below full resolution are drawn at twice the size and reduced."""
    if resolution == CONFIG.img_resolution:
        return jax.vmap(lambda z: scenes.render(z, resolution).image)(z)
    return pool(jax.vmap(lambda z: scenes.render(z, 2 * resolution).image)(z))


def generate(params: stylegan2.Params, z: Array, resolution: int, mix: bool = False) -> Array:
    """The generator's images [N, R, R, 3] of `z`, from its blocks up to `resolution`.

    With `mix`, every second image takes the last block's styles from its neighbor, with the same target. So the network
    learns to decide colors before that block, where F layers can hold them (style mixing: Karras et al. 2019, section
    3.1).
    """

    def run(module: stylegan2.Generator, z: Array) -> Array:
        ws = module.map_z(z)
        if mix:
            foreign = jnp.roll(ws, 1, axis=0).at[::2].set(ws[::2])
            ws = ws.at[:, -3:].set(foreign[:, -3:])
        return module.synthesize(ws, noise="none", max_resolution=resolution).image

    return stylegan2.Generator(CONFIG, stylegan2.up_conv_folded).apply({"params": params}, z, method=run)  # type: ignore[return-value]


def faded(params: Any, stage: Stage, step: Array) -> Any:
    """`params` with the RGB outputs of the lower blocks scaled as at a step of a stage.

    Training from coarse to fine leaves most of the color to coarse blocks, where no F layer can change it. Networks
    trained at full resolution make it in their last blocks (Karras et al. 2020, figure 8), and so does this one after
    fading.
    """
    if not stage.fade:
        return params
    gate = jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / stage.fade)
    blocks = {
        name: block
        if name == f"b{stage.resolution}"
        else {**block, "torgb": {**block["torgb"], **{k: gate * block["torgb"][k] for k in ("weight", "bias")}}}
        for name, block in params["synthesis"].items()
    }
    return {"mapping": params["mapping"], "synthesis": blocks}


def image_loss(x: Array, y: Array) -> Array:
    """Absolute and squared error, and absolute error of the image gradients, summed over three scales."""
    total = jnp.zeros(())
    for _ in range(3):
        d = x - y
        total += jnp.abs(d).mean() + jnp.square(d).mean()
        total += 0.5 * (jnp.abs(jnp.diff(d, axis=1)).mean() + jnp.abs(jnp.diff(d, axis=2)).mean())
        x, y = pool(x), pool(y)
    return total


def _muon_dimensions(params: Any) -> Any:
    def of(path: tuple[Any, ...], a: Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if a.ndim == 4 and a.shape[0] == 3:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
        if a.ndim == 2 and "weight" in name and "fc0" not in name:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
        return None

    return jax.tree_util.tree_map_with_path(of, params)


def active(params: Any, resolution: int) -> Any:
    """The part of `params` on which images of `resolution` depend."""
    blocks = {name: block for name, block in params["synthesis"].items() if int(name[1:]) <= resolution}
    return {"mapping": params["mapping"], "synthesis": blocks}


def make_optimizer(stage: Stage, last: bool) -> optax.GradientTransformation:
    """Muon and Adam with a warm-up and half a cosine, and a higher learning rate for the mapping network."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, 30, stage.steps, peak * (0.005 if last else 0.1))

    def speed_up(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return {**updates, "mapping": jax.tree.map(lambda u: MAPPING_SPEED * u, updates["mapping"])}, state

    muon = optax.contrib.muon(
        schedule(stage.lr),
        adam_learning_rate=schedule(stage.lr_adam),
        adam_b2=0.99,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return optax.chain(muon, optax.GradientTransformation(lambda params: optax.EmptyState(), speed_up))


@functools.partial(jax.jit, static_argnames=("stage", "last", "seed"), donate_argnames="state")
def train_step(state: State, *, stage: Stage, last: bool, seed: int) -> tuple[State, Array]:
    """One step on new scenes, which depend on the number of the step only, so that a resumed run sees the same."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage.resolution), state.step)
    z = jax.random.normal(key, (stage.batch, CONFIG.z_dim))
    target = targets(z, stage.resolution)
    params = active(state.params, stage.resolution)

    def objective(params: Any) -> Array:
        return image_loss(generate(faded(params, stage, state.step), z, stage.resolution, stage.mix), target)

    loss, grads = jax.value_and_grad(objective)(params)
    updates, optimizer = make_optimizer(stage, last).update(grads, state.optimizer, params)
    params: Any = optax.apply_updates(params, updates)
    blocks = {**state.params["synthesis"], **params["synthesis"]}
    return State({"mapping": params["mapping"], "synthesis": blocks}, optimizer, state.step + 1), loss


@functools.partial(jax.jit, static_argnames="resolution")
def preview(params: stylegan2.Params, z: Array, resolution: int) -> tuple[Array, Array]:
    """Scenes and the generator's images of `z`, both [N, R, R, 3] in [-1, 1]."""
    return targets(z, resolution), jnp.clip(generate(params, z, resolution), -1, 1)


def held_out(params: stylegan2.Params, count: int, resolution: int) -> tuple[float, np.ndarray]:
    """Mean PSNR in decibels over `count` held-out scenes, and a figure of the first eight."""
    z = jax.random.normal(jax.random.key(2**31 - 1), (count, CONFIG.z_dim))
    pairs = [preview(params, z[i : i + 8], resolution) for i in range(0, count, 8)]
    mse = np.concatenate([np.square(np.asarray(a - b)).mean((1, 2, 3)) for a, b in pairs])
    sheet = np.concatenate([np.concatenate(list(np.asarray(x)), axis=1) for x in pairs[0]], axis=0)
    return float(np.mean(10 * np.log10(4 / mse))), sheet


def save_state(path: Path, index: int, state: State) -> None:
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    files.write_npz(path, {"stage": np.asarray(index), **leaves})


def load_state(path: Path, args: Arguments) -> tuple[int, State]:
    with np.load(path, allow_pickle=False) as saved:
        index = int(saved["stage"])
        like = jax.eval_shape(lambda: first_state(index, first_params(0), args))
        leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(jax.tree.leaves(like)))]
    return index, jax.tree.unflatten(jax.tree.structure(like), leaves)


def first_params(seed: int) -> Any:
    """Random parameters whose blocks add little to the image until they are trained."""

    def damp(path: tuple[Any, ...], a: Array) -> Array:
        return 0.1 * a if "torgb" in jax.tree_util.keystr(path) and a.ndim == 4 else a

    return jax.tree_util.tree_map_with_path(damp, stylegan2.init(CONFIG, key=jax.random.key(seed)))


def first_state(index: int, params: Any, args: Arguments) -> State:
    """The first state of a stage."""
    optimizer = make_optimizer(args.stages[index], index == len(args.stages) - 1)
    return State(params, optimizer.init(active(params, args.stages[index].resolution)), jnp.zeros((), jnp.int32))


def main(args: Arguments) -> None:
    folder = cli.output_directory(args.output_path)
    saved = folder / "state.npz"
    if saved.exists():
        index, state = load_state(saved, args)
        print(f"resuming at stage {index} ({args.stages[index].resolution} px), step {int(state.step)}", flush=True)
    else:
        index, state = 0, first_state(0, first_params(args.seed), args)
    while index < len(args.stages):
        stage, last = args.stages[index], index == len(args.stages) - 1
        start = saved_at = time.perf_counter()
        first = int(state.step)
        for step in range(first, stage.steps):
            state, loss = train_step(state, stage=stage, last=last, seed=args.seed)
            now = time.perf_counter()
            if now - saved_at > args.save_seconds or step == stage.steps - 1:
                saved_at = now
                psnr, sheet = held_out(faded(state.params, stage, state.step), args.eval_scenes, stage.resolution)
                rate = (step + 1 - first) * stage.batch / (now - start)
                print(f"{stage.resolution:3d} px  step {step + 1}/{stage.steps}  loss {float(loss):.4f}  "
                      f"held-out PSNR {psnr:.2f} dB  {rate:.1f} images/s", flush=True)  # fmt: skip
                images.save_png(folder / "preview.png", sheet)
                save_state(saved, index, state)
        finished = jax.tree.map(np.asarray, with_mean_w(faded(state.params, stage, state.step)))
        # Half precision halves the size, and changes no 8-bit color.
        checkpoints.save_safetensors(folder / "generator.safetensors", CONFIG, finished, dtype=np.float16)
        index += 1
        if index < len(args.stages):
            state = first_state(index, faded(state.params, stage, state.step), args)


def with_mean_w(params: Any) -> Any:
    """`params` with the measured mean style `w_avg`, for truncation."""
    z = jax.random.normal(jax.random.key(1), (10_000, CONFIG.z_dim))
    w = stylegan2.map_z(CONFIG, params, z)[:, 0]
    return {**params, "mapping": {**params["mapping"], "w_avg": w.mean(0)}}


if __name__ == "__main__":
    cli.run(Arguments, main)
