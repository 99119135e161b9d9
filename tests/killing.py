"""Kills data making and training at random moments, and checks that nothing is lost by it.

    python tests/killing.py --kills 10

What was finished when a process was killed is still there, unchanged, and what the last one leaves is what a run that
nobody killed leaves: the same pictures, the same figures at every step, the same predictor. The slow tests do this
with fewer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from samjax.io import checkpoints
from samjax.nets import stylegan2

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def environment(folder: Path, devices: int = 1) -> dict[str, str]:
    """Of the processes; they share what they compile, so that little of their time goes into starting."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **cache}


# --- what is run ---


def write_photos(folder: Path, count: int) -> Path:
    """A generator of 64 px and photographs."""
    config = stylegan2.StyleGAN2Config(64, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(folder / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "photos" / f"p{i}.png")
    return folder


def folder_command(inputs: Path, output: Path, *more: str) -> list[str]:
    """`invert_folder.py` on `write_photos`."""
    return [
        sys.executable, str(EXPERIMENTS / "invert_folder.py"), "--image_folder", str(inputs / "photos"),
        "--gan_weights", str(inputs / "own.safetensors"), "--output_path", str(output), "--num_opt_steps", "3",
        "--lpips_type", "alex", "--batch_size", "1", *more,
    ]  # fmt: skip


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def finished(folder: Path) -> dict[str, bytes]:
    """The pictures that stand for a finished inversion."""
    return {name: data for name, data in pictures(folder).items() if name.endswith("reconstruction.png")}


def write_data(folder: Path, count: int, seed: int = 0, size: int = 64) -> Path:
    """Pictures of two halves, inverted badly on one of them, in the authors' layout."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        # With texture: where channels hardly vary, batch normalisation makes much of the last digits.
        picture = rng.integers(0, 60, (size, size, 3), np.uint8)
        picture[:, : size // 2] += rng.integers(0, 195, 3, np.uint8)
        picture[:, size // 2 :] += rng.integers(0, 195, 3, np.uint8)
        for layer, strength in (("W+", 90), ("F4", 20)):
            noisy = picture.astype(int)
            noisy[:, : size // 2] += rng.integers(-strength, strength, (size, size // 2, 3))
            final = folder / layer / f"p{i}" / "final"
            final.mkdir(parents=True)
            Image.fromarray(picture).save(final / "input.png")
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(final / "reconstruction.png")
    return folder


def training_command(data: Path, output: Path, *more: str, steps: int = 20) -> list[str]:
    """`train_invertibility.py` on `write_data`.

    The learning rate is low enough that rounding does not grow: at the usual one, two runs on one device whose first
    weights differ in their last digit part by 1e-3 within twenty steps, which hides what is to be seen here.
    """
    return [
        sys.executable, str(EXPERIMENTS / "train_invertibility.py"), "--dataset_folder_train", str(data / "train"),
        "--dataset_folder_val", str(data / "val"), "--output_folder", str(output), "--preset", "small",
        "--lpips_type", "alex", "--target_H", "64", "--target_W", "64", "--batch_size", "8", "--num_steps", str(steps),
        "--val_frequency", "10", "--save_frequency", "3", "--log_frequency", "1", "--lr", "1e-6", *more,
    ]  # fmt: skip


def figures(folder: Path) -> list[dict[str, float]]:
    """Every line of a training's figures, but for the seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def predictor(folder: Path) -> dict[str, np.ndarray]:
    return checkpoints.flatten(checkpoints.load_network(folder / "predictor", "invertibility").variables)


def run_as_two(command: Callable[..., list[str]], inputs: Path, output: Path, env: dict[str, str]) -> None:
    """Two processes of `command` that work as one, over loopback; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--coordinator", address, "--num_processes", "2", "--process_id"]
    running = [subprocess.Popen(command(inputs, output, *flags, str(i)), env=env) for i in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]


# --- killing ---


def run_with_kills(
    command: list[str],
    env: dict[str, str],
    kills: int,
    progress: Callable[[], int],
    after_kill: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> int:
    """Starts `command` again and again, kills it at random moments, and lets the last one end.

    One in four dies while it starts; the others when they are further than the one before, and up to a second later.

    Returns:
      How many were killed.
    """
    rng, killed = np.random.default_rng(seed), 0
    while killed < kills:
        reached = progress()
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 10))
        else:
            while process.poll() is None and progress() <= reached:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        after_kill()
    subprocess.run(command, check=True, capture_output=True, env=env)
    return killed


def kill_data_making(inputs: Path, output: Path, alone: Path, kills: int, env: dict[str, str]) -> int:
    """`alone` is what an uninterrupted run left."""
    seen: dict[str, bytes] = {}

    def after_kill() -> None:
        found = finished(output) if output.exists() else {}
        assert all(found.get(name) == data for name, data in seen.items()), "finished work was lost"
        seen.update(found)

    killed = run_with_kills(folder_command(inputs, output), env, kills, lambda: len(finished(output)), after_kill)
    assert pictures(output) == pictures(alone), "the pictures are not those of the uninterrupted run"
    return killed


def kill_training(data: Path, output: Path, alone: Path, kills: int, env: dict[str, str], steps: int = 20) -> int:
    """`alone` is what an uninterrupted run left."""
    command = training_command(data, output, steps=steps)
    killed = run_with_kills(command, env, kills, lambda: len(figures(output)))
    assert figures(output) == figures(alone), "the figures are not those of the uninterrupted run"
    expected, found = predictor(alone), predictor(output)
    assert all((expected[name] == found[name]).all() for name in expected), "another predictor"
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = environment(folder)
        write_photos(folder, 3 * kills)
        subprocess.run(folder_command(folder, folder / "alone"), check=True, capture_output=True, env=env)
        killed = kill_data_making(folder, folder / "killed", folder / "alone", kills, env)
        print(f"data making: killed {killed} times, the same {len(finished(folder / 'alone'))} inversions", flush=True)
        write_data(folder / "data" / "train", 16)
        write_data(folder / "data" / "val", 3, seed=1)
        command = training_command(folder / "data", folder / "run_alone", steps=4 * kills)
        subprocess.run(command, check=True, capture_output=True, env=env)
        killed = kill_training(folder / "data", folder / "run", folder / "run_alone", kills, env, steps=4 * kills)
        print(f"training: killed {killed} times, the same figures at all {4 * kills} steps and the same predictor")


if __name__ == "__main__":
    main()
