"""Options, and how they are resolved: one function for every program."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from samjax.config import (
    CATEGORIES,
    Category,
    InversionConfig,
    Options,
    checked,
    default_batch_size,
    required_roles,
    resolve,
    resolve_category,
    segmenter_category,
    with_preset,
)
from samjax.errors import UserError
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.testing import TINY, TINY_64

OWN = Options(gan_weights=Path("own"))


def test_presets_name_a_schedule_that_single_options_override():
    def config(**changes) -> InversionConfig:
        return resolve(dataclasses.replace(OWN, **changes), TINY_64).config

    assert config(preset="reference") == config()  # a generator of one's own takes the authors' schedule
    fast = config(preset="fast")
    assert (fast.num_opt_steps, fast.final_steps, fast.lr, fast.lpips_type) == (60, 12, 0.2, "none")
    assert config(preset="fast", lr=0.1) == dataclasses.replace(fast, lr=0.1)
    demo = resolve_category(Options())  # whose own schedule belongs to the learned start
    assert with_preset(demo, None) == demo.learned != demo.config
    assert with_preset(demo, "reference").lpips_type == demo.config.lpips_type == "alex"
    assert with_preset(demo, "reference").num_opt_steps == 1001
    assert config(lambda_mse=2.0, lpips_type="alex").lambda_mse == 2.0


def test_the_layers_are_those_of_the_generator():
    assert resolve(OWN, TINY_64).config.latent_names == ("W+", "F4", "F6")
    assert resolve(dataclasses.replace(OWN, latent_names="F6"), TINY_64).config.latent_names == ("W+", "F6")
    with pytest.raises(UserError, match="'F10'"):
        resolve(dataclasses.replace(OWN, latent_names="W+,F10"), TINY_64)


def test_a_generator_of_ones_own_has_its_own_sizes():
    category = resolve(OWN, TINY_64).category
    assert (category.name, category.resolution, category.target_size) == ("custom", 64, (64, 64))
    assert resolve(OWN, StyleGAN2Config(1024)).category.target_size == (256, 256)
    with pytest.raises(UserError, match="makes 64 px images, the category cars has 512 px"):
        resolve(dataclasses.replace(OWN, image_category="cars"), TINY_64)


@pytest.mark.parametrize(
    ("options", "start", "maps"),
    [
        (Options(), "learned", "predicted"),  # the demo has all networks
        (Options(start="encoder"), "encoder", "predicted"),
        (OWN, "mean", "measured"),
        (dataclasses.replace(OWN, image_category="demo"), "mean", "measured"),  # which know the demo's generator only
        (dataclasses.replace(OWN, e4e_path=Path("e"), inv_model_path=Path("p")), "encoder", "predicted"),
        (dataclasses.replace(OWN, e4e_path=Path("e"), offsets_path=Path("o")), "learned", "measured"),
        (Options(e4e_path=Path("e")), "encoder", "predicted"),  # for which the demo's offset encoder was not trained
        (dataclasses.replace(OWN, image_category="cars"), "encoder", "predicted"),
        (Options(image_category="cars", offsets_path=Path("o")), "learned", "predicted"),
        (Options(image_category="faces", start="best", invertibility="measured"), "best", "measured"),
    ],
)
def test_where_maps_and_start_come_from(options, start, maps):
    category = resolve_category(options)
    assert (category.start, category.invertibility) == (start, maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(image_category="custom"), "--gan_weights"),
        (dataclasses.replace(OWN, start="encoder"), "--e4e_path"),
        (dataclasses.replace(OWN, start="learned"), "--start learned needs --e4e_path"),
        (dataclasses.replace(OWN, start="learned", e4e_path=Path("e")), "--start learned needs --offsets_path"),
        (Options(image_category="cars", start="learned"), "--start learned needs --offsets_path"),
        (dataclasses.replace(OWN, start_latent=Path("w"), offsets_path=Path("o")), "leave them out"),
        (dataclasses.replace(OWN, invertibility="predicted"), "--inv_model_path"),
        (Options(threshold=float("nan")), "--threshold must be a finite number"),
        (Options(lr=float("inf")), "--lr must be a finite number"),
        (Options(num_opt_steps=-1), "num_opt_steps must be at least 0"),
        (Options(batch_size=0), "batch_size must be at least 1"),
        (Options(invertibility_steps=-1), "--invertibility_steps must be at least 0"),
        (Options(threshold=-0.1), "--threshold must be a finite number, 0 or more"),
        (Options(seed=2**70), "--seed must lie between 0 and 4294967295"),
        (Options(seed=-1), "--seed must lie between 0 and 4294967295"),
        (Options(edit_strengths=(1.0, float("nan"))), "--edit_strengths: a strength must be a finite number, not nan"),
        (Options(lr=-1.0), "lr cannot be -1.0: it is above 0"),
        (Options(lr_rampdown_length=-3.0), "--lr_rampdown_length is a fraction of the run, from 0 to 1, not -3.0"),
        (Options(beta1=1.0), "beta1 cannot be 1.0: it is 0 or more, and below 1"),
        (Options(lambda_mse=-2.0), "--lambda_mse cannot be -2.0: it is 0 or more"),
        (Options(lr=10**400), "--lr must be a finite number, not an integer of 1329 bits"),
        (Options(lr=1e300), "--lr must be a finite number"),  # in float32
        (Options(edit_strengths=(10**400,)), "--edit_strengths: a strength must be a finite number"),
        (Options(num_opt_steps=2**31), "--num_opt_steps must be at most 2147483647"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        resolve(options, StyleGAN2Config(256))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "bogus"}, "--preset must be reference or fast, not 'bogus'"),
        ({"start": "bogus"}, "--start must be mean, best, encoder or learned, not 'bogus'"),
        ({"segmenter": "bogus"}, "--segmenter must be felzenszwalb, slic, ade20k, bisenet or mask_rcnn"),
        ({"noise": None}, "--noise must be random, const or none, not None"),
        ({"latent_names": ("W+", "F4")}, "--latent_names must be text, not"),
        ({"num_opt_steps": "3"}, "--num_opt_steps must be an integer, not '3'"),
        ({"num_opt_steps": 2.5}, "--num_opt_steps must be an integer, not 2.5"),
        ({"num_opt_steps": True}, "--num_opt_steps must be an integer, not True"),
        ({"lr": "0.1"}, "--lr must be a number, not '0.1'"),
        ({"generate_edits": "yes"}, "--generate_edits must be true or false, not 'yes'"),
        ({"edit_strengths": 2}, "--edit_strengths must be a sequence, each a number, not 2"),
        ({"edit_strengths": ["a"]}, "--edit_strengths must be a sequence, each a number"),
        ({"gan_weights": 3}, "--gan_weights must be a path, not 3"),
    ],
)
def test_options_of_other_types_are_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        resolve_category(Options(**given))


@pytest.mark.parametrize("size", [0, -1, 2.5, "x"])
def test_the_largest_batch_is_at_least_1(size):
    with pytest.raises(UserError, match="max_batch_size must be at least 1"):
        resolve(OWN, TINY, max_batch_size=size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": -3}, "resolution and target_size cannot be -3"),
        ({"target_size": (64,)}, "resolution and target_size"),
        ({"threshold": float("nan")}, "threshold and threshold_range"),
        ({"threshold_range": (0.1,)}, "threshold and threshold_range"),
        ({"segmenter": "bogus"}, "--segmenter must be"),
    ],
)
def test_categories_that_cannot_be_meant(change, message):
    with pytest.raises((UserError, ValueError), match=message):
        dataclasses.replace(CATEGORIES["demo"], **change)


def test_options_may_be_numpys_scalars_and_text_for_paths():
    options = checked(Options(num_opt_steps=np.int64(3), lr=1, gan_weights="g", edit_strengths=[np.float32(2)]))
    assert options.gan_weights == Path("g")
    assert resolve(options, StyleGAN2Config(256)).config.num_opt_steps == 3


def test_measuring_takes_at_most_501_steps_by_default():
    assert resolve(OWN, TINY).measure_steps == 501
    assert resolve(dataclasses.replace(OWN, num_opt_steps=40), TINY).measure_steps == 40
    for steps in (0, 7):
        assert resolve(dataclasses.replace(OWN, invertibility_steps=steps), TINY).measure_steps == steps


def test_the_threshold_is_laid_over_the_category():
    assert resolve_category(Options(threshold=0.7)).threshold == 0.7
    assert resolve_category(Options()).threshold == CATEGORIES["demo"].threshold


def test_required_networks():
    cars = Options(image_category="cars")
    assert required_roles(cars) == ("generator", "encoder", "invertibility", "segmenter")
    assert required_roles(cars, segmenter=False) == ("generator", "encoder", "invertibility")
    assert required_roles(dataclasses.replace(cars, segmenter="slic", start="mean")) == ("generator", "invertibility")
    given = dataclasses.replace(cars, gan_weights=Path("g"), e4e_path=Path("e"), inv_model_path=Path("i"))
    assert required_roles(given) == ("segmenter",)
    assert required_roles(Options()) == required_roles(OWN) == ()
    assert segmenter_category("mask_rcnn") == "cats"


def test_the_sweep_of_a_category():
    assert Category("x", 256, threshold_range=(0.1, 0.2)).sweep() == (0.1, 0.125, 0.15, 0.175, 0.2, 1.0)


def test_batches_divide_by_the_devices():
    assert resolve(OWN, TINY, devices=2).config.batch_size == 2
    with pytest.raises(UserError, match="--batch_size 3 does not divide evenly over the 2 devices"):
        resolve(dataclasses.replace(OWN, batch_size=3), TINY, devices=2)


def test_as_many_items_as_fit_are_optimized_at_once(monkeypatch):
    assert default_batch_size(TINY) == 1, "on a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    class Device:
        def __init__(self, memory):
            self.memory_stats = lambda: memory and {"bytes_limit": memory}

    for memory, resolution, limit, expected in (
        (None, 1024, 8, 8),
        (80e9, 1024, 16, 16),
        (12e9, 256, 8, 8),
        (12e9, 1024, 8, 3),  # a free notebook's card, three quarters of its 16 GB
        (1e9, 1024, 8, 1),
    ):
        monkeypatch.setattr(jax, "local_devices", lambda memory=memory: [Device(memory)])
        assert default_batch_size(StyleGAN2Config(resolution), limit) == expected
