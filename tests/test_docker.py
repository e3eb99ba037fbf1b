"""The image and the compose file, read by a parser: no engine runs where the tests do."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
SECRET = re.compile(r"PASSWORD|KEY|SECRET|TOKEN")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def sources(dockerfile: list[tuple[str, str]]) -> list[str]:
    return [source for name, rest in dockerfile if name == "COPY" for source in rest.split()[:-1]]


def test_dockerfile_instructions(dockerfile: list[tuple[str, str]]) -> None:
    """Without it, a misspelt instruction or a command line that is no JSON list is found out only by an engine."""
    names = [name for name, _ in dockerfile]
    assert names[0] == "FROM"
    assert set(names) <= INSTRUCTIONS
    given = dict(dockerfile)
    assert json.loads(given["ENTRYPOINT"]) == ["qatbench"]
    assert isinstance(json.loads(given["CMD"]), list)


def test_image_has_supported_python_and_tested_versions(dockerfile: list[tuple[str, str]]) -> None:
    """Without it, the image drifts to a Python or to versions that no test has seen."""
    given = dict(dockerfile)
    image = re.fullmatch(r"python:3\.(\d+)-slim", given["FROM"])
    assert image
    assert 11 <= int(image[1]) <= 13
    (install,) = [rest for name, rest in dockerfile if name == "RUN" and "pip install" in rest]
    assert "-c constraints.txt ." in install


def test_container_does_not_run_as_root(dockerfile: list[tuple[str, str]]) -> None:
    """Without it, results in a mounted folder belong to root."""
    names = [name for name, _ in dockerfile]
    users = [rest for name, rest in dockerfile if name == "USER"]
    assert users == ["qatbench"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("COPY", "RUN"))
    assert any(name == "RUN" and "useradd" in rest and "qatbench" in rest for name, rest in dockerfile)


def test_copied_paths_exist_and_make_the_package(dockerfile: list[tuple[str, str]]) -> None:
    """Without it, a renamed folder breaks the image, or a new one is missing from it."""
    copied = sources(dockerfile)
    for source in copied:
        assert list(ROOT.glob(source)), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    rooms = {package.split(".")[1] for package in packages if "." in package}
    assert rooms <= set(copied)
    assert {"*.py", "pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"} <= set(copied)


def test_ignored_files_are_not_copied_ones(dockerfile: list[tuple[str, str]]) -> None:
    """Without it, .dockerignore hides a file that the image needs, or sends .venv and runs/ to the engine."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert kept == set(sources(dockerfile))
    for folder in (".venv", ".git", "runs", "tests", "docker"):
        assert not any(fnmatch.fnmatch(folder, pattern) for pattern in kept)


def test_services(compose: dict[str, Any]) -> None:
    """Without it, a service can be lost, or refer to a volume or a service that is not there."""
    services = compose["services"]
    assert set(services) == {"worker", "postgres", "optuna-dashboard", "wandb"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for dependency, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in services[dependency]
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
            assert source in compose["volumes"], (name, volume)
        for host in re.findall(r"(?:@|http://)([a-z][\w-]*)", json.dumps([service.get("environment"), service])):
            assert host in services or host == "localhost", (name, host)
    used = json.dumps(services)
    assert all(f"{volume}:/" in used or f":-{volume}}}:/" in used for volume in compose["volumes"])


def test_worker_is_built_from_this_repository(compose: dict[str, Any]) -> None:
    """Without it, compose builds from a folder or a file that is not there."""
    worker = compose["services"]["worker"]
    context = (ROOT / "docker" / worker["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / worker["build"]["dockerfile"]).is_file()
    assert worker["command"][0] == "sweep"
    mounted = [volume.split(":/")[1].split(":")[0] for volume in worker["volumes"]]
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert all(f"=/{folder}" in text for folder in mounted)


def test_servers_have_health_checks_and_are_local(compose: dict[str, Any]) -> None:
    """Without it, a dashboard without a password is open to the network, or a dead server looks alive."""
    for name, service in compose["services"].items():
        if name != "worker":
            assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)


def test_no_secret_in_the_file(compose: dict[str, Any]) -> None:
    """Without it, a password or a key is published with the repository."""
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name):
                assert re.fullmatch(rf"\$\{{{name}(:-|:\?[^}}]+)\}}", value), name
    text = (ROOT / "docker" / "compose.yaml").read_text()
    assert not re.search(r"://\w+:(?!PASSWORD@|\$\{)[^@/\s\"]+@", text)


def test_variables_are_well_formed(compose: dict[str, Any]) -> None:
    """Without it, an unclosed ${ stops compose."""
    text = json.dumps(compose)
    assert text.count("${") == len(re.findall(r"\$\{[A-Z_]+(?::[-?][^}$]*)?\}", text))
