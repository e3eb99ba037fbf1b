"""Fetching from a real server that does everything wrong."""

from __future__ import annotations

import hashlib
import os
import pty
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench import fetch as fetch_module
from qatbench.bench.errors import UserError
from qatbench.bench.fetch import Remote, fetch, verify
from support import open_to_all

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
FAST = {"show": False, "attempts": 3, "pause": 0.001}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- a server that can do everything wrong


@dataclass
class Page:
    """How one address answers."""

    body: bytes = BODY
    statuses: list[int] = field(default_factory=list)  # of the first answers, one each
    cuts: list[int] = field(default_factory=list)  # bytes after which the connection of an answer with a body ends
    always_cut: int | None = None
    ranges: bool = True
    etag: str = ""
    if_range: bool = True
    announce: int | None = None  # a Content-Length that is a lie
    length: bool = True  # whether a length is given at all
    chunked: bool = False
    redirect: str = ""
    drip: float = 0.0  # seconds between two pieces of 10,000 bytes
    silent: float = 0.0  # seconds before anything is said
    linger: float = 0.0  # seconds until the connection is closed after the body


class Server(ThreadingHTTPServer):
    """Serves `pages`, and notes what was asked and how many bytes of bodies it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str]] = []  # path, Range
        self.bodies: list[int] = []  # bytes of the body of each answer
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path: str, page: Page | None = None) -> str:
        if page is not None:
            self.pages[path] = page
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def sent(self) -> int:
        return sum(self.bodies)

    @property
    def ranges(self) -> list[str]:
        return [r for _, r in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range", "")
        self.server.asked.append((path, asked))
        page = self.server.pages.get(path)
        if page is None:
            return self.send_error(404)
        time.sleep(page.silent)
        if page.redirect:
            self.send_response(302)
            self.send_header("Location", page.redirect)
            return self.end_headers()
        if page.statuses and (status := page.statuses.pop(0)) != 200:
            return self.send_error(status)
        start = self.begin(page, asked)
        if start is not None:
            self.send(page, page.body[start:])

    def begin(self, page: Page, asked: str) -> int | None:
        unchanged = not page.if_range or self.headers.get("If-Range", page.etag) == page.etag
        start = int(asked[6:-1]) if asked and page.ranges and unchanged else 0
        total = len(page.body)
        if start and start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return None
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif page.length:
            self.send_header("Content-Length", str(page.announce or total - start))
        self.end_headers()
        return start

    def send(self, page: Page, body: bytes) -> None:
        cut = page.cuts.pop(0) if page.cuts else page.always_cut
        ended = cut is not None
        body = body[:cut]
        this = len(self.server.bodies)
        self.server.bodies.append(0)
        try:
            for i in range(0, len(body), 10_000):
                piece = body[i : i + 10_000]
                self.server.bodies[this] += len(piece)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.chunked else piece)
                time.sleep(page.drip)
            if page.chunked and not ended:
                self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
            time.sleep(page.linger)
        except OSError:
            pass  # the other side was killed


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder: Path) -> set[str]:
    """What lies there, but for locks, which stay."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix != ".lock"}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys\nfrom pathlib import Path\nfrom qatbench.bench.errors import UserError\n"
    head += "from qatbench.bench.fetch import Remote, fetch\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# ---- fetch


def test_a_file_is_fetched_once(server, tmp_path):
    """A plain download would fail, leave its scaffolding, or be made again each time."""
    remote = Remote("a/b/x.gz", (server.url("/x", Page()),), sha256=sha(BODY).upper(), size=len(BODY))
    path = fetch(remote, tmp_path, **FAST)
    assert path == tmp_path / "a/b/x.gz"
    assert path.read_bytes() == BODY
    assert names(tmp_path / "a/b") == {"x.gz"}
    assert fetch(remote, tmp_path, **FAST) == path
    assert server.asked == [("/x", "")]


def test_a_file_on_disk_is_checked_each_time(tmp_path):
    """A file that was put there by hand, or damaged since, would pass."""
    path = tmp_path / "x"
    path.write_bytes(BODY)
    remote = Remote("x", sha256=sha(BODY), md5=hashlib.md5(BODY).hexdigest())
    assert fetch(remote, tmp_path) == path
    path.write_bytes(OTHER)
    with pytest.raises(UserError, match=f"x is not the file .* its sha256 is {sha(OTHER)}, expected {sha(BODY)}"):
        fetch(remote, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become somebody else")
def test_a_file_in_a_folder_that_may_only_be_read(tmp_path):
    """Shared data, read-only, could not be used at all."""
    (tmp_path / "x").write_bytes(BODY)
    open_to_all(tmp_path)
    code = f"""
        import os
        os.setresuid(65534, 65534, 65534)
        print(fetch(Remote("x", sha256={sha(BODY)!r}), Path(sys.argv[1])).name)
        try:
            fetch(Remote("y", ("http://127.0.0.1:9/y",)), Path(sys.argv[1]))
        except UserError as error:
            print(error)
    """
    told = child(code, tmp_path).communicate(timeout=60)[0].splitlines()
    assert told == [
        "x",
        f"cannot write {tmp_path / 'y'}: Permission denied; mend that or choose another folder",
    ]
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize(
    ("remote", "wrong"),
    [
        (Remote("x", size=3), "it has 300,000 bytes, expected 3"),
        (Remote("x", sha256="0" * 64), f"its sha256 is {sha(BODY)}, expected {'0' * 64}"),
        (
            Remote("x", sha256=sha(BODY), md5="1" * 32),
            f"its md5 is {hashlib.md5(BODY).hexdigest()}, expected {'1' * 32}",
        ),
    ],
)
def test_verify_says_what_differs(tmp_path, remote, wrong):
    """A wrong file would pass, or nobody would know in what it differs."""
    path = tmp_path / "x"
    path.write_bytes(BODY)
    verify(path, Remote("x", sha256=sha(BODY), md5=hashlib.md5(BODY).hexdigest(), size=len(BODY)))
    with pytest.raises(UserError) as told:
        verify(path, remote)
    assert str(told.value) == f"{path} is not the file that was published: {wrong}; put the file there by hand: {path}"


def test_another_file_with_the_same_content_is_accepted(tmp_path):
    """A file known to hold the same pixels, packed anew, could not be used; or any other could."""
    path = tmp_path / "x"
    path.write_bytes(BODY)
    pins: dict[str, Any] = {"sha256": sha(OTHER), "md5": "0" * 32, "size": 7}
    verify(path, Remote("x", accept=("1" * 64, sha(BODY)), **pins))
    with pytest.raises(UserError, match="it has 300,000 bytes, expected 7"):
        verify(path, Remote("x", accept=("1" * 64,), **pins))


def test_verify_of_a_file_that_is_not_there(tmp_path):
    """A missing file would be a traceback."""
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        verify(tmp_path / "x", Remote("x", sha256="0" * 64))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', ""])
def test_a_cut_download_goes_on(server, tmp_path, ranges, pinned, etag):
    """After a cut a download would begin anew where it need not, or glue together what does not belong together."""
    page = Page(cuts=[100_000, 150_000], ranges=ranges, etag=etag)
    remote = Remote("x", (server.url("/x", page),), sha256=sha(BODY) if pinned else None)
    assert fetch(remote, tmp_path, **FAST).read_bytes() == BODY
    asks = pinned or etag == '"v1"'  # else nothing would show that the file had changed in between
    goes_on = asks and ranges
    second = "bytes=150000-" if not goes_on else "bytes=250000-"
    assert server.ranges == ["", "bytes=100000-", second] if asks else ["", "", ""]
    assert server.sent == (300_000 if goes_on else 550_000)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_that_changed_between_two_attempts(server, tmp_path, pinned):
    """Half of the old file and half of the new one would be put together."""
    page = Page(cuts=[100_000], etag='"old"', body=OTHER)
    (url,) = urls = (server.url("/x", page),)
    remote = Remote("x", urls, sha256=sha(BODY) if pinned else None)
    with pytest.raises(UserError, match=f"{url}: was cut off at 100,000 of 300,000 bytes[)]"):
        fetch(remote, tmp_path, show=False, attempts=1)
    assert (tmp_path / "x.part").read_bytes() == OTHER[:100_000]
    server.pages["/x"] = Page(etag='"new"')
    assert fetch(remote, tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges == ["", "bytes=100000-"]


def test_a_server_that_ignores_if_range(server, tmp_path):
    """A server that sends the rest of another file, though it was told which one is meant, would spoil the file."""
    url = server.url("/x", Page(cuts=[100_000], etag='"old"', body=OTHER))
    with pytest.raises(UserError):
        fetch(Remote("x", (url,)), tmp_path, show=False, attempts=1)
    server.pages["/x"] = Page(etag='"new"', if_range=False)
    assert fetch(Remote("x", (url,)), tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges == ["", "bytes=100000-", ""]


def test_another_mirror_goes_on_and_a_wrong_beginning_is_noticed(server, tmp_path):
    """The bytes of a mirror that died would be lost; or those of a mirror with another file would spoil a good one's."""
    cut = server.url("/cut", Page(always_cut=50_000))
    good = server.url("/good", Page())
    remote = Remote("x", (cut, good), sha256=sha(BODY))
    assert fetch(remote, tmp_path / "1", **FAST).read_bytes() == BODY
    assert server.ranges == ["", "bytes=50000-", "bytes=100000-", "bytes=150000-"]
    assert server.sent == 300_000
    server.asked.clear()
    server.pages["/cut"] = Page(always_cut=50_000, body=OTHER)
    assert fetch(remote, tmp_path / "2", **FAST).read_bytes() == BODY
    assert server.ranges[-2:] == ["bytes=150000-", ""]
    server.asked.clear()
    assert fetch(Remote("x", (cut, good)), tmp_path / "3", **FAST).read_bytes() == BODY  # no hash would show it
    assert server.ranges == [""] * 4


def test_many_cuts_with_much_in_between_are_no_failure(server, tmp_path):
    """A file of 100 GB would never arrive over a line that breaks once an hour."""
    body = random.Random(2).randbytes(8 * 2**20)
    url = server.url("/x", Page(body=body, always_cut=2**20 + 10_000))
    remote = Remote("x", (url,), sha256=sha(body))
    assert fetch(remote, tmp_path, show=False, attempts=2, pause=0.001).read_bytes() == body
    assert server.sent == len(body)


@pytest.mark.parametrize(
    ("status", "times"), [(404, 1), (403, 1), (410, 1), (500, 3), (503, 3), (429, 3), (408, 3), (204, 1), (206, 1)]
)
def test_what_may_pass_is_tried_again_and_what_will_not_is_not(server, tmp_path, status, times):
    """A missing file would be asked for again and again; or a server that is busy for a second given up at once."""
    bad = server.url("/bad", Page(statuses=[status] * 9))
    good = server.url("/good", Page())
    assert fetch(Remote("x", (bad, good)), tmp_path, **FAST).read_bytes() == BODY
    assert [p for p, _ in server.asked] == ["/bad"] * times + ["/good"]


def test_a_server_that_recovers(server, tmp_path):
    """One bad answer would be the end of it."""
    url = server.url("/x", Page(statuses=[500, 503]))
    assert fetch(Remote("x", (url,)), tmp_path, **FAST).read_bytes() == BODY
    assert len(server.asked) == 3


def test_pauses_grow(server, tmp_path, monkeypatch):
    """A server in trouble would be hammered; or a pause would grow to hours."""
    pauses = []
    monkeypatch.setattr(fetch_module.time, "sleep", pauses.append)
    monkeypatch.setattr(fetch_module, "LONGEST", 5.0)
    url = server.url("/x", Page(statuses=[500] * 5))
    fetch(Remote("x", (url,)), tmp_path, show=False, attempts=6, pause=1.0)
    assert [p for p in pauses if p] == [1.0, 2.0, 4.0, 5.0, 5.0]  # 0: the server's own


def test_the_line_when_all_fails(server, tmp_path):
    """A user would not see why, would see a key, or would not know how to help themselves."""
    urls = (
        server.url("/missing?key=SECRET"),
        server.url("/busy", Page(statuses=[500] * 9)),
        server.url("/wrong", Page(body=OTHER)),
        server.url("/short", Page(always_cut=0)),
        server.url("/page", Page(body=b"\n<!DOCTYPE html><html>Are you sure?</html>")),
        "http://127.0.0.1:9/nobody",
        "file:///etc/passwd",
        "no address?key=SECRET",
        "http://[::1/?key=SECRET",
    )
    remote = Remote("x.zip", urls, sha256=sha(BODY), note="form at https://example.org")
    with pytest.raises(UserError) as told:
        fetch(remote, tmp_path, **FAST)
    line, base, none = (
        str(told.value),
        server.url(""),
        "an address without a server: is, or leads to, no http(s) address",
    )
    assert "SECRET" not in line
    assert "\n" not in line
    assert line == (
        f"cannot fetch x.zip ({base}/missing: answered 404 Not Found; {base}/busy: answered 500 Internal Server Error, 3 times; "
        f"{base}/wrong: its sha256 is {sha(OTHER)}, expected {sha(BODY)}; "
        f"{base}/short: was cut off at 0 of 300,000 bytes, 3 times; {base}/page: gives a web page, not the file; "
        f"http://127.0.0.1:9/nobody: connection refused, 3 times; {none}; {none}; {none}); "
        f"give --data-root if it is here, or put the file there by hand (form at https://example.org): {tmp_path / 'x.zip'}"
    )
    assert names(tmp_path) == set()
    with pytest.raises(UserError) as told:
        fetch(Remote("x", ("http://me:SECRET@127.0.0.1:9/",)), tmp_path, **FAST)
    assert "SECRET" not in str(told.value)


def test_no_address_and_no_file(tmp_path):
    """A set that is given out by hand only would end in a traceback, or leave folders."""
    with pytest.raises(UserError) as told:
        fetch(Remote("a/x.zip", note="form at https://example.org"), tmp_path)
    assert str(told.value) == (
        f"{tmp_path / 'a/x.zip'} is missing, and no address is known to fetch it from; "
        f"put the file there by hand (form at https://example.org): {tmp_path / 'a/x.zip'}"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(tmp_path):
    """A folder, or a link to a disk that is not mounted, would be replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        with pytest.raises(UserError, match=f"{name} should be a file, but is .*; move it away"):
            fetch(Remote(name, ("http://127.0.0.1:9/x",)), tmp_path)
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_a_good_file_is_used(tmp_path):
    """Data that a user linked into the root would be fetched again."""
    (tmp_path / "real").write_bytes(BODY)
    (tmp_path / "x").symlink_to(tmp_path / "real")
    assert fetch(Remote("x", sha256=sha(BODY)), tmp_path).is_symlink()


@pytest.mark.parametrize("known", ["hash", "size", "nothing"])
@pytest.mark.parametrize("announce", [200_000, 400_000])
def test_a_lie_about_the_length(server, tmp_path, announce, known):
    """A file that is cut short by a false length, or that ends too early, would be taken for whole."""
    url = server.url("/x", Page(announce=announce, etag='"v1"'))
    pins = {"hash": {"sha256": sha(BODY)}, "size": {"size": len(BODY)}, "nothing": {}}[known]
    with pytest.raises(UserError) as told:
        fetch(Remote("x", (url,), **pins), tmp_path, **FAST)
    if known == "size":
        assert f"has {announce:,} bytes, expected 300,000" in str(told.value)
    elif announce < len(BODY):
        assert "sends more than the 200,000 bytes that were announced" in str(told.value)
    else:
        assert "was cut off at 300,000 of 400,000 bytes" in str(told.value)
    assert "x" not in names(tmp_path)


@pytest.mark.parametrize("pins", [{"sha256": sha(BODY)}, {"size": len(BODY)}, {}])
def test_a_body_without_a_length(server, tmp_path, pins):
    """A body that ends when the connection does would be taken for whole, though nothing shows that it is."""
    url = server.url("/x", Page(length=False))
    remote = Remote("x", (url,), **pins)
    if pins:
        assert fetch(remote, tmp_path, **FAST).read_bytes() == BODY
        server.pages["/x"] = Page(length=False, always_cut=1000, ranges=False)
        with pytest.raises(UserError, match="its sha256 is" if "sha256" in pins else "was cut off at 1,000 of 300,000"):
            fetch(remote, tmp_path / "cut", **FAST)
        server.pages["/x"] = Page(length=False, body=BODY + b"more")
        with pytest.raises(UserError, match="its sha256 is" if "sha256" in pins else "sends more than the 300,000"):
            fetch(remote, tmp_path / "long", **FAST)
    else:
        with pytest.raises(UserError, match="does not say how long the file is"):
            fetch(remote, tmp_path, **FAST)


def test_a_chunked_body(server, tmp_path):
    """A body in chunks would be refused; or one without its last chunk taken for whole."""
    url = server.url("/x", Page(chunked=True))
    assert fetch(Remote("x", (url,)), tmp_path, **FAST).read_bytes() == BODY
    server.pages["/x"] = Page(chunked=True, always_cut=100_000)
    with pytest.raises(UserError, match="was cut off, 3 times"):
        fetch(Remote("x", (url,)), tmp_path / "cut", **FAST)
    assert "x" not in names(tmp_path / "cut")


def test_a_server_that_says_nothing(server, tmp_path, monkeypatch):
    """A dead server would hold a run for ever."""
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.1)
    urls = (server.url("/mute", Page(silent=1.0)), server.url("/stuck", Page(drip=1.0)))
    with pytest.raises(UserError) as told:
        fetch(Remote("x", urls), tmp_path, show=False, attempts=2, pause=0.001)
    assert str(told.value).count("gave no answer for 0.1 s, 2 times") == 2


def test_a_server_that_does_not_hang_up(server, tmp_path, monkeypatch):
    """A whole file would be thrown away because its server keeps the connection."""
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.3)
    url = server.url("/x", Page(linger=1.0))
    assert fetch(Remote("x", (url,)), tmp_path, **FAST).read_bytes() == BODY
    assert len(server.asked) == 1


def test_redirects(server, tmp_path):
    """A file that has moved would not be found; or a server could have us read a local file."""
    server.url("/there", Page())
    url = server.url("/x", Page(redirect="/there"))
    assert fetch(Remote("x", (url,)), tmp_path, **FAST).read_bytes() == BODY
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for to in ("/loop", secret.as_uri(), "ftp://127.0.0.1/x", "data:text/plain,x", "//[", "gopher://x"):
        url = server.url("/loop", Page(redirect=to))
        with pytest.raises(UserError, match=r"redirects in a circle, or to what is not|no http\(s\) address") as told:
            fetch(Remote("y", (url,)), tmp_path, **FAST)
        assert "times" not in str(told.value)  # not tried again
    assert not (tmp_path / "y").exists()


def test_a_redirect_keeps_the_range(server, tmp_path):
    """A download from an address that redirects, as those of the hub do, could never be resumed."""
    server.url("/there", Page(cuts=[100_000]))
    url = server.url("/x", Page(redirect="/there"))
    assert fetch(Remote("x", (url,), sha256=sha(BODY)), tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges == ["", "", "bytes=100000-", "bytes=100000-"]
    assert server.sent == len(BODY)


def test_the_right_file_is_on_the_second_mirror(server, tmp_path):
    """A bad mirror would be the end of it, or what it sent would be left."""
    urls = (server.url("/bad", Page(body=OTHER)), server.url("/good", Page()))
    assert fetch(Remote("x", urls, md5=hashlib.md5(BODY).hexdigest()), tmp_path, **FAST).read_bytes() == BODY
    assert names(tmp_path) == {"x"}
    assert server.ranges == ["", ""]


def test_a_part_that_is_whole_or_too_long_already(server, tmp_path):
    """A process killed between the last byte and the new name would leave a part that no server goes on with."""
    remote = Remote("x", (server.url("/x", Page()),), sha256=sha(BODY), size=len(BODY))
    (tmp_path / "x.part").write_bytes(BODY)
    assert fetch(remote, tmp_path, **FAST).read_bytes() == BODY
    assert server.asked == []
    for body, size in ((BODY, None), (BODY + b"more", len(BODY))):
        (tmp_path / "x").unlink()
        (tmp_path / "x.part").write_bytes(body)
        assert fetch(replace(remote, size=size), tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges == ["bytes=300000-", "", "bytes=300004-", ""]


FETCH = """
    remote = Remote("x", (sys.argv[2],), sha256=sys.argv[3] or None)
    try:
        print(fetch(remote, Path(sys.argv[1]), attempts=2, pause=0.01).stat().st_size)
    except UserError as error:
        print(error)
"""


def test_of_two_processes_one_works_and_one_waits(server, tmp_path):
    """Two processes would load twice, or write into each other's part."""
    url = server.url("/x", Page(drip=0.03))
    both = [child(FETCH, tmp_path, url, "") for _ in range(2)]
    assert [p.communicate(timeout=60)[0] for p in both] == ["300000\n", "300000\n"]
    assert server.asked == [("/x", "")]
    assert (tmp_path / "x").read_bytes() == BODY


@pytest.mark.parametrize("pinned", [True, False])
def test_killed_in_mid_download_it_goes_on_where_it_was(server, tmp_path, pinned):
    """A killed process would leave its half for a whole file, hold its lock, or its bytes would be lost."""
    url = server.url("/x", Page(drip=0.05, etag='"v1"'))
    process = child(FETCH, tmp_path, url, sha(BODY) if pinned else "")
    part = tmp_path / "x.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 50_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "x").exists()
    have = part.stat().st_size
    assert part.read_bytes() == BODY[:have]
    server.pages["/x"].drip = 0
    remote = Remote("x", (url,), sha256=sha(BODY) if pinned else None)
    assert fetch(remote, tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges == ["", f"bytes={have}-"]
    assert server.bodies[1] == len(BODY) - have


def test_ctrl_c_leaves_the_part(server, tmp_path):
    """What had come before a Ctrl-C would be lost."""
    process = child(FETCH, tmp_path, server.url("/x", Page(drip=0.05)), sha(BODY))
    part = tmp_path / "x.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 20_000)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[0]
    assert part.stat().st_size > 20_000
    assert not (tmp_path / "x").exists()


LIMIT = """
    import resource, signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond
"""


def test_a_full_disk_is_one_line(server, tmp_path):
    """A full disk would be a traceback, or be taken for trouble with the network; and what came would be lost."""
    url = server.url("/x", Page())
    told = child(textwrap.dedent(LIMIT) + textwrap.dedent(FETCH), tmp_path, url, sha(BODY)).communicate(timeout=60)[0]
    assert told == f"no space left on the disk of {tmp_path} for x; free some and start again\n"
    assert len(server.asked) == 1
    assert fetch(Remote("x", (url,), sha256=sha(BODY)), tmp_path, **FAST).read_bytes() == BODY
    assert server.ranges[1] == "bytes=100000-"


def test_the_bar_is_for_terminals(server, tmp_path):
    """A log file would be full of bars; or a user would look at nothing for an hour."""
    url = server.url("/x", Page(drip=0.01))
    quiet = child(FETCH, tmp_path / "1", url, "").communicate(timeout=60)[0]
    assert quiet == "300000\n"
    main, side = pty.openpty()
    code = "from pathlib import Path; import sys; from qatbench.bench.fetch import Remote, fetch\n"
    code += "fetch(Remote('x[red].gz', (sys.argv[2],)), Path(sys.argv[1]), show=sys.argv[3] == '1')"
    seen = {}
    for show in ("1", "0"):
        command = [sys.executable, "-c", code, str(tmp_path / f"2{show}"), url, show]
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        subprocess.run(command, stderr=side, check=True, timeout=60, env=env)
        os.write(side, b"END")
        text = b""
        while not text.endswith(b"END"):
            text += os.read(main, 100_000)
        seen[show] = text.decode()
    os.close(main)
    os.close(side)
    assert "x[red].gz" in seen["1"]
    assert "300.0/300.0 kB" in seen["1"]
    assert seen["0"] == "END"
