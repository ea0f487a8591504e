"""The files that say how workers are run: each is understood by what reads it."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from trbatch import cli, gpus, supervisor
from trbatch.config import WorkerConfig
from trbatch.queue_names import ModelKey

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
UNITS = ("workers/trbatch-worker@.service", "jobs/trbatch-nightly.service")
SCRIPTS = ("workers/slurm.sbatch", "jobs/nightly.sh")

# A worker that is asked to stop is gone by itself after this long.
LEAVES_S = WorkerConfig().grace_s + supervisor.LEAVE_S


@pytest.fixture(autouse=True)
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_present", lambda: ["0", "1"])


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What `trbatch` makes of the arguments of a worker."""
    name, *words = arguments
    assert name == "worker"
    above = click.Context(cli.commands, **cli.commands.context_settings)
    return cli.worker_command.make_context("worker", words, parent=above).params


# --- systemd ---


def directives(path: str) -> dict[str, list[str]]:
    """The values of each directive of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / path).read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is absent")
    names = []
    for path in (*UNITS, "jobs/trbatch-nightly.timer"):
        # The programs of a unit must exist where it is verified.
        text = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", (ROOT / path).read_text())
        names.append(Path(path).name.replace("@.", "@0."))
        (tmp_path / names[-1]).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", *(f"./{name}" for name in names)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_workers_unit_runs_a_worker_and_gives_it_time_to_leave() -> None:
    unit = directives("workers/trbatch-worker@.service")
    command = unit["ExecStart"][0].replace("%i", "1").replace("${TRBATCH_PROFILE}", "h100")
    program, *arguments = shlex.split(command)
    settings = parsed(arguments)
    assert Path(program).name == "trbatch"
    assert (settings["gpu"], settings["max_num_seqs"]) == ("1", 256)
    assert settings["grace_s"] == WorkerConfig().grace_s
    assert float(unit["TimeoutStopSec"][0]) > LEAVES_S
    assert unit["SuccessExitStatus"] == [str(128 + signal.SIGTERM)]
    assert unit["RestartPreventExitStatus"] == ["2 4"]
    assert (unit["KillSignal"], unit["KillMode"]) == (["SIGTERM"], ["mixed"])


def test_the_nightly_unit_runs_the_script_in_its_folder() -> None:
    unit = directives("jobs/trbatch-nightly.service")
    script, spec = unit["ExecStart"][0].split()
    folder = unit["WorkingDirectory"][0]
    assert os.access(ROOT / Path(script).relative_to(folder), os.X_OK)
    assert (ROOT / spec).is_file()


# --- Kubernetes ---


@pytest.mark.parametrize("version", ["1.25", "1.30", "1.34"])
def test_kubernetes_understands_the_deployment(version: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "workers/kubernetes/worker.yaml").read_text()))
    assert [one["kind"] for one in documents] == ["PersistentVolumeClaim", "Deployment"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_pod_runs_a_worker_and_gives_it_time_to_leave() -> None:
    claim, deployment = yaml.safe_load_all((ROOT / "workers/kubernetes/worker.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = parsed(container["args"])
    assert settings["grace_s"] == WorkerConfig().grace_s
    assert pod["terminationGracePeriodSeconds"] > LEAVES_S
    assert settings["metrics_host"] == "0.0.0.0"
    (port,) = container["ports"]
    assert port["containerPort"] == settings["metrics_port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/metrics", "port": port["name"]}
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    for variable in container["env"]:  # the root is read-only
        if variable["value"].startswith("/"):
            assert any(variable["value"].startswith(place) for place in places), variable


# What KEDA's documentation says of the kinds that scaling.yaml uses, as far as it uses them.
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_TRIGGERS = {
    "redis": {"required": ["listName", "listLength"],
              "known": {"address", "listName", "listLength", "activationListLength", "enableTLS",
                        "databaseIndex", "unsafeSsl"}},
    "prometheus": {"required": ["serverAddress", "query", "threshold"],
                   "known": {"serverAddress", "query", "threshold", "activationThreshold",
                             "namespace", "ignoreNullValues", "unsafeSsl"}},
}  # fmt: skip
SCALED_OBJECT = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {"type": "object", "required": ["name"]},
        "minReplicaCount": {"type": "integer", "minimum": 0},
        "maxReplicaCount": {"type": "integer", "minimum": 1},
        "pollingInterval": {"type": "integer"},
        "cooldownPeriod": {"type": "integer"},
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"behavior": {"type": "object"}, "name": {"type": "string"}},
                },
                "restoreToOriginalReplicaCount": {"type": "boolean"},
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "metadata"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": list(_TRIGGERS)},
                    "metadata": _TEXTS,
                    "authenticationRef": {"type": "object", "required": ["name"]},
                    "name": {"type": "string"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                },
            },
        },
    },
}


def test_the_scaling_has_kedas_fields_and_the_names_of_trbatchs_queues() -> None:
    access, scaled = yaml.safe_load_all((ROOT / "workers/kubernetes/scaling.yaml").read_text())
    assert {access["apiVersion"], scaled["apiVersion"]} == {"keda.sh/v1alpha1"}
    assert (access["kind"], scaled["kind"]) == ("TriggerAuthentication", "ScaledObject")
    spec = scaled["spec"]
    jsonschema.validate(spec, SCALED_OBJECT)
    for trigger in spec["triggers"]:
        names = set(trigger["metadata"])
        rules = _TRIGGERS[trigger["type"]]
        assert set(rules["required"]) <= names <= set(rules["known"])
    redis = [one for one in spec["triggers"] if one["type"] == "redis"]
    queues = ModelKey("org/model").queue_names
    assert [one["metadata"]["listName"] for one in redis] == [f"rq:queue:{name}" for name in queues]
    assert {one["authenticationRef"]["name"] for one in redis} == {access["metadata"]["name"]}
    assert {one["parameter"] for one in access["spec"]["secretTargetRef"]} == {
        "address", "username", "password",
    }  # fmt: skip
    # The behaviour is the autoscaler's own: have it checked as a part of one.
    autoscaler = {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "x"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "x"},
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }  # fmt: skip
    kubernetes_validate.validate(autoscaler, "1.30", strict=True)
    _, deployment = yaml.safe_load_all((ROOT / "workers/kubernetes/worker.yaml").read_text())
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    metrics = (ROOT / "docs" / "operations.md").read_text()
    query = spec["triggers"][-1]["metadata"]["query"]
    assert all(f"`{name}`" in metrics for name in re.findall(r"trbatch_\w+", query))


# --- scripts ---


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_are_good_bash(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)
    for command in (["bash", "-n"], [str(BIN / "shellcheck")]):
        done = subprocess.run([*command, ROOT / path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def slurm(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as an array's task runs it, with a program that says what it was started with."""
    program = tmp_path / "trbatch"
    program.write_text('#!/bin/sh\nfor word; do echo "$word"; done\necho "$TRBATCH_HOME" >&2\n')
    program.chmod(0o755)
    return subprocess.run(
        ["bash", ROOT / "workers/slurm.sbatch", *arguments],
        env={"PATH": os.environ["PATH"], "TRBATCH": str(program), "TMPDIR": str(tmp_path),
             "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_task_of_the_slurm_array_is_a_worker_that_ends_with_the_queue(tmp_path: Path) -> None:
    known = {"TRBATCH_REDIS_URL": "redis://host", "TRBATCH_STORE": "/scratch/jobs"}
    done = slurm(tmp_path, "--model", "org/m", TRBATCH_PROFILE="a100", **known)
    assert done.returncode == 0, done.stderr
    settings = parsed(done.stdout.splitlines())
    assert (settings["burst"], settings["gpu"], settings["name"]) == (True, "all", "slurm-17-3")
    assert (settings["model"], settings["max_num_seqs"]) == ("org/m", 128)
    assert Path(done.stderr.strip()).is_dir()
    missing = slurm(tmp_path, TRBATCH_REDIS_URL="redis://host")
    assert (missing.returncode, "TRBATCH_STORE" in missing.stderr) == (1, True)


def test_slurm_warns_a_worker_early_enough() -> None:
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", (ROOT / SCRIPTS[0]).read_text(), re.MULTILINE)
    )
    name, at, seconds = options["signal"].partition("@")
    assert (name, at) == ("B:TERM", "@")
    assert float(seconds) > LEAVES_S
    assert options["array"] == "0-3"
    assert "requeue" in options


# --- Docker ---

COMPOSE = "docker/compose.yaml"


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    # Debian's compiler is of whatever version the base image's release has.
    done = subprocess.run(
        [BIN / "hadolint", "--ignore", "DL3008", "--format", "json", ROOT / "docker/Dockerfile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (json.loads(done.stdout), done.returncode) == ([], 0), done.stderr


def dockerfile() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile, a line each."""
    text = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"FROM \S+ AS (\w+)", line):
            name = found[1]
            stages[name] = []
        elif line and not line.startswith("#") and name:
            stages[name].append(line)
    return stages


def test_the_images_are_made_from_files_that_there_are() -> None:
    stages = dockerfile()
    assert list(stages) == ["base", "client", "gpu"]
    copied = [word for line in stages["base"] if line.startswith("COPY")
              for word in line.split()[1:-1]]  # fmt: skip
    assert all((ROOT / word).exists() for word in copied)
    let_in = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in let_in if line.startswith("!")} == set(copied)
    for stage in ("client", "gpu"):
        assert "USER 10001:10001" in stages[stage]
        assert 'ENTRYPOINT ["trbatch"]' in stages[stage]
    command = json.loads(stages["gpu"][-1].removeprefix("CMD "))
    assert parsed(command)["metrics_port"] == 9400


def test_only_the_gpu_image_gets_torch() -> None:
    installs = {stage: " ".join(lines) for stage, lines in dockerfile().items()}
    assert "'.[hub,s3,structured,tokenizers]'" in installs["client"]
    assert "'.[worker,gpu,s3]'" in installs["gpu"]
    assert "pip install" not in installs["base"]


def test_the_client_image_has_every_extra_that_needs_no_torch() -> None:
    """`worker` and what goes with it decode; the last three are for no image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    elsewhere = {"worker", "gpu", "lora", "quantised", "bench", "test", "lint"}
    extras = set(project["optional-dependencies"]) - elsewhere
    found = re.search(r"'\.\[([\w,]+)\]'", " ".join(dockerfile()["client"]))
    assert found is not None
    assert set(found[1].split(",")) == extras


def compose() -> dict[str, Any]:
    """The file with its variables put in, as the client does before it looks at it."""
    values = {"TRBATCH_REDIS_PASSWORD": "secret"}

    def put(found: re.Match[str]) -> str:
        name, _, default = found[1].partition(":-")
        name, needed, _ = name.partition(":?")
        assert name in values or default or needed, f"{name} has neither a value nor a default"
        return values.get(name, default)

    return yaml.safe_load(re.sub(r"\$\{([^}]+)\}", put, (ROOT / COMPOSE).read_text()))


def workers_of(file: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, service in file["services"].items():
        if service.get("command", [""])[0] == "worker":
            yield name, service


def test_the_compose_file_follows_the_compose_specification() -> None:
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    jsonschema.validate(loaded(COMPOSE), schema)
    file = compose()
    jsonschema.validate(file, schema)
    for service in file["services"].values():
        for other in service.get("depends_on", {}):
            assert "healthcheck" in file["services"][other]
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in file["volumes"] or (ROOT / "docker" / source).exists()
    targets = {s["build"]["target"] for s in file["services"].values() if "build" in s}
    assert targets == {"client", "gpu"}


def test_docker_compose_understands_the_compose_file() -> None:
    program = shutil.which("docker")
    version = [program or "docker", "compose", "version"]
    if program is None or subprocess.run(version, capture_output=True, check=False).returncode:
        pytest.skip("docker compose is absent")
    done = subprocess.run(
        [program, "compose", "-f", ROOT / COMPOSE, "--profile", "*", "config", "--quiet"],
        env=os.environ | {"TRBATCH_REDIS_PASSWORD": "secret"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_each_worker_of_the_compose_file_has_a_gpu_of_its_own_and_time_to_leave() -> None:
    cards = []
    for _, service in workers_of(compose()):
        settings = parsed(service["command"])
        assert settings["grace_s"] == WorkerConfig().grace_s
        assert float(service["stop_grace_period"].removesuffix("s")) > LEAVES_S
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        cards += device["device_ids"]
        assert settings["gpu"] == "0"  # the only one that it sees
    assert cards == ["0", "1"]


def test_prometheus_finds_the_workers_of_the_compose_file() -> None:
    (job,) = loaded("docker/prometheus.yaml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found) <= {"names", "type", "port", "refresh_interval"}
    for _, service in workers_of(compose()):
        assert found["names"] == service["networks"]["default"]["aliases"]
        assert found["port"] == parsed(service["command"])["metrics_port"]
    services = compose()["services"]
    config = services["prometheus"]["command"][0].partition("=")[2]
    assert any(mount.split(":")[1] == config for mount in services["prometheus"]["volumes"])


def test_prometheus_understands_its_configuration() -> None:
    if (program := shutil.which("promtool")) is None:
        pytest.skip("promtool is absent")
    done = subprocess.run(
        [program, "check", "config", ROOT / "docker/prometheus.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
