import io
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from relloc.data.images import SUFFIXES, crop_resized, read_file, read_rgb
from relloc.errors import UnreadableImage

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
LEVELS = RNG.integers(0, 256, (24, 36), dtype=np.uint8)
ORIENTATION = 0x0112


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def pixels_of(path: Path) -> np.ndarray:
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def smooth() -> np.ndarray:
    """Colors that survive JPEG within a few levels."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack(
        [rows * 5, columns * 4 - 1 * (columns > 0), 120 + rows - columns], axis=2
    ).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.PNG"])
def test_rgb_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Image.fromarray(COLORS), name)
    assert path.suffix.lower() in SUFFIXES
    assert np.array_equal(pixels_of(path), COLORS)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_lossy_rgb_is_near(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Image.fromarray(smooth()), name, quality=95)
    assert np.abs(pixels_of(path).astype(int) - smooth()).max() < 12


def test_gray_gets_three_equal_channels(tmp_path: Path) -> None:
    found = pixels_of(saved(tmp_path, Image.fromarray(LEVELS), "a.png"))
    assert np.array_equal(found, np.repeat(LEVELS[..., None], 3, axis=2))


def test_a_palette_is_looked_up_also_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(COLORS).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels_of(saved(tmp_path, image, "a.png", transparency=3)), expected)
    assert np.array_equal(
        pixels_of(saved(tmp_path, image, "b.png", transparency=bytes(range(16)))), expected
    )
    assert np.array_equal(pixels_of(saved(tmp_path, image, "c.gif", transparency=3)), expected)


def test_a_cmyk_jpeg_has_the_colors_of_its_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(smooth()).convert("CMYK"), "a.jpg", quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert np.abs(pixels_of(path).astype(int) - smooth()).max() < 16


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_to_8_and_not_clipped(tmp_path: Path, name: str) -> None:
    deep = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    found = pixels_of(saved(tmp_path, Image.fromarray(deep), name)).astype(float)
    assert np.abs(found - deep[..., None] / 257).max() <= 1
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    with_alpha = np.concatenate([COLORS, LEVELS[..., None]], axis=2)
    assert np.array_equal(pixels_of(saved(tmp_path, Image.fromarray(with_alpha), "a.png")), COLORS)
    gray = Image.fromarray(np.stack([LEVELS, 255 - LEVELS], axis=2), mode=None)
    assert gray.mode == "LA"
    assert np.array_equal(pixels_of(saved(tmp_path, gray, "b.png"))[..., 0], LEVELS)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_1_bit_becomes_black_and_white(tmp_path: Path, name: str) -> None:
    bits = LEVELS > 127
    found = pixels_of(saved(tmp_path, Image.fromarray(bits), name))
    assert np.array_equal(found, np.where(bits[..., None], 255, 0).repeat(3, axis=2))


TURNS = {  # what a camera did to the upright scene before it wrote this orientation
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.transpose(1, 0, 2),
    6: lambda scene: np.rot90(scene, 1),
    7: lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),
    8: lambda scene: np.rot90(scene, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_turned_photograph_is_upright_after(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](COLORS)))
    options = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(
        pixels_of(saved(tmp_path, stored, f"a.{suffix}", exif=exif, **options)), COLORS
    )


def with_odd_exif(orientation: int) -> bytes:
    """Orientation, and a width that is text, as some editing programs leave it."""
    entries = [(0x0100, 2, 4, b"wide"), (ORIENTATION, 3, 1, struct.pack(">HH", orientation, 0))]
    packed = b"".join(
        struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries
    )
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + packed + struct.pack(">I", 0)


def test_odd_metadata_neither_hide_the_orientation_nor_stop_the_run(tmp_path: Path) -> None:
    path = saved(
        tmp_path, Image.fromarray(np.rot90(smooth())), "a.jpg", quality=95, exif=with_odd_exif(6)
    )
    assert np.abs(pixels_of(path).astype(int) - smooth()).max() < 12
    path = saved(tmp_path, Image.fromarray(COLORS), "a.png", exif=b"Exif\0\0no metadata at all")
    assert np.array_equal(pixels_of(path), COLORS)


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLORS).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_unreadable(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    whole = encoded(kind)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableImage) as caught:
        read_rgb(path)
    assert str(path) not in str(caught.value)  # whoever reports it names the image
    if (kind, share) == ("JPEG", 0.9):
        assert "image file is truncated" in str(caught.value)


def test_empty_text_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>404 Not Found</html>")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("empty.jpg", "is an empty file"),
        ("text.jpg", "cannot identify image file"),
        ("missing.jpg", "is missing"),
        ("folder.jpg", "Is a directory"),
        ("x" * 300 + ".jpg", "File name too long"),
    ]:
        with pytest.raises(UnreadableImage, match=reason):
            read_rgb(tmp_path / name)


def test_a_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.fromarray(COLORS), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLORS.shape[0] * COLORS.shape[1] // 2 - 1)
    with pytest.raises(UnreadableImage, match="DecompressionBombError"):
        read_rgb(path)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]))
def test_whatever_is_broken_in_a_file_it_is_read_or_unreadable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    broken = bytearray(
        encoded(kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    )
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(broken) - 1), st.integers(0, 255)))
    ):
        broken[place] = value
    path = tmp_path_factory.getbasetemp() / "broken.jpg"
    path.write_bytes(broken)
    try:
        assert read_rgb(path).mode == "RGB"
    except UnreadableImage as error:
        assert str(error)  # noqa: PT017


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def differences(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int
) -> np.ndarray:
    """In gray levels from torchvision's resize and crop, which rounds once after each axis."""
    found = np.asarray(crop_resized(image, size, corner, side)).astype(int)
    assert found.shape == (side, side, 3)
    return np.abs(found - torchvisions(image, size, corner, side))


def torchvisions(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int
) -> np.ndarray:
    resized = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return np.asarray(F.crop(resized, *corner, side, side)).astype(int)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crop_resized_is_torchvisions_resize_and_crop(data: st.DataObject) -> None:
    image = noise_image(data.draw(st.integers(5, 300)), data.draw(st.integers(5, 300)))
    size = data.draw(st.tuples(st.integers(10, 200), st.integers(10, 200)))
    side = data.draw(st.integers(1, min(size)))
    corner = data.draw(st.tuples(st.integers(0, size[0] - side), st.integers(0, size[1] - side)))
    assert differences(image, size, corner, side).max() <= 2  # 1, and in noise rarely 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_image_of_the_wanted_size_is_cut_and_the_pixels_are_those_of_the_resize(
    data: st.DataObject,
) -> None:
    size = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    side = data.draw(st.integers(1, min(size)))
    top, left = data.draw(st.tuples(st.integers(0, size[0] - side), st.integers(0, size[1] - side)))
    image = noise_image(*size)
    resized = image.resize(
        (side, side), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    assert np.array_equal(
        np.asarray(crop_resized(image, size, (top, left), side)), np.asarray(resized)
    )


def test_a_file_comes_with_its_bytes_and_is_a_plain_jpeg_or_not(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    scene = Image.fromarray(smooth())
    plain = {
        "rgb": scene,
        "gray": scene.convert("L"),
        "cmyk": scene.convert("CMYK"),
        "turned": scene,
        "png": scene,
    }
    for name, image in plain.items():
        options = {"exif": turned} if name == "turned" else {}
        path = saved(tmp_path, image, "a.png" if name == "png" else f"{name}.jpg", **options)
        file = read_file(path)
        assert file.content == path.read_bytes()
        assert np.array_equal(np.asarray(file.rgb), pixels_of(path))
        assert file.is_plain_jpeg == (name in ("rgb", "gray")), name


def test_a_file_that_cannot_be_read_has_the_reason_that_read_rgb_gives(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("empty.jpg", "text.jpg", "missing.jpg"):
        reasons = []
        for read in (read_rgb, read_file):
            with pytest.raises(UnreadableImage) as caught:
                read(tmp_path / name)
            reasons.append(str(caught.value))
        assert reasons[0] == reasons[1]


@pytest.mark.parametrize(("height", "width"), [(40, 12_000), (12_000, 40)])
@pytest.mark.parametrize("place", [0, 0.37, 1])
def test_a_very_elongated_image_is_cropped_like_torchvision_does(
    height: int, width: int, place: float
) -> None:
    image = noise_image(height, width)
    size = (int(height * 1.4), int(width * 1.4))
    corner = (int(place * (size[0] - 50)), int(place * (size[1] - 50)))
    assert differences(image, size, corner, 50).max() <= 1


def test_only_the_square_of_a_scroll_is_computed() -> None:
    scroll = Image.fromarray(
        np.repeat(np.arange(200, dtype=np.uint8), 100)[None, :, None].repeat(3, axis=2)
    )
    size = (255, 255 * 20_000)  # whole, this would be 3.9 GB
    found = np.asarray(crop_resized(scroll, size, (0, 255 * 10_050), 255))
    assert (found == 100).all()


def gray_tiff(
    path: Path,
    values: np.ndarray,
    *,
    kind: int,
    bits: int | None = None,
    photometric: int = 1,
    size: tuple[int, int] | None = None,
) -> Path:
    """A gray little-endian TIFF in one strip.

    `kind`: 1 is unsigned, 2 signed, 3 float. `photometric`: with 0, the value 0 is white.
    """
    height, width = size or values.shape
    data = values.tobytes()
    tags = {
        256: width,
        257: height,
        258: bits or values.itemsize * 8,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
    }
    tags |= {278: height, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)
    return path


def gray_of(path: Path) -> np.ndarray:
    found = pixels_of(path)
    assert (found == found[..., :1]).all()
    return found[..., 0].astype(float)


@pytest.mark.parametrize("widest", [1, 255])
def test_floating_point_values_are_the_picture_in_either_range(tmp_path: Path, widest: int) -> None:
    values = (LEVELS / 255 * widest).astype("<f4")
    path = gray_tiff(tmp_path / "a.tif", values, kind=3)
    assert np.array_equal(gray_of(path), LEVELS)
    assert np.array_equal(gray_of(gray_tiff(path, values, kind=3, photometric=0)), 255 - LEVELS)


@pytest.mark.parametrize("odd", [-3.0, 4000.0, np.nan, np.inf, -np.inf])
def test_floating_point_values_outside_both_ranges_are_unreadable(
    tmp_path: Path, odd: float
) -> None:
    values = (LEVELS / 255).astype("<f4")
    values[3, 4] = odd
    with pytest.raises(UnreadableImage, match="floating-point values|not a number"):
        read_rgb(gray_tiff(tmp_path / "a.tif", values, kind=3))


def test_floating_point_values_are_clipped_within_rounding(tmp_path: Path) -> None:
    values = (LEVELS / 255).astype("<f4")
    values[0, :2] = -1e-6, 1 + 1e-6
    assert list(gray_of(gray_tiff(tmp_path / "a.tif", values, kind=3))[0, :2]) == [0, 255]


@pytest.mark.parametrize(("dtype", "kind"), [("<u4", 1), ("<i4", 2), ("<i2", 2)])
def test_integers_whose_white_is_not_told_are_unreadable(
    tmp_path: Path, dtype: str, kind: int
) -> None:
    with pytest.raises(UnreadableImage, match="8 or 16 bits"):
        read_rgb(gray_tiff(tmp_path / "a.tif", LEVELS.astype(dtype) * 100, kind=kind))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bits_of_every_byte_order_and_with_white_as_0(tmp_path: Path, dtype: str) -> None:
    deep = LEVELS.astype(np.uint16) * 257
    if dtype == "<u2":
        assert np.array_equal(gray_of(gray_tiff(tmp_path / "a.tif", deep, kind=1)), LEVELS)
        assert np.array_equal(
            gray_of(gray_tiff(tmp_path / "b.tif", deep, kind=1, photometric=0)), 255 - LEVELS
        )
    else:
        image = Image.frombytes("I;16B", (36, 24), deep.astype(dtype).tobytes())
        assert np.array_equal(gray_of(saved(tmp_path, image, "c.tif")), LEVELS)


def test_12_bits_reach_from_black_to_white(tmp_path: Path) -> None:
    levels = np.array([[0, 4095, 2048, 1024]])
    packed = np.array([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x00], np.uint8)  # two values in three bytes
    path = gray_tiff(tmp_path / "a.tif", packed[None], kind=1, bits=12, size=(1, 4))
    assert np.abs(gray_of(path) - levels * 255 / 4095).max() <= 1


def test_a_deep_gray_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = Image.fromarray(np.ascontiguousarray(np.rot90(LEVELS.astype(np.uint16) * 257, 1)))
    assert np.array_equal(gray_of(saved(tmp_path, deep, "a.png", exif=exif)), LEVELS)


JPEG_OF_65500 = (
    b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01"
    b"\xff\xda\x00\x02"
)


@pytest.mark.parametrize(
    "content",
    [
        JPEG_OF_65500,
        b"GIF89a"
        + struct.pack("<HH", 65500, 65500)
        + b"\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        b"GIF89a\1\0\1\0\x80\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHH", 0, 0, 65500, 65500)
        + b"\0\2\2D\1\0;",
        b"P6 65500 65500 255\n",
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 65500, 65500, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
)
def test_an_image_that_claims_to_be_huge_is_unreadable_before_memory_is_asked_for(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # None: another library lifted Pillow's own
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        tracemalloc.start()
        with pytest.raises(UnreadableImage, match="limit|claims to have 65500 x 65500 px"):
            read_rgb(tmp_path / "a.jpg")
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + bytes(40),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_what_other_programs_would_have_to_draw_is_unreadable(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_arguments: object, **_more: object) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match="cannot identify image file"):
        read_rgb(tmp_path / "a.jpg")


def test_pipes_and_folders_are_unreadable_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        for read in (read_rgb, read_file):
            with pytest.raises(UnreadableImage, match="pipe|Is a directory"):
                read(tmp_path / name)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(UnreadableImage, match="has 1099.5 GB"):
        read_file(path)
