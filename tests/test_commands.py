"""Every command as people meet it: installed, with odd words, odd folders, full disks and deaf terminals."""

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from built import need
from inputs import CASES, fault, snapshot, strict_json
from PIL import Image

import detr_nb.cli as cli
from detr_nb.checks import PICTURES, Problem
from detr_nb.cli import COMMANDS, Detections, in_one_line, main, signed
from detr_nb.model import detr_tiny
from detr_nb.shapes import EASY, Scenes
from detr_nb.terminal import LastingStream, explain

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = shutil.which("detr-nb", path=Path(sys.executable).parent)
TINY = ["--data.train_images", "4", "--data.val_images", "2", "--data.scenes.size", "32", "--model.widths",
        "[16, 16, 16]", "--model.hidden_dim", "16", "--model.nheads", "2", "--model.dim_feedforward", "16",
        "--steps", "1", "--batch_size", "4", "--evaluations", "1", "--progress", "false"]
COLUMNS = ["image_id", "file_name", "category_id", "category_name", "bbox", "score"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Away from the repository, as a user is; reports of mistakes stay there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture(scope="module")
def model():
    return detr_tiny()


def two_boxes(model: object, picture: torch.Tensor, threshold: float | None = None) -> dict:
    """What a quick model sees in every picture; nothing if the threshold is high."""
    count = 2 if (threshold or 0) <= 0.5 else 0
    boxes = torch.tensor([[1.0, 2.0, 20.0, 30.0], [5.0, 5.0, 15.0, 25.0]])[:count]
    return {"scores": torch.tensor([0.9, 0.6])[:count], "labels": torch.tensor([2, 0])[:count],
            "names": ["square", "disc"][:count], "boxes": boxes}


@pytest.fixture(autouse=True)
def quick(request, model, monkeypatch):
    """These tests are about what lies around a model."""
    if "run" not in request.fixturenames:
        monkeypatch.setattr(cli, "pretrained_model", lambda weights=None: model)
        monkeypatch.setattr(cli, "predict_image", two_boxes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["train", *TINY, "--folder", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained) -> Path:
    shutil.copytree(trained, "run")
    return Path("run")


def photograph(path: str | Path, seed: int = 0, side: int = 40) -> Path:
    """A picture of noise, whose file is large for its size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(path)
    return Path(path)


def album(count: int, folder: str = "in") -> Path:
    for number in range(count):
        photograph(f"{folder}/{number}.png", number)
    return Path(folder)


def rows_of(file: str | Path = "predictions/detections.json") -> list[dict]:
    return strict_json(Path(file).read_text("utf8"))


def refused(words: list[str], capsys) -> str:
    """What is said of words that cannot be obeyed: one line, code 2, nothing on standard output."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("detr-nb: ") and said.err.count("\n") == 1
    assert "Traceback" not in said.err and "mistake of the program" not in said.err
    return said.err


# --- as it is installed -------------------------------------------------------------------------------------------
def shell(line: str, **more: str) -> subprocess.CompletedProcess:
    """A line of bash in this folder, where `detr-nb` is the installed program."""
    need(PROGRAM, "the program detr-nb is not installed beside this Python")
    path = f"{Path(PROGRAM).parent}:{os.environ['PATH']}"
    surroundings = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=surroundings, timeout=300, text=True)


def test_bench_runs_and_needs_no_streams():
    done = shell("detr-nb bench --only '[matching]' --rounds 1 --out deep/record.json <&- >&- 2>&-")
    assert done.returncode == 0
    record = rows_of("deep/record.json")
    assert record["rows"] and record["command"] == "detr-nb bench --only '[matching]' --rounds 1"


@pytest.mark.fault("stdout that takes ASCII only, --out aus-ü")
def test_a_terminal_may_know_ascii_only():
    photograph("bild-ü.png")
    done = shell("detr-nb predict bild-ü.png no-ü.png --out aus-ü", PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("1 of 2 pictures done") and r"aus-\xfc" in done.stdout
    assert done.stderr.startswith(r"no-\xfc.png: picture is FileNotFoundError")
    assert Path("aus-ü/bild-ü.png").is_file() and isinstance(rows_of("aus-ü/detections.json"), list)


@pytest.mark.fault("eval --out f.json | true, unbuffered")
def test_a_reader_may_go_away():
    words = " ".join(f"'{word}'" for word in TINY)
    lines = [f"detr-nb train {words} --folder run 2>&1 | head -1", "train=${PIPESTATUS[0]}",
             "detr-nb eval run --out f.json | true", "eval=${PIPESTATUS[0]}",
             "detr-nb check-data --data ShapesData --data.train_images 2 --data.val_images 2 > /dev/full",
             "echo $train $eval $?"]
    done = shell("\n".join(lines), PYTHONUNBUFFERED="1")
    assert done.stdout.splitlines()[-1] == "0 0 1" and done.stdout.count("\n") <= 2
    assert done.stderr.startswith("detr-nb: the output could not be printed") and done.stderr.count("\n") == 1
    assert Path("run/checkpoint.pt").is_file() and rows_of("f.json")["per_class"]


# --- help and words -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_is_whole(name, capsys):
    for words in ([name, "--help"], [name, "-h"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        said = " ".join(capsys.readouterr().out.split())
        assert left.value.code == 0 and "<class" not in said and "Within(" not in said and "==SUPPRESS==" not in said
    kind = COMMANDS[name][0]
    for part in fields(kind):
        assert part.name in said
    for flag in ("--config FILE", "--plugin MODULE"):
        assert flag in said


WORDS = {
    "no command": ([], "name a command: models, predict, train, eval, check-data, bench"),
    "another command": (["find"], "invalid choice: 'find'"),
    "an unset variable": (["predict", ""], "one of the words is empty"),
    "a flag that is none": (["predict", "a.png", "--treshold", "1"], "did you mean --threshold?"),
    "a flag without a value": (["predict", "a.png", "--out"], "--out is wrong: expected one argument"),
    "a word for a number": (["train", "--steps", "many"], "steps is 'many': it must be a whole number"),
    "a list": (["bench", "--only", "matching"], "only is 'matching': it must be a list, such as [a, b]"),
    "an empty list": (["bench", "--only", "[]"], "--only names nothing to measure"),
    "another comparison": (["bench", "--only", "[speed]"], "--only speed: the comparisons are"),
    "a kind": (["train", "--data", "Cocodata"], "data.kind is 'Cocodata': it must be one of CocoData"),
    "a missing field": (["check-data"], "data is missing"),
    "a plugin": (["predict", "--plugin", "no_such_module", "a.png"], "--plugin is 'no_such_module'"),
    "eval of nothing": (["eval"], "both --data and --weights"),
    "eval of no run": (["eval", "nowhere"], "nowhere holds no config.yaml"),
    "two folders": (["eval", "a", "b"], "b is unknown"),
}


@pytest.mark.parametrize("words, expected", WORDS.values(), ids=WORDS)
def test_wrong_words_are_explained_in_a_line(words, expected, capsys):
    assert expected in refused(words, capsys)


@pytest.mark.parametrize("content, expected", [
    fault("--config that is not UTF-8", b"threshold: \xff\xfe\n", "is options.yaml, whose byte 11 is not UTF-8"),
    (None, "there is no such file"), (b"- 1\n- 2\n", "options.yaml"), (b"steps: [1\n", "is no YAML"),
    (b"treshold: 1\n", "treshold"), (b"[" * 5000, "options.yaml"), (b"threshold: !!python/object:os.system 1", "YAML"),
])
def test_a_file_of_options_that_is_none_is_named(content, expected, capsys):
    if content is not None:
        Path("options.yaml").write_bytes(content)
    assert expected in refused(["predict", "a.png", "--config", "options.yaml"], capsys)


@pytest.mark.parametrize("words", [["--batch_size", "0"], ["--batch_size=-1"], ["--batch_size", "1000000000"]], ids=str)
@pytest.mark.fault("eval --batch_size 0")
@pytest.mark.fault("eval --batch_size -1")
def test_a_batch_has_a_size(words, run, capsys):
    assert "batch_size is" in refused(["eval", "run", *words], capsys)


def test_a_plugin_lies_in_a_file_or_on_the_path(capsys):
    Path("mine.py").write_text("print('mine is imported')")
    photograph("a.png")
    assert main(["predict", "--plugin", "mine.py", "a.png", "--plugin=json"]) == 0
    assert "mine is imported" in capsys.readouterr().out
    sys.modules.pop("mine")


# --- which pictures -----------------------------------------------------------------------------------------------
ODD_NAMES = ["with space.png", "käfer.png", "\N{SNOWMAN}\N{PILE OF POO}.png", "two\nlines.png", "-x.png", "100%.png"]


@pytest.mark.fault("predict FOLDER --out o -- -x.png")
def test_names_of_all_kinds_are_done(capsys):
    for name in ODD_NAMES:
        photograph(f"in/{name}")
    photograph("-y.png")
    assert main(["predict", "in", "--out", "o", "--threshold", "0", "--", "-y.png"]) == 0
    done = {row["file_name"] for row in rows_of("o/detections.json")}
    assert done == {f"in/{name}" for name in ODD_NAMES} | {"-y.png"}
    assert all(Path(f"o/in/{name}").is_file() for name in ODD_NAMES) and Path("o/-y.png").is_file()
    assert capsys.readouterr().err == ""
    assert main(["predict", "in/käfer.png", "--out", "p", "--overwrite", "./-y.png", "--threshold", "1"]) == 0


@pytest.mark.fault("file name that is not UTF-8 beside a good picture")
def test_a_name_that_is_not_utf8_costs_nothing(capsys):
    photograph("in/good.png")
    os.rename(photograph("in/other.png"), os.fsencode("in/") + b"caf\xe9.png")
    assert main(["predict", "in", "--threshold", "0"]) == 0
    names = {row["file_name"] for row in rows_of()}
    assert names == {"in/good.png", "in/caf\udce9.png"}
    assert r"caf\udce9" in Path("predictions/detections.json").read_text("utf8")
    (Path(os.fsdecode(b"in/caf\xe9.png"))).write_bytes(b"no picture")
    assert main(["predict", "in", "--threshold", "0"]) == 1
    assert capsys.readouterr().err.startswith(r"in/caf\udce9.png: picture is")


@pytest.mark.fault("folder with .HEIC, .gif, .jfif and one .png")
def test_what_is_left_out_is_counted(capsys):
    album(1)
    for name in ("a.HEIC", "b.heic", "c.txt", "sub/d.svg"):
        (Path("in") / name).parent.mkdir(exist_ok=True)
        (Path("in") / name).write_bytes(b"")
    for kind in ("gif", "jfif"):
        Image.new("RGB", (30, 30)).save(f"in/x.{kind}", "GIF" if kind == "gif" else "JPEG")
    assert main(["predict", "in"]) == 0
    said = capsys.readouterr()
    assert said.err == "detr-nb: left out: 2 .heic, 1 .txt, 1 .svg\n" and said.out.startswith("3 of 3 pictures done")
    Path("in/0.png").unlink(), Path("in/x.gif").unlink(), Path("in/x.jfif").unlink()
    assert "there is no picture in in (2 .heic" in refused(["predict", "in"], capsys)


@pytest.mark.fault("in/more -> ../elsewhere")
@pytest.mark.fault("a FIFO x.jpg in the folder")
@pytest.mark.fault("folder in/x.jpg/")
def test_links_pipes_and_folders_that_are_called_like_pictures(capsys):
    album(1)
    photograph("elsewhere/linked.png")
    Path("in/more").symlink_to("../elsewhere")
    Path("in/round").symlink_to(".")
    Path("in/gone.png").symlink_to("nowhere.png")
    photograph("in/x.jpg/inside.png")
    os.mkfifo("in/pipe.jpg")
    assert main(["predict", "in", "--threshold", "0"]) == 0
    assert {row["file_name"] for row in rows_of()} == {"in/0.png", "in/more/linked.png", "in/x.jpg/inside.png"}
    said = capsys.readouterr().err
    assert "1 broken link" in said and "1 pipe or device" in said and said.count("\n") == 1


@pytest.mark.parametrize("name, count", [
    fault("20_checkpoints_folder", "20_checkpoints_folder", 1),
    fault("21_other_suffixes", "21_other_suffixes", 5 + (".avif" in PICTURES)),
])
def test_folders_as_people_have_them(name, count, capsys):
    shutil.copytree(CASES / name, "in")
    if name.startswith("20"):
        shutil.copytree("in", "in/.ipynb_checkpoints", dirs_exist_ok=True)
    assert main(["predict", "in"]) == 0
    assert capsys.readouterr().out.startswith(f"{count} of {count} pictures done")
    assert len(snapshot("predictions")) == count + 1  # and the list


# --- where results go ---------------------------------------------------------------------------------------------
@pytest.mark.fault("in/a.bmp and in/a.bmp.png")
def test_no_two_pictures_share_a_result():
    names = ["a.bmp", "a.bmp.png", "A.BMP.png", "sub/a.bmp", "b.bmp", "b.bmp.png/c.png"]
    for number, name in enumerate(names):
        photograph(f"in/{name}", number)
    photograph("other/a.png", 8), photograph("in/a.png", 9)
    assert main(["predict", "in", "other", "--threshold", "0"]) == 0
    results = [path for path in snapshot("predictions") if path.endswith(".png")]
    assert len({path.casefold() for path in results}) == len(names) + 2
    assert len({row["file_name"] for row in rows_of()}) == len(names) + 2


def test_a_second_run_replaces_its_own_results_without_a_word(capsys):
    album(3), photograph("in/c.jpg"), photograph("in/d.bmp")
    for threshold in ("0", "0", "1"):
        assert main(["predict", "in", "--threshold", threshold]) == 0
    assert rows_of() == [] and capsys.readouterr().err == ""
    assert not Path("predictions/detections.json.part").exists()
    Path("predictions/0.png").unlink()
    Path("predictions/detections.json").write_bytes(b"")  # what a full disk left
    assert main(["predict", "in", "--threshold", "0"]) == 0
    assert {row["image_id"] for row in rows_of()} == {1, 2, 3, 4, 5}


def foreign_picture() -> None:
    photograph("predictions/0.png", 77)


def foreign_rows() -> None:
    Path("predictions").mkdir()
    Path("predictions/detections.json").write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]')


def foreign_link() -> None:
    Path("predictions").mkdir()
    Path("predictions/0.png").symlink_to(photograph("elsewhere.png").absolute())


def foreign_part() -> None:
    Path("predictions").mkdir()
    Path("predictions/detections.json.part").write_text("my notes")


@pytest.mark.parametrize("lies_there", [
    fault("predict album/2020/a.png --out album, where album/a.png is another photograph", foreign_picture),
    fault("--out with a detections.json of somebody else", foreign_rows), foreign_link, foreign_part,
])
def test_what_is_not_ours_stays(lies_there, capsys):
    album(2)
    lies_there()
    before = snapshot()
    said = refused(["predict", "in"], capsys)
    assert "no result of an earlier run" in said and "--overwrite" in said and snapshot() == before
    assert main(["predict", "in", "--overwrite"]) == 0
    assert not before.get("elsewhere.png") or Path("elsewhere.png").read_bytes() == before["elsewhere.png"]
    assert {path: content for path, content in before.items() if path.startswith("in/")} == {
        f"in/{path}": content for path, content in snapshot("in").items()}


def results_are_a_folder() -> None:
    Path("predictions/detections.json").mkdir(parents=True)


def result_is_a_folder() -> None:
    Path("predictions/0.png").mkdir(parents=True)


def out_is_a_file() -> None:
    Path("predictions").write_text("a file")


def subfolder_is_a_link() -> None:
    Path("elsewhere").mkdir(), Path("predictions").mkdir()
    Path("predictions/sub").symlink_to("../elsewhere")


def subfolder_is_a_file() -> None:
    Path("predictions").mkdir()
    Path("predictions/sub").write_text("a file")


@pytest.mark.parametrize("lies_there", [
    fault("detections.json is a folder", results_are_a_folder), result_is_a_folder, out_is_a_file,
    subfolder_is_a_link, subfolder_is_a_file,
])
def test_places_are_looked_at_before_the_work(lies_there, capsys, monkeypatch):
    album(2), photograph("in/sub/1.png")
    lies_there()
    monkeypatch.setattr(cli, "pretrained_model", lambda weights: pytest.fail("the work has begun"))
    before = snapshot()
    for more in ([], ["--overwrite"]):
        said = refused(["predict", "in", *more], capsys)
        assert "--out predictions: " in said and "predictions" in said.partition("--out predictions: ")[2]
        assert snapshot() == before


@pytest.mark.parametrize("out", ["/proc/found", "/sys/found", "out/../in/0.png/x"])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(out, capsys, monkeypatch):
    album(1), Path("out").mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith(("/proc", "/sys")))
    monkeypatch.setattr(cli, "pretrained_model", lambda weights: pytest.fail("the work has begun"))
    assert f"--out {out}" in refused(["predict", "in", "--out", out], capsys)


@pytest.mark.fault("YAML out: ~/found_x")
def test_the_home_folder_is_known_in_files_and_flags(monkeypatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    photograph("home/pictures/a.png")
    Path("options.yaml").write_text("out: ~/found_x\nimages: [~/pictures]\n")
    assert main(["predict", "--config", "options.yaml"]) == 0 and Path("home/found_x/a.png").is_file()
    assert main(["predict", "--out", "~/found_y", "~/pictures"]) == 0 and Path("home/found_y/a.png").is_file()
    assert not Path("~").exists()


# --- what ends the work early -------------------------------------------------------------------------------------
def at_the_third(monkeypatch, action) -> None:
    """Let something happen while the third picture is looked at; the list is readable at every moment."""
    look, seen = cli.predict_image, []

    def looking(*args: object) -> object:
        seen.append(len({row["image_id"] for row in rows_of("predictions/detections.json.part")}))
        assert seen == list(range(len(seen)))
        if len(seen) == 3:
            action()
        return look(*args)

    monkeypatch.setattr(cli, "predict_image", looking)


@pytest.mark.parametrize("number, code", [
    fault("Ctrl-C among 400 pictures", signal.SIGINT, 130),
    fault("SIGTERM among 300 pictures", signal.SIGTERM, 143),
])
def test_a_signal_leaves_the_rows_so_far(number, code, capsys, monkeypatch):
    album(6)
    at_the_third(monkeypatch, lambda: os.kill(os.getpid(), number))
    assert main(["predict", "in", "--threshold", "0"]) == code
    said = capsys.readouterr()
    assert said.out.startswith("3 of 6 pictures done") and said.err.count("\n") == 1 and "detr-nb: " in said.err
    assert {row["image_id"] for row in rows_of()} == {1, 2, 3}
    assert sorted(os.listdir("predictions")) == ["0.png", "1.png", "2.png", "detections.json"]


def test_a_second_ctrl_c_ends_at_once_and_keeps_whole_rows(capsys, monkeypatch):
    def impatient() -> None:
        raise KeyboardInterrupt

    album(6)
    at_the_third(monkeypatch, impatient)
    assert main(["predict", "in", "--threshold", "0"]) == 130
    assert "2 of 6 pictures done" in capsys.readouterr().out and {row["image_id"] for row in rows_of()} == {1, 2}


def with_full_disk(limit: int, words: list[str]) -> int:
    """The exit code of a command that can write no file above some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fault("disk full (no file above 20 kB), earlier results in --out")
def test_a_full_disk_is_said_of_the_result_and_earlier_ones_stay(capsys):
    album(2), photograph("in/2.png", 2, side=150), album(1, "in/z")
    assert main(["predict", "in", "--threshold", "0"]) == 0
    before = snapshot("predictions")
    capsys.readouterr()
    assert with_full_disk(20_000, ["predict", "in", "--threshold", "0.00001"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("detr-nb: predictions/2.png could not be written") and said.err.count("\n") == 1
    assert "2 of 4 pictures done" in said.out and "predictions/detections.json.part" in said.out
    after = snapshot("predictions")
    assert {row["image_id"] for row in rows_of("predictions/detections.json.part")} == {1, 2}
    assert after["detections.json"] == before["detections.json"]
    assert after["2.png"] == before["2.png"] and len(after) == len(before) + 1
    assert main(["predict", "in", "--threshold", "0"]) == 0 and snapshot("predictions") == before


@pytest.mark.fault("disk full in detections.json")
def test_a_disk_that_is_full_for_the_list_leaves_whole_rows(capsys):
    for number in range(5):
        Image.new("L", (8, 8)).save(f"{number}.png")
    names = [f"{number}.png" for number in range(5)]
    assert main(["predict", *names, "--threshold", "0"]) == 0
    before = rows_of()
    assert with_full_disk(900, ["predict", *names, "--threshold", "0"]) == 1
    assert "detections.json.part could not be written" in capsys.readouterr().err and rows_of() == before
    kept = rows_of("predictions/detections.json.part")
    assert kept and kept == before[: len(kept)] and set(kept[0]) == set(COLUMNS)
    Path("predictions/detections.json").unlink()
    with_full_disk(900, ["predict", *names, "--threshold", "0"])
    assert rows_of() == kept and not Path("predictions/detections.json.part").exists()


@pytest.mark.parametrize("error", [KeyError("k"), TypeError("t"), IndexError("i"), ZeroDivisionError("z"),
                                   AttributeError("a"), ValueError("of another library"), AssertionError()],
                         ids=lambda error: type(error).__name__)
def test_a_mistake_of_the_program_is_one_line_and_keeps_its_traceback(error, capsys, monkeypatch):
    def mistaken(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "data_of_run", mistaken)
    assert main(["eval", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and type(error).__name__ in said and "report it at https://" in said
    [report] = Path("tmp").iterdir()
    assert str(report) in said
    text = report.read_text("utf8")
    assert "Traceback" in text and "torch " in text and "Python " in text and "in mistaken" in text


def test_one_picture_that_meets_a_mistake_does_not_stop_the_others(capsys, monkeypatch):
    look = cli.predict_image
    monkeypatch.setattr(cli, "predict_image", lambda m, image, t: look(m, image, t) if image.sum() % 2 else {}["x"])
    sums = []
    for number in range(6):
        photograph(f"in/{number}.png", number)
        sums.append(int(np.asarray(Image.open(f"in/{number}.png"), np.int64).sum()) % 2)
    assert main(["predict", "in"]) == (1 if any(sums) else 2)
    said = capsys.readouterr()
    assert said.out.startswith(f"{sum(sums)} of 6 pictures done")
    assert said.err.count("mistake of the program") == 6 - sum(sums) == said.err.count("\n")


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), "the memory is used up"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] you tried to allocate 512 bytes"), "the memory is used up"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the memory is used up"),
    (FileNotFoundError(2, "No such file", "a\nb\x1b[31m.png"), r"No such file: 'a\nb\x1b[31m.png'"),
    (OSError("two\nlines \x1b[31m"), r"two lines \x1b[31m"),
    (RuntimeError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                  '  File "/x/detr_nb/checks.py", line 1, in f\n    raise\ndetr_nb.checks.DataError: a.png: is bad\n'),
     "a.png: is bad"),
])
def test_failures_have_a_reason_in_one_line(error, expected):
    assert expected in explain(error) and "\n" not in explain(error) and "mistake" not in explain(error)


# --- streams ------------------------------------------------------------------------------------------------------
class Narrow:
    """A terminal that takes some letters, and breaks after some calls."""

    def __init__(self, encoding: str, error: Exception | None = None):
        self.encoding, self.error, self.text = encoding, error, ""

    def write(self, text: str) -> None:
        text.encode(self.encoding)
        if self.error:
            raise self.error
        self.text += text

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise OSError("it has none")


def test_a_stream_gets_what_it_can_take():
    for encoding, expected in {"ascii": r"k\xe4fer \u2603", "latin1": r"käfer \u2603", "utf8": "käfer ☃"}.items():
        stream = Narrow(encoding)
        assert LastingStream(stream).write("käfer ☃\n") == 8 and stream.text == expected + "\n"
    stream = Narrow("utf8")
    LastingStream(stream).write("caf\udce9")
    assert stream.text == r"caf\udce9"
    for error in (BrokenPipeError(), ValueError("I/O operation on closed file"), OSError(28, "No space left")):
        outlet = LastingStream(Narrow("utf8", error))
        outlet.write("a"), outlet.write("b"), outlet.flush()
        assert outlet.failure is error


# --- eval and check-data ------------------------------------------------------------------------------------------
@pytest.fixture
def figures(monkeypatch) -> dict:
    """What an evaluation gives, without the evaluation."""
    found = {"AP": 0.5, "AP_small": float("nan"), "per_class": {"Käfer": 0.25, "\x1b[31mred\n": float("nan")}}
    monkeypatch.setattr(cli, "evaluate", lambda *_: found)
    return found


@pytest.mark.fault("eval --out f.json, class 'Käfer', stdout ASCII")
@pytest.mark.fault("terminal escapes in a class name, eval")
def test_figures_are_written_before_they_are_printed(figures, run, capsys, monkeypatch):
    stream = Narrow("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["eval", "run", "--out", "new/f.json"]) == 0
    assert rows_of("new/f.json") == {"AP": 0.5, "AP_small": None, "per_class": {"Käfer": 0.25, "\x1b[31mred\n": None}}
    assert "\x1b" not in stream.text and stream.text.count("\n") == 4 and r"K\xe4fer" in stream.text
    monkeypatch.setattr(sys, "stdout", Narrow("utf8", BrokenPipeError()))
    assert main(["eval", "run", "--out", "new/f.json"]) == 0  # an earlier one is replaced


@pytest.mark.parametrize("place, expected", [("folder", "is a folder"), ("file/f.json", "is no folder"),
                                             ("mine.json", "holds something else"), ("mine.txt", "something else")])
@pytest.mark.fault("eval --out no/such/f.json, --out a folder")
def test_the_place_of_figures_is_looked_at_first(place, expected, run, capsys, monkeypatch):
    monkeypatch.setattr(cli, "evaluate", lambda *_: pytest.fail("the work has begun"))
    Path("folder").mkdir(), Path("file").write_text(""), Path("mine.txt").write_text("mine")
    Path("mine.json").write_text('{"mine": 1}')
    before = snapshot()
    assert expected in refused(["eval", "run", "--out", place], capsys)
    if place.startswith("mine"):
        assert expected in refused(["bench", "--only", "[matching]", "--out", place], capsys)
    assert snapshot() == before


def test_overwrite_is_said_for_other_files(figures, run, capsys):
    Path("mine.json").write_text("[1]")
    assert main(["eval", "run", "--out", "mine.json", "--overwrite"]) == 0 and rows_of("mine.json")["AP"] == 0.5
    assert main(["eval", "run", "--out", "/dev/null"]) == 0 and not Path("/dev/null").is_file()


@pytest.mark.parametrize("text", [
    fault("eval of a stranger's run folder whose config.yaml says class_path: innocent.X, module on sys.path",
          "class_path: innocent.X"),
    fault("the same, innocent.py lies INSIDE the stranger's folder, `python -c main(['eval', ...])`",
          "class_path: run.innocent.X"),
    fault("class_path: this.X", "class_path: this.X"), "class_path: antigravity.fly", "kind: innocent.X",
    "class_path: os.system\n  init_args: {command: touch ran}",
])
def test_a_strangers_folder_imports_nothing(text, run, capsys, monkeypatch):
    for place in (Path("innocent.py"), run / "innocent.py", run / "__init__.py"):
        place.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend("."), monkeypatch.syspath_prepend(str(run))
    monkeypatch.syspath_prepend("")
    for name in ("this", "antigravity"):
        sys.modules.pop(name, None)
    (run / "config.yaml").write_text(f"data:\n  {text}\n")
    said = refused(["eval", "run"], capsys)
    assert "config.yaml" in said and "data" in said and not {"this", "innocent", "antigravity"} & set(sys.modules)


def test_problems_are_counted_and_bounded(capsys, monkeypatch):
    many = [Problem("a\nb.json", f"entry {i}", "[" + "1, " * 9999 + "]", "mend it", "size") for i in range(50)]
    monkeypatch.setattr(cli, "check_data", lambda part: many)
    assert main(["check-data", "--data", "ShapesData", "--data.train_images", "2", "--data.val_images", "2"]) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert said.count("50 problems: 50 size") == 2 and len(lines) == 2 * 22 and max(map(len, lines)) < 350
    assert in_one_line(many[0]).file == "a b.json"


# --- the parts ----------------------------------------------------------------------------------------------------
def test_rows_are_readable_after_each_picture(tmp_path):
    growing, row = Detections(tmp_path / "o"), dict.fromkeys(COLUMNS, 1)
    for count in range(4):
        assert len(rows_of(growing.part)) == growing.count == count
        growing.add([row])
        growing.add([])
    assert growing.keep(whole=True) == growing.place and len(rows_of(growing.place)) == 4


def test_a_signature_does_not_change_the_picture(tmp_path):
    picture = Image.open(photograph("a.png"))
    for ending, exact in ((".png", True), (".PNG", True), (".jpg", False)):
        place = tmp_path / f"signed{ending}"
        place.write_bytes(signed(picture, ending))
        assert cli.is_ours(place) and not cli.is_ours(Path("a.png"))
        if exact:
            assert (np.asarray(Image.open(place)) == np.asarray(picture)).all()
        else:
            picture.save("plain.jpg")
            assert (np.asarray(Image.open(place)) == np.asarray(Image.open("plain.jpg"))).all()


def test_a_name_that_is_too_long_for_a_result_costs_one_picture(capsys):
    photograph("in/a.png")
    photograph("in/short.bmp").rename("in/" + "x" * 250 + ".bmp")
    assert main(["predict", "in"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 pictures done" in said.out and "xxx.bmp.png" in said.err and "too long" in said.err


def test_scenes_of_the_readme_are_found(capsys):
    for number in (1, 2):
        image = Scenes(EASY, 3, seed=number)[0][0]
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{number}.png")
    assert main(["predict", "photos/", "--out", "found/"]) == 0
    assert "2 of 2 pictures done" in capsys.readouterr().out and rows_of("found/detections.json")


def commands_in(page: Path) -> list[list[str]]:
    """The words of every command of ours in the code blocks of a page."""
    blocks = page.read_text("utf8").split("```")[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition("detr-nb ")[2]) for line in lines if "detr-nb " in line and "import" not in line]


def test_the_commands_of_the_readme_are_understood():
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text("steps: 3\n")
    found = commands_in(ROOT / "README.md")
    assert {words[0] for words in found} >= {"predict", "train", "eval"}
    for name, *words in found:
        kind = COMMANDS[name][0]
        assert isinstance(cli.read_options(kind, cli.command_parser(name), words), kind)


def test_defaults_are_allowed_for_every_command():
    for name, (kind, _) in COMMANDS.items():
        if name != "check-data":
            assert cli.read_options(kind, cli.command_parser(name), []) == kind()
