"""Decoding images in little memory and time, where Pillow needs much.

TIFF files are decoded in strips, PNG and GIF files without their texts, and JPEG files if they have few scans. `memory`
tells how much Pillow needs otherwise.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from PIL import Image

# Tags of a TIFF file that decoding needs: bits, compression, photometric, fill order, samples, planes, fax options,
# predictor, palette, tiles, extra samples, sample format, JPEG tables, and YCbCr subsampling and positions.
_TIFF_TAGS = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 322, 323, 338, 339, 347, 530, 531)
_OLD_JPEG = 6  # a TIFF compression whose strips depend on each other

_GIF = b"GIF8"
_LONG_COMMENT = 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOST_CHUNKS = 1_000_000
_LARGEST_PROFILE = 2**20  # Pillow's own limit

_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_MOST_SCANS = 100  # encoders write about ten

_CODECS = {"WEBP": 16, "AVIF": 12, "HEIF": 12, "JPEG2000": 25}  # measured peaks, bytes for each pixel


def memory(image: Image.Image) -> int:
    """About how many bytes Pillow needs to decode an opened image as a whole, by its header.

    What is measured is the peak of the process, in bytes for each pixel: 1 for gray and palettes, 2 for 16-bit grays,
    4 for other modes; more for the codecs that keep copies; and for progressive JPEGs the coefficients, 2 for each
    value, even if they are decoded at a reduced size.
    """
    pixels = image.width * image.height
    if image.info.get("progressive"):
        return 2 * len(image.getbands()) * pixels
    if image.format in ("JPEG", "MPO"):
        return 0  # decoded at a reduced size if large
    small = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    return _CODECS.get(image.format or "", small) * pixels


# --- TIFF ---


def tiff_strips(
    image: Image.Image, multiple: int, pixels: int
) -> tuple[tuple[int, int], Callable[[], Iterator[Image.Image]]] | None:
    """Decodes an opened TIFF file in strips, of which one at a time is in memory.

    Pillow decodes a compressed file as a whole. Here it decodes files made of a few of its strips, or rows of tiles.

    Args:
      image: opened by Pillow and not decoded; its file must stay open.
      multiple: the number of rows of each strip but the last is a multiple of this.
      pixels: about how many pixels a strip has.

    Returns:
      (width, height) as stored, without the EXIF orientation, and a function that returns the strips from top to
      bottom. None if the file has no parts of this size.

    Raises:
      ValueError: when strips are read: a part is damaged.
    """
    tags, file = getattr(image, "tag_v2", None), getattr(image, "fp", None)
    if tags is None or file is None or not getattr(image, "tile", None):  # decoded already
        return None
    tiled = 324 in tags
    kind = (324, 325) if tiled else (273, 279)
    width, height = tags[256], tags[257]
    rows, columns = (tags[323], tags[322]) if tiled else (min(tags.get(278, height), height), width)
    if min(rows, columns) < 1:
        return None
    across, down = -(-width // columns), -(-height // rows)
    planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1
    step = multiple // math.gcd(rows, multiple)
    step *= max(1, pixels // (width * rows * step))
    offsets, counts = (tags.get(tag, ()) for tag in kind)
    if (
        step * rows * max(width, columns) > 8 * pixels
        or not len(offsets) == len(counts) == planes * across * down
        or tags.get(259, 1) == _OLD_JPEG
    ):
        return None
    # Compressed parts larger than this are not compressed, but made to fill the memory.
    largest = 2 * rows * columns * max(1, sum(tags.get(258, (1,))) // 8) + 65536

    def part(index: int) -> bytes:
        if counts[index] > largest:
            raise ValueError("a strip is larger than its pixels")
        file.seek(offsets[index])
        return file.read(counts[index])

    def read() -> Iterator[Image.Image]:
        for first in range(0, down, step):
            last = min(first + step, down)
            numbers = itertools.product(range(planes), range(first, last), range(across))
            parts = [part((plane * down + row) * across + column) for plane, row, column in numbers]
            made = {tag: tags[tag] for tag in _TIFF_TAGS if tag in tags}
            made |= {256: width, 257: min(last * rows, height) - first * rows, **({} if tiled else {278: rows})}
            yield Image.open(_tiff(tags.prefix, made, kind, parts), formats=["TIFF"])

    return (width, height), read


def _tiff(prefix: bytes, tags: Mapping[int, Any], kind: tuple[int, int], parts: Sequence[bytes]) -> io.BytesIO:
    """A TIFF file.

    Args:
      prefix: of the file: II or MM, the order of bytes, also of the pixels.
      tags: tag to an integer, several of them, or bytes.
      kind: the tags of offsets and sizes: those of strips, or those of tiles.
      parts: the encoded strips or tiles.
    """
    order = "<" if prefix == b"II" else ">"
    offsets = itertools.accumulate(map(len, parts[:-1]), initial=8)
    directory, body = b"", b"".join(parts)
    body += bytes(-len(body) % 4)
    for tag, value in sorted({**tags, kind[0]: tuple(offsets), kind[1]: tuple(map(len, parts))}.items()):
        numbers = () if isinstance(value, bytes) else value if isinstance(value, tuple) else (value,)
        raw = value if isinstance(value, bytes) else struct.pack(f"{order}{len(numbers)}I", *numbers)
        directory += struct.pack(f"{order}HHI", tag, 4 if numbers else 7, len(numbers) or len(raw))
        if len(raw) > 4:
            raw, body = struct.pack(f"{order}I", 8 + len(body)), body + raw + bytes(-len(raw) % 4)
        directory += raw.ljust(4, b"\0")
    header = prefix + struct.pack(f"{order}HI", 42, 8 + len(body))
    return io.BytesIO(header + body + struct.pack(f"{order}H", len(directory) // 12) + directory + bytes(4))


# --- texts ---


def without_texts(file: BinaryIO) -> BinaryIO:
    """An image file without texts that Pillow refuses, or cannot read in linear time, though nothing needs them.

    These are all texts of PNG files, of which it refuses those of more than 1 MB, and color profiles of more than that;
    and comments in GIF files if they have more than 1 MB.

    Args:
      file: any file, at its beginning.

    Returns:
      `file` itself, at its beginning, if there is nothing to leave out; otherwise a copy in memory.

    Raises:
      ValueError: a PNG file has too many chunks, or ends within one.
    """
    start = file.read(len(_PNG))
    file.seek(0)
    kept = _png_parts(file) if start == _PNG else _gif_parts(file) if start.startswith(_GIF) else None
    if kept is None:
        file.seek(0)
        return file
    copy = io.BytesIO()
    for offset, size in kept:
        file.seek(offset)
        copy.write(file.read(size))
    copy.seek(0)
    return copy


def _joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts of a file, (offset, size) each, with those that follow each other made one."""
    joined: list[tuple[int, int]] = []
    for offset, size in parts:
        if joined and sum(joined[-1]) == offset:
            offset, size = joined[-1][0], joined.pop()[1] + size
        joined.append((offset, size))
    return joined


def _png_parts(file: BinaryIO) -> list[tuple[int, int]] | None:
    """The parts of a PNG file to keep; None for all."""
    left_out, end = False, file.seek(0, io.SEEK_END)

    def chunks() -> Iterator[tuple[int, int]]:
        nonlocal left_out
        offset = len(_PNG)
        yield 0, offset
        for count in itertools.count():
            file.seek(offset)
            if len(head := file.read(8)) < 8:
                return
            if count == _MOST_CHUNKS:
                raise ValueError(f"more than {_MOST_CHUNKS:,} chunks")
            length, name = struct.unpack(">I4s", head)
            if offset + 12 + length > end and name != b"IEND":  # Pillow would ask for as much memory
                raise ValueError("it ends early")
            if name in _TEXTS or (name == b"iCCP" and _inflates(file.read(length))):
                left_out = True
            else:
                yield offset, 12 + length
            if name == b"IEND":
                return
            offset += 12 + length

    parts = _joined(chunks())
    return parts if left_out else None


def _gif_parts(file: BinaryIO) -> list[tuple[int, int]] | None:
    """The parts of a GIF file to keep, up to its second frame; None for all."""
    comments = 0

    def palette(flags: int) -> int:
        return 3 * 2 ** (1 + flags % 8) if flags & 128 else 0

    def blocks() -> Iterator[tuple[int, int]]:
        nonlocal comments
        head, frames = file.read(13).ljust(13, b"\0"), 0
        offset = file.seek(13 + palette(head[10]))
        yield 0, offset
        while frames < 2:
            mark = file.read(2)
            if mark[:1] == b",":
                frames += 1
                rest = file.read(8).ljust(8, b"\0")
                file.seek(palette(rest[7]) + 1, io.SEEK_CUR)
            elif mark[:1] != b"!":
                yield offset, 1
                return
            while size := file.read(1):
                if size == b"\0":
                    break
                file.seek(size[0], io.SEEK_CUR)
            following = file.tell()
            if mark == b"!\xfe":
                comments += following - offset
            else:
                yield offset, following - offset
            offset = following

    parts = _joined(blocks())
    return parts if comments > _LONG_COMMENT else None


def _inflates(chunk: bytes) -> bool:
    """Whether the color profile in an iCCP chunk is larger than Pillow permits."""
    _, _, packed = chunk.partition(b"\0")
    stream = zlib.decompressobj()
    try:
        stream.decompress(packed[1:], _LARGEST_PROFILE)
    except zlib.error:
        return False
    return bool(stream.unconsumed_tail)


# --- JPEG ---


def check_scans(file: BinaryIO) -> None:
    """Checks that a JPEG file has no more scans than an encoder writes: each takes the time of a whole image.

    Args:
      file: a JPEG file; its position changes.

    Raises:
      ValueError: it has too many.
    """
    file.seek(0)
    data, position, scans = file.read(), 2, 0
    while found := _MARKER.search(data, position):
        code, position = found[0][1], found.end()
        if code == 0xD9:  # the end: a second image or a film may follow
            return
        scans += code == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"more than {_MOST_SCANS} scans")
        position += int.from_bytes(data[position : position + 2], "big")
