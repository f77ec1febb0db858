"""Google Cloud Storage in the memory of a test: the part of its JSON API that gcsfs and TensorStore use."""

import base64
import collections
import contextlib
import dataclasses
import datetime
import email
import email.policy
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"


@dataclasses.dataclass(frozen=True)
class Object:
    """One object: what is in it, and the number of its version."""

    data: bytes
    generation: int
    updated: str


class Refused(Exception):
    """An answer of the server that is an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass
class Storage:
    """What the server holds.

    Attributes:
      url: address of the server.
      objects: by name, in the one bucket that there is.
      denied: status and message with which requests are refused; of all, or of those that change something.
      written: number of uploads of each name.
    """

    url: str = ""
    objects: dict[str, Object] = dataclasses.field(default_factory=dict)
    denied: tuple[int, str] | None = None
    only_changes: bool = False
    written: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._versions = itertools.count(1)
        self.uploads: dict[str, dict[str, Any]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process uses this server in place of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
        }

    def folder(self, prefix: str) -> dict[str, bytes]:
        """Contents of the objects below a folder, by their names there."""
        with self._lock:
            found = {name: kept.data for name, kept in self.objects.items() if name.startswith(f"{prefix}/")}
        return {name.removeprefix(f"{prefix}/"): data for name, data in found.items()}

    def put(self, name: str, data: bytes, expected: str | None = None) -> dict[str, Any]:
        """Writes an object, if the version that is there is the expected one (0: none)."""
        with self._lock:
            self._check(name, expected)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self.objects[name] = Object(data, next(self._versions), now)
            self.written[name] += 1
        return self.describe(name)

    def get(self, name: str) -> Object:
        """An object; refused with 404 if it is missing."""
        with self._lock:
            if name not in self.objects:
                raise Refused(404, f"No such object: {BUCKET}/{name}")
            return self.objects[name]

    def delete(self, name: str, expected: str | None = None) -> None:
        """Removes an object."""
        self.get(name)
        with self._lock:
            self._check(name, expected)
            self.objects.pop(name, None)

    def _check(self, name: str, expected: str | None) -> None:
        here = self.objects[name].generation if name in self.objects else 0
        if expected is not None and int(expected) != here:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def describe(self, name: str) -> dict[str, Any]:
        """The resource of an object."""
        found = self.get(name)
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{found.generation}",
            "name": name,
            "bucket": BUCKET,
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.data)),
            "updated": found.updated,
            "timeCreated": found.updated,
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(found.data).digest()).decode(),
        }

    def list(self, prefix: str, delimiter: str, start: str, end: str, most: int, token: str) -> dict[str, Any]:
        """A page of objects, and of the folders that stand for objects below them."""
        with self._lock:
            names = sorted(name for name in self.objects if name.startswith(prefix) and name >= start)
        rows: dict[str, bool] = {}
        for name in names:
            if end and name >= end:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            rows[prefix + head + delimiter if found else name] = bool(found)
        page = [row for row in sorted(rows) if row > token]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if len(page) > most:
            answer["nextPageToken"] = page[most - 1]
        page = page[:most]
        with contextlib.suppress(Refused):
            answer["items"] = [self.describe(row) for row in page if not rows[row]]
        answer["prefixes"] = [row for row in page if rows[row]]
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: Storage

    def log_message(self, *arguments: object) -> None:
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        body = self._body()
        try:
            denied = self.storage.denied
            if denied and (self.command != "GET" or not self.storage.only_changes):
                raise Refused(*denied)
            self._route(address.path, query, body)
        except Refused as error:
            self._json({"error": {"code": error.status, "message": error.message}}, error.status)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if match is None:
            raise Refused(404, f"no such address: {path}")
        kind, bucket, name = match[1], match[2], match[3]
        if bucket != BUCKET:
            raise Refused(404, "The specified bucket does not exist.")
        if kind == "/upload":
            self._upload(query, body)
        elif name is None and not path.endswith("/o"):
            self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif name is None:
            first, last = query.get("startOffset", ""), query.get("endOffset", "")
            most = int(query.get("maxResults") or 1000)
            delimiter, token = query.get("delimiter", ""), query.get("pageToken", "")
            self._json(self.storage.list(query.get("prefix", ""), delimiter, first, last, most, token))
        elif copied := re.fullmatch(r"(.+)/(rewrite|copy|move)To(?:/b/[^/]+)?/o/(.+)", name):
            source = unquote(copied[1])
            resource = self.storage.put(unquote(copied[3]), self.storage.get(source).data)
            if copied[2] == "move":
                self.storage.delete(source)
            rewritten = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
            self._json(rewritten if copied[2] == "rewrite" else resource)
        elif self.command == "DELETE":
            self.storage.delete(unquote(name), query.get("ifGenerationMatch"))
            self._send(204, b"", {})
        elif query.get("alt") == "media" or kind == "/download":
            self._media(unquote(name), query)
        else:
            self._json(self.storage.describe(unquote(name)))

    def _media(self, name: str, query: dict[str, str]) -> None:
        found = self.storage.get(name)
        unchanged = query.get("ifGenerationNotMatch")
        if unchanged is not None and int(unchanged) == found.generation:
            return self._send(304, b"", {})
        expected = query.get("ifGenerationMatch", query.get("generation"))
        if expected is not None and int(expected) != found.generation:
            raise Refused(412, "precondition")
        headers = {
            "x-goog-generation": str(found.generation),
            "Content-Type": "application/octet-stream",
            "x-goog-stored-content-length": str(len(found.data)),
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, found.data, headers)
        size = len(found.data)
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
        if start >= size:
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self._send(206, found.data[start:stop], headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        kind, expected = query.get("uploadType"), query.get("ifGenerationMatch")
        if kind == "media":
            self._json(self.storage.put(query["name"], body, expected))
        elif kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = list(email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts())
            name = query.get("name") or json.loads(parts[0].get_payload(decode=True))["name"]
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary is not None
            # As bytes: the parser would change line ends.
            raw = body.split(f"--{boundary[1]}".encode())[2]
            data = re.split(rb"\r?\n\r?\n", raw, maxsplit=1)[1]
            self._json(self.storage.put(name, re.sub(rb"\r?\n$", b"", data), expected))
        elif "upload_id" not in query:
            number = str(len(self.storage.uploads))
            name = query.get("name") or json.loads(body)["name"]
            self.storage.uploads[number] = {"name": name, "expected": expected, "data": b""}
            place = f"{self.storage.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            self._send(200, b"", {"Location": place + f"&name={quote(name, safe='')}"})
        else:
            upload = self.storage.uploads[query["upload_id"]]
            upload["data"] += body
            size = (self.headers.get("Content-Range") or "*").rpartition("/")[2]
            if size != "*" and len(upload["data"]) >= int(size):
                self._json(self.storage.put(upload["name"], upload["data"], upload["expected"]))
            else:
                self._send(308, b"", {"Range": f"bytes=0-{len(upload['data']) - 1}"})

    def _json(self, data: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def storage_server() -> Iterator[Storage]:
    """Serves an empty bucket named `bucket` until the block ends."""
    storage = Storage()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"storage": storage}))
    server.daemon_threads = True
    # A client that has read enough hangs up.
    server.handle_error = lambda *connection: None  # type: ignore[method-assign]
    storage.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield storage
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
