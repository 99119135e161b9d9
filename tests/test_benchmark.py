"""The benchmark: counts, workers, tables, and the programs that it runs."""

import json
import textwrap
from pathlib import Path

import benchmark
import demo_command
import estimate_cost
import jax
import numpy as np
import operations
import presets
import pytest
from operations import Operations
from sleep_step import Sleep
from steps import Convolution
from workers import Worker, WorkerError

from samjax.errors import UserError
from samjax.nets import lpips, stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config


def convolution_operations(jaxpr) -> int:
    """Multiplications and additions of a program's convolutions, counted from the program itself.

    Where a convolution has one form for CPUs and one for the rest, the plain one counts, which has the most.
    """
    total = 0
    for equation in jaxpr.eqns:
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        programs = [inner for leaf in leaves if hasattr(inner := getattr(leaf, "jaxpr", leaf), "eqns")]
        choose = max if equation.primitive.name == "cond" else sum
        total += choose(map(convolution_operations, programs)) if programs else 0
        if equation.primitive.name == "conv_general_dilated":
            height, width, inputs, outputs = equation.invars[1].aval.shape
            total += 2 * height * width * inputs * outputs * int(np.prod(equation.outvars[0].aval.shape[:3]))
    return total


def test_operations_of_synthesis():
    """Against the program: its up-convolutions compute a margin more, its RGB layers are matrix products."""
    config = StyleGAN2Config(64, w_dim=8, channel_base=512, channel_max=16)
    params = jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0)))
    ws = jax.ShapeDtypeStruct((1, config.num_ws, config.w_dim), np.float32)
    program = jax.make_jaxpr(lambda params, ws: stylegan2.synthesize(config, params, ws))(params, ws)
    rgb = sum(2 * r * r * config.channels(r) * 3 for r in config.block_resolutions)
    ratio = convolution_operations(program.jaxpr) / (operations.synthesis_operations(config) - rgb)
    assert 1 <= ratio < 1.15
    # Liu et al., "Content-Aware GAN Compression", CVPR 2021, count 45.1 and 74.3 billion multiply-adds.
    for resolution, published in ((256, 45.1e9), (1024, 74.3e9)):
        assert operations.synthesis_operations(StyleGAN2Config(resolution)) == pytest.approx(2 * published, rel=0.01)


def test_operations_of_lpips():
    params = jax.eval_shape(lambda: lpips.init("vgg", key=jax.random.key(0)))
    image = jax.ShapeDtypeStruct((1, 96, 64, 3), np.float32)
    program = jax.make_jaxpr(lambda params, x: lpips.features(params, x, "vgg"))(params, image)
    assert convolution_operations(program.jaxpr) == operations.lpips_operations(96, 64)
    assert operations.lpips_operations(224, 224) == pytest.approx(2 * 15.35e9, rel=0.01)  # as is known of VGG16


def test_figures():
    row = benchmark.Row(512, 4, Operations(1, 2, 3, 4), [8.0, 4.0, 6.0], [1.0, 2.0, 0.5], [4.0, 1.0, 2.0])
    rate = Convolution.OPERATIONS
    assert row.rate == rate
    assert row.share == 4 * 10 / 6 / rate
    assert row.ratio == 0.75, "the median of 0.5, 1 and 0.75, not the ratio of medians"
    assert row.against(benchmark.Row(512, 2, row.operations, [5.0, 1.0, 1.0])) == 2, "an image's time, round by round"
    failed = benchmark.Row(1024, 1, Operations(1, 2, 3, 4), failure="out of memory?")
    lines = list(benchmark.table([row, failed], True))
    assert len({line.count("|") for line in lines}) == 1
    assert "0.75 per image" in lines[2]
    assert "failed: out of memory?" in lines[3]
    assert row.against(failed) is None


def test_worker():
    with Worker(Sleep, 0.01) as worker:
        assert worker.device == "bed"
        assert worker.seconds(3) == pytest.approx(0.01)
        with pytest.raises(WorkerError, match="ended with code 3"):
            worker.seconds(100)
    with pytest.raises(WorkerError, match=r"^ValueError: cannot sleep$"):
        Worker(Sleep, -1)


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    args = benchmark.Arguments(
        resolutions=(16,), batch_sizes=(1,), steps=1, rounds=2, channel_max=4, output_path=tmp_path / "figures.json"
    )
    benchmark.main(args)
    printed = capsys.readouterr().out
    assert "| 16 px | 1 |" in printed
    assert "| synthesis, backward |" in printed
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1]
    assert rows[0]["parts"]["synthesis, backward"]["operations"] == rows[0]["operations"]["synthesis_backward"]
    for row in rows:
        assert row["failure"] is None
        assert row["peak_memory"] > 1e8
        assert len(row["ours"]) == len(row["convolution"]) == 2
        assert 0 < row["share"] < 1


def test_a_batch_that_does_not_run(monkeypatch):
    """A failing batch is reported in its row, and the others keep their figures."""

    def worker(step, config, batch_size, precision):
        if batch_size == 7:
            raise WorkerError("out of memory?")
        return Worker(Sleep, 0.01)

    monkeypatch.setattr(benchmark, "Worker", worker)
    args = benchmark.Arguments(batch_sizes=(1, 7, 2), steps=1, rounds=2, channel_max=4)
    with Worker(Sleep, 0.01) as convolution:
        one, seven, two = benchmark.measure(args, 16, convolution)
    assert (seven.failure, seven.ours) == ("out of memory?", [])
    assert len(one.ours) == len(two.ours) == 2
    assert two.against(one) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (100,)}, "100 is not a power of two"),
        ({"resolutions": ()}, "--resolutions is empty"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"reference": (Path("a"), Path("b"))}, "a is not a checkout of NVlabs/stylegan3"),
        ({"reference": (Path("a"), Path("b")), "resolutions": (64,)}, "from 256 on"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(benchmark.Arguments(**options))


def program(path: Path, text: str) -> Path:
    """A script that stands in for a program."""
    path.write_text("import json, pathlib, sys\n" + textwrap.dedent(text))
    return path


def test_quality(monkeypatch, tmp_path):
    """Differences are those of the same scenes, with their standard error; times the median of their ratios."""
    script = program(
        tmp_path / "evaluate.py",
        """
        flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        fast, half = flags["--preset"] == "fast", flags["--precision"] == "bfloat16"
        rows = {f"{i}": {"SAM": {"lpips": 0.1 * i + 0.01 * i * half, "edit": 0.2 + 0.05 * fast, "psnr": 9,
                                 "seconds": (10 + i) / (4 if fast else 1)}} for i in range(int(flags["--scenes"]))}
        output = pathlib.Path(flags["--output_path"])
        output.mkdir(parents=True)
        (output / "table.json").write_text(json.dumps({"images": rows}))
        """,
    )
    monkeypatch.setattr(presets, "PROGRAM", script)
    found = presets.measure(3, tmp_path / "kept", "cpu")
    assert list(presets.table(found))[2:] == [
        "| reference, highest | 0.100 | – | 0.200 | – | 1.00 |",
        "| fast, highest | 0.100 | +0.0000 ± 0.0000 | 0.250 | +0.0500 ± 0.0000 | 0.25 |",
        "| fast, bfloat16 | 0.110 | +0.0100 ± 0.0058 | 0.250 | +0.0500 ± 0.0000 | 0.25 |",
    ]
    assert len(presets.measure(3, tmp_path / "on a card", "NVIDIA H100")) == 5
    monkeypatch.setattr(presets, "PROGRAM", program(tmp_path / "broken.py", "sys.exit(2)"))
    with pytest.raises(UserError, match=r"--preset reference --precision highest .* ended with code 2"):
        presets.measure(3, tmp_path / "kept", "cpu")


def test_demo(monkeypatch, tmp_path):
    script = program(
        tmp_path / "invert.py",
        """
        output = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "scene0"
        output.mkdir(parents=True)
        (output / "start.png").touch()
        sweep = "--sweep_thresholds" in sys.argv
        layers = (["W+", "F4"], ["W+", "F4"], ["F4", "F6"]) if sweep else (["W+", "F4"],)
        thresholds = {str(i): {"segments": [{"layer": name} for name in names]} for i, names in enumerate(layers)}
        import time
        time.sleep(0.2)
        metrics = {"seconds": {"sam": 6.0 if sweep else 4.0}, "thresholds": thresholds}
        (output / "metrics.json").write_text(json.dumps(metrics))
        """,
    )
    monkeypatch.setattr(demo_command, "PROGRAM", script)
    runs = demo_command.measure()
    assert runs["sweep, cached"][2:] == (6.0, 2, 3)
    assert all(0 < run.first_image < run.seconds for run in runs.values())
    assert list(demo_command.table(runs))[-1].endswith("| 6.0 | 3 | 2 | 1.5 |")
    monkeypatch.setattr(demo_command, "PROGRAM", program(tmp_path / "broken.py", "sys.exit('no such file')"))
    with pytest.raises(UserError, match="ended with code 1: no such file"):
        demo_command.measure()


def test_estimated_costs(monkeypatch):
    """Times follow from operations or from bytes, whichever take longer, and fall with the number of chips."""
    cost = estimate_cost.Cost(67e12, 3.35e12)
    h100 = estimate_cost.DEVICES[0]
    assert estimate_cost.seconds(cost, h100, fast=False, utilization=0.5) == 2
    assert estimate_cost.seconds(cost._replace(flops=2 * cost.flops), h100, fast=False, utilization=1) == 2
    assert estimate_cost.seconds(cost._replace(bytes=4 * cost.bytes), h100, fast=True, utilization=1) == 4
    monkeypatch.setattr(estimate_cost, "inversion_step", lambda resolution: cost)
    monkeypatch.setattr(estimate_cost, "training_step", lambda batch_size: (cost, 59_300_000))
    args = estimate_cost.Arguments(images=16, resolutions=(256,), steps=90, epochs=1, utilization=1.0, measured=(0.5,))
    lines = list(estimate_cost.page(args))
    row = next(line for line in lines if line.startswith("| config-f, 256 px |"))
    assert row.startswith("| config-f, 256 px | 67.000 (0.261) | 3350.0 | 0 | 2.0 h, 2.0 h | ")
    assert "Measured on this machine, 256 px: 0.5 s per step, × 7,200 = 1.0 h." in lines
    assert any("× 16 / 16 = 1 steps" in line for line in lines)
