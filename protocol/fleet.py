"""Messages between controller and workers: FastChat's, with more keys from workers of our own."""

import math
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from protocol.wire import Wire


def _usable_speed(speed: float) -> float:
    return speed if math.isfinite(speed) and speed > 0 else 1.0


class WorkerStatus(Wire):
    """Answer of ``/worker_get_status`` and part of a registration. FastChat's workers send the first three keys."""

    model_names: list[str]
    speed: Annotated[float, AfterValidator(_usable_speed)] = 1  # relative; what is no speed counts as 1
    queue_length: int = 0
    running: int | None = None
    last_progress_s: float | None = None  # seconds since the engine's last step; None while it is idle
    incarnation: str | None = None  # new at every start of the worker; set by our own workers only
    methods: list[str] = []
    heart_beat_s: float | None = None  # how often this worker beats
    draining: bool = False


class RegisterWorker(Wire):
    """Body of ``/register_worker``."""

    worker_name: str
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None
    multimodal: bool = False


class HeartBeat(Wire):
    """Body of ``/receive_heart_beat``; the answer is :class:`HeartBeatReply`."""

    worker_name: str
    queue_length: int
    running: int | None = None
    last_progress_s: float | None = None
    incarnation: str | None = None
    methods: list[str] = []
    draining: bool = False


class HeartBeatReply(Wire):
    """``exist`` false asks the worker to register again."""

    exist: bool


class UnregisterWorker(Wire):
    """Body of ``/unregister_worker``: the worker leaves; it takes no new request from now on."""

    worker_name: str


class ModelQuery(Wire):
    """Body of ``/get_worker_address``, ``/get_worker_count`` and other calls that name a model."""

    model: str | None = None
    prompt: str | None = None


class ConvTemplate(Wire):
    """FastChat's conversation template. ``sep_style`` is one of 1 to 7, on which all its versions agree."""

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: list[str] = ["USER", "ASSISTANT"]
    messages: list[list[str | None]] = []
    offset: int = 0
    sep_style: int
    sep: str = "\n"
    sep2: str | None = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None


class LatencyTable(Wire):
    """What a forward pass costs: ``ms[i][j]`` with ``contexts[i]`` rows of KV and ``rows[j]`` rows in the pass."""

    device: str
    dtype: str
    contexts: list[int]
    rows: list[int]
    ms: list[list[float]]


class ModelDetails(Wire):
    """Answer of ``/model_details``."""

    context_length: int
    methods: list[str] = []
    memory: dict[str, int] = {}  # bytes by use: weights, packed copies, kv, and each kind of adapter
    curve: LatencyTable | None = None  # None until it is measured
    pace: dict[str, float] = {}  # method → its speed over vanilla's in what it served so far; below 1 it is slower


class EmbeddingsParams(Wire):
    """Body of ``/worker_get_embeddings``."""

    model: str | None = None
    input: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    encoding_format: str | None = None


class WorkerTraceParams(Wire):
    """Body of APAR's ``/worker_trace``: prompts that already carry their template."""

    model: str | None = None
    prompts: str | list[str]
    max_length: Annotated[int, Field(gt=0)] = 2048
    max_batch_size: Annotated[int, Field(gt=0)] = 32
    max_depth: Annotated[int, Field(gt=0)] = 2


class FleetWorker(Wire):
    """One worker as ``/fleet`` shows it."""

    name: str
    models: list[str]
    methods: list[str] = []
    health: str  # ok, suspect, draining or stalled; only an ok worker is chosen
    load: int  # requests on it: in flight, external at its last report, addresses handed out since
    in_flight: int  # those that came through this controller
    queue_length: int  # as last reported
    running: int | None = None
    speed: float
    own: bool  # one of polydecode's workers, not FastChat's
    multimodal: bool = False
    last_beat_s: float  # seconds since its last sign of life


class Fleet(Wire):
    """Answer of ``/fleet``: every worker of the controller's table."""

    dispatch_method: str
    workers: list[FleetWorker]
