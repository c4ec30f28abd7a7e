import socket
import subprocess
from pathlib import Path

import pytest

from polydecode import gpus, up
from polydecode.deployment import Deployment, DeploymentError, load_deployment


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "visible_gpus", list)


def _deployment(**keys: object) -> Deployment:
    return Deployment.model_validate({"workers": [{"model": "m"}], **keys})


def test_the_demo_is_packaged_and_complete() -> None:
    demo = load_deployment("demo")
    assert (demo.controller.port, demo.page.port) == (21001, 7860)
    offered = {worker.model: worker.methods for worker in demo.workers}
    assert offered == {
        "smollm2-135m": ["vanilla", "ngram", "lookahead", "medusa", "ppd"],
        "smollm2-135m-apar": ["apar", "apar+medusa", "apar+ppd", "apar+ngram"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: [{model: m, modle: m}]", "workers.0.modle: unknown key"),
        ("workers: [{}]", "workers.0.model: field required"),
        ("workers: []", "workers: list should have at least 1"),
        ("", "workers: field required"),
        ("workers: [", "not valid YAML"),
        ("- 1", "file: "),
        ("controller: {port: 99999}\nworkers: [{model: m}]", "controller.port: "),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DeploymentError, match=message) as caught:
        load_deployment(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_packaged_ones() -> None:
    with pytest.raises(DeploymentError, match=r"no file 'dmeo'; polydecode brings: .*demo"):
        load_deployment("dmeo")


def test_a_cpu_gets_one_worker_and_is_hidden_from_gpus() -> None:
    deployment = _deployment(controller={"host": "0.0.0.0"}, page={"port": 7861})
    controller, worker, page = up.children(deployment, up.place_workers(deployment))
    assert worker.environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert " ".join(worker.command[1:]) == (
        "-m workers --host 127.0.0.1 --port 21002 --model-path m --method vanilla"
        " --controller-address http://127.0.0.1:21001 --worker-address http://127.0.0.1:21002"
    )
    assert controller.health_url == "http://127.0.0.1:21001/health"
    assert page.health_url == "http://127.0.0.1:7861/"


def test_each_gpu_gets_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "visible_gpus", lambda: ["0", "GPU-b", "5"])
    workers = [{"model": "m", "methods": ["vanilla", "ngram"]}, {"model": "n", "gpus": [1]}, {"model": "o", "gpus": []}]
    deployment = _deployment(workers=workers)
    placed = up.place_workers(deployment)
    assert [(section.model, gpu) for section, gpu in placed] == [
        ("m", "0"), ("m", "GPU-b"), ("m", "5"), ("n", "GPU-b"), ("o", None)
    ]  # fmt: skip
    _, *specs, _ = up.children(deployment, placed)
    assert [spec.name for spec in specs] == [f"worker {index}" for index in range(5)]
    assert {spec.health_url for spec in specs} == {f"http://127.0.0.1:{21002 + index}/health" for index in range(5)}
    assert specs[0].group == specs[2].group != specs[3].group
    assert "vanilla,ngram" in specs[0].command


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeploymentError, match="no GPU 0 for m: 0 visible"):
        up.place_workers(_deployment(workers=[{"model": "m", "gpus": [0]}]))


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        path = tmp_path / "d.yaml"
        path.write_text(f"page: {{port: {port}}}\ncontroller: {{port: {_free()}}}\nworkers: [{{model: m}}]")
        assert up.run(str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{port}" in line and "page.port" in line


def test_a_port_wanted_twice_is_refused() -> None:
    port = _free()
    with pytest.raises(DeploymentError, match=r"wanted twice: change page\.port"):
        up.check_ports(_deployment(controller={"port": port}, page={"port": port}), 0)


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("listing", "variable", "expected"),
    [
        ("GPU 0: A\nGPU 1: B\n", None, ["0", "1"]),
        ("GPU 0: A\n  MIG 1g Device 0: x\n", "", []),
        ("GPU 0: A\nGPU 1: B\n", "1", ["1"]),
        ("GPU 0: A\nGPU 1: B\n", "-1", []),
        ("", "0,1", []),
    ],
)
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, listing: str, variable: str | None, expected: list[str]) -> None:
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, listing))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpus.visible_gpus() == expected


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpus.visible_gpus() == []
