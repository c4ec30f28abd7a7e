"""``polydecode up``: controller, workers and page on one machine, as children of one supervisor."""

import asyncio
import socket
import sys

from rich.console import Console
from rich.text import Text

from polydecode.child import ChildSpec
from polydecode.deployment import Deployment, DeploymentError, WorkerSection, load_deployment
from polydecode.gpus import visible_gpus
from polydecode.supervisor import SELF, Supervisor

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
_LOCAL = "127.0.0.1"


def run(name: str) -> int:
    """Start the deployment ``name`` and stay until it is stopped; the exit status."""
    try:
        deployment = load_deployment(name)
        placed = place_workers(deployment)
        check_ports(deployment, len(placed))
    except DeploymentError as error:
        print(f"polydecode: {error}", file=sys.stderr)
        return 2
    output = Output()
    url = f"http://{reachable(deployment.page.host)}:{deployment.page.port}"
    supervisor = Supervisor(children(deployment, placed), output.say)
    return asyncio.run(supervisor.run(lambda: output.say(SELF, f"ready: {url}  (Ctrl-C stops all)")))


def place_workers(deployment: Deployment) -> list[tuple[WorkerSection, str | None]]:
    """Which workers run on which GPU: (section, value of CUDA_VISIBLE_DEVICES), the value None for the CPU.

    Raises:
        DeploymentError: a section asks for a GPU that is not there.
    """
    visible = visible_gpus()
    placed: list[tuple[WorkerSection, str | None]] = []
    for section in deployment.workers:
        wanted = range(len(visible)) if section.gpus is None else section.gpus
        for gpu in wanted:
            if not 0 <= gpu < len(visible):
                raise DeploymentError(f"no GPU {gpu} for {section.model}: {len(visible)} visible")
        placed += [(section, visible[gpu]) for gpu in wanted] or [(section, None)]
    return placed


def check_ports(deployment: Deployment, workers: int) -> None:
    """DeploymentError unless every port that is needed is free, and needed once."""
    wanted = [
        ("controller.port", deployment.controller.host, deployment.controller.port),
        ("page.port", deployment.page.host, deployment.page.port),
        *(("worker_port", _LOCAL, deployment.worker_port + index) for index in range(workers)),
    ]
    taken: set[int] = set()
    for key, host, port in wanted:
        if port in taken:
            raise DeploymentError(f"port {port} is wanted twice: change {key}")
        taken.add(port)
        if reason := _cannot_listen(host, port):
            raise DeploymentError(f"cannot listen on {host}:{port} ({reason}): change {key}, or stop what uses it")


def _cannot_listen(host: str, port: int) -> str | None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        return str(getattr(error, "strerror", None) or error).lower()
    return None


def children(deployment: Deployment, placed: list[tuple[WorkerSection, str | None]]) -> list[ChildSpec]:
    """The processes of a deployment. No order among them: workers and page wait for the controller by themselves."""
    controller = deployment.controller
    controller_url = f"http://{reachable(controller.host)}:{controller.port}"
    command = _module("controller", host=controller.host, port=controller.port)
    command += ["--dispatch-method", controller.dispatch_method]
    specs = [ChildSpec("controller", command, f"{controller_url}/health")]
    for index, (section, gpu) in enumerate(placed):
        name = f"worker {index}" if len(placed) > 1 else "worker"
        specs.append(_worker(name, section, gpu, deployment.worker_port + index, controller_url))
    page = deployment.page
    command = [*_module("webui", host=page.host, port=page.port), "--controller-url", controller_url]
    specs.append(ChildSpec("page", command, f"http://{reachable(page.host)}:{page.port}/"))
    return specs


def _worker(name: str, section: WorkerSection, gpu: str | None, port: int, controller_url: str) -> ChildSpec:
    address = f"http://{_LOCAL}:{port}"
    command = _module("workers", host=_LOCAL, port=port)
    command += ["--model-path", section.model, "--method", ",".join(section.methods)]
    command += ["--controller-address", controller_url, "--worker-address", address, *section.options]
    environment = {"CUDA_VISIBLE_DEVICES": gpu or ""}
    return ChildSpec(name, command, f"{address}/health", environment, group=f"workers of {section.model}")


def _module(module: str, *, host: str, port: int) -> list[str]:
    return [sys.executable, "-m", module, "--host", host, "--port", str(port)]


def reachable(host: str) -> str:
    """A host to connect to for one to listen on."""
    if host in ("0.0.0.0", "::", ""):
        return _LOCAL
    return f"[{host}]" if ":" in host else host


class Output:
    """Prints the lines of all children, each behind the name of who wrote it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._colours: dict[str, str] = {SELF: "bold"}

    def say(self, who: str, line: str) -> None:
        """Print one line of ``who``."""
        colour = self._colours.setdefault(who, _COLOURS[(len(self._colours) - 1) % len(_COLOURS)])
        self._console.print(Text.assemble((f"{who:>10} │ ", colour), line))
