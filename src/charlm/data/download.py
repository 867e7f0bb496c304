"""Download a file with a known sha256. Downloads are resumable and verified, and a file appears only when it is complete."""

import http.client
import os
import re
import string
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from charlm.data.text import file_sha256
from charlm.system.errors import CorpusError
from charlm.system.locks import exclusive_lock
from charlm.system.progress import ByteProgress, say

# A connection that delivers nothing for this time is treated as broken.
_TIMEOUT_SECONDS = 30
_READ_BYTES = 1 << 16


def fetch(url: str, sha256: str, folder: Path) -> Path:
    """Return the path of the file in `folder`, and download it first if it is not there. Its name is its sha256.

    An interrupted download continues where it stopped, in the same call or in a later one, if the server supports HTTP ranges
    (RFC 9110). A file has its final name only after its sha256 was verified.

    Args:
        url: an http or https URL.
        sha256: 64 lower-case hexadecimal digits.
        folder: the folder of downloads. It is created if it does not exist.

    Raises:
        CorpusError: the download fails, the sha256 differs, or the folder cannot be written.
    """
    path, part = folder / sha256, folder / f"{sha256}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / f"{sha256}.lock", f"downloading {url}"):
            if path.exists():
                if file_sha256(path) == sha256:
                    return path
                say(f"the file {path} was changed after its download; downloading it again")
                path.unlink()
            resumed = part.exists()
            if not resumed or file_sha256(part) != sha256:
                _download(url, part)
            found = file_sha256(part)
            if found != sha256 and resumed:
                # The partial file may have come from another version of the file.
                part.unlink()
                _download(url, part)
                found = file_sha256(part)
            if found != sha256:
                part.unlink()
                raise CorpusError(
                    f"the download of {url} has the sha256 {found}, not {sha256}: it was altered or is another version, so it "
                    "was deleted; set data.path to a copy of the right file"
                )
            part.replace(path)
            return path
    except OSError as error:
        raise CorpusError(
            f"cannot write the download of {url} to {folder}: {error.strerror or error}; set CHARLM_CACHE to another folder"
        ) from None


def _download(url: str, part: Path) -> None:
    """Download the missing rest of the file `part`. Connect again as long as each connection makes progress."""
    last_size = part.stat().st_size if part.exists() else -1
    while True:
        try:
            _download_once(url, part)
            return
        except (urllib.error.URLError, http.client.HTTPException, ValueError, _ConnectionLost) as error:
            # The library raises ValueError for several kinds of invalid URLs.
            size = part.stat().st_size if part.exists() else 0
            if size <= last_size or not size or isinstance(error, urllib.error.HTTPError):
                reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"the server answered {error.code} {reason}"
                kept = f"; {size:,} bytes are kept, and the same command continues from there if the server can" if size else ""
                raise CorpusError(f"cannot download {url}: {reason}{kept}; or set data.path to a copy of the file") from None
            last_size = size


class _ConnectionLost(Exception):
    """The connection ended before the file was complete."""


def _download_once(url: str, part: Path) -> None:
    """Append the rest of the file to `part` over one connection. Start from byte 0 if the server does not support ranges."""
    done = part.stat().st_size if part.exists() else 0
    # Characters outside ASCII are quoted. Characters that are quoted already stay as they are.
    request = urllib.request.Request(
        urllib.parse.quote(url, safe=string.punctuation), headers={"User-Agent": "charlm", "Accept-Encoding": "identity"}
    )
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if done and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # The server has no more bytes. The sha256 will show whether the file is the right one.
        raise
    except urllib.error.URLError:
        raise
    except OSError as error:  # For example, the connection is reset before the server answers.
        raise _ConnectionLost(error) from None
    with response:
        continues = re.fullmatch(rf"bytes {done}-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if response.status != http.client.PARTIAL_CONTENT or not continues:
            done = 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        with open(part, "ab" if done else "wb") as file, ByteProgress(f"downloading {url}", total, done) as progress:
            while data := _read(response):
                file.write(data)
                progress.advance(len(data))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() < total:
                raise _ConnectionLost(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    """Return the next bytes of a response. Raises _ConnectionLost for every error of the transport."""
    try:
        return response.read1(_READ_BYTES)
    except OSError as error:  # Translated here, so an OSError in the caller is always an error of the disk.
        raise _ConnectionLost(error) from None
