"""Files that mean harm: mutated and generated ones, the readers that they are given to, and what must not happen.

    python tests/fuzzing.py --count 10000 --seed 0

prints a JSON object with the number of files that were executed, and of tracebacks, hangs, reads that took too much
memory, files left behind, and messages that are not one printable line with the name of the file. All must be 0. Tests
marked slow do the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
"""Of processor time, after which the reading of a file counts as a hang."""
MEMORY = 512 * 2**20, 4
"""Bytes that a process may take in all, and for each byte of the file."""

# --- mutation ---

_NUMBERS = (
    b"\0",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\0\0\0\x80",
    b"\0" * 7 + b"\x7f",
)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to six changes, mostly near the ends, where formats have their structure."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        size = len(content)
        start = rng.choice(
            (rng.randint(0, size), rng.randint(0, min(size, 600)), size - rng.randint(0, min(size, 600)))
        )
        length = rng.choice((1, 2, 4, 8, rng.randint(1, 40), rng.randint(1, max(size, 1))))
        part = bytes(content[start : start + length])
        match rng.randint(0, 6):
            case 0 | 1:
                content[start : start + 1] = bytes([rng.randint(0, 255)])
            case 2:
                number = rng.choice(_NUMBERS)
                content[start : start + len(number)] = number
            case 3:
                del content[start : start + length]
            case 4:
                content[start:start] = part
            case 5:
                other = rng.randint(0, size)
                content[other : other + len(part)] = part
            case 6:
                content[start:start] = bytes(rng.randint(0, 255) for _ in range(min(length, 40)))
    return bytes(content)


def mutate_inside(rng: random.Random, data: bytes) -> bytes:
    """A zip archive with a member mutated and its checksum renewed; a safetensors file with its header mutated."""
    if data[:2] != b"PK":
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= len(data):
            return mutate(rng, data)
        header = mutate(rng, data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = rng.choice(pickles or names)
        pack = zipfile.ZIP_STORED if pickles else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(out, "w", pack) as new:
            for name in names:
                content = old.read(name)
                new.writestr(name, mutate(rng, content) if name == chosen else content)
    return out.getvalue()


# --- pickles from a grammar ---

HARMLESS = (
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"), ("builtins", "list"),
    ("builtins", "set"), ("builtins", "dict"), ("builtins", "frozenset"), ("builtins", "bytes"), ("_codecs", "encode"),
    ("copyreg", "_reconstructor"), ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"), ("numpy", "ndarray"), ("numpy", "dtype"), ("torch", "FloatStorage"),
    ("torch", "LongStorage"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch.storage", "_load_from_bytes"), ("easydict", "EasyDict"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"), ("dnnlib.tflib.network", "Network"),
    ("types", "SimpleNamespace"), ("somewhere.options", "Options"), ("datetime", "datetime"),
)  # fmt: skip
RUNNING = (
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
    ("builtins", "exec"), ("__builtin__", "execfile"), ("builtins", "open"), ("builtins", "__import__"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("shutil", "rmtree"), ("webbrowser", "open"),
    ("pickle", "loads"), ("torch", "load"), ("numpy", "load"), ("collections", "abc.sys.exit"),
    ("__main__", "os.system"), ("code", "interact"),
    ("samjax.io.files", "write_text"), ("operator", "methodcaller"), ("types", "FunctionType"),
)  # fmt: skip
_KEYS = (
    "g_ema", "G_ema", "state_dict", "latent_avg", "state", "_modules", "_parameters", "_buffers", "class_name",
    "mapping", "synthesis", "variables", "components", "static_kwargs", "version", "conv1.conv.weight", "input.input",
    "comp", "std", "latent", "direction", "lat_comp", "lat_stdev", "Generator", "f4", "<", "storage", "0", "cpu",
    "latin1", "F", "w",
)  # fmt: skip


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


class Program:
    """A random pickle whose opcodes mostly fit each other."""

    def __init__(self, rng: random.Random, command: str) -> None:
        self.rng = rng
        self.command = command
        self.memo = 0

    def made(self) -> bytes:
        """The pickle, of protocol 2 to 4."""
        body = self.value(0) if self.rng.random() < 0.85 else self.bomb()
        if self.rng.random() < 0.2:
            body = mutate(self.rng, body)
        return b"\x80" + bytes([self.rng.choice((2, 3, 4, 4))]) + body + b"."

    def kept(self, code: bytes) -> bytes:
        """`code`, whose value is sometimes put into the memo."""
        if self.rng.random() > 0.4 or self.memo > 200:
            return code
        self.memo += 1
        return code + b"q" + bytes([self.memo - 1])

    def many(self, depth: int, most: int = 4) -> bytes:
        return b"".join(self.value(depth + 1) for _ in range(self.rng.randint(0, most)))

    def leaf(self) -> bytes:
        rng = self.rng
        match rng.randint(0, 11):
            case 0:
                return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"))
            case 1:
                return b"K" + bytes([rng.randint(0, 255)])
            case 2:
                return b"J" + struct.pack("<i", rng.choice((0, 1, 4, -1, 2**31 - 1, rng.randint(-(2**31), 2**31 - 1))))
            case 3:
                number = rng.getrandbits(rng.choice((8, 64, 70, 900, 2000)))
                size = number.bit_length() // 8 + 1
                return (b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<I", size)) + number.to_bytes(
                    size, "little", signed=True
                )
            case 4:
                return b"G" + struct.pack(">d", rng.choice((0.0, 1.5, float("nan"), float("inf"))))
            case 5:
                return b"C\x04" + rng.randbytes(4)
            case 6:
                return b"h" + bytes([rng.randint(0, max(self.memo - 1, 0))])
            case 7:
                return _text("".join(chr(rng.choice((27, 0, 65, 0x202E, 0xD800, 0x1F600))) for _ in range(5)))
            case 8:
                return _name(*rng.choice(HARMLESS))
            case 9 if rng.random() < 0.3:
                return _name(*rng.choice(RUNNING)) + _text(self.command) + b"\x85R"
            case _:
                return _text(rng.choice(_KEYS))

    def value(self, depth: int) -> bytes:
        rng = self.rng
        if depth > 5:
            return self.leaf()
        match rng.randint(0, 12):
            case 0:
                return self.kept(b"]") + b"(" + self.many(depth) + b"e"
            case 1:
                return b"(" + self.many(depth) + b"t"
            case 2 | 3 | 4:
                entries = b"".join(
                    (_text(rng.choice(_KEYS)) if rng.random() < 0.9 else self.value(depth + 1)) + self.value(depth + 1)
                    for _ in range(rng.randint(0, 5))
                )
                return self.kept(b"}") + b"(" + entries + b"u"
            case 5:
                return _name(*rng.choice(HARMLESS)) + b"(" + self.many(depth) + b"t" + rng.choice((b"R", b"\x81"))
            case 6:
                state = rng.choice((self.array, lambda: self.value(depth + 1)))()
                return _name(*rng.choice(HARMLESS)) + b")" + rng.choice((b"R", b"\x81")) + state + b"b"
            case 7:
                return self.array()
            case 8:
                return self.tensor()
            case 9:
                return self.module(depth)
            case 10:
                return b"(" + self.many(depth) + b"Q" if rng.random() < 0.2 else b"\x8f(" + self.many(depth) + b"\x90"
            case _:
                return self.leaf()

    def size(self) -> bytes:
        return b"J" + struct.pack("<i", self.rng.choice((0, 1, 2, 4, 4, 4, 16, 2**30, -1)))

    def array(self) -> bytes:
        """A pickled array of NumPy."""
        shape = b"(" + b"".join(self.size() for _ in range(self.rng.randint(0, 4))) + b"t"
        dtype = _name("numpy", "dtype") + _text(self.rng.choice(("f4", "f8", "O8", "V4"))) + b"\x85R"
        data = self.rng.randbytes(self.rng.choice((0, 4, 16, 64)))
        state = b"(K\x01" + shape + dtype + b"\x89C" + bytes([len(data)]) + data + b"t"
        return _name("numpy.core.multiarray", "_reconstruct") + b")R" + state + b"b"

    def tensor(self) -> bytes:
        """A tensor of a storage in a torch file."""
        storage = (
            b"(" + _text("storage") + _name("torch", "FloatStorage") + _text("0") + _text("cpu") + self.size() + b"tQ"
        )
        axes = self.rng.randint(0, 3)
        shape, strides = (b"(" + b"".join(self.size() for _ in range(axes)) + b"t" for _ in range(2))
        return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + self.size() + shape + strides + b"\x89}tR"

    def module(self, depth: int) -> bytes:
        """A persistent object of NVIDIA's programs, or a network of TensorFlow."""
        if self.rng.random() < 0.3:
            return self.kept(_name("dnnlib.tflib.network", "Network") + b")\x81") + self.value(depth + 1) + b"b"
        parts = b"".join(
            _text(name) + self.value(depth + 1) for name in ("_parameters", "_buffers", "_modules", "_init_kwargs")
        )
        meta = (
            b"}(" + _text("class_name") + _text("Generator") + _text("state") + self.kept(b"}") + b"(" + parts + b"uu"
        )
        return self.kept(_name("torch_utils.persistence", "_reconstruct_persistent_obj") + meta + b"\x85R")

    def bomb(self) -> bytes:
        """A small program that asks for much: doubled, deep and self-referring structures, sizes that are not there."""
        rng = self.rng
        count = rng.choice((30, 1000, 20_000, 60_000))
        huge = rng.choice((2**31 - 1, 2**40, 2**62))
        doubled = b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
        tuples = b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
        loop = b"}q\x00" + _text("_modules") + b"h\x00s"
        deep = rng.choice(
            (b")" + b"\x85" * count, b"]" * count + b"a" * (count - 1), b"}K\x01" * count + b"N" + b"s" * count)
        )
        call = rng.choice((_name("builtins", "list"), _name("collections", "OrderedDict"), _name("builtins", "set")))
        again = b"](" + b"N" * count + b"eq\x00" + call + b"q\x01(" + b"h\x01h\x00\x85R" * count + b"l"
        text = b"X" + struct.pack("<I", count) + b"a" * count + b"q\x00"
        bomb = rng.choice((
            b"]q\x00" + doubled, b")q\x00" + tuples, loop, b"]q\x00h\x00a", deep, again, text + b"h\x00" * count,
            rng.choice((b"]", b"}", b"\x8f", b"(", b")", b"N\x94", b"2", b"\x80\x04")) * count,
            rng.choice((b"\x8e", b"\x8d", b"\x96")) + struct.pack("<Q", huge),
            b"\x8b" + struct.pack("<I", 2**31) + b"a", b"\x8b" + struct.pack("<I", count) + b"\x7f" * count,
            text + _name("_codecs", "encode") + b"q\x01" + b"h\x01h\x00\x85R" * count,
            _text("x" * count) + _text("y") + b"\x93", _text("x") + deep + b"\x93",
            b"crun\x1b[31m\nme\n)R", b"cos\0\nsystem\n)R",
        ))  # fmt: skip
        around = rng.choice((b"%b", b"}(" + _text("g_ema") + b"%bu", b"(NN%bt", b"}(%bNu", b"\x8f(%b\x90"))
        if rng.random() < 0.3:
            shape = _name("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00%b)\x89}tR"
            around = rng.choice(
                (shape, _name("numpy", "dtype") + b"%b\x85R", _name("numpy.core.multiarray", "scalar") + b"%bN\x86R")
            )
        return around.replace(b"%b", bomb)


LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}(" + _text("little_endian") + b"\x88u."


def in_torch_file(rng: random.Random, program: bytes) -> bytes:
    """A pickle as the pickle of a torch file, zip or legacy."""
    storage = rng.randbytes(64)
    if rng.random() < 0.5:
        keys = b"\x80\x02](" + _text("0") + b"e."
        return LEGACY + program + keys + struct.pack("<q", 16) + storage
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", storage)
    return out.getvalue()


# --- other formats from a grammar ---


def json_value(rng: random.Random, depth: int = 0) -> Any:
    """A value to put into a manifest or a header."""
    match rng.randint(0, 9):
        case 0 | 1 if depth < 3:
            return {rng.choice((*_KEYS, "\x1b[31m", "x" * 300)): json_value(rng, depth + 1) for _ in range(3)}
        case 2 if depth < 3:
            return [json_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
        case 3:
            return rng.choice((0, 1, -1, 4, 2**31, 2**63, 2**200, 1e308, float("nan"), float("-inf")))
        case 4:
            return rng.choice((None, True, False))
        case 5:
            return "../" * 3 + "x" + chr(rng.choice((0, 10, 27, 0x202E)))
        case _:
            return rng.choice((*_KEYS, "float32", "F32", "U8", "0", ""))


def mutate_json(rng: random.Random, value: Any) -> Any:
    """`value` with one of its parts replaced or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[key]
        else:
            changed[key] = mutate_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], mutate_json(rng, value[i]), *value[i + 1 :]]
    return json_value(rng)


def npy(rng: random.Random) -> bytes:
    """A file in NumPy's format whose header may lie."""
    size = rng.choice((0, 1, 4, 16, 4**20, 2**62, 10**30))
    shape = rng.choice(
        (f"({size},)", f"(1, {size})", f"(4, 4, {size})", "()", f"({'1, ' * 40})", "(0, 2)", f"(-{size},)")
    )
    descr = rng.choice(
        ("'<f4'", "'<f8'", "'|O'", "'<U99999999'", "'<U0'", "[('a', '<f4')]", "'<M8[ns]'", "'|S4'", "'>c16'")
    )
    header = f"{{'descr': {descr}, 'fortran_order': {rng.choice(('True', 'False', '3'))}, 'shape': {shape}, }}\n"
    header = rng.choice((header, header, "(" * 9000, "-" * 9000 + "1", "9" * 5000, header + " " * 70_000))
    data = rng.randbytes(rng.choice((0, 4, 64, 256)))
    if rng.random() < 0.7:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header.encode() + data
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", rng.choice((len(header), 2**32 - 1))) + header.encode() + data


def npz(rng: random.Random) -> bytes:
    """An archive of such files, or of zeros that inflate, or with an index that lies about their size."""
    out = io.BytesIO()
    many = rng.random() < 0.02
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for i in range(20_000 if many else rng.randint(0, 4)):
            name = (
                f"{i}.npy"
                if many
                else rng.choice(("w.npy", "lat_comp.npy", "lat_stdev.npy", "direction", "../x.npy", "a\x1b.npy"))
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that occur twice
                archive.writestr(name, b"" if many else npy(rng))
    data = out.getvalue()
    if rng.random() < 0.05:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % 2**30
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(head) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
        claimed = rng.choice((len(head) + 2**30, len(head) + 2**26, 100))
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), claimed, 5, 0)
        local = b"PK\x03\x04" + fields + b"w.npy" + packed
        index = b"PK\x01\x02" + struct.pack("<H", 20) + fields + bytes(14) + b"w.npy"
        data = local + index + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(index), len(local), 0)
    return data


# --- readers ---

NUM_WS = W_DIM = 4
"""Of the generator in `seeds`."""


def readers() -> dict[str, Callable[[Path, Path], Any]]:
    """Name to reader, which takes the file and a directory that it may write."""
    from ckpt_convert import convert
    from samjax.io import checkpoints, directions, files, images, styles, weights

    return {
        "convert": convert.convert,
        "encoder": lambda path, out: convert.convert(path, out, "e4e"),
        "predictor": lambda path, out: convert.convert(path, out, "invertibility"),
        "directions": lambda path, _: directions.read(path, NUM_WS, W_DIM),
        "latents": lambda path, _: styles.read(path, NUM_WS, W_DIM),
        "npz": lambda path, _: files.read_npz(path),
        "npy": lambda path, _: files.read_npy(path),
        "image": lambda path, _: images.read_image(path, notify=lambda _: None),
        "segments": lambda path, _: images.read_segments(path, 8, 8, images.image_size(path)),
        "network": lambda path, _: checkpoints.load_generator(path),
        "LPIPS": lambda path, _: weights.parse_lpips(path.read_bytes(), "alex"),
    }


_PICKLES = ("convert", "convert", "convert", "directions", "latents", "encoder", "predictor", "LPIPS")
_ARRAYS = ("directions", "latents")
READERS_OF: Mapping[str, Sequence[str]] = {
    ".pkl": _PICKLES, ".pt": _PICKLES, ".pth": _PICKLES, ".safetensors": ("convert", "network", *_ARRAYS),
    ".npz": ("npz", *_ARRAYS, "convert"), ".npy": ("npy", *_ARRAYS),
    **dict.fromkeys((".png", ".jpg", ".tif", ".webp", ".bmp"), ("image", "segments")), "": ("network",),
}  # fmt: skip
"""Names of readers by the suffix of a file; "" for converted directories."""


def seeds(folder: Path) -> Path:
    """Writes a small valid file of each kind to a directory, and returns it. Needs torch."""
    import ckpt_files
    import numpy as np
    import torch
    from PIL import Image

    from ckpt_convert import convert
    from samjax.io import checkpoints
    from samjax.nets.stylegan2 import StyleGAN2Config

    config = StyleGAN2Config(8, z_dim=4, w_dim=W_DIM, mapping_layers=1, channel_base=32, channel_max=4)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    nvidia = ckpt_files.nvidia_network(config, ckpt_files.their_arrays("nvidia", config))
    ckpt_files.dump_nvidia(folder / "nvidia.pkl", {"G_ema": nvidia})
    tensorflow = ckpt_files.tensorflow_network(config, ckpt_files.their_arrays("tensorflow", config))
    ckpt_files.dump_tensorflow(folder / "tensorflow.pkl", (None, None, tensorflow))
    rosinality = ckpt_files.rosinality_checkpoint(config)
    ckpt_files.dump_torch(folder / "rosinality.pt", rosinality)
    ckpt_files.dump_torch(folder / "legacy.pth", rosinality, legacy=True)
    checkpoints.write_safetensors(folder / "nvidia.safetensors", ckpt_files.their_arrays("nvidia", config), {})
    convert.convert(folder / "nvidia.pkl", folder / "network")
    code = rng.standard_normal((NUM_WS, W_DIM), np.float32)
    np.save(folder / "direction.npy", code)
    np.savez(folder / "projected_w.npz", w=code[None])
    np.savez_compressed(folder / "components.npz", lat_comp=code[:, None], lat_stdev=code[0])
    torch.save({"a.png": torch.from_numpy(code), "b.png": code}, folder / "latents.pt")
    torch.save({"comp": torch.from_numpy(code), "std": torch.ones(NUM_WS)}, folder / "components.pt")
    pixels = rng.integers(0, 255, (12, 10, 3), np.uint8)
    for suffix in ("png", "jpg", "tif", "webp", "bmp"):
        Image.fromarray(pixels).save(folder / f"image.{suffix}")
    Image.fromarray(pixels[..., 0] % 3).save(folder / "segments.png")
    return folder


def bad_file(rng: random.Random, source: Path, path: Path, command: str) -> Path:
    """Writes a bad file of the kind of `source` beside `path`, and returns its path."""
    path = path.with_suffix(source.suffix)
    if source.is_dir():
        shutil.copytree(source, path)
        changed = rng.choice([file for file in path.rglob("*") if file.is_file()])
        if rng.random() < 0.7:
            changed = path / "manifest.json"
        data = changed.read_bytes()
        if changed.suffix == ".json" and rng.random() < 0.7:
            data = json.dumps(mutate_json(rng, json.loads(data))).encode()
        else:
            data = mutate(rng, data)
        changed.write_bytes(data)
        return path
    data, kind = source.read_bytes(), source.suffix
    generated = rng.random()
    if kind == ".pkl" and generated < 0.6:
        data = Program(rng, command).made()
    elif kind in (".pt", ".pth") and generated < 0.6:
        data = in_torch_file(rng, Program(rng, command).made())
    elif kind == ".npy" and generated < 0.5:
        data = npy(rng)
    elif kind == ".npz" and generated < 0.5:
        data = npz(rng)
    elif kind == ".safetensors" and generated < 0.4:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif kind in (".pt", ".npz", ".safetensors") and generated < 0.8:
        data = mutate_inside(rng, data)
    else:
        data = mutate(rng, data)
    path.write_bytes(data)
    return path


# --- watching ---

_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
         "socket.connect", "exec", "compile", "code.__new__", "ctypes.dlopen", "os.putenv", "os.kill")  # fmt: skip


class Hang(BaseException):
    """A reader took more than `CPU_SECONDS`."""


class Watch:
    """What happens while a file is read.

    Attributes:
      refused: number of files that ended in a `UserError`.
      message: of the last one.
      seconds: of processor time that the slowest file took.
      share: the part of the memory allowed to it that a file took at most.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.refused = 0
        self.message = ""
        self.seconds = self.share = 0.0
        self.events: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGPROF, self._stop)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS and not (event in ("exec", "compile") and _by_library()):
            self.events.append(event)
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.path.abspath(arguments[0])
            if not path.startswith(self.folder) and path != os.devnull:
                self.events.append(f"open {path}")

    def _stop(self, *_: Any) -> None:
        raise Hang

    def read(self, reader: Callable[[Path, Path], Any], path: Path, out: Path, *, named: bool = True) -> str:
        """Gives a file to a reader; returns what went wrong, "" if nothing did.

        Args:
          reader: takes `path`, and a directory that it may write.
          path: of the file.
          out: where nothing is.
          named: whether messages must have the name of the file.
        """
        self.events.clear()
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        base, before = _reset_peak(), time.process_time()
        limit = max(MEMORY[0] - base, 2**28) + MEMORY[1] * size
        # Address space is not memory: threads reserve some. What counts is what is resident at the peak.
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + limit + 2**29, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        problem = ""
        self.on = True
        try:
            reader(path, out)
        except Hang:
            problem = "hang"
        except Exception as error:
            self.on = False  # Python compiles lines of source to format them
            problem = _problem(error, path.name if named else "")
            self.message = str(error)
            self.refused += not problem
            if out.exists():
                problem = problem or "left behind: the output of a file that was refused"
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.events:
            return f"executed: {self.events[:3]}"
        seconds, taken = time.process_time() - before, _memory("VmHWM") - base
        self.seconds, self.share = max(self.seconds, seconds), max(self.share, taken / limit)
        if seconds > CPU_SECONDS:
            return "hang"
        return f"memory: {taken >> 20} MB for {size:,} bytes" if taken > limit else problem


def _by_library() -> bool:
    """Whether a program is compiled by a library for itself, and not because of the file."""
    frame = sys._getframe(2)
    while frame:
        if any(
            part in frame.f_code.co_filename
            for part in ("/jax/", "/flax/", "/orbax/", "dataclasses.py", "typing.py", "importlib")
        ):
            return True
        frame = frame.f_back
    return False


def _problem(error: Exception, name: str) -> str:
    from samjax.errors import UserError

    if "MemoryError" in "".join(traceback.format_exception(error)):
        return "memory: MemoryError"
    if not isinstance(error, UserError):
        return f"traceback: {''.join(traceback.format_exception(error)[-3:])}"
    text = str(error)
    if not text or not text.isprintable() or len(text) > 5000:
        return f"message: {text[:300]!r}"
    return "" if name in text else f"message: {text[:300]!r} does not name the file"


def _memory(field: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def _reset_peak() -> int:
    """Makes the peak of the process's memory its present size, and returns it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _memory("VmRSS")


PROBLEMS = ("executed", "traceback", "hang", "memory", "left behind", "message")


def run(sources: Sequence[Path], work: Path, numbers: Sequence[int], seed: int) -> dict[str, Any]:
    """Makes bad files like `sources`, reads each, and counts what went wrong.

    Args:
      sources: valid files.
      work: an empty directory.
      numbers: of the files to make; each is made from its number and `seed` alone.
      seed: any number.

    Returns:
      The number of files, of those refused, and of each of `PROBLEMS`; the most time and memory that a file took; and
      descriptions of up to 20 files.
    """
    from samjax.errors import UserError

    by_name = readers()
    counts = dict.fromkeys(PROBLEMS, 0)
    examples: list[str] = []
    for source in sources:  # what is imported or compiled at the first use counts for no file
        for name in set(READERS_OF[source.suffix]):
            with contextlib.suppress(UserError):
                by_name[name](source, work / "out")
            shutil.rmtree(work / "out", ignore_errors=True)
    watch = Watch(work)
    canary = work / "canary"
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(sources)
        name = rng.choice(READERS_OF[source.suffix])
        (work / "in").mkdir()
        path = bad_file(rng, source, work / "in" / "file", f"touch {canary}")
        problem = watch.read(by_name[name], path, work / "out", named=name != "LPIPS")
        if canary.exists():
            problem = "executed: the canary"
        left = {entry.name for entry in (*work.iterdir(), *(work / "in").iterdir())} - {"in", "out", path.name}
        if problem or left:
            problem = problem or f"left behind: {sorted(left)}"
            counts[problem.partition(":")[0]] += 1
            if len(examples) < 20:
                examples.append(f"{number}, {name} of {source.name}: {problem[:1500]}")
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    most = {"seconds": round(watch.seconds, 2), "share of memory": round(watch.share, 2)}
    return {"files": len(numbers), "refused": watch.refused, **counts, **most, "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to repeat one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", type=Path, help="directory of valid files, as `seeds` writes them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        sources = sorted((args.sources or seeds(Path(folder, "sources"))).iterdir())
        found = run(sources, work, range(args.first, args.first + args.count), args.seed)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
