"""The HTTP face of the job server: OpenAI-shaped `/v1/videos` over the durable job store.

Stateless: everything it knows is in the store and the job's files. Errors are
`application/problem+json` (RFC 9457). A job is acknowledged when its files and its row are on disk.
"""

import asyncio
import hmac
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from inference.engine_factory import names_a_path
from inference.outputs import sync
from inference.requests import AnimationOptions, RequestError
from inference.serving.job import IdempotencyError, Job, new_job_id
from inference.serving.jobs import JobStore
from inference.serving.uploads import Upload, UploadError, UploadLimits, check_media
from inference.serving.wire import (
    UPLOAD_FORM,
    DeletedVideo,
    Health,
    Problem,
    Video,
    VideoPage,
    video_object,
)
from inference.serving.worker import JobFiles

MAX_KEY_LENGTH = 255
RETRY_SECONDS = 30

log = logging.getLogger(__name__)


def create_app(
    files: JobFiles,
    store: JobStore,
    *,
    limits: UploadLimits,
    max_queued: int,
    api_key: str | None = None,
    local_only: bool = True,
    preset: str | None = None,
    changes: Sequence[str] = (),
) -> FastAPI:
    """The application; `local_only` refuses what a web page of another site can send.

    Args:
        preset, changes: by which the engines animate, to be told to those who ask.
    """
    told = [change for change in changes if not names_a_path(change)]
    guards = [Depends(_key_check(api_key))] if api_key else []
    if local_only and not api_key:
        guards = [Depends(_refuse_foreign_pages)]
    app = FastAPI(
        title="animator",
        summary="Animate the person of an image by the motion of a video.",
        responses={code: {"model": Problem} for code in ("4XX", "5XX")},
    )
    _answer_problems(app)
    receiving: set[str] = set()

    @app.get("/healthz")
    def healthz() -> Health:
        counts = store.counts()
        return Health(
            queued=counts["queued"],
            in_progress=counts["in_progress"],
            preset=preset,
            changes=told,
        )

    @app.post("/v1/videos", status_code=201, dependencies=guards, openapi_extra=UPLOAD_FORM)
    async def create_video(request: Request) -> Video:
        """Queue a job; answered when it is on disk. `Idempotency-Key` makes it safe to repeat."""
        key = _idempotency_key(request)
        _admit(request, store, limits, max_queued, len(receiving))
        job_id = new_job_id()
        folder = files.incoming / job_id
        folder.mkdir(mode=0o700)
        receiving.add(job_id)
        try:
            upload = Upload(request.headers.get("content-type", ""), folder, limits)
            async with asyncio.timeout(limits.seconds):
                await upload.receive(request.stream())
            options = AnimationOptions.from_text(upload.fields)
            job, created = await asyncio.to_thread(
                _commit, files, store, upload, options, limits, key
            )
        except TimeoutError:
            raise UploadError(408, f"the upload took longer than {limits.seconds:g} s") from None
        except ClientDisconnect:
            raise UploadError(400, "the upload was broken off") from None
        finally:
            receiving.discard(job_id)
            shutil.rmtree(folder, ignore_errors=True)
        status = 201 if created else 200
        return _reply(job, status)  # pyright: ignore[reportReturnType]

    @app.get("/v1/videos", dependencies=guards)
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoPage:
        start = _found(store, after) if after else None
        jobs = store.page(limit=limit + 1, after=start, ascending=order == "asc")
        data = [video_object(job) for job in jobs[:limit]]
        return VideoPage(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(jobs) > limit,
        )

    @app.get("/v1/videos/{video_id}", dependencies=guards)
    def get_video(video_id: str) -> Video:
        return video_object(_found(store, video_id))

    @app.get(
        "/v1/videos/{video_id}/content",
        dependencies=guards,
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": {}}}},
    )
    def get_content(video_id: str) -> FileResponse:
        job = _found(store, video_id)
        if job.status != "completed":
            raise HTTPException(409, f"the video is {job.status}; its content is not there")
        path = files.video(job.id)
        if not path.is_file():
            raise HTTPException(410, "the video was completed, but its file was removed")
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")

    @app.delete("/v1/videos/{video_id}", dependencies=guards)
    def delete_video(video_id: str) -> DeletedVideo:
        """Remove a job and its files; a running one stops before its next step."""
        if not store.delete(video_id):
            raise HTTPException(404, f"no video {video_id[:60]!r}")
        files.remove(video_id)
        return DeletedVideo(id=video_id)

    return app


def _admit(
    request: Request, store: JobStore, limits: UploadLimits, max_queued: int, num_receiving: int
) -> None:
    """Refuse before the body is read: bodies in flight are held in memory by Ray's proxy."""
    later = {"Retry-After": str(RETRY_SECONDS)}
    if store.counts()["queued"] >= max_queued:
        raise HTTPException(429, f"{max_queued} jobs are waiting already; try again later", later)
    if num_receiving >= limits.at_once:
        raise HTTPException(429, f"{num_receiving} uploads are under way; try again later", later)
    if int(request.headers.get("content-length") or 0) > limits.body_bytes:
        raise HTTPException(
            413, f"the body is larger than {limits.body_bytes} bytes; send smaller files"
        )


def _commit(
    files: JobFiles,
    store: JobStore,
    upload: Upload,
    options: AnimationOptions,
    limits: UploadLimits,
    key: str | None,
) -> tuple[Job, bool]:
    """Check the files, bring them to their place and commit the row; all of it is then on disk."""
    check_media(upload.folder, limits)
    job_id = upload.folder.name
    home = files.uploads / job_id
    os.replace(upload.folder, home)
    sync(files.uploads)
    fingerprint = upload.fingerprint(json.dumps(asdict(options), sort_keys=True))
    created = False
    try:
        job, created = store.create(job_id, options, fingerprint, key)
    finally:
        if not created:
            shutil.rmtree(home, ignore_errors=True)
    return job, created


def _found(store: JobStore, video_id: str) -> Job:
    job = store.get(video_id)
    if job is None:
        raise HTTPException(404, f"no video {video_id[:60]!r}")
    return job


def _reply(job: Job, status: int) -> JSONResponse:
    return JSONResponse(
        video_object(job).model_dump(), status, headers={"Location": f"/v1/videos/{job.id}"}
    )


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
        raise HTTPException(
            400, f"Idempotency-Key has {len(key)} characters, expected 1 to {MAX_KEY_LENGTH}"
        )
    return key


def _key_check(api_key: str):
    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise HTTPException(
                401,
                "no valid API key; send 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _refuse_foreign_pages(request: Request) -> None:
    """Without a key, a browser on this machine must not be a way in for pages of other sites.

    A foreign page shows in Origin; a name rebound to 127.0.0.1 shows in Host.
    """
    local = {"127.0.0.1", "localhost", "::1"}
    origin = request.headers.get("origin")
    try:
        hosts = [urlsplit(f"//{request.headers.get('host', '')}").hostname]
        if origin is not None:
            hosts.append(urlsplit(origin).hostname)
    except ValueError:
        hosts = [None]
    if not local.issuperset(hosts):
        raise HTTPException(403, "this server answers programs on its own machine only")


def _answer_problems(app: FastAPI) -> None:
    """Every error leaves as a problem document."""

    def problem(status: int, detail: str, headers: Any = None) -> JSONResponse:
        body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
        return JSONResponse(
            body.model_dump(), status, headers=headers, media_type="application/problem+json"
        )

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(UploadError)
    async def upload(_: Request, error: UploadError) -> JSONResponse:
        return problem(error.status, str(error))

    @app.exception_handler(RequestError)
    @app.exception_handler(IdempotencyError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return problem(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        parts = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
        return problem(422, "; ".join(parts))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        log.error("request failed", exc_info=error)
        return problem(500, "the server failed on this request; its log says why")
