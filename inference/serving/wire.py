"""What travels over HTTP: the video object of OpenAI's API, its lists, and problem documents."""

from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel

from inference.serving.job import Job


class VideoFailure(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job, in the shape of OpenAI's video object; times are Unix seconds, progress 0 to 100."""

    id: str
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    stage: str
    created_at: int
    completed_at: int | None
    error: VideoFailure | None
    seed: int
    steps: int | None
    guidance: float | None
    reference_face: int


class VideoPage(BaseModel):
    """A page of jobs, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    """The server answers and its store can be read; and by which settings it animates.

    `preset` is null and `changes` empty where those are the model's own. Changes that give paths of
    files on the server are left out, as anybody may ask.
    """

    status: Literal["ok"] = "ok"
    queued: int
    in_progress: int
    preset: str | None
    changes: list[str]


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "video"],
                    "properties": {
                        "image": {
                            "type": "string",
                            "format": "binary",
                            "description": "The person: JPEG, PNG or WebP (also `input_reference`)",
                        },
                        "video": {
                            "type": "string",
                            "format": "binary",
                            "description": "The motion: mp4, mov, mkv, webm, avi",
                        },
                        "image_pose": {
                            "type": "string",
                            "format": "binary",
                            "description": "Keypoints of the image (.pose.npz)",
                        },
                        "video_pose": {
                            "type": "string",
                            "format": "binary",
                            "description": "Keypoints of the video (.pose.npz)",
                        },
                        "seed": {"type": "integer", "default": 0},
                        "steps": {"type": "integer"},
                        "guidance": {"type": "number"},
                        "reference_face": {
                            "type": "integer",
                            "default": 1,
                            "description": "Whom to animate; 1 is the largest face",
                        },
                    },
                }
            }
        },
    }
}


def video_object(job: Job) -> Video:
    """A job as clients see it."""
    error = None
    if job.error_code:
        error = VideoFailure(code=job.error_code, message=job.error_message or "")
    return Video.model_validate(
        {
            "id": job.id,
            "status": job.status,
            # 100 is kept for a video that can be fetched.
            "progress": 100 if job.status == "completed" else min(int(job.progress * 100), 99),
            "stage": job.stage,
            "created_at": int(job.created_at),
            "completed_at": int(job.completed_at) if job.completed_at else None,
            "error": error,
            **asdict(job.options),
        }
    )
