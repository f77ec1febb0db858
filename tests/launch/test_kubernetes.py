"""launch/kubernetes.yaml: its fields are valid, and its hosts, names and exit statuses agree with each other."""

import copy
import json
import os
import re

import jsonschema
import pytest
import yaml

from ftwt_jax.commands.parse import parse
from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.parallel.processes import LOST
from tests.conftest import ROOT

TEXT = (ROOT / "launch" / "kubernetes.yaml").read_text()
SCHEMA = json.loads((ROOT / "tests" / "schemas" / "jobset.json").read_text())
MISTAKE = 2


@pytest.fixture
def jobset():
    return yaml.safe_load(TEXT)


def parts(jobset):
    """The replicated job, its Job, its pod and the pod's container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def test_it_fits_the_schema(jobset):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(jobset, SCHEMA)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda jobset: parts(jobset)[1].update(backofLimit=0), "backofLimit"),
        (lambda jobset: parts(jobset)[2].update(restartPolicy="OnFailure"), "Never"),
        (lambda jobset: parts(jobset)[3]["env"].append({"name": "A", "value": 2}), "not of type 'string'"),
        (lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Restart"), "is not one of"),
    ],
)
def test_the_schema_refuses_mistakes(jobset, change, says):
    change(jobset)
    with pytest.raises(jsonschema.ValidationError, match=says):
        jsonschema.validate(jobset, SCHEMA)


def test_every_host_is_one_process_and_all_connect_to_the_first(jobset):
    replicated, job, _, container = parts(jobset)
    environment = {each["name"]: each for each in container["env"]}
    hosts = int(environment["JAX_NUM_PROCESSES"]["value"])
    assert (replicated["replicas"], job["completionMode"]) == (1, "Indexed")
    assert job["parallelism"] == job["completions"] == hosts
    index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"]
    port = container["ports"][0]["containerPort"]
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}:{port}"
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == first
    assert f"jobset-name={jobset['metadata']['name']}," in TEXT


def action_for(jobset, message, reason):
    """The action of the first rule that matches; without one, a restart that counts."""
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]
        ):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "evicted", "action"),
    [
        (PREEMPTED, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (PREEMPTED, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (MISTAKE, False, "FailJobSet"),
        (LOST, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_the_exit_status_decides_between_restart_and_failure(jobset, status, evicted, action):
    _, job, _, container = parts(jobset)
    message, reason = "Job has reached the specified backoff limit", "BackoffLimitExceeded"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["containerName"] == container["name"]
            fits = codes["operator"] == "In" and status in codes["values"]
            what = f"Container train for pod default/ftwt-hosts-0-1-x failed with exit code {status}"
        else:
            fits = evicted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
            what = "Pod default/ftwt-hosts-0-1-x has condition DisruptionTarget"
        if fits:
            assert rule["action"] == "FailJob"
            message, reason = f"{what} matching FailJob rule at index {index}", "PodFailurePolicy"
            break
    assert job["backoffLimit"] == 0
    assert action_for(jobset, message, reason) == action


def test_the_workdir_is_on_the_shared_volume_and_the_command_is_valid(jobset):
    _, _, pod, container = parts(jobset)
    assert container["command"] == ["python", "-m", "ftwt_jax", "train"]
    values = parse("train", container["args"])
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert os.path.dirname(values.flags.workdir) == mount["mountPath"]


def test_with_the_lines_for_a_tpu_it_fits_the_schema_too(jobset):
    text = re.sub(r"# TPU nodeSelector:", "nodeSelector:", TEXT)
    text = re.sub(r" *nvidia.com/gpu.*\n", "", text)
    text = text.replace("# TPU   cloud", "  cloud").replace("# TPU google", "google")
    assert "# TPU" not in text
    changed = yaml.safe_load(text)
    jsonschema.validate(changed, SCHEMA)
    _, _, pod, container = parts(changed)
    assert len(pod["nodeSelector"]) == 2
    assert list(container["resources"]["limits"]) == ["google.com/tpu"]
    del pod["nodeSelector"]
    same = copy.deepcopy(jobset)
    parts(same)[3]["resources"] = container["resources"]
    assert changed == same
