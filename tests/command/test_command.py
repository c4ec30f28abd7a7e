import subprocess
import sys

import pytest


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "polydecode", *arguments], capture_output=True, text=True, timeout=60)


def test_help_lists_the_verbs() -> None:
    printed = _run("--help").stdout
    assert all(verb in printed for verb in ("controller", "worker", "webui", "get-trace", "up", "chat"))


def test_help_imports_nothing_heavy() -> None:
    script = "import polydecode.__main__, sys; print(sorted({'torch', 'gradio', 'httpx', 'yaml'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_light_packages_do_not_import_torch() -> None:
    script = "import traces.get_trace, webui.page, sys; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_a_verb_passes_its_options_and_its_status_on() -> None:
    done = _run("get-trace", "--model", "m")
    assert done.returncode == 2
    assert "the following arguments are required: --controller, --dataset, --save-path" in done.stderr
    assert "--max-length" in _run("get-trace", "--help").stdout


def test_a_bad_deployment_is_one_line() -> None:
    done = _run("up", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("polydecode: no file 'nonsense'")


def test_the_engine_is_only_a_name_until_it_is_used() -> None:
    import polydecode

    with pytest.raises(AttributeError, match="Engin"):
        _ = polydecode.Engin
