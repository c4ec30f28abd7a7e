"""What a controller can be told, by command line or environment."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class DispatchMethod(StrEnum):
    """How the next worker is chosen."""

    LOTTERY = "lottery"
    SHORTEST_QUEUE = "shortest_queue"


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """All times in seconds. Environment: ``POLYDECODE_CONTROLLER_<NAME>``, and FastChat's two variables."""

    model_config = SettingsConfigDict(env_prefix="POLYDECODE_CONTROLLER_", populate_by_name=True)

    host: str = "127.0.0.1"
    port: int = 21001
    dispatch_method: DispatchMethod = DispatchMethod.SHORTEST_QUEUE
    state_file: Path | None = None  # None: in the user's cache folder, one file a port
    heart_beat_expiration_s: Seconds = Field(  # for workers that do not announce how often they beat
        90, validation_alias="FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION"
    )
    worker_api_timeout_s: Seconds = Field(  # longest silence of a worker inside an answer
        100, validation_alias="FASTCHAT_WORKER_API_TIMEOUT"
    )
    connect_timeout_s: Seconds = 5
    poll_timeout_s: Seconds = 5  # for a worker's /worker_get_status
    check_interval_s: Seconds = 1  # between looks for late and unreachable workers
    stall_s: Seconds = 120  # a worker that runs requests without a step for so long is not chosen
    address_lease_s: Seconds = 15  # how long an address handed out counts as load without a report of the worker

    @property
    def snapshot_path(self) -> Path:
        """Where the table of workers is kept between runs."""
        if self.state_file is not None:
            return self.state_file
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "polydecode" / f"controller-{self.port}.json"
