"""Jobs for a cluster: checked before they are sent, and manifests that Kubernetes can read."""

import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from inference.settings import AnimationSettings
from infra import submit
from infra.cli import app, main
from infra.console import WRONG_USE
from pipelines.curation.config import CurationConfig
from pipelines.overrides import apply_overrides
from training.recipes import get_recipe

FOLDER = Path(submit.__file__).parent / "env"


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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"manifest": "jobs.jsonl"}, "'jobs.jsonl'"),
        ({"--model": "model"}, "'model'"),
        ({"--alignment": "runs/align"}, "'runs/align'"),
    ],
)
def test_relative_paths_of_a_batch_are_refused(changed, said) -> None:
    given = {"manifest": "/data/jobs.jsonl", "--model": "/data/model", "--out": "/data/out"}
    given |= {"--alignment": "closed-form", "--set": "sampling.steps=4", "--size": "576x1024"}
    options = {name: value for name, value in (given | changed).items() if name != "manifest"}
    arguments = [(given | changed)["manifest"], *(p for pair in options.items() for p in pair)]
    with pytest.raises(submit.SubmitError, match=said):
        submit.checked_job("batch", arguments, verb("batch"))
    good = [given.pop("manifest"), *(part for pair in given.items() for part in pair)]
    sent = submit.checked_job("batch", good, verb("batch"))
    assert shlex.split(sent.entrypoint) == ["python", "-m", "infra", "batch", *good]
    assert "NCCL_DEBUG" not in sent.environment


ANIMATOR = ("train", "animator", "--shards", "/data/shards", "--out", "/data/run")
ALIGNMENT = ("train", "alignment", "--motion", "/data/motion", "--out", "/data/run")
CURATE = ("curate", "/data/videos", "--out", "/data/shards")
BATCH = ("batch", "/data/jobs.jsonl", "--model", "/data/model", "--out", "/data/out")


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        *((ANIMATOR, f"task.{name}") for name in ("shards", "latents", "validation", "start")),
        (ANIMATOR, "task.alignment"),
        *((ALIGNMENT, f"task.{name}") for name in ("shards", "motion", "validation")),
        (CURATE, "download.cookies_file"),
        *((BATCH, f"provenance.{name}") for name in ("key", "certificate")),
    ],
)
def test_relative_paths_in_settings_are_refused_too(command, setting) -> None:
    name, *arguments = command

    def sent(value: str) -> submit.Job:
        given = [*arguments, "--set", f"{setting}={value}"]
        return submit.checked_job(name, given, verb(name))

    with pytest.raises(submit.SubmitError, match=r"'here/it'.*absolute path"):
        sent("here/it")
    for value in ("/data/it", ""):
        assert sent(value).arguments[-1] == f"{setting}={value}"


def test_settings_of_paths_are_settings_and_none_of_the_tasks_is_forgotten() -> None:
    def texts(name: str) -> set[str]:
        task = get_recipe(name).task
        return {f"task.{field.name}" for field in fields(task) if getattr(task, field.name) == ""}

    of_tasks = texts("animator_tiny") | texts("alignment_motion")
    assert of_tasks == set(submit.SETTINGS_OF_PATHS["train"])
    found = apply_overrides(CurationConfig(), ["download.cookies_file=/data/it"])
    assert found.download.cookies_file == "/data/it"
    marks = [f"{name}=/data/it" for name in submit.SETTINGS_OF_PATHS["batch"]]
    assert apply_overrides(AnimationSettings(), marks).provenance.key == Path("/data/it")


def test_a_batch_gets_a_cluster_that_grows_with_an_engine_on_each_gpu(tmp_path) -> None:
    out = tmp_path / "job.yaml"
    arguments = ["--manifest", str(out), "--workers", "16", "--gpus", "1", "--name", "videos"]
    batch = ["batch", "/data/jobs.jsonl", "--model", "/data/model", "--out", "/data/out"]
    with pytest.raises(SystemExit) as ended:
        main(["submit", *arguments, *batch])
    assert not ended.value.code
    found = yaml.safe_load(out.read_text())
    assert found["metadata"]["name"] == "videos"
    assert shlex.split(found["spec"]["entrypoint"])[3:] == batch
    cluster = found["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    workers = cluster["workerGroupSpecs"][0]
    assert (workers["replicas"], workers["maxReplicas"]) == (1, 16)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


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


def test_training_gets_a_cluster_of_fixed_size_with_time_for_a_checkpoint(tmp_path) -> None:
    out = tmp_path / "job.yaml"
    arguments = ["--manifest", str(out), "--workers", "4", "--gpus", "8"]
    training = ["train", "animator", "--recipe", "animator_512_32gpu", "--shards", "/data/shards"]
    with pytest.raises(SystemExit) as ended:
        main(["submit", *arguments, *training, "--out", "/data/run"])
    assert not ended.value.code
    cluster = yaml.safe_load(out.read_text())["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    workers = cluster["workerGroupSpecs"][0]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    pod = workers["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data", "shm": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    wait = [each["value"] for each in head["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait[0]) == pod["terminationGracePeriodSeconds"]


def test_training_jobs_have_the_variables_of_the_environment_files() -> None:
    arguments = ("animator", "--shards", "/data/shards", "--out", "/data/run")
    sent = submit.checked_job("train", arguments, verb("train")).environment
    text = "".join((FOLDER / f"{name}.env").read_text() for name in ("nccl", "ray"))
    written = dict(re.findall(r"^(\w+)=\$\{\w+:-(.*)\}$", text, re.MULTILINE))
    assert {name: written[name] for name in sent} == sent
    assert not set(job("/data/v", "--out", "/data/s").environment) & {"NCCL_DEBUG"}


def test_environment_files_are_shell_and_say_what_they_are() -> None:
    for name in ("nccl", "ray"):
        assert (FOLDER / f"{name}.env").read_text().startswith("# ")
        read = ["bash", "-euc", f"set -a; . {FOLDER / f'{name}.env'}; env"]
        set_here = {"PATH": "/usr/bin:/bin", "NCCL_DEBUG": "INFO"}
        done = subprocess.run(read, capture_output=True, text=True, check=True, env=set_here)
        expected = {"nccl": "NCCL_DEBUG=INFO", "ray": "OMP_NUM_THREADS=1"}[name]
        assert expected in done.stdout.splitlines()  # and a site's own values stay
