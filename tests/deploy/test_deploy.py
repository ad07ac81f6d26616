"""The Dockerfile, the compose file and the manifests: valid by their schemas, and true of our program."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rtp_llm import cli
from rtp_llm.runtime.server.metrics import Metrics
from rtp_llm.runtime.tritonserver.binary import Binary
from rtp_llm.runtime.tritonserver.launch import Tritonserver
from rtp_llm.runtime.tritonserver.options import Options, options_of

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# of Docker's reference; FROM, RUN, … each begins a line of the file
INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL",
                "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}  # fmt: skip


def _objects() -> Iterator[dict[str, Any]]:
    for file in KUBERNETES:
        yield from yaml.safe_load_all(file.read_text())


def _of(kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in _objects() if o["kind"] == kind}


def _container(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def _parsed(words: list[str], **env: str) -> Options:
    """What our program makes of its arguments there; the bundle stands first, as its one positional."""
    end = [*words, "--"].index("--")  # behind it stands what is for Triton's own program
    args, unknown = cli.parser().parse_known_args(["tritonserver", *words[:end]])
    assert not unknown and args.bundle == words[0]
    return options_of(args, words[end + 1 :], env)


@pytest.mark.parametrize("version", ["1.30", "1.33", kubernetes_validate.latest_version()])
def test_manifests_are_valid(version: str) -> None:
    for o in _objects():
        kubernetes_validate.validate(o, version, strict=True)


def test_the_compose_file_is_valid() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_made_of_instructions_and_of_files_that_are_there() -> None:
    found = _instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert [name for name, _ in found if name != "ARG"][0] == "FROM"
    assert [name for name, _ in found].count("CMD") == 1
    arguments = dict(value.split("=", 1) for name, value in found if name == "ARG")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)
    assert re.fullmatch(r"\d\d\.\d\d-py3", arguments["TRITON"])
    for path in re.findall(r"/src/([\w./]+)", " ".join(value for _, value in found)):
        assert (ROOT / path).is_file(), path
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert not {"constraints.txt", "README.md", "LICENSE", "NOTICE", "model_repository"} & set(ignored)


def test_the_dockerfile_starts_our_program() -> None:
    lines = dict(_instructions())
    program = json.loads(lines["ENTRYPOINT"])
    assert program == ["rtp-llm", "tritonserver"]
    options = _parsed(json.loads(lines["CMD"]))
    assert not options.settings.loopback and options.echo and options.log is None
    assert sorted(options.ports.values()) == [int(port) for port in lines["EXPOSE"].split()]


def test_the_compose_file_starts_our_program() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["triton"]
    options = _parsed(service["command"], API_KEY="k")
    assert options.settings.api_key == ("k",) and options.openai_port
    inside = {int(port.rpartition(":")[2]) for port in service["ports"]}
    assert inside == {*options.ports.values(), options.openai_port}
    open_to_all = [port for port in service["ports"] if not port.startswith("127.0.0.1:")]
    assert open_to_all == [f"{options.openai_port}:{options.openai_port}"], "Triton itself asks for no key"
    # the OpenAI port drains first, then Triton
    assert float(service["stop_grace_period"].rstrip("s")) > 2 * options.settings.drain_seconds + 10
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_deployments_start_our_program_and_end_it_in_peace() -> None:
    for name, deployment in _of("Deployment").items():
        pod, container = deployment["spec"]["template"]["spec"], _container(deployment)
        options = _parsed(container["args"])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == options.ports, name
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause + options.settings.drain_seconds + 10
        probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
        assert {probe["port"] for probe in probes.values()} == {"http"}
        assert probes["liveness"]["path"] == "/v2/health/live"
        assert probes["readiness"]["path"] == probes["startup"]["path"] == "/v2/health/ready"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts) == set(volumes) and volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["shm"] == "/dev/shm" and container["args"][0].startswith(mounts["bundles"] + "/")
        assert container["securityContext"]["readOnlyRootFilesystem"] and mounts["tmp"] == "/tmp"


def test_the_decoder_finds_the_tower() -> None:
    deployments, services = _of("Deployment"), _of("Service")
    host, port = _parsed(_container(deployments["vlm"])["args"]).vision.split(":")
    assert int(port) in [p["port"] for p in services[host]["spec"]["ports"]]
    assert _parsed(_container(deployments[host])["args"]).vision == "only"


def test_every_selector_finds_its_pods() -> None:
    labels = {name: d["spec"]["template"]["metadata"]["labels"] for name, d in _of("Deployment").items()}
    selectors: list[tuple[str, dict[str, str]]] = []
    for kind, *path in (
        ("Deployment", "selector", "matchLabels"),
        ("Service", "selector"),
        ("PodDisruptionBudget", "selector", "matchLabels"),
        ("NetworkPolicy", "podSelector", "matchLabels"),
    ):
        for name, o in _of(kind).items():
            selectors.append((name, functools.reduce(lambda value, key: value[key], path, o["spec"])))
    for name, selector in selectors:
        assert selector == labels[name], name
    assert set(_of("NetworkPolicy")) == set(_of("Service")) == set(labels)


def test_autoscalers_scale_on_metrics_that_the_adapter_makes() -> None:
    made = set()
    for rule in _rules():
        series = rule["seriesQuery"].partition("{")[0]
        name = rule.get("name", {})
        to = name.get("as", series).replace("${1}", r"\1")
        made.add(re.sub(name.get("matches", ".*"), to, series, count=1))
    scalers = _of("HorizontalPodAutoscaler")
    assert {s["spec"]["scaleTargetRef"]["name"] for s in scalers.values()} == set(_of("Deployment"))
    wanted = {m["pods"]["metric"]["name"] for s in scalers.values() for m in s["spec"]["metrics"]}
    assert wanted == made


def _rules() -> list[dict[str, Any]]:
    (config,) = _of("ConfigMap").values()
    return yaml.safe_load(config["data"]["config.yaml"])["rules"]


def test_the_adapters_series_are_ours_or_tritons(triton_binary: Binary, tmp_path: Path) -> None:
    """As a real server and our own registry show them."""
    from urllib.request import urlopen

    model = tmp_path / "models" / "vision_tower"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 4\ninput [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
        'output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]\ninstance_group [ { kind: KIND_CPU } ]\n'
    )
    (model / "1" / "model.py").write_text("class TritonPythonModel:\n    def execute(self, requests): ...\n")
    with Tritonserver(model.parent, binary=triton_binary) as server:
        shown = urlopen(f"http://{server.metrics}/metrics", timeout=10).read().decode()
    shown += Metrics(lambda: None).render().decode()
    for rule in _rules():
        text = rule["seriesQuery"] + rule["metricsQuery"]
        for series in re.findall(r"\b(?:nv|rtp_llm)_\w+(?=\{)", text):
            model_label = r"\{[^}]*model=\"vision_tower\"" if series.startswith("nv_") else ""
            assert re.search(rf"^{series}\b{model_label}", shown, re.M), series
