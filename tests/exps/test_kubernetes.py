"""The jobs of exps/kubernetes/ have what Kubeflow's operator takes, and a pod that is started again goes on.

There is no cluster here: pods are started as the operator and Kubernetes start them, with the operator's variables.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.exps.recorded import ROOT, run_recorded

FOLDER = ROOT / "exps" / "kubernetes"
JOBS = ("one_node", "several_nodes")
NAMES = {"name": str}
POD = {
    "spec": {
        "terminationGracePeriodSeconds": int,
        "containers": [
            NAMES | {
                "image": str, "command": [str], "args": [str], "env": [NAMES | {"value": str}],
                "resources": {"limits": {"nvidia.com/gpu": int}},
                "volumeMounts": [NAMES | {"mountPath": str, "subPath": str, "readOnly": bool}],
            }
        ],
        "volumes": [NAMES | {"persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str}}],
    }
}  # fmt: skip
REPLICAS = {"replicas": int, "restartPolicy": str, "template": POD}
JOB = {
    "apiVersion": str, "kind": str, "metadata": NAMES,
    "spec": {
        "nprocPerNode": str, "runPolicy": {"backoffLimit": int},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}  # fmt: skip
"""What is used of the schema of pytorchjobs.kubeflow.org in version 1.9.0 of the operator: key -> its type."""


def faults(value: Any, schema: Any, place: str) -> list[str]:
    """What of a document does not fit a schema, each with its place."""
    if isinstance(schema, dict) and isinstance(value, dict):
        unknown = [f"{place}.{key}" for key in value.keys() - schema.keys()]
        return unknown + [f for key in value.keys() & schema for f in faults(value[key], schema[key], f"{place}.{key}")]
    if isinstance(schema, list) and isinstance(value, list):
        return [fault for i, item in enumerate(value) for fault in faults(item, schema[0], f"{place}[{i}]")]
    return [] if isinstance(schema, type) and type(value) is schema else [f"{place}: {value!r}"]


def job_of(name: str) -> dict[str, Any]:
    """A manifest."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", JOBS)
def test_the_operator_takes_a_job(name: str) -> None:
    """What its schema and its check at admission ask for, and the volumes that are mounted are there."""
    job = job_of(name)
    assert faults(job, JOB, name) == []
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    nodes = job["spec"]["pytorchReplicaSpecs"]
    assert nodes["Master"]["replicas"] == 1 and ("Worker" in nodes) == (name == "several_nodes")
    for node in nodes.values():
        pod = node["template"]["spec"]
        (container,) = pod["containers"]
        assert (container["name"], node["restartPolicy"]) == ("pytorch", "OnFailure") and container["image"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        (flags,) = [entry["value"] for entry in container["env"] if entry["name"] == "TORCHRUN_FLAGS"]
        assert int(flags.split()[-1]) < pod["terminationGracePeriodSeconds"]
    claim = yaml.safe_load((FOLDER / "volume.yaml").read_text())
    assert claim["metadata"]["name"] == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]


def test_both_jobs_run_the_same_pod() -> None:
    one, several = ([*job_of(name)["spec"]["pytorchReplicaSpecs"].values()] for name in JOBS)
    assert one * 2 == several


def told_by_the_operator(name: str, port: int, rank: int = 0) -> dict[str, str]:
    """The variables of a pod: the manifest's and the operator's."""
    spec = job_of(name)["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    nodes, processes = len(spec["pytorchReplicaSpecs"]), spec["nprocPerNode"]
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    pet = {**master, "NODE_RANK": str(rank), "NPROC_PER_NODE": processes, "NNODES": str(nodes)}
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    ranks = {"WORLD_SIZE": str(nodes * int(processes)), "RANK": str(rank)}
    return own | master | ranks | {f"PET_{key}": value for key, value in pet.items()}


def pod_command(base: Path) -> list[str]:
    """What a pod runs, on another model."""
    (container,) = job_of("one_node")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    return [word.replace("/models/BASE", str(base)) for word in (*container["command"], *container["args"])]


def test_torchrun_is_left_to_the_operator(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """No flag of the script's says otherwise, and only a start that finds a checkpoint resumes one."""
    _, script, *arguments = pod_command(tmp_path)
    told = told_by_the_operator("several_nodes", 23456) | {"OUTPUT": str(tmp_path)}
    run = lambda: run_recorded(ROOT / script, *arguments, folder=tmp_path, environment=clean_environment, **told)  # noqa: E731
    first = run()
    assert first[:5] == ["--nproc_per_node", "8", *told["TORCHRUN_FLAGS"].split(), f"{ROOT}/accessory/main_finetune.py"]
    assert "--resume" not in first
    saved = Path(first[first.index("--output_dir") + 1]) / "epoch0"
    saved.mkdir()
    assert run() == first  # a save that was cut short has no manifest
    (saved / "manifest.json").touch()
    assert run() == [*first, "--resume", "latest"]


def test_slurm_may_have_started_the_processes(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$RECORD"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    script = ROOT / "exps" / "finetune" / "sg" / "dialog_sharegpt_70B.sh"
    words = run_recorded(script, "BASE", folder=tmp_path, environment=clean_environment, LAUNCHER="python")
    assert words[:2] == ["-u", f"{ROOT}/accessory/main_finetune.py"]


def test_a_pod_that_is_stopped_goes_on(tiny_base: Path, tmp_path: Path, clean_environment: dict[str, str]) -> None:
    """Its process is the launcher: asked to stop, it saves; started again, it ends the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    more = {"OUTPUT": str(tmp_path), "NPROC": "1", "DEVICE": "cpu"}
    more["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean_environment['PATH']}"
    how = {"cwd": ROOT, "env": clean_environment | told_by_the_operator("one_node", port) | more, "text": True}
    small = "--data_config data_example/accessory_qa.json --save_steps 1 --max_steps 20 --max_words 160 --batch_size 1"
    command = [*pod_command(tiny_base), *small.split()]
    output = tmp_path / "finetune" / "sg" / Path(command[1]).stem
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)
    while not list(output.glob("epoch*/manifest.json")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=100)
    stood = json.loads((output / "run_status.json").read_text())
    assert (stood["state"], stood["status"]) == ("preempted", 75) and stood["step"] < 20, said[-2000:]
    second = subprocess.run(command, capture_output=True, timeout=200, **how)
    assert second.returncode == 0, second.stdout[-3000:]
    assert f"resuming {output / stood['checkpoint']} after step {stood['step']}" in second.stdout
    assert json.loads((output / "run_status.json").read_text())["state"] == "finished"
