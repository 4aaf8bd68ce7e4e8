"""Search through places, the data folder, and downloads from a server of the test."""

import functools
import http.server
import socket
import threading

import pytest

from fedjax_sim.data import sources
from fedjax_sim.data.sources import NotHere


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder and the URL at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def closed_url():
    """The URL of a port at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


def test_downloads_from_the_first_url_that_has_the_right_file(
    server, closed_url, tmp_path
):
    folder, url = server
    (folder / "bad").mkdir()
    (folder / "bad" / "x.gz").write_bytes(b"something else")
    (folder / "x.gz").write_bytes(b"right")
    urls = (closed_url, f"{url}none/", f"{url}bad/", url)
    checksum = sources.md5(folder / "x.gz")
    path = sources.download("x.gz", tmp_path / "new" / "idx", urls, checksum)
    assert path == tmp_path / "new" / "idx" / "x.gz"
    assert path.read_bytes() == b"right"


def test_gives_the_reason_of_every_url(server, closed_url, tmp_path):
    folder, url = server
    (folder / "x.gz").write_bytes(b"something else")
    with pytest.raises(NotHere) as caught:
        sources.download("x.gz", tmp_path / "new", (closed_url, f"{url}n/", url), "0")
    message = str(caught.value)
    assert f"{closed_url}x.gz (ConnectionError" in message
    assert f"{url}n/x.gz (HTTPError: 404" in message
    assert f"{url}x.gz (ValueError" in message
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    folder, url = server
    (folder / "x.gz").write_bytes(b"right")
    with pytest.raises(NotHere, match="Error"):
        sources.download("x.gz", folder / "x.gz" / "below", (url,), "0")


def test_reachable(server, closed_url):
    _, url = server
    assert sources.reachable(url)
    assert sources.reachable(f"{url}none")
    assert not sources.reachable(closed_url)


def test_first_found_lists_every_place():
    def shelf():
        raise NotHere("shelf: empty")

    def drawer():
        raise NotHere("drawer: locked")

    with pytest.raises(FileNotFoundError) as caught:
        sources.first_found("mnist", [shelf, drawer])
    message = str(caught.value)
    assert "'mnist' was not found" in message
    assert message.index("  - shelf: empty\n") < message.index("  - drawer: locked\n")
    assert "--data-dir DIR" in message
    assert "--dataset digits" in message


def test_first_found_does_not_hide_damage():
    def damaged():
        raise ValueError("corrupt")

    with pytest.raises(ValueError, match="corrupt"):
        sources.first_found("mnist", [damaged, lambda: "another"])


def test_data_dir(tmp_path, cache_folder, monkeypatch):
    assert sources.resolve_data_dir(None) == cache_folder / "data"
    monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path / "env"))
    assert sources.resolve_data_dir(None) == tmp_path / "env"
    assert sources.resolve_data_dir(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        sources.resolve_data_dir(tmp_path / "file")


def test_cache_dir_is_the_users(monkeypatch):
    monkeypatch.delenv("FEDJAX_SIM_CACHE")
    assert sources.cache_dir().name == "fedjax_sim"
