"""An HTTP server on this machine, for the tests of downloads."""

import http.server
import re
import threading


class Server:
    """An HTTP server for one file. It can cut the file short, alter it, support ranges or not, or answer with an error."""

    def __init__(self, body: bytes):
        self.body, self.ranges, self.status, self.cuts, self.requests, self.length = body, True, 200, [], [], True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.headers.get("Range"))
                body, status = server.body, server.status
                found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if found and server.ranges and status == 200:
                    first = int(found[1])
                    status = 206 if first < len(body) else 416
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
                    body = body[first:]
                if server.length:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/text.txt"

    def close(self):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
