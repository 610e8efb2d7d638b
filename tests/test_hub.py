"""ImageNet weights from a hub that misbehaves: a small local server stands in for it."""
import http.server
import shlex
import shutil
import socketserver
import subprocess
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from core.errors import InputError
from model import create_model

NAME, SIZE = "test_efficientnet", (32, 24)
HEADERS = {"X-Repo-Commit": "a" * 40, "ETag": f'"{"b" * 40}"'}


@pytest.fixture(scope="module")
def weights():
    """A file of weights as the hub has it: 1000 classes."""
    return safetensors.torch.save(timm.create_model(NAME).state_dict(), {"format": "pt"})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a hub: hub(answer), where answer(handler) sends the response about a file."""
    servers = []

    def start(answer, handler=http.server.BaseHTTPRequestHandler):
        class Handler(handler):
            def do_HEAD(self):
                if "/resolve/" in self.path:
                    answer(self)
                else:
                    send(self, 200)

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        set_constant("ENDPOINT", url)
        set_constant("HUGGINGFACE_CO_URL_TEMPLATE",
                     url + "/{repo_id}/resolve/{revision}/{filename}")

    def set_constant(name, value):
        # Old versions copy the constants into the module that downloads.
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, name, value, raising=False)

    set_constant("HF_HUB_CACHE", str(tmp_path / "my cache"))
    set_constant("HF_HUB_OFFLINE", False)
    new_sessions()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler, status, body=b"", length=None, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def new_sessions():
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # before 1.0 they keep HF_HUB_OFFLINE
        huggingface_hub.utils.reset_sessions()


def refuse():
    """Ask for ImageNet weights; return the one line that refuses."""
    with pytest.raises(InputError) as caught:
        create_model(NAME, SIZE, "imagenet")
    line = str(caught.value)
    assert line.startswith("--weights imagenet: ") and "\n" not in line
    assert "--weights none" in line and "--weights FILE" in line and NAME in line
    return line


def test_a_good_hub_gives_its_weights(hub, weights):
    hub(lambda handler: send(handler, 200, weights, **HEADERS))
    model = create_model(NAME, SIZE, "imagenet")
    expected = safetensors.torch.load(weights)
    assert torch.equal(model.conv_stem.weight, expected["conv_stem.weight"])
    assert model.classifier.out_features == 18


def not_found(handler):
    send(handler, 404)


def log_in(handler):
    send(handler, 401)


def redirected_forever(handler):
    send(handler, 302, Location=handler.path)


def no_storage(handler):
    """The hub answers and the storage behind it does not, as behind a firewall."""
    send(handler, 302, Location="http://127.0.0.1:9/blob", X_Linked_Size="46807446",
         X_Linked_ETag='"x"', **HEADERS)


def too_short(handler):
    send(handler, 200, b"x" * 50, 50 if handler.command == "GET" else 99, **HEADERS)


def not_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.0\r\n")


def hangs_up(handler):
    handler.close_connection = True


def overloaded(handler):
    send(handler, 503)


def cut_off(handler):
    """The connection ends in the middle of the file."""
    send(handler, 200, b"x" * 50, 99, **HEADERS)
    handler.close_connection = True


def no_gzip(handler):
    send(handler, 200, b"x" * 50, Content_Encoding="gzip", **HEADERS)


@pytest.mark.parametrize("answer", [
    not_found, log_in, overloaded, redirected_forever, no_storage, too_short, cut_off, not_http,
    hangs_up, no_gzip])
def test_a_hub_that_misbehaves_ends_in_one_line(hub, answer):
    hub(answer)
    assert "are not available (" in refuse()


class NoHttp(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")


def test_an_endpoint_that_is_no_hub_ends_in_one_line(hub):
    hub(None, NoHttp)
    assert "are not available (" in refuse()


def page(handler):
    """The page of a proxy, instead of the file."""
    send(handler, 200, b"<html>Please log in to the proxy</html>", **HEADERS)


def noise(handler):
    send(handler, 200, bytes(range(256)) * 50, **HEADERS)


@pytest.mark.parametrize("answer", [page, noise])
def test_a_damaged_download_is_named_with_the_command_that_removes_it(hub, weights, answer):
    hub(answer)
    line = refuse()
    remove = line.partition("delete them with: ")[2].partition(" (or ")[0]
    assert Path(shlex.split(remove)[-1]).name == "models--timm--test_efficientnet.r160_in1k"
    subprocess.run(remove, shell=True, check=True)
    hub(lambda handler: send(handler, 200, weights, **HEADERS))
    create_model(NAME, SIZE, "imagenet")


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def become_a_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 468\n")


@pytest.mark.parametrize("damage", [cut, become_a_pointer])
def test_a_cache_that_was_damaged_later_is_named_with_and_without_a_network(
        hub, weights, tmp_path, monkeypatch, damage):
    hub(lambda handler: send(handler, 200, weights, **HEADERS))
    create_model(NAME, SIZE, "imagenet")
    (file,) = (tmp_path / "my cache").glob("models--*/snapshots/*/model.safetensors")
    damage(file)
    assert "damaged; delete them with: rm -r '" in refuse()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    new_sessions()
    assert "damaged; delete them with: rm -r '" in refuse()
    shutil.rmtree(tmp_path / "my cache")
    assert "are not available (" in refuse()


def test_what_was_downloaded_is_used_if_the_hub_is_gone(hub, weights, monkeypatch):
    hub(lambda handler: send(handler, 200, weights, **HEADERS))
    create_model(NAME, SIZE, "imagenet")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    create_model(NAME, SIZE, "imagenet")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
