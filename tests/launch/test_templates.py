"""Templates for Slurm and Kubernetes: what the schedulers would refuse. `tests/slow` runs them."""

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from running import slurm_variables

ROOT = Path(__file__).parent.parent.parent
JOBS = ("train", "evaluate", "decode", "convert", "serve")
# Of jobset.x-k8s.io/v1alpha2; a job's template is held against Kubernetes' own schema.
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            # The name becomes part of host names.
            "properties": {"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,40})$"}},
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*)$"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def _jobset(job):
    return yaml.safe_load((ROOT / f"launch/kubernetes/{job}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("job", JOBS)
def test_kubernetes_would_take_it(job):
    jobset = _jobset(job)
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        kubernetes_validate.validate(template | replicated["template"], "1.34", strict=True)
        spec = replicated["template"]["spec"]
        # A job that begins anew as a whole must not begin pods anew; the others must.
        is_together = "failurePolicy" in jobset["spec"]
        expected = ("Never", 0) if is_together else ("OnFailure", 100)
        assert (spec["template"]["spec"]["restartPolicy"], spec["backoffLimit"]) == expected


def test_a_service_leads_to_the_pod_that_listens():
    """By the labels that the two controllers give it, under a name that the server takes."""
    file = ROOT / "launch/kubernetes/serve_service.yaml"
    service = yaml.safe_load(file.read_text(encoding="utf-8"))
    kubernetes_validate.validate(service, "1.34", strict=True)
    jobset = _jobset("serve")
    assert service["spec"]["selector"] == {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "batch.kubernetes.io/job-completion-index": "0",
    }
    [workers] = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    [port] = service["spec"]["ports"]
    assert container["ports"] == [{"containerPort": port["port"]}]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert given["port"] == str(port["port"])
    assert given["allowed_host"] == service["metadata"]["name"]
    assert spec["terminationGracePeriodSeconds"] > int(given["drain_seconds"])


@pytest.mark.parametrize(("index", "status"), [("0", 1), ("1", 0)])
def test_only_the_pod_that_listens_is_asked_whether_it_is_ready(index, status):
    [workers] = _jobset("serve")["spec"]["replicatedJobs"]
    [container] = workers["template"]["spec"]["template"]["spec"]["containers"]
    *shell, script = container["readinessProbe"]["exec"]["command"]
    script = script.replace("python", sys.executable).replace(":8000", ":1")  # where no one is
    variables = {"JOB_COMPLETION_INDEX": index}
    done = subprocess.run([*shell, script], env=variables, capture_output=True, check=False)
    assert done.returncode == status, done.stderr


def test_the_check_finds_what_is_wrong():
    broken = _jobset("train")
    broken["spec"]["replicatedJobs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(broken, JOBSET)
    spec = _jobset("train")["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["template"]["spec"]["containers"][0]["imag"] = "x"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError, match="imag"):
        kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.parametrize("job", JOBS)
def test_arguments_are_flags_of_the_launcher(job):
    """Read from its source: importing all launchers would define flags twice."""
    [workers] = _jobset(job)["spec"]["replicatedJobs"]
    [container] = workers["template"]["spec"]["template"]["spec"]["containers"]
    module = container["command"][2]
    files = [ROOT / f"{module.replace('.', '/')}.py"]
    files += [ROOT / f"launch/{name}_flags.py" for name in ("model", "training")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text))
    known |= {"config"} if "define_experiment_flag" in text else set()
    for argument in container["args"]:
        assert re.match(r"--(\w+)", argument)[1] in known, argument


@pytest.mark.parametrize("job", JOBS)
def test_slurm_scripts_are_sound(job):
    script = ROOT / f"launch/slurm/{job}.sh"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text(encoding="utf-8").splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    known = {
        "--job-name", "--ntasks-per-node", "--gpus-per-node", "--exclusive", "--signal",
        "--requeue", "--open-mode",
    }  # fmt: skip
    assert {option.split("=")[0] for option in options} <= known
    # Slurm reads none after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    assert "--requeue" in options
    assert any(option.startswith("--signal=TERM@") for option in options)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("ended", "status", "is_requeued"),
    [("exit 143", 143, True), ("exit 0", 0, False), ("exit 1", 1, False), ("exit 137", 137, False)],
)
def test_what_sigterm_ended_is_requeued(tmp_path, job, ended, status, is_requeued):
    """As a real slurmctld does it: without the request, the job is FAILED."""
    variables = slurm_variables(tmp_path, ended)
    command = [ROOT / f"launch/slurm/{job}.sh", "--mesh=1,1,16"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == "77\n" * is_requeued


@pytest.mark.parametrize("job", ["train", "finetune"])
def test_the_training_script_starts_either_job(tmp_path, job):
    variables = slurm_variables(tmp_path, 'echo "$@"')
    variables |= {} if job == "train" else {"GLM_JAX_JOB": job}
    command = [ROOT / "launch/slurm/train.sh", "--workdir=w w"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    expected = f"--kill-on-bad-exit=1 .venv/bin/python -m launch.{job} --workdir=w w\n"
    assert done.stdout == expected


@pytest.mark.parametrize("job", ["train", "evaluate", "decode", "serve"])
def test_of_many_nodes_the_first_coordinates(tmp_path, job):
    """More names than a pipe holds: none is read but the first."""
    variables = slurm_variables(tmp_path, 'echo "$GLM_JAX_COORDINATOR"')
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nseq -f node%.0f 20000\n")
    variables |= {"GLM_JAX_TOGETHER": "1", "GLM_JAX_PORT": "1234"}
    command = [ROOT / f"launch/slurm/{job}.sh", "--mesh=1,1,16"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "node1:1234\n"
