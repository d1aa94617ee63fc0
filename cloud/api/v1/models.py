"""The signed repository, as files: what vehicles fetch. Nothing here is trusted by them but the bytes' signatures.

Only names that the repository can have are looked for, so that no path leaves it. A file with a version or a hash in
its name never changes, and may be kept by any cache; timestamp.json is asked for again each time. One range of bytes is
answered (RFC 9110 14.2), so that a vehicle goes on where its link broke.
"""

import re
from email.utils import formatdate
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse

from cloud.api.endpoint import NOT_FOUND, WRONG, Running, only_known_parameters, problem
from cloud.api.problems import ProblemError

METADATA = re.compile(r"metadata/(timestamp|[1-9][0-9]{0,9}\.(root|targets|snapshot))\.json", re.ASCII)
TARGET = re.compile(r"targets/bundles/[0-9a-f]{64}\.[A-Za-z0-9][A-Za-z0-9_.-]{0,150}\.tar", re.ASCII)
RANGE = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})", re.ASCII)
FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {"application/octet-stream": {}}},
    206: {"description": "The range that was asked for.", "content": {"application/octet-stream": {}}},
    304: {"description": "It is what If-None-Match names."},
    416: problem("The range lies behind the file's end; Content-Range says its length."),
    **NOT_FOUND,
}

router = APIRouter(dependencies=[Depends(only_known_parameters)], responses=WRONG, tags=["models"])


@router.head("/v1/models/repository/{path:path}", include_in_schema=False, response_class=Response)
@router.get(
    "/v1/models/repository/{path:path}", summary="A file of the signed repository", response_class=Response,
    responses=ANSWERS,
)  # fmt: skip
async def repository_file(
    running: Running,
    request: Request,
    path: Annotated[
        str,
        PathParameter(
            max_length=300, examples=["metadata/timestamp.json"], description="As TUF names it (consistent snapshots)."
        ),
    ],
) -> Response:
    """Serve metadata and releases as TUF's clients ask for them, whole or one range of bytes."""
    folder = running.settings.models
    if folder is None:
        raise ProblemError(404, "this server has no repository of releases; start it with --models DIR")
    if not (METADATA.fullmatch(path) or TARGET.fullmatch(path)):
        raise _absent(path)
    file = folder / path
    try:
        stat = file.stat()
    except OSError as error:
        raise _absent(path) from error
    # a file is replaced by one rename, so that its inode tells two versions of the same second apart
    etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"'
    headers = {
        "ETag": etag, "Last-Modified": formatdate(stat.st_mtime, usegmt=True), "Accept-Ranges": "bytes",
        "Cache-Control": ASK_AGAIN if path == "metadata/timestamp.json" else FOREVER,
        "X-Content-Type-Options": "nosniff",
    }  # fmt: skip
    if etag in [given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    _check_range(request, stat.st_size, etag)
    return FileResponse(_readable(file, path), headers=headers, media_type=_media_type(path), stat_result=stat)


def _check_range(request: Request, size: int, etag: str) -> None:
    """Leave to the file's answer only a range that it can satisfy; any other is ignored, or a 416."""
    asked = request.headers.get("range")
    if asked is None:
        return
    match = RANGE.fullmatch(asked.strip())
    usable = match is not None and (match[1] or match[2]) and request.headers.get("if-range", etag) == etag
    if usable and match is not None:
        first, last = match[1], match[2]
        if first and last and int(first) > int(last):
            usable = False
        elif (first and int(first) >= size) or (not first and int(last) == 0):
            detail = f"range {asked[:60]!a} lies behind the end: the file has {size} bytes"
            raise ProblemError(416, detail, headers={"Content-Range": f"bytes */{size}"})
    if not usable:  # RFC 9110 14.2: a range that is not understood is as if it were not there
        request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]


def _readable(file: Path, path: str) -> Path:
    try:
        file.open("rb").close()
    except OSError as error:
        raise _absent(path) from error
    return file


def _media_type(path: str) -> str:
    return "application/json" if path.endswith(".json") else "application/x-tar"


def _absent(path: str) -> ProblemError:
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in path[:120])
    return ProblemError(404, f"the repository has no {shown}", headers={"Cache-Control": "no-store"})
