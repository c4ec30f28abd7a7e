"""What ``polydecode up`` reads: one YAML file a deployment."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Port = Annotated[int, Field(ge=1, le=65535)]


class DeploymentError(Exception):
    """A deployment that cannot be started; the message is one readable line."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ControllerSection(_Section):
    host: str = "127.0.0.1"
    port: Port = 21001
    dispatch_method: Literal["shortest_queue", "lottery"] = "shortest_queue"


class PageSection(_Section):
    host: str = "127.0.0.1"
    port: Port = 7860


class WorkerSection(_Section):
    """One model: a worker on each GPU of ``gpus`` (default: all that are visible), or one on the CPU."""

    model: str
    methods: Annotated[list[str], Field(min_length=1)] = ["vanilla"]
    gpus: list[int] | None = None
    options: list[str] = []


class Deployment(_Section):
    """A whole deployment on one machine."""

    controller: ControllerSection = ControllerSection()
    page: PageSection = PageSection()
    worker_port: Port = 21002
    workers: Annotated[list[WorkerSection], Field(min_length=1)]


def load_deployment(name: str) -> Deployment:
    """Read the YAML file ``name``, or the packaged file of that name.

    Raises:
        DeploymentError: no such file, no YAML, unknown keys or wrong values.
    """
    text = _read(name)
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DeploymentError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Deployment.model_validate({} if content is None else content)
    except ValidationError as error:
        raise DeploymentError(f"{name}: {_readable(error)}") from None


def _read(name: str) -> str:
    packaged = files("configs") / f"{name}.yaml"
    path = Path(name)
    try:
        if path.is_file() or path.suffix or not packaged.is_file():
            return path.read_text("utf-8")
        return packaged.read_text("utf-8")
    except FileNotFoundError:
        known = sorted(entry.name.removesuffix(".yaml") for entry in files("configs").iterdir() if _is_yaml(entry.name))
        raise DeploymentError(f"no file {name!r}; polydecode brings: {', '.join(known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"cannot read {name}: {error}") from None


def _is_yaml(name: str) -> bool:
    return name.endswith(".yaml")


def _readable(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "file"
    return f"{where}: {'unknown key' if first['type'] == 'extra_forbidden' else first['msg'].lower()}"
