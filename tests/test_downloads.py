"""Downloads against a server on this machine that breaks off, knows no ranges, lies or sends the wrong bytes."""

import gc
import hashlib
import re
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from detr_nb import downloads
from detr_nb.downloads import (
    BCCD,
    COCO_2017,
    Archive,
    DownloadError,
    download,
    download_bccd,
    download_coco,
    fetch,
)


def zipped(path, names=("images/a.jpg", "images/b.jpg", "note.txt")):
    """The bytes of a zip file whose members do not compress."""
    with zipfile.ZipFile(path, "w") as file:
        for i, name in enumerate(names):
            file.writestr(name, hashlib.shake_256(bytes([i])).digest(100_000))
    return path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    """`plan[path]` says how to answer: content, bytes until it hangs up, whether it knows ranges, a length."""

    plan, seen = {}, []

    def do_GET(self):
        self.seen.append((self.path, self.headers["Range"]))
        if self.path not in self.plan:
            return self.send_error(404)
        content, patience, ranges, length = self.plan[self.path]
        wish = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if ranges else None
        start = int(wish[1]) if wish else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if wish else 200)
        if length is not False:
            self.send_header("Content-Length", str(length or len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:patience])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.plan, Handler.seen = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture
def content(tmp_path):
    return zipped(tmp_path / "source.zip")


def archive(content, *addresses):
    return Archive("set.zip", len(content), hashlib.sha256(content).hexdigest(), addresses, "images", 2)


def good(content, patience=None, ranges=True, length=None):
    return content, patience, ranges, length


@pytest.mark.parametrize("length", [None, False])
def test_a_file_comes_whole(server, content, tmp_path, length):
    Handler.plan = {"/a": good(content, length=length)}
    place = fetch(archive(content, f"{server}/a"), tmp_path / "new" / "folder", quiet=True)
    assert place.read_bytes() == content and place.name == "set.zip"
    assert sorted(path.name for path in place.parent.iterdir()) == ["set.zip"]
    assert fetch(archive(content, f"{server}/a"), place.parent) == place and len(Handler.seen) == 1


def test_a_broken_transfer_goes_on_at_its_byte(server, content, tmp_path):
    wanted = archive(content, f"{server}/a")
    Handler.plan = {"/a": good(content, patience=120_000)}
    with pytest.raises(DownloadError, match=r"broke off after 120000 of 300\d+ bytes"):
        fetch(wanted, tmp_path, quiet=True)
    with pytest.raises(DownloadError, match="broke off after 240000"):
        fetch(wanted, tmp_path, quiet=True)
    assert fetch(wanted, tmp_path, quiet=True).read_bytes() == content
    assert Handler.seen == [("/a", None), ("/a", "bytes=120000-"), ("/a", "bytes=240000-")]


def test_the_next_mirror_goes_on_where_the_last_broke_off(server, content, tmp_path):
    Handler.plan = {"/a": good(content, patience=120_000), "/b": good(content)}
    wanted = archive(content, "http://127.0.0.1:1/dead", f"{server}/absent", f"{server}/a", f"{server}/b")
    assert fetch(wanted, tmp_path, quiet=True).read_bytes() == content
    assert Handler.seen == [("/absent", None), ("/a", None), ("/b", "bytes=120000-")]


def test_an_answer_that_is_an_error_is_told_and_its_connection_closed(server, content, tmp_path):
    with pytest.raises(DownloadError, match="absent: DownloadError: the server answers 404, Not Found"):
        fetch(archive(content, f"{server}/absent"), tmp_path, quiet=True)
    gc.collect()


def test_a_server_without_ranges_begins_anew(server, content, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(content[:50_000])
    Handler.plan = {"/a": good(content, ranges=False)}
    assert fetch(archive(content, f"{server}/a"), tmp_path, quiet=True).read_bytes() == content
    assert Handler.seen == [("/a", "bytes=50000-")]


def test_what_was_complete_but_not_renamed_needs_no_server(content, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(content)
    assert fetch(archive(content, "http://127.0.0.1:1/dead"), tmp_path, quiet=True).read_bytes() == content


@pytest.mark.parametrize("rubbish", [b"x" * 70_000, b"x" * 400_000])
def test_rubbish_in_the_part_is_found_out_by_the_hash(server, content, tmp_path, rubbish):
    (tmp_path / "set.zip.part").write_bytes(rubbish)
    Handler.plan = {"/a": good(content), "/b": good(content)}
    assert fetch(archive(content, f"{server}/a", f"{server}/b"), tmp_path, quiet=True).read_bytes() == content


def test_wrong_bytes_are_thrown_away(server, content, tmp_path):
    wrong = bytes([content[0] ^ 1]) + content[1:]
    Handler.plan = {"/a": good(wrong), "/b": good(content)}
    with pytest.raises(DownloadError, match=r"wrong content: its sha256 is [0-9a-f]{64} instead of"):
        fetch(archive(content, f"{server}/a"), tmp_path, quiet=True)
    assert not (tmp_path / "set.zip.part").exists()
    assert fetch(archive(content, f"{server}/a", f"{server}/b"), tmp_path, quiet=True).read_bytes() == content


def test_a_page_in_place_of_the_file_is_refused_before_it_comes(server, content, tmp_path):
    Handler.plan = {"/a": good(b"<html>please log in</html>")}
    with pytest.raises(DownloadError, match=r"it offers 26 bytes instead of 300\d+"):
        fetch(archive(content, f"{server}/a"), tmp_path, quiet=True)
    assert not (tmp_path / "set.zip.part").exists()


def test_without_a_network_the_manual_way_is_told(content, tmp_path):
    wanted = archive(content, "http://127.0.0.1:1/first", "http://nowhere.invalid/second")
    with pytest.raises(DownloadError) as caught:
        fetch(wanted, tmp_path, quiet=True)
    text = str(caught.value)
    for part in (*wanted.mirrors, str(tmp_path / "set.zip"), "0.3 MB", "Call again", "URLError"):
        assert part in text
    (tmp_path / "set.zip").write_bytes(content)  # as the message says
    assert fetch(wanted, tmp_path) == tmp_path / "set.zip"
    (tmp_path / "set.zip").write_bytes(content[:-1])
    with pytest.raises(DownloadError, match=r"set\.zip has the wrong content"):
        fetch(wanted, tmp_path)
    assert (tmp_path / "set.zip").exists(), "what a person put there is not ours to delete"


def test_download_says_the_size_first_and_fetches_nothing_twice(server, content, tmp_path, capsys):
    Handler.plan = {"/a": good(content)}
    wanted = archive(content, f"{server}/a")
    assert download([wanted], tmp_path / "sets") == tmp_path / "sets"
    said = capsys.readouterr()
    assert said.out == "to fetch: set.zip 0.3 MB; with the unpacked files 0.6 MB on disk\n"
    assert "set.zip: 100%" in said.err and "unpacking set.zip: 100%" in said.err
    assert (tmp_path / "sets" / "images" / "a.jpg").stat().st_size == 100_000
    (tmp_path / "sets" / "set.zip").unlink()
    download([wanted], tmp_path / "sets")
    assert len(Handler.seen) == 1 and capsys.readouterr() == ("", "")


def test_unpacking_goes_on_too(server, content, tmp_path, capsys):
    Handler.plan = {"/a": good(content)}
    wanted = archive(content, f"{server}/a")
    download([wanted], tmp_path, quiet=True)
    (tmp_path / "images" / "b.jpg").unlink()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "note.txt").write_bytes(b"half")
    before = (tmp_path / "images" / "a.jpg").stat().st_mtime_ns
    download([wanted], tmp_path, quiet=True)
    assert (tmp_path / "images" / "b.jpg").stat().st_size == (tmp_path / "note.txt").stat().st_size == 100_000
    assert (tmp_path / "images" / "a.jpg").stat().st_mtime_ns == before and len(Handler.seen) == 1
    assert capsys.readouterr() == ("", "")


def test_too_few_files_and_too_little_room_are_named(server, content, tmp_path, monkeypatch):
    Handler.plan = {"/a": good(content)}
    wanted = archive(content, f"{server}/a")
    with pytest.raises(DownloadError, match=r"images should hold 3 files .*delete that folder and set\.zip"):
        download([wanted._replace(files=3)], tmp_path / "one", quiet=True)
    usage = downloads.disk_usage(tmp_path)
    monkeypatch.setattr(downloads, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(DownloadError, match=r"set\.zip 0\.3 MB: 0\.6 MB more are needed in .*two, 0\.5 MB are free"):
        download([wanted], tmp_path / "two", quiet=True)


def test_coco_and_bccd_give_the_folders_that_the_readers_want(server, tmp_path, monkeypatch):
    parts = {"val": ["val2017/1.jpg"], "annotations": [f"annotations/{i}.json" for i in range(6)]}
    small = {}
    for part, names in parts.items():
        content = zipped(tmp_path / "source.zip", names)
        Handler.plan[f"/{part}"] = good(content)
        small[part] = archive(content, f"{server}/{part}")._replace(
            name=COCO_2017[part].name, holds=COCO_2017[part].holds, files=len(names)
        )
    monkeypatch.setattr(downloads, "COCO_2017", small)
    folder = download_coco(tmp_path / "coco", quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "annotations", "annotations_trainval2017.zip", "val2017", "val2017.zip"
    ]  # fmt: skip
    content = zipped(tmp_path / "source.zip", [f"{BCCD.holds}/one.jpg"])
    Handler.plan["/bccd"] = good(content)
    monkeypatch.setattr(downloads, "BCCD", archive(content, f"{server}/bccd")._replace(holds=BCCD.holds, files=1))
    assert (download_bccd(tmp_path, quiet=True) / "JPEGImages" / "one.jpg").is_file()
    with pytest.raises(ValueError, match=r"no \['test'\]: choose of \['val', 'annotations'\]"):
        download_coco(tmp_path, ["val", "test"])


@pytest.mark.parametrize("entry", [*COCO_2017.values(), BCCD], ids=lambda entry: entry.name)
def test_the_table_is_well_formed(entry):
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256) and entry.size > 1e6 and entry.files > 0
    assert len(set(entry.mirrors)) == len(entry.mirrors) >= 2
    assert all(re.match(r"https?://[\w.-]+/", address) for address in entry.mirrors)
