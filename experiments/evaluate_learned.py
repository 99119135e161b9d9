"""What the learned networks are worth: predicted maps against measured ones, the encoder's start against the mean.

    python experiments/evaluate_learned.py                              # 64 held-out hard scenes of the demo
    python experiments/evaluate_learned.py --images DIR --gan_weights converted/ --e4e_path output/encoder/encoder \\
        --inv_model_path output/predictor/predictor

Every image is inverted in each layer alone, which measures its maps, then with SAM by the measured and by the predicted
ones; and from the mean style in all steps against from the encoder's code in half of them. Prints Markdown tables and
writes them, with every image's figures, to OUTPUT_PATH. Finished images are kept: the same command goes on where it was
stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import cli
import evaluate
import jax
import networks
import numpy as np
import tqdm

from samjax import api, maps
from samjax.errors import UserError
from samjax.io import files


@dataclasses.dataclass(frozen=True)
class Arguments(evaluate.Flags):
    output_path: Path = Path("output/evaluation_learned")
    scenes: int = 64
    scene_seed: int = 3
    """Which hard scenes; the networks were trained on those of 30, and chosen on those of 31."""
    threshold: float | None = None
    """Mean error up to which a segment may use a layer; none: that of the category."""


class Row(NamedTuple):
    """One image.

    Attributes:
      same_layer: share of its area whose segments get the layer that the measured maps give.
      segment_error: mean absolute error of segment means, by area.
      wanted: shares of its area that the measured maps give to each layer.
      lpips_measured, lpips_predicted: of SAM's reconstruction with the maps.
      mean_w, half_w: final loss in W+ from the mean style in all steps, from the encoder's code in half of them.
      mean_sam, half_sam: the same with SAM.
    """

    same_layer: float
    segment_error: float
    wanted: list[float]
    lpips_measured: float
    lpips_predicted: float
    mean_w: float
    half_w: float
    mean_sam: float
    half_sam: float


def measure(models: api.Models, nets: networks.Networks, example: evaluate.Example, threshold: float, seed: int) -> Row:
    """All figures of one image."""
    target, labels = example.target, example.segments
    code, mean = networks.encode(nets, target), api.start(models, target, kind="mean", seed=seed)
    errors = (
        api.measure(models, target, code, seed=seed).maps[0],
        networks.predicted_maps(nets, target, models.config.latent_names),
    )
    measured, predicted = (maps.assign_layers(error, labels, threshold) for error in errors)
    areas = np.bincount(maps.contiguous(labels)[0].ravel()) / labels.size
    chosen, found = measured.layer_maps[0], predicted.layer_maps[0]
    half = models._replace(
        config=dataclasses.replace(models.config, num_opt_steps=max(models.config.num_opt_steps // 2, 1))
    )

    def run(models: api.Models, layer_map: np.ndarray, ws: np.ndarray) -> tuple[float, float]:
        """LPIPS and loss at the end."""
        done = api.invert_layers(models, target, layer_map[None], ws, seed=seed)
        return float(api.distances(models, done.images, target)[0]), float(done.terms.total[-1, 0])

    with_measured, _ = run(models, chosen, code)
    with_predicted = with_measured if (chosen == found).all() else run(models, found, code)[0]
    all_w = np.zeros_like(chosen)
    return Row(
        float((chosen == found).mean()),
        float((np.abs(measured.means - predicted.means) * areas).sum(1).mean()),
        (np.bincount(chosen.ravel(), minlength=len(models.layers)) / chosen.size).tolist(),
        with_measured,
        with_predicted,
        run(models, all_w, mean)[1],
        run(half, all_w, code)[1],
        run(models, chosen, mean)[1],
        run(half, chosen, code)[1],
    )


def markdown(rows: dict[str, Row], caption: str, steps: int) -> str:
    """Means over the images."""
    mean = lambda name: float(np.mean([getattr(row, name) for row in rows.values()]))  # noqa: E731
    sooner = lambda half, whole: np.mean([getattr(r, half) <= getattr(r, whole) for r in rows.values()])  # noqa: E731
    measured, predicted = mean("lpips_measured"), mean("lpips_predicted")
    lines = [
        "| maps | area with the measured layer | error of segment means | SAM's LPIPS |",
        "|---|--:|--:|--:|",
        f"| measured | 100% | 0 | {measured:.3f} |",
        f"| predicted | {mean('same_layer'):.1%} | {mean('segment_error'):.3f}"
        f" | {predicted:.3f} ({predicted / measured - 1:+.1%}) |",
        "",
        f"| loss at the end | from the mean style, {steps} steps | from the encoder's code, {max(steps // 2, 1)} steps"
        " | code not above the mean |",
        "|---|--:|--:|--:|",
        *(
            f"| {title} | {mean(f'mean_{key}'):.4f} | {mean(f'half_{key}'):.4f}"
            f" | {sooner(f'half_{key}', f'mean_{key}'):.0%} of images |"
            for title, key in (("W+", "w"), ("SAM", "sam"))
        ),
        "",
        caption,
        "",
    ]
    return "\n".join(lines)


def read(path: Path) -> Row:
    """A finished image."""
    try:
        return Row(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove it, and the same command makes it again") from error


def main(args: Arguments) -> None:
    count = evaluate.count_examples(args)
    nets = networks.load(
        dataclasses.replace(args, start="encoder", invertibility="predicted"), segments_given=args.images is None
    )
    config = evaluate.settings(args, nets)
    networks.check_layers(nets, config.latent_names)
    folder = files.output_folder(args.output_path)
    models = api.load_models(nets.generator, config, seed=args.seed)
    threshold = args.threshold or nets.category.threshold
    looks: Any = (nets.encoder, nets.predictor)
    run = repr((config, threshold, args.fit, args.seed, *map(evaluate.fingerprint, looks)))
    run = hashlib.sha256(run.encode()).hexdigest()[:8]
    rows: dict[str, Row] = {}
    for example in tqdm.tqdm(evaluate.examples(args, nets), total=count, unit="image"):
        path = folder / f"{example.name}_{run}.json"
        if not path.exists():
            files.write_json(path, measure(models, nets, example, threshold, args.seed)._asdict())
        rows[example.name] = read(path)
    shares = np.mean([row.wanted for row in rows.values()], axis=0)
    given = ", ".join(f"{layer.name} {share:.0%}" for layer, share in zip(models.layers, shares, strict=True))
    what = f"{count} hard scenes of the demo" if args.images is None else f"{count} images of {args.images.name}"
    device = jax.devices()[0].device_kind
    caption = f"{what}, threshold {threshold:g}; area by measured maps: {given}; {device}."
    text = markdown(rows, caption, config.num_opt_steps)
    files.write_text(folder / "table.md", text)
    files.write_json(folder / "table.json", {"images": {name: row._asdict() for name, row in rows.items()}})
    print(text)


if __name__ == "__main__":
    cli.run(Arguments, main)
