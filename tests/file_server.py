"""A web server on this machine that gives files by parts, and can be told to fail."""
import contextlib
import dataclasses
import hashlib
import http.server
import re
import threading


@dataclasses.dataclass
class File:
    content: bytes
    etag: str | None = None    # None: of the content; '' for none
    modified: str = ''
    kind: str = 'application/octet-stream'

    def headers(self):
        etag = f'"{hashlib.md5(self.content).hexdigest()}"' if self.etag is None else self.etag
        return {key: value for key, value in (('ETag', etag), ('Last-Modified', self.modified)) if value}


@dataclasses.dataclass
class Fault:
    """What goes wrong with one request.

    Args:
        status: Answer this and nothing else.
        headers: Of the answer; None takes one away.
        stop: Bytes of the body that are sent before the connection ends.
        more: Bytes that are sent after the body.
        no_range: The whole file, whatever part was asked for.
        careless: The part that was asked for, whatever has become of the file.
        chunked: Without a length.
        hold: An event to wait for after `stop` bytes.
    """
    status: int = 0
    headers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    stop: int | None = None
    more: bytes = b''
    no_range: bool = False
    careless: bool = False
    chunked: bool = False
    hold: threading.Event | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_GET(self):
        state = self.server.state
        state.requests.append((self.command, self.path, dict(self.headers)))
        fault = state.faults.pop(0) if state.faults else state.always or Fault()
        file = state.files.get(self.path)
        if fault.status or file is None:
            self.answer(fault.status or 404, b'', {'Content-Length': '0', **fault.headers}, Fault())
            return
        body, status, headers = file.content, 200, {'Content-Type': file.kind, **file.headers()}
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        same = fault.careless or self.headers.get('If-Range') in (None, *file.headers().values())
        if asked and same and not fault.no_range:
            start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            if start >= len(body):
                self.answer(416, b'', {'Content-Length': '0'}, Fault())
                return
            headers['Content-Range'] = f'bytes {start}-{end}/{len(body)}'
            body, status = body[start:end + 1], 206
        headers |= {'Transfer-Encoding': 'chunked'} if fault.chunked else {'Content-Length': str(len(body))}
        self.answer(status, body, headers | fault.headers, fault)

    do_HEAD = do_GET

    def answer(self, status, body, headers, fault):
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == 'HEAD':
                return
            if fault.chunked:
                self.wfile.write(b'%x\r\n' % len(body))
            self.wfile.write((body + fault.more) if fault.stop is None else body[:fault.stop])
            if fault.chunked and fault.stop is None:
                self.wfile.write(b'\r\n0\r\n\r\n')
            if fault.hold:
                self.wfile.flush()
                fault.hold.wait(60)


class FileServer:
    """The state and the thread. `faults` happen one a request; `always` to each after them."""

    def __init__(self, handler=Handler):
        self.files, self.faults, self.always, self.requests = {}, [], None, []
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.state = self
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.02})
        self.thread.start()

    def put(self, path, content, **facts):
        """Serve a file; returns its URL."""
        self.files[path] = File(content, **facts)
        return self.address + path

    @property
    def ranges(self):
        """The part that each request asked for, None for all."""
        return [headers.get('Range') for _, _, headers in self.requests]

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextlib.contextmanager
def run_file_server(handler=Handler):
    running = FileServer(handler)
    try:
        yield running
    finally:
        running.close()
