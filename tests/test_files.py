"""Files that are written while others read, disks that are full, folders that belong to somebody else, bad servers."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import pytest
import torch
from inputs import fault, snapshot, strict_json

import detr_nb.downloads as downloads
from detr_nb.downloads import Archive, DownloadError, download, download_coco, fetch
from detr_nb.files import (
    append_line,
    json_text,
    locked,
    printable,
    replacing,
    replacing_together,
)
from detr_nb.formats import write_coco
from detr_nb.model import DETR, detr_tiny
from detr_nb.shapes import EASY, Scenes


@contextmanager
def little_disk(room: int):
    """No file may grow above so many bytes."""
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# --- one writer ---------------------------------------------------------------------------------------------------
REWRITE = """
import sys
from pathlib import Path
from detr_nb.files import replacing
for number in range(300):
    with replacing(sys.argv[1], durable=False) as file:
        file.write(str(number % 10) * 500_000)
"""


def test_another_process_reads_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("x" * 500_000)
    with subprocess.Popen([sys.executable, "-c", REWRITE, str(path)]) as writer:
        seen = set()
        while writer.poll() is None:
            text = path.read_text()
            assert len(text) == 500_000 and len(set(text)) == 1
            seen.add(text[0])
    assert writer.returncode == 0 and len(seen) > 3 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[1, 2]")
    path.chmod(0o640)
    with little_disk(1000), pytest.raises(OSError, match=r"rows\.json could not be written .*unharmed"):
        with replacing(path) as file:
            file.write("1" * 5000)
    assert snapshot(tmp_path) == {"rows.json": b"[1, 2]"}
    with replacing(path) as file:
        file.write("[]")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_line_is_whole_or_absent(tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, "a" * 60)
    with little_disk(100), pytest.raises(OSError, match=r"log\.jsonl could not be written"):
        append_line(log, "b" * 60)
    append_line(log, "c")
    assert log.read_text() == "a" * 60 + "\nc\n"


def test_devices_stay_devices_and_links_lead_nowhere(tmp_path):
    with replacing("/dev/null") as file:
        file.write("gone")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with replacing(tmp_path / "link", "wb") as file:
        file.write(b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "link").is_symlink()
    (tmp_path / "log").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="Remove what is in the way"):
        append_line(tmp_path / "log", "a line")


@pytest.mark.parametrize(("value", "found"), [
    (float("nan"), None), ([1.5, -float("inf")], [1.5, None]),
    ({"a": {"b": (float("nan"), 2)}}, {"a": {"b": [None, 2]}}),
    ("Käfer\udce9\ud800", "Käfer\udce9\ud800"), (Path("a/b"), "a/b"), ({1: True}, {"1": True}),
])
def test_a_strict_reader_takes_our_json(value, found):
    assert strict_json(json_text(value)) == found and strict_json(json_text(value, 1)) == found
    with pytest.raises(TypeError):
        json_text({"a": object()})


def test_a_lock_is_for_one_and_the_next_may_wait(tmp_path):
    with locked(tmp_path, "a toy"):
        with pytest.raises(RuntimeError, match=f"in use as a toy by process {os.getpid()} on .*: wait until"):
            with locked(tmp_path, "a toy"):
                pass
        order = []

        def second():
            with locked(tmp_path, "a toy", wait=20):
                order.append("second")

        waiting = Thread(target=second)
        waiting.start()
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[31mred", "\\x1b[31mred"), ("a\rb\x07\x7f", "a\\rb\\x07\\x7f"), ("\u202etxt.exe", "\\u202etxt.exe"),
    ("\udce9", "\\udce9"), ("Käfer\t猫\n", "Käfer\t猫\n"), ("می\u200cخواهم", "می\u200cخواهم"), (7, "7"),
])
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert printable(text) == shown


def test_files_that_belong_together_come_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="could not be written"), little_disk(1000):
        with replacing_together(tmp_path) as half:
            (half / "a").write_text("new")
            (half / "b").write_text("n" * 5000)
    assert snapshot(tmp_path) == {"a": b"old"}


# --- saved models and data ----------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path) -> Path:
    """A good model in a folder."""
    torch.manual_seed(0)
    detr_tiny(num_classes=2).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.fault("disk full while save_pretrained writes over a good model")
@pytest.mark.parametrize("room", [300, 100_000])
def test_a_full_disk_leaves_the_saved_model(room, saved):
    before, model = snapshot(saved), detr_tiny(num_classes=5)
    with little_disk(room), pytest.raises(OSError, match="saved could not be written .*unharmed"):
        model.save_pretrained(saved)
    assert snapshot(saved) == before and DETR.from_pretrained(saved).num_classes == 2


@pytest.mark.fault("save_pretrained into a folder with another config.json")
@pytest.mark.parametrize(("files", "reason"), [
    ({"config.json": '{"model_type": "bert"}', "README.md": "mine"}, "its config.json was not written by"),
    ({"config.json": "[1]"}, "its config.json was not written by"), ({"model.safetensors": "x"}, "of another origin"),
    pytest.param({"checkpoint.pt": "x"}, "the folder of a training run",
                 marks=pytest.mark.fault("save_pretrained (5 new classes) into the folder of a run")),
])
def test_a_model_is_not_saved_over_what_is_none(files, reason, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"a model cannot be saved there, because .*{reason}.*: give another folder"):
        detr_tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="because it is a file"):
        detr_tiny().save_pretrained(tmp_path / next(iter(files)))
    assert snapshot(tmp_path) == before


def test_a_card_of_ones_own_stays_and_a_model_of_ours_is_replaced(saved):
    (saved / "README.md").write_text("mine")
    detr_tiny(num_classes=5).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine" and DETR.from_pretrained(saved).num_classes == 5


@pytest.mark.fault("save_pretrained of a model with threshold NaN, ids 1.5")
@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, True, "x", None])
def test_a_threshold_that_is_none_is_refused(value, tmp_path):
    model = detr_tiny()
    model.threshold = value
    with pytest.raises(ValueError, match="threshold is .*: it must be a number from 0 to 1"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.fault("save_pretrained of a model with threshold NaN, ids 1.5")
def test_ids_that_are_no_whole_numbers_are_refused(tmp_path):
    model = detr_tiny(num_classes=2)
    model.category_ids = [1, 1.5]
    with pytest.raises(ValueError, match=r"category_ids has 1\.5: it must be a whole number"):
        model.save_pretrained(tmp_path / "new")


def test_a_full_disk_leaves_the_annotations(tmp_path):
    file = write_coco(Scenes(replace(EASY, size=32), 3, 1), tmp_path)
    before = file.read_bytes()
    with little_disk(len(before)), pytest.raises(OSError, match="could not be written"):
        write_coco(Scenes(replace(EASY, size=32), 12, 1), tmp_path)
    assert file.read_bytes() == before and strict_json(before.decode())


# --- downloads ----------------------------------------------------------------------------------------------------
def zipped(path: Path, names=("images/a.jpg", "images/b.jpg"), size=50_000, compress=zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(path, "w", compress) as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), name[-5].encode() * size, compress)
    return path.read_bytes()


class Bad(BaseHTTPRequestHandler):
    """Answers each path with raw bytes, and then, if it shall, keeps silent."""

    plan: dict = {}
    asked: list = []
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self.asked.append(self.path)
        answer, silent = self.plan[self.path]
        self.wfile.write(answer)
        self.wfile.flush()
        if silent:
            self.server.released.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "SILENCE", 1)
    Bad.plan, Bad.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Bad) as made:
        made.released = threading.Event()
        Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.released.set()
        made.shutdown()


def answer(content: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.0 {status}", *headers, "", ""]).encode() + content


def archive(content: bytes, *addresses: str) -> Archive:
    return Archive("set.zip", len(content), hashlib.sha256(content).hexdigest(), addresses, "images", 2)


BAD = {
    "abc": (lambda body: answer(body, "Content-Length: abc"), False, "says that the file has 'abc' bytes"),
    "negative": (lambda body: answer(body, "Content-Length: -5"), False, "says that the file has '-5' bytes"),
    "no HTTP": (lambda body: b"SSH-2.0-OpenSSH_9\r\n", False, "BadStatusLine"),
    "endless": (lambda body: answer(body + b"more"), False, "sends more than"),
    "silent": (lambda body: answer(body[:100], f"Content-Length: {len(body)}"), True, "timed out"),
    "elsewhere": (lambda body: answer(b"", "Location: file:///etc/hosts", status="302 Found"), False, "is not allowed"),
    "by ftp": (lambda body: answer(b"", "Location: ftp://127.0.0.1/a", status="302 Found"), False, "no web address"),
}


@pytest.mark.parametrize("kind", [fault("Content-Length: abc", "abc"), *(kind for kind in BAD if kind != "abc")])
def test_a_bad_server_is_told_in_a_line_and_the_next_mirror_is_tried(kind, server, tmp_path):
    content = zipped(tmp_path / "source.zip")
    make, silent, reason = BAD[kind]
    Bad.plan = {"/bad": (make(content), silent), "/good": (answer(content), False)}
    with pytest.raises(DownloadError, match=rf"/bad: .*{reason}"):
        fetch(archive(content, f"{server}/bad"), tmp_path / "one", quiet=True)
    place = fetch(archive(content, f"{server}/bad", f"{server}/good"), tmp_path / "two", quiet=True)
    assert place.read_bytes() == content and Bad.asked[-1] == "/good"


def broken(content: bytes) -> bytes:
    middle = content.index(b"a" * 100) + 10
    return content[:middle] + b"zz" + content[middle + 2:]


@pytest.mark.fault("broken zip with the right hash")
@pytest.mark.parametrize("spoil", [broken, lambda content: content[:-30], lambda content: b"no zip at all" * 50])
def test_a_zip_that_is_broken_is_named_with_a_remedy(spoil, server, tmp_path):
    content = spoil(zipped(tmp_path / "source.zip"))
    Bad.plan = {"/a": (answer(content), False)}
    with pytest.raises(DownloadError, match=r"set\.zip cannot be unpacked: .*delete it and call again"):
        download([archive(content, f"{server}/a")], tmp_path / "new", quiet=True)


@pytest.mark.fault("images -> elsewhere in the folder")
@pytest.mark.parametrize(("names", "reason"), [
    (("images/a.jpg", "images/b.jpg"), "images is a link: nothing is written to where it leads"),
    (("other/../../up.jpg", "images/b.jpg"), "would lie outside"),
    (("/etc/a.jpg", "images/b.jpg"), "would lie outside"),
])
def test_nothing_is_written_outside_of_the_folder(names, reason, server, tmp_path):
    content, folder = zipped(tmp_path / "source.zip", names), tmp_path / "sets"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a.jpg").write_text("theirs")
    (folder / "images").symlink_to(elsewhere)
    Bad.plan = {"/a": (answer(content), False)}
    with pytest.raises(DownloadError, match=reason):
        download([archive(content, f"{server}/a")], folder, quiet=True)
    assert snapshot(elsewhere) == {"a.jpg": b"theirs"} and not (tmp_path / "up.jpg").exists()


def test_a_zip_bomb_is_refused(server, tmp_path):
    content = zipped(tmp_path / "source.zip", size=20_000_000, compress=zipfile.ZIP_DEFLATED)
    Bad.plan = {"/a": (answer(content), False)}
    with pytest.raises(DownloadError, match=r"it claims 2 files of 40\.0 MB in"):
        download([archive(content, f"{server}/a")], tmp_path / "new", quiet=True)


def download_and_die(wanted: Archive, folder: Path) -> None:
    """A program that is killed when it has unpacked all but half of the last file."""

    def dying(source, target, size: int) -> None:
        content = source.read()
        target.write(content[: len(content) // 2])
        target.flush()
        if content[:1] == b"b":
            os.kill(os.getpid(), signal.SIGKILL)
        target.write(content[len(content) // 2 :])

    downloads.copyfileobj = dying
    download([wanted], folder, quiet=True)


def program(function, *args: object) -> BaseProcess:
    """A process of its own, which has all that this one has."""
    process = get_context("fork").Process(target=function, args=args)
    process.start()
    return process


@pytest.mark.fault("kill -9 while the last file is unpacked")
def test_half_a_file_is_mended_by_the_next_call(server, tmp_path):
    content = zipped(tmp_path / "source.zip")
    Bad.plan, wanted = {"/a": (answer(content), False)}, archive(content, f"{server}/a")
    first = program(download_and_die, wanted, tmp_path)
    first.join(30)
    assert first.exitcode == -signal.SIGKILL and not (tmp_path / "images" / "b.jpg").exists()
    assert [path.stat().st_size for path in (tmp_path / "images").glob(".b.jpg.*")] == [25_000]
    download([wanted], tmp_path, quiet=True)
    (tmp_path / "images" / "b.jpg").write_bytes(b"half")  # as another program leaves it
    download([wanted], tmp_path, quiet=True)
    assert [(tmp_path / "images" / f"{name}.jpg").read_bytes() for name in "ab"] == [b"a" * 50_000, b"b" * 50_000]
    assert Bad.asked == ["/a"]


@pytest.mark.fault("two programs fetch into one folder")
def test_two_at_once_fetch_once_and_both_end_well(server, tmp_path):
    content = zipped(tmp_path / "source.zip")
    Bad.plan, wanted = {"/a": (answer(content), False)}, archive(content, f"{server}/a")
    both = [program(download, [wanted], tmp_path / "sets", True) for _ in range(2)]
    for one in both:
        one.join(30)
    assert [one.exitcode for one in both] == [0, 0] and Bad.asked == ["/a"]
    assert snapshot(tmp_path / "sets") == {
        "set.zip": content, "images/a.jpg": b"a" * 50_000, "images/b.jpg": b"b" * 50_000}


@pytest.mark.fault("download_coco('~/x')")
def test_the_home_folder_is_meant_by_its_sign_and_odd_arguments_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    content = zipped(tmp_path / "source.zip")
    Bad.plan = {"/a": (answer(content), False)}
    monkeypatch.setitem(downloads.COCO_2017, "val", archive(content, f"{server}/a"))
    assert download_coco("~/x", ["val"], quiet=True) == tmp_path / "x" and not Path("~").exists()
    assert (tmp_path / "x" / "images" / "a.jpg").stat().st_size == 50_000
    for parts in ("val", []):
        with pytest.raises(ValueError, match=r"parts: is .*: give a list"):
            download_coco(tmp_path, parts)
    with pytest.raises(ValueError, match="folder: is empty"):
        download_coco("", ["val"])
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="file is a file: name a folder"):
        download_coco(tmp_path / "file", ["val"])
