"""Whether the hub can be reached is known within seconds, and what follows from it."""

import argparse
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

import defaults
import hub


@pytest.fixture
def endpoint(monkeypatch):
    """Point the probe at another address, and forget what it found before and after."""

    def point(url: str):
        monkeypatch.setattr(hub, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        hub.reachable.cache_clear()

    yield point
    hub.reachable.cache_clear()


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (403, False), (503, False)])
def test_a_server_that_answers(endpoint, status, reachable):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        assert hub.reachable() is reachable
        assert huggingface_hub.constants.HF_HUB_OFFLINE is not reachable


def test_a_closed_port_and_a_server_that_never_answers(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 1)
    endpoint("http://127.0.0.1:9")
    assert not hub.reachable()
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # listens, but nobody handles requests
        endpoint(f"http://127.0.0.1:{silent.server_port}")
        assert not hub.reachable()


@pytest.mark.parametrize("url", ["", "huggingface", "http://", "http://[", "http://127.0.0.1:port", "nonsense://hub"])
def test_an_address_that_is_none_cannot_be_reached(endpoint, url, capfd):
    endpoint(url)
    assert not hub.reachable()
    assert capfd.readouterr().err == "", "of the thread"


def test_a_server_that_does_not_speak_http(endpoint, capfd):
    with socketserver.TCPServer(("127.0.0.1", 0), Ssh) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_address[1]}")
        assert not hub.reachable()
    assert capfd.readouterr().err == ""


class Ssh(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


def chosen(**given) -> tuple[str, str]:
    args = argparse.Namespace(**({"data": None, "backbone": None, "weights": None} | given))
    defaults.choose_source(args)
    return args.data, args.backbone


def test_only_a_run_that_named_nothing_falls_back_to_the_demo(endpoint, capsys):
    endpoint("http://127.0.0.1:9")
    assert chosen() == ("demo", "demo")
    assert "cannot be reached" in capsys.readouterr().out
    assert chosen(data="demo") == ("demo", "demo")
    assert chosen(data="folder") == ("folder", defaults.HUB_BACKBONE)
    assert chosen(backbone="vit_tiny_patch16_224") == (defaults.HUB_DATA, "vit_tiny_patch16_224")
    assert chosen(weights="file") == (defaults.HUB_DATA, defaults.HUB_BACKBONE)


def test_what_was_named_and_needs_the_hub_fails_in_one_line(endpoint, command, cache_dir, tmp_path):
    endpoint("http://127.0.0.1:9")
    words = (
        "--data",
        "demo",
        "--backbone",
        "vit_tiny_patch16_224",
        "--out",
        tmp_path / "run",
        "--cache-dir",
        cache_dir,
    )
    done = command("train.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot get the weights of 'vit_tiny_patch16_224' from the hub" in done.stderr.splitlines()[-1]
    done = command("train.py", "--backbone", "demo", "--out", tmp_path / "run2", "--cache-dir", cache_dir)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert defaults.HUB_DATA in done.stderr
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "so its libraries do not try again and again"
