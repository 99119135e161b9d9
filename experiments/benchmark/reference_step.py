"""The authors' optimization step in PyTorch, with random weights, as `benchmark.py` times it.

The generator and the synthesis from latents are the authors' own code, from their checkouts. The loop around them is
rewritten after theirs: frozen weights, random noise, area-resized image, squared error, LPIPS-VGG of both images at
every step, the penalty of the offsets, Adam.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

OFFSETS = {"F4": 16, "F6": 32, "F8": 64, "F10": 128}
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _old_setuptools() -> None:
    """Replaces `pkg_resources`, by which the checkout compares versions, and which setuptools no longer has."""
    if importlib.util.find_spec("pkg_resources") is None:
        module = types.ModuleType("pkg_resources")
        module.parse_version = lambda text: tuple(map(int, re.findall(r"\d+", text)[:3]))  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = module


class Step:
    """Optimizes one image: called with a number of steps, returns the seconds they took."""

    def __init__(self, stylegan3: str, sam: str, resolution: int, channel_base: int, channel_max: int, threads: int):
        _old_setuptools()
        sys.path[:0] = [stylegan3, str(Path(sam) / "src")]
        import torch
        from model_utils import custom_forward  # type: ignore[import-not-found]
        from training.networks_stylegan2 import Generator  # type: ignore[import-not-found]

        torch.manual_seed(0)
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # full float32
        self._torch, self._forward = torch, custom_forward
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = Generator(
            512, 0, 512, resolution, 3, channel_base=channel_base, channel_max=channel_max, num_fp16_res=0
        )
        self._generator = generator.eval().requires_grad_(False).to(self._device)
        self._lpips = _lpips(torch).requires_grad_(False).to(self._device)
        self._crop = 32 if resolution == 512 else 0  # cars are letterboxed

        def random(*shape: int) -> Any:
            return torch.rand(*shape, device=self._device)

        z = torch.randn(1, 512, device=self._device)
        self._latents = {"W+": self._generator.mapping(z, None).clone()}
        self._masks = {}
        for name, size in OFFSETS.items():
            channels = min(channel_base // size, channel_max)
            self._latents[name] = torch.zeros(1, channels, size, size, device=self._device)
            self._masks[name] = random(1, 1, size, size)
        for latent in self._latents.values():
            latent.requires_grad_(True)
        self._target = 2 * random(1, 3, 256 - 2 * self._crop, 256) - 1
        self._adam = torch.optim.Adam(list(self._latents.values()), lr=0.05)
        self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

    def _one(self) -> None:
        mse = self._torch.nn.functional.mse_loss
        image = self._forward(self._generator, self._latents, "stylegan2", ",".join(self._latents), self._masks)
        image = self._torch.nn.functional.interpolate(image, size=(256, 256), mode="area").clamp(-1, 1)
        image = image[:, :, self._crop : 256 - self._crop]
        loss = mse(image, self._target) + self._lpips(image, self._target)
        for name in OFFSETS:
            loss = loss + 5 * mse(self._latents[name], self._torch.zeros_like(self._latents[name]))
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def __call__(self, steps: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self._one()
        self._wait()
        return time.perf_counter() - began


def _lpips(torch: Any) -> Any:
    """LPIPS-VGG with random weights, on which its time does not depend."""
    nn = torch.nn

    class Lpips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.weights, channels = nn.ModuleList(), nn.ModuleList(), 3
            for i, widths in enumerate(VGG):
                layers = [nn.MaxPool2d(2)] if i else []
                for width in widths:
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                    channels = width
                self.stages.append(nn.Sequential(*layers))
                self.weights.append(nn.Conv2d(channels, 1, 1, bias=False))

        def features(self, x: Any) -> list[Any]:
            result = []
            for stage in self.stages:
                x = stage(x)
                result.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            return result

        def forward(self, x: Any, y: Any) -> Any:
            pairs = zip(self.features(x), self.features(y), self.weights, strict=True)
            return sum(weight((a - b).square()).mean() for a, b, weight in pairs)

    return Lpips()
