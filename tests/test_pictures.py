"""Which pictures are read, how, and which are refused."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import CASES, fault
from PIL import EpsImagePlugin, Image
from torch.testing import assert_close

import detr_nb.checks
from detr_nb import detr_tiny, evaluate, predict_image
from detr_nb.checks import (
    FORMATS,
    PICTURES,
    DataError,
    as_picture,
    check_data,
    count_words,
    picture_files,
    picture_size,
    read_image,
)
from detr_nb.cli import main
from detr_nb.data import Preprocess, fitted_size
from detr_nb.formats import YoloDataset
from detr_nb.loading import MemoryDataset

RAMP = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)


def grey_of(path: Path) -> torch.Tensor:
    """The one colour of a grey picture."""
    image = read_image(path)
    assert image.dtype == torch.uint8 and (image == image[:1]).all()
    return image[0]


# which files


@pytest.mark.fault("20_checkpoints_folder")
def test_what_computers_leave_behind_is_no_picture():
    found, left_out = picture_files(CASES / "20_checkpoints_folder")
    assert [path.name for path in found] == ["a.png"] and not left_out


@pytest.mark.fault("21_other_suffixes")
def test_all_named_formats_are_found_and_read(recwarn):
    found, left_out = picture_files(CASES / "21_other_suffixes")
    assert [path.name[0] for path in found] == sorted({path.name[0] for path in found})
    assert {path.suffix for path in found} >= {".png", ".jfif", ".gif", ".ppm", ".jp2"}
    assert left_out == {"file without an ending": 1} | ({} if ".avif" in PICTURES else {".avif": 1})
    for path in found:
        assert read_image(path).shape[1:] == picture_size(path)


@pytest.mark.fault("folder with .HEIC, .gif, .jfif and one .png")
def test_what_is_left_out_is_counted(tmp_path):
    for name in ("a.png", "b.gif", "c.jfif", "d.HEIC", "e.heic", "f.svg"):
        (tmp_path / name).touch()
    found, left_out = picture_files(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.gif", "c.jfif"]
    assert count_words(left_out) == "2 .heic, 1 .svg"


@pytest.mark.fault("folder in/x.jpg/")
def test_folders_are_walked_into_whatever_they_are_called(tmp_path):
    (tmp_path / "x.jpg" / "more").mkdir(parents=True)
    (tmp_path / "x.jpg" / "more" / "a.png").touch()
    found, left_out = picture_files(tmp_path)
    assert found == [tmp_path / "x.jpg" / "more" / "a.png"] and not left_out
    with pytest.raises(DataError, match=r"x\.jpg: picture is no ordinary file"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.fault("in/more -> ../elsewhere")
def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").touch()
    (tmp_path / "in" / "sub" / "a.png").touch()
    (tmp_path / "in" / "more").symlink_to("../elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in" / "a_link").symlink_to("sub")  # comes before its folder, which wins
    (tmp_path / "in" / "lost.png").symlink_to("nowhere")
    found, left_out = picture_files(tmp_path / "in")
    assert found == [tmp_path / "in" / "more" / "b.png", tmp_path / "in" / "sub" / "a.png"]
    assert left_out == {"broken link": 1}


@pytest.mark.fault("a FIFO x.jpg in the folder")
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    found, left_out = picture_files(tmp_path)
    assert not found and left_out == {"pipe or device": 1}
    for read in (read_image, picture_size):
        for path in (tmp_path / "x.jpg", Path("/dev/zero")):
            with pytest.raises(DataError, match="is no ordinary file"):
                read(path)


@pytest.mark.fault("the same in a YOLO folder, check-data")
def test_a_pipe_in_a_data_set_is_named_or_left_out(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    os.mkfifo(tmp_path / "images" / "x.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    found = [str(problem) for problem in check_data(YoloDataset(tmp_path / "images", ["cell"]))]
    assert any("1 pipe or device" in line for line in found)


# which formats


def checked_folder(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What `detr-nb check-data` says of the pictures in folder/images, which have no objects."""
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [cell]")
    places = [word for part in ("train", "val") for word in (f"--data.{part}", str(folder / "images"))]
    capsys.readouterr()
    assert main(["check-data", "--data", "YoloData", *places, "--data.names", str(folder / "data.yaml")]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.fault("the same picture in a data set, check-data")
def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "ran"
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "images").mkdir()
    picture = tmp_path / "images" / "a.jpg"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow has not looked for it yet
    with suppress(Exception), Image.open(picture) as opened:
        opened.load()
    assert ran.exists(), "without our list of formats a program would run"
    ran.unlink()
    for read in (read_image, picture_size):
        with pytest.raises(DataError, match=r"a\.jpg: picture is none of JPEG, PNG.*save it as JPEG or PNG"):
            read(picture)
    said = checked_folder(tmp_path, capsys)
    assert said.count("a.jpg: picture is none of JPEG, PNG") == 2, said
    assert not ran.exists() and "EPS" not in FORMATS


PLAIN, GREY, RED, BLACK = (104, 105, 89), (103, 103, 103), (200, 30, 30), (0, 0, 0)
ODD = {  # how each looks: its mean colour
    "plain.png": PLAIN, "cmyk.jpg": PLAIN, "cmyk.tif": PLAIN, "lab.tif": PLAIN, "ycc.tif": PLAIN, "pages.tif": PLAIN,
    "moving.gif": PLAIN, "moving.webp": PLAIN, "two.mpo": PLAIN, "palette.png": PLAIN,
    "palette_transparent.png": PLAIN, "palette_transparent_bytes.png": PLAIN,  # transparency is dropped
    "grey_alpha.png": GREY, "onebit.png": GREY, "logo_black_on_transparent.png": BLACK,
    "dot.png": RED, "flat_3000x1.png": RED, "thin_1x3000.png": RED, "pano_20x8000.png": RED,
}  # fmt: skip
with Image.open(CASES / "18_odd_pictures" / "plain.png") as opened:
    PLAIN_PICTURE = np.asarray(opened)
    assert np.abs(PLAIN_PICTURE[::-1] - PLAIN_PICTURE.astype(float)).mean() > 24
    assert np.abs(PLAIN_PICTURE[:, ::-1] - PLAIN_PICTURE.astype(float)).mean() > 24


@pytest.mark.fault("18_odd_pictures")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's
def test_odd_pictures_are_read_and_looked_at(name):
    path = CASES / "18_odd_pictures" / name
    image = read_image(path)
    assert_close(image.float().mean((1, 2)), torch.tensor(ODD[name]).float(), atol=12, rtol=0)
    assert image.dtype == torch.uint8 and image.shape[1:] == picture_size(path)
    if ODD[name] is PLAIN:  # and not its mirror image, its negative or its second page
        assert np.abs(image.permute(1, 2, 0).numpy() - PLAIN_PICTURE.astype(float)).mean() < 12
    frame = Preprocess()(image[:, :400, :400])
    assert min(frame.shape) >= 1
    assert min(fitted_size(picture_size(path), 800, 1333)) >= 1


def test_all_odd_pictures_are_in_the_table():
    assert set(ODD) == {path.name for path in (CASES / "18_odd_pictures").iterdir()}


@pytest.mark.parametrize(
    "size",
    [
        fault("COCO: one picture 2000 x 1", (1, 2000)),
        fault("22_thin_in_training", (1, 3000)),
        (3000, 1),
        (8000, 20),
    ],
)
def test_no_side_vanishes(size):
    frame = Preprocess(short_side=64, longest=100)(torch.zeros(3, *size, dtype=torch.uint8))
    assert sorted(frame.shape[1:]) == [1, 100]


def test_a_thin_picture_is_not_stretched_into_gigabytes():
    with pytest.raises(DataError, match="make it smaller"):
        fitted_size((1, 3000), 800)


# how large


@pytest.mark.fault("13000 x 11000 picture in a data set")
@pytest.mark.parametrize("size", [(13000, 11000), (20000, 10000), (60000, 60000)])
def test_scans_beyond_the_limit_are_refused_with_the_right_remedy(tmp_path, size, capsys):
    (tmp_path / "images").mkdir()
    small = tmp_path / "images" / "a.bmp"  # its head tells the size, and the rest is never read
    Image.new("L", (1, 1)).save(small)
    content = bytearray(small.read_bytes())
    content[18:26] = np.array(size, "<i4").tobytes()
    small.write_bytes(content)
    for read in (read_image, picture_size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(DataError, match=r"a\.bmp: picture is .*make it smaller") as found:
                read(small)
        assert "restore" not in str(found.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        said = checked_folder(tmp_path, capsys)
    assert said.count("a.bmp: picture is ") == said.count("make it smaller") == 2 and "restore" not in said


# how deep


@pytest.mark.fault("16_deep_pictures")
def test_deep_pictures_are_scaled_and_it_is_said():
    folder = CASES / "16_deep_pictures"
    assert grey_of(folder / "full16.png").float().mean() > 50  # no warning: warnings are errors
    for name in ("eight_in_sixteen.png", "float255.tif", "float65535.tif"):
        with pytest.warns(UserWarning, match="grey pictures in .*16_deep_pictures hold numbers as"):
            image = grey_of(folder / name)
        assert 20 < image.float().mean() < 235, name


@pytest.mark.parametrize(
    ("values", "expected", "found"),
    [
        (RAMP.astype(np.uint16) * 257, RAMP, None),
        (RAMP.astype(np.uint16) * 16, RAMP, "12 bits"),
        (RAMP.astype(np.uint16) * 4, RAMP, "10 bits"),
        (RAMP.astype(np.uint16), RAMP, "8 bits"),
        fault("TIFF of 32-bit integers 0..255", RAMP.astype(np.int32), RAMP, "8 bits"),
        (RAMP.astype(np.int32) * 257, RAMP, None),
        fault("TIFF of floats 0..1", (RAMP / 255).astype(np.float32), RAMP, "full brightness"),
        (RAMP.astype(np.float32) * 257, RAMP, "16 bits"),
        (np.zeros((6, 8), np.uint16), np.zeros((6, 8), np.uint8), None),
    ],
)
def test_the_rule_for_deep_pictures(tmp_path, values, expected, found):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_close(grey_of(tmp_path / "a.tif"), torch.from_numpy(expected), atol=1, rtol=0)
    assert found is None and not said or found in str(said[0].message)


@pytest.mark.parametrize("wrong", [np.nan, -3.0, 1e9, np.inf])
def test_numbers_that_mean_no_brightness_are_refused(tmp_path, wrong):
    values = RAMP.astype(np.float32)
    values[0, 0] = wrong
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: picture is grey with numbers from .*8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.fault("YOLO: EXIF orientation stored as text")
def test_a_note_that_is_a_text_turns_nothing(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0"  # type 2: text
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png", exif=exif)
    assert picture_size(tmp_path / "a.png") == tuple(read_image(tmp_path / "a.png").shape[1:]) == (6, 8)


# in memory


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Six drawn shapes."""
    return detr_tiny(pretrained=True).eval()


def scene() -> torch.Tensor:
    """A red square on grey."""
    image = torch.full((3, 96, 128), 200, dtype=torch.uint8)
    image[:, 30:60, 40:70] = torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None]
    return image


@pytest.mark.fault("numpy array, PIL image, None")
@pytest.mark.fault("one or four colours, y x 3, (3,0,0)")
def test_a_picture_comes_in_any_form(model, tmp_path):
    image = scene()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png")
    expected = predict_image(model, image)
    assert len(expected["names"]) == 1
    four = torch.cat([image, torch.full_like(image[:1], 255)])
    files = (tmp_path / "a.png", str(tmp_path / "a.png"))
    forms = (picture, np.asarray(picture), picture.convert("RGBA"), four, four.permute(1, 2, 0).numpy())
    for form in (*files, *forms):
        found = predict_image(model, form)
        assert found["names"] == expected["names"]
        assert_close(found["boxes"], expected["boxes"])
    with pytest.raises(TypeError, match="image is a NoneType: give a path"):
        as_picture(None)


FOUR = "one or four colours, y x 3, (3,0,0)"
BAD = {
    "float": (lambda x: x / 255, "0 to 1", "float picture in [0, 1]"),
    "double NaN": (lambda x: x.double() * np.nan, "uint8", "0 x 64, 1 x 1 pixels, no image, double, half"),
    "bool": (lambda x: x > 100, "uint8", "bool picture; threshold 50, nan"),
    "int": (lambda x: x.long(), "uint8", None),
    "one colour": (lambda x: x[:1], "three colours belong on axis 0", FOUR),
    "colours last": (lambda x: x.permute(1, 2, 0), r"permute\(2, 0, 1\)", FOUR),
    "a batch": (lambda x: x[None], r"image\[0\]", None),
    "no pixel": (lambda x: x[:, :0, :0], "at least one pixel", FOUR),
    "grey": (lambda x: x[0], "three colours", None),
}
LAST = ("one colour", "colours last", "grey")  # an array has its colours last: these are none, or right


def bad_pictures() -> list:
    """Each of `BAD` as a tensor and as an array."""
    return [
        pytest.param(change, words, array, marks=[pytest.mark.fault(mark)] if mark else [],
                     id=f"{name} as {'an array' if array else 'a tensor'}")
        for name, (change, words, mark) in BAD.items() for array in (False, True) if not (array and name in LAST)
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "words", "array"), bad_pictures())
def test_what_is_not_one_picture_of_bytes_is_refused(model, change, words, array):
    given = change(scene())
    before = given.clone()
    with pytest.raises(ValueError, match=f"^image is .*{words}"):
        predict_image(model, given.numpy() if array else given)
    assert_close(given, before, equal_nan=True)


def test_an_array_with_its_colours_first_is_refused(model):
    with pytest.raises(ValueError, match=r"transpose\(1, 2, 0\)"):
        predict_image(model, scene().numpy())
    grey = scene()[1].numpy()
    expected = predict_image(model, torch.from_numpy(grey).expand(3, -1, -1))
    assert_close(predict_image(model, grey)["boxes"], expected["boxes"])
    assert len(expected["names"]) == 1


@pytest.mark.parametrize("threshold", [50, -1, float("nan")])
@pytest.mark.fault("bool picture; threshold 50, nan")
def test_a_threshold_is_a_score(model, threshold):
    with pytest.raises(ValueError, match="threshold is .*from 0 to 1"):
        predict_image(model, scene(), threshold)


def test_what_is_given_stays_as_it_is(model):
    image, given = scene(), scene()
    predict_image(model, given)
    assert_close(given, image)


def test_broken_weights_never_find_nothing(model):
    broken = detr_tiny(pretrained=True)
    with torch.no_grad():
        next(broken.decoder.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="scores are not finite: its weights are probably NaN"):
        predict_image(broken, scene())


@pytest.mark.fault("pictures of floats 0..1")
def test_evaluate_refuses_float_pictures(model):
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}

    class Floats(MemoryDataset):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image / 255, target

    data = Floats(scene()[None], [target], model.names, model.category_ids)
    with pytest.raises(ValueError, match=r"dataset\[0\] gives an image of torch.float32"):
        evaluate(model, data)
    with pytest.raises(ValueError, match="batch_size is -1"):
        evaluate(model, data, -1)


def test_the_limit_is_read_when_it_is_needed(monkeypatch, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(detr_nb.checks, "MOST_PIXELS", 300)
    with pytest.raises(DataError, match="of 20 x 20 pixels .*at most 300"):
        read_image(tmp_path / "a.png")
