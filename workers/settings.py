"""Settings that come from the environment, under FastChat's names."""

from pydantic import Field
from pydantic_settings import BaseSettings


class WorkerSettings(BaseSettings):
    """Times in seconds."""

    heart_beat_s: float = Field(default=5.0, gt=0, validation_alias="FASTCHAT_WORKER_HEART_BEAT_INTERVAL")
    drain_s: int = Field(default=30, ge=0, validation_alias="POLYDECODE_DRAIN_SECONDS")
