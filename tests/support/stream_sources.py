"""What tests of streams share: a small causal model in a file, a web server, and raw frames by FFmpeg."""

import contextlib
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.small_models import rewrite
from videogru.checkpoint.model_file import make_card, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.models.classifier import Classifier

CLASSES = ("one", "two", "three")


def write_stream_model(
    path: Path, *, window_seconds: tuple[float, ...] = (), kind: str = "video", data: dict | None = None, **settings
) -> Path:
    """A model whose answer changes with every frame: random, and large at its end."""
    torch.manual_seed(4)
    read = DataConfig(**{"frame_size": 16, "num_frames": 6, "channels": 3, **(data or {})})
    model = ModelConfig(**{"encoder_width": 4, "hidden_size": 6, "temporal": "causal", **settings})
    size = {"in_channels": 3, "frame_size": 16, "num_classes": 3}
    classifier = Classifier(model, **size, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2)).eval()
    nn.init.normal_(classifier.head.linear.weight, std=2.0)
    card = make_card(classifier, kind=kind, classes=CLASSES, data=read, window_seconds=window_seconds)
    write_model(path, classifier, card)
    return path


def with_exits(place: Path, thresholds: list[float], changed: list[int], *, clips: int = 99, **how) -> Path:
    """The same, reading every frame, and with this table of when to stop early."""
    path = write_stream_model(place / "model.safetensors", **{"data": {"sampling": "all"}, **how})
    table = {"dataset": "made", "split": "val", "clips": clips, "thresholds": thresholds, "changed": changed}
    rewrite(path, exits=table)
    return path


def ffmpeg(*arguments: object) -> bytes:
    """What FFmpeg writes to its standard output; tests that need it skip where it is absent."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command")
    command = ["ffmpeg", "-v", "error", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


class _Files(BaseHTTPRequestHandler):
    """Files of a folder, by ranges as video players ask for them.

    endless/NAME has no length and cannot seek; stalls/NAME is the same, and halfway nothing more comes.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, folder: Path, release: threading.Event, **more) -> None:
        self.folder, self.release = folder, release
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name == "silent":
            self.release.wait(30)
            return
        path = self.folder / name.removeprefix("endless/").removeprefix("stalls/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if name.startswith(("endless/", "stalls/")):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for place in range(0, len(content), 4096):
                    chunk = content[place : place + 4096]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                    if name.startswith("stalls/") and place > len(content) / 2:
                        self.release.wait(30)
                        return
                self.wfile.write(b"0\r\n\r\n")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        stop = int(found[2]) + 1 if found and found[2] else len(content)
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content[start:stop])))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serves a folder; gives its address, without a slash at the end."""
    release = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, folder=folder, release=release))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def rtp_of(source: Path, sdp: Path) -> tuple[str, list[bytes]]:
    """A video as FFmpeg sends it by RTP: its description, and all packets."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        ffmpeg("-re", "-i", source, "-an", "-c:v", "copy", "-sdp_file", sdp, "-f", "rtp", f"rtp://127.0.0.1:{port}")
        receiver.settimeout(1)
        packets = []
        with contextlib.suppress(TimeoutError):
            while packet := receiver.recv(65_536):
                packets.append(packet)
    description = re.sub(r"m=video \d+", "m=video 0", sdp.read_text().partition("SDP:\n")[2] or sdp.read_text())
    return description + "a=control:track\n", packets


@contextlib.contextmanager
def rtsp_server(description: str, packets: list[bytes]) -> Iterator[str]:
    """A camera as far as a client can tell (RFC 2326, with RTP in the same connection: section 10.12), for one call."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as file:
                while request := file.readline().decode():
                    lines = iter(lambda: file.readline().decode().strip(), "")
                    headers = dict(line.split(": ", 1) for line in lines)
                    method = request.split()[0]
                    reply = {"CSeq": headers["CSeq"], "Session": "1"}
                    body = description if method == "DESCRIBE" else ""
                    if method == "OPTIONS":
                        reply["Public"] = "DESCRIBE, SETUP, PLAY, TEARDOWN"
                    elif method == "DESCRIBE":
                        reply |= {"Content-Type": "application/sdp", "Content-Length": str(len(body))}
                    elif method == "SETUP":
                        reply["Transport"] = "RTP/AVP/TCP;unicast;interleaved=0-1"
                    text = "".join(f"{name}: {value}\r\n" for name, value in reply.items())
                    file.write(f"RTSP/1.0 200 OK\r\n{text}\r\n{body}".encode())
                    file.flush()
                    if method == "PLAY":
                        for packet in packets:
                            file.write(b"$\0" + struct.pack(">H", len(packet)) + packet)
                        file.flush()
                        return  # the camera is switched off

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    try:
        yield f"rtsp://127.0.0.1:{listener.getsockname()[1]}/live"
    finally:
        listener.close()
        thread.join(10)
