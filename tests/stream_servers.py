"""Run local servers of live streams for the tests of video: MJPEG over HTTP, MPEG-4 over RTSP, and files.

Each connection of a live server sends the images of the next entry of `connections` and is then closed. After the last
entry, or if an entry is None, the server accepts the connection and sends nothing.
"""

import http.server
import io
import socketserver
import struct
import threading
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

PAUSE = 0.01  # seconds between two images


class Server(socketserver.ThreadingTCPServer):
    """Runs in a thread inside a `with` block.

    Attributes:
        connections: The images of each connection, see above.
        sent: Set when all images were sent.
        requests: The number of connections so far.
    """

    allow_reuse_address = daemon_threads = True
    block_on_close = False
    scheme = "http"

    def __init__(self, handler: type, connections: Sequence[Any], password: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.connections, self.password = connections, password
        self.sent, self.over = threading.Event(), threading.Event()
        self.requests = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}/live"

    def next_images(self) -> Sequence[Image.Image]:
        """Return the images of a new connection. If there are none, wait for the end of the test first."""
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
        images = self.connections[number] if number < len(self.connections) else None
        if images is None:
            self.sent.set()
            self.over.wait(30)
            return []
        return images

    def note_end(self) -> None:
        if self.requests >= len(self.connections):
            self.sent.set()

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


class _MjpegHandler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        images = self.server.next_images()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=image")
        self.end_headers()
        for image in images:
            data = io.BytesIO()
            image.save(data, "JPEG", quality=95)
            head = f"--image\r\nContent-Type: image/jpeg\r\nContent-Length: {data.tell()}\r\n\r\n"
            self.wfile.write(head.encode() + data.getvalue() + b"\r\n")
            self.server.over.wait(PAUSE)
        self.server.note_end()

    def log_message(self, *_: object) -> None:
        pass


class _FileHandler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = self.server.connections[0]
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class _RtspHandler(socketserver.StreamRequestHandler):
    """RFC 2326 with RTP in the same TCP connection (its section 10.12), MPEG-4 Visual as in RFC 6416."""

    server: "Server"

    def handle(self) -> None:
        while request := self._read_request():
            method, headers = request
            if self.server.password is not None and "authorization" not in headers:
                self._answer(headers, 'WWW-Authenticate: Basic realm="camera"', status="401 Unauthorized")
            elif method == "DESCRIBE":
                self._answer(headers, "Content-Type: application/sdp", body=_SDP)
            elif method == "SETUP":
                self._answer(headers, "Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
            elif method == "PLAY":
                self._answer(headers, "Range: npt=0-")
                self._play(self.server.next_images())
                self.server.note_end()
                return
            else:
                self._answer(headers, "Public: DESCRIBE, SETUP, PLAY, TEARDOWN")

    def _read_request(self) -> tuple[str, dict[str, str]] | None:
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        if not lines:
            return None
        headers = dict(line.split(": ", 1) for line in lines[1:])
        return lines[0].split()[0], {name.lower(): value for name, value in headers.items()}

    def _answer(self, headers: dict[str, str], *fields: str, status: str = "200 OK", body: str = "") -> None:
        if self.server.password is not None and "authorization" in headers:
            status = "403 Forbidden"  # for any password
        lines = [
            f"RTSP/1.0 {status}",
            f"CSeq: {headers['cseq']}",
            "Session: 1",
            *fields,
            f"Content-Length: {len(body)}",
        ]
        self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())

    def _play(self, images: Sequence[Image.Image]) -> None:
        for number, data in enumerate(_mpeg4(images)):
            # Version 2, the last packet of its frame, type 96; a clock of 90 kHz at 25 frames/s.
            header = struct.pack("!BBHII", 0x80, 0x80 | 96, number, number * 3600, 1)
            self.wfile.write(struct.pack("!cBH", b"$", 0, len(header) + len(data)) + header + data)
            self.server.over.wait(PAUSE)


_SDP = "\r\n".join(
    [
        "v=0",
        "o=- 0 0 IN IP4 127.0.0.1",
        "s=test",
        "c=IN IP4 127.0.0.1",
        "t=0 0",
        "m=video 0 RTP/AVP 96",
        "a=rtpmap:96 MP4V-ES/90000",
        "a=control:track1",
        "",
    ]
)


def _mpeg4(images: Sequence[Image.Image]) -> list[bytes]:
    if not images:
        return []
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height = images[0].size
    encoder.pix_fmt, encoder.framerate = "yuv420p", 25
    encoder.options = {"qmin": "2", "qmax": "2"}
    frames = [av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24") for image in images]
    return [bytes(packet) for frame in [*frames, None] for packet in encoder.encode(frame)]


def serve_mjpeg(*connections: Sequence[Image.Image] | None) -> Server:
    return Server(_MjpegHandler, connections)


def serve_file(data: bytes) -> Server:
    return Server(_FileHandler, [data])


def serve_rtsp(*connections: Sequence[Image.Image] | None, password: str | None = None) -> Server:
    server = Server(_RtspHandler, connections, password)
    server.scheme = "rtsp"
    return server
