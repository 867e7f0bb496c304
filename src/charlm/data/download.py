"""Fetch a file whose sha256 is known: resumable, checked, and in place whole or not at all."""

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
from charlm.system.locks import exclusive
from charlm.system.progress import ByteProgress, say

# Seconds without a byte after which a connection counts as broken.
_TIMEOUT = 30
_READ = 1 << 16


def fetch(url: str, sha256: str, folder: Path) -> Path:
    """The file at `url`, from `folder` if it is there, else downloaded into it under the name of its sha256.

    A download that breaks off is taken up where it stopped, by the same call or a later one, if the server can (HTTP
    ranges, RFC 9110). Nothing but the file with that sha256 ever bears its name.

    Args:
        url: http or https.
        sha256: 64 lower-case hexadecimal digits.

    Raises:
        CorpusError: no network, an HTTP error, a broken download, another sha256, or a disk that cannot be written.
    """
    path, part = folder / sha256, folder / f"{sha256}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{sha256}.lock", f"downloading {url}"):
            if path.exists():
                if file_sha256(path) == sha256:
                    return path
                say(f"the download {path} was altered since; fetching it again")
                path.unlink()
            resumed = part.exists()
            if not resumed or file_sha256(part) != sha256:
                _complete(url, part)
            found = file_sha256(part)
            if found != sha256 and resumed:
                # What lay there may have been of another version of the file.
                part.unlink()
                _complete(url, part)
                found = file_sha256(part)
            if found != sha256:
                part.unlink()
                raise CorpusError(
                    f"the download of {url} has the sha256 {found}, not {sha256}: it was altered or is another version; "
                    "nothing of it is kept"
                )
            part.replace(path)
            return path
    except OSError as error:
        raise CorpusError(
            f"cannot keep the download of {url} in {folder}: {error.strerror or error}; CHARLM_CACHE names another folder"
        ) from None


def _complete(url: str, part: Path) -> None:
    """Download what is missing of `part`, in as many attempts as each bring something new."""
    most = part.stat().st_size if part.exists() else -1
    while True:
        try:
            _attempt(url, part)
            return
        except (urllib.error.URLError, http.client.HTTPException, ValueError, _ConnectionLost) as error:
            # ValueError: a URL that cannot be one, in all the ways that the library finds out.
            size = part.stat().st_size if part.exists() else 0
            if size <= most or not size or isinstance(error, urllib.error.HTTPError):
                reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"the server answered {error.code} {reason}"
                kept = f"; {size:,} bytes are kept, and the same command goes on from there if the server can" if size else ""
                raise CorpusError(f"cannot download {url}: {reason}{kept}; or set data.path to a copy of the file") from None
            most = size


class _ConnectionLost(Exception):
    """The connection ended before the file did."""


def _attempt(url: str, part: Path) -> None:
    """One connection: append the rest of the file to `part`, or begin anew where the server cannot go on."""
    done = part.stat().st_size if part.exists() else 0
    # What is not ASCII is quoted; what is quoted already stays.
    request = urllib.request.Request(
        urllib.parse.quote(url, safe=string.punctuation), headers={"User-Agent": "charlm", "Accept-Encoding": "identity"}
    )
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if done and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # There is nothing after what is there; its sha256 will tell whether that is the file.
        raise
    except urllib.error.URLError:
        raise
    except OSError as error:  # A connection that is reset before it answers, say.
        raise _ConnectionLost(error) from None
    with response:
        goes_on = re.fullmatch(rf"bytes {done}-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if response.status != http.client.PARTIAL_CONTENT or not goes_on:
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
    try:
        return response.read1(_READ)
    except OSError as error:  # Whatever the transport makes of it; an error of the disk is another matter.
        raise _ConnectionLost(error) from None
