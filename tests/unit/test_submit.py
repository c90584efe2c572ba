"""Jobs for a cluster: checked before they are sent, and manifests that Kubernetes can read."""

import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from infra import submit
from infra.cli import app, main
from infra.console import WRONG_USE


def verb(name: str):
    return get_command(app).commands[name]  # type: ignore[attr-defined]


def job(*arguments: str, **options) -> submit.Job:
    return submit.checked_job("curate", arguments, verb("curate"), **options)


def test_entrypoint_keeps_every_argument_as_it_was() -> None:
    given = ["/data/my videos/*.mp4", "--out", "/data/shards", "--set", "faces.min_share=0.5"]
    assert shlex.split(job(*given).entrypoint) == ["python", "-m", "infra", "curate", *given]


@pytest.mark.parametrize(
    "arguments",
    [("videos", "--out", "/data/shards"), ("s3://bucket/videos", "--out", "shards")],
    ids=["source", "out"],
)
def test_relative_paths_are_refused_since_a_job_runs_elsewhere(arguments) -> None:
    with pytest.raises(submit.SubmitError, match="absolute path"):
        job(*arguments)


def test_addresses_are_no_paths() -> None:
    assert job("https://example.org/a.mp4", "s3://bucket/videos", "--out", "/data/shards")


def test_wrong_arguments_are_found_before_anything_is_sent(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", "curate", "/data/videos", "--out", "/data/shards", "--worker", "3"])
    assert ended.value.code == WRONG_USE
    assert "--worker" in capsys.readouterr().err


def test_paths_inside_nested_verbs_are_checked_too() -> None:
    with pytest.raises(submit.SubmitError, match="'shards'"):
        submit.checked_job(
            "train", ("animator", "--shards", "shards", "--out", "/data/run"), verb("train")
        )


def test_missing_cluster_is_said_in_one_sentence(capsys) -> None:
    arguments = ["submit", "--address", "http://127.0.0.1:9", "status"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == WRONG_USE
    assert "no Ray cluster answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_code_goes_along_only_where_asked() -> None:
    assert "py_modules" not in job("/data/v", "--out", "/data/s").runtime_env()
    sent = job("/data/v", "--out", "/data/s", ship="code").runtime_env()
    assert {Path(folder).name for folder in sent["py_modules"]} == set(submit.HOME_PACKAGES)
    everything = job("/data/v", "--out", "/data/s", ship="all").runtime_env()
    assert any(line.startswith("ray[data") for line in everything["pip"]["packages"])
    assert all("==" in line for line in everything["pip"]["packages"])


def test_manifest_is_a_ray_job_that_grows_and_forgives_lost_nodes(tmp_path) -> None:
    out = tmp_path / "job.yaml"
    arguments = ["--manifest", str(out), "--image", "registry/animator:1", "--workers", "40"]
    arguments += ["--env", 'NOTE=say "hi": yes', "--gpus", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["submit", *arguments, "curate", "/data/it's", "--out", "/data/shards"])
    assert not ended.value.code
    found = yaml.safe_load(out.read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    spec = found["spec"]
    assert shlex.split(spec["entrypoint"])[-3:] == ["/data/it's", "--out", "/data/shards"]
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    workers = cluster["workerGroupSpecs"][0]
    assert workers["maxReplicas"] == 40
    pod = workers["template"]["spec"]
    assert pod["tolerations"]
    container = pod["containers"][0]
    assert container["image"] == "registry/animator:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "NOTE", "value": 'say "hi": yes'} in container["env"]
    assert container["volumeMounts"][0]["mountPath"] == "/data"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
