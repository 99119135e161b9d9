"""Kills the making of training data and the training at random moments, and checks that nothing is lost.

    python tests/killing.py --kills 10

Whatever was finished when a process was killed is still there and unchanged. After the last start, images, metrics of
every step and the predictor are those of an uninterrupted run. Tests marked slow do the same with fewer kills.
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

import chex
import numpy as np
from PIL import Image

from samjax.io import checkpoints
from samjax.testing import TINY_64, tiny_generator

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def environment(folder: Path, devices: int = 1) -> dict[str, str]:
    """Environment of the processes, which share compiled programs, so that starting takes little of their time."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **cache}


# --- what is run ---


def write_images(folder: Path, count: int) -> Path:
    """Writes a generator of 64 px images, and images."""
    checkpoints.save_safetensors(folder / "own.safetensors", TINY_64, tiny_generator(TINY_64))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "images" / f"p{i}.png")
    return folder


def folder_command(inputs: Path, output: Path, *more: str) -> list[str]:
    """The command of `invert_folder.py` for `write_images`."""
    return [
        sys.executable, str(EXPERIMENTS / "invert_folder.py"), "--image_folder", str(inputs / "images"),
        "--gan_weights", str(inputs / "own.safetensors"), "--output_path", str(output), "--num_opt_steps", "3",
        "--lpips_type", "alex", "--batch_size", "1", *more,
    ]  # fmt: skip


def images_of(folder: Path) -> dict[str, bytes]:
    """The contents of all PNG files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def finished(folder: Path) -> dict[str, bytes]:
    """The contents of the files that mark finished inversions."""
    return {name: data for name, data in images_of(folder).items() if name.endswith("reconstruction.png")}


def write_data(folder: Path, count: int, seed: int = 0, size: int = 64) -> Path:
    """Writes images of two halves, with inversions that are bad in one half, in the authors' layout."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        # With texture, because batch normalization amplifies rounding errors of channels that hardly vary.
        image = rng.integers(0, 60, (size, size, 3), np.uint8)
        image[:, : size // 2] += rng.integers(0, 195, 3, np.uint8)
        image[:, size // 2 :] += rng.integers(0, 195, 3, np.uint8)
        for layer, strength in (("W+", 90), ("F4", 20)):
            noisy = image.astype(int)
            noisy[:, : size // 2] += rng.integers(-strength, strength, (size, size // 2, 3))
            final = folder / layer / f"p{i}" / "final"
            final.mkdir(parents=True)
            Image.fromarray(image).save(final / "input.png")
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(final / "reconstruction.png")
    return folder


def training_command(data: Path, output: Path, *more: str, steps: int = 20) -> list[str]:
    """The command of `train_invertibility.py` for `write_data`.

    The learning rate is so low that rounding errors do not grow. At the usual one, two runs whose initial weights
    differ in the last digit differ by 1e-3 after twenty steps, which would hide errors of resuming and of sharding.
    """
    return [
        sys.executable, str(EXPERIMENTS / "train_invertibility.py"), "--dataset_folder_train", str(data / "train"),
        "--dataset_folder_val", str(data / "val"), "--output_folder", str(output), "--preset", "small",
        "--lpips_type", "alex", "--target_H", "64", "--target_W", "64", "--batch_size", "8", "--num_steps", str(steps),
        "--val_frequency", "10", "--save_frequency", "3", "--log_frequency", "1", "--lr", "1e-6", *more,
    ]  # fmt: skip


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """All metrics of a training except the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def predictor_of(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a trained predictor."""
    return checkpoints.flatten(checkpoints.load_network(folder / "predictor", "invertibility").params)


def run_as_two(command: Callable[..., list[str]], inputs: Path, output: Path, env: dict[str, str]) -> None:
    """Runs `command` in two connected processes on this machine, which must both succeed."""
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
    """Starts `command` repeatedly, kills it at random moments, and lets the last process finish.

    One in four processes is killed while it starts, the others up to a second after they have made progress.

    Returns:
      The number of killed processes.
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
    """Kills and restarts a run, and compares it with `alone`, the output of an uninterrupted one."""
    seen: dict[str, bytes] = {}

    def after_kill() -> None:
        found = finished(output) if output.exists() else {}
        assert all(found.get(name) == data for name, data in seen.items()), "finished work was lost"
        seen.update(found)

    killed = run_with_kills(folder_command(inputs, output), env, kills, lambda: len(finished(output)), after_kill)
    assert images_of(output) == images_of(alone), "the images differ from those of the uninterrupted run"
    return killed


def kill_training(data: Path, output: Path, alone: Path, kills: int, env: dict[str, str], steps: int = 20) -> int:
    """Kills and restarts a run, and compares it with `alone`, the output of an uninterrupted one."""
    command = training_command(data, output, steps=steps)
    killed = run_with_kills(command, env, kills, lambda: len(metrics_of(output)))
    assert metrics_of(output) == metrics_of(alone), "the metrics differ from those of the uninterrupted run"
    chex.assert_trees_all_equal(predictor_of(alone), predictor_of(output))
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = environment(folder)
        write_images(folder, 3 * kills)
        subprocess.run(folder_command(folder, folder / "alone"), check=True, capture_output=True, env=env)
        killed = kill_data_making(folder, folder / "killed", folder / "alone", kills, env)
        print(f"data making: killed {killed} times, the same {len(finished(folder / 'alone'))} inversions", flush=True)
        write_data(folder / "data" / "train", 16)
        write_data(folder / "data" / "val", 3, seed=1)
        command = training_command(folder / "data", folder / "run_alone", steps=4 * kills)
        subprocess.run(command, check=True, capture_output=True, env=env)
        killed = kill_training(folder / "data", folder / "run", folder / "run_alone", kills, env, steps=4 * kills)
        print(f"training: killed {killed} times, the same metrics at all {4 * kills} steps and the same predictor")


if __name__ == "__main__":
    main()
