"""The manifests for KubeRay: no cluster runs them here, so they are held against its schemas and what they name."""

import importlib
import json
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.embed.config import EmbedConfig
from pipelines.run_config import load_config
from pipelines.train.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas"
KUSTOMIZATION = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text(encoding="utf-8"))
MANIFESTS = [name for name in KUSTOMIZATION["resources"] if name.endswith(".yaml")]
(JOBS,) = (KUBERAY / name for name in KUSTOMIZATION["resources"] if name not in MANIFESTS)
(CONFIGS,) = yaml.safe_load((JOBS / "kustomization.yaml").read_text(encoding="utf-8"))["configMapGenerator"]
# What a pod may take from the environment that is no place: it has to come from a secret.
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def manifest(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((KUBERAY / name).read_text(encoding="utf-8"))
    return document


def job_of(name: str) -> dict[str, Any]:
    """The RayJob of a manifest, that of a RayCronJob too."""
    spec = manifest(name)["spec"]
    job: dict[str, Any] = spec.get("jobTemplate", spec)
    return job


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]


def pods(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The pod of each group, and its only container."""
    for group in groups(job):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield pod, container


def settings() -> dict[str, str]:
    lines = (KUBERAY / "settings.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def command_of(job: dict[str, Any]) -> list[str]:
    """The words that reach `mdm`: through the submitter's shell, which Ray's command line undoes, and the head's."""
    bash, dash_c, script = shlex.split(job["entrypoint"])
    assert (bash, dash_c) == ("bash", "-c")
    execute, mdm, *words = shlex.split(string.Template(script).substitute(settings()))
    assert (execute, mdm) == ("exec", "mdm")
    return words


def config_of(job: dict[str, Any]) -> Any:
    """The configuration that an entrypoint asks for, its file read from where the ConfigMap has it from."""
    mounts = [mount for _, container in pods(job) for mount in container["volumeMounts"]]
    (folder,) = {mount["mountPath"] for mount in mounts if mount["name"] == "configs"}
    command, *words = command_of(job)
    assert words[-1] == "--json"
    local = [word.replace(folder, str(ROOT / "jobs" / "configs"), 1) for word in words[:-1]]
    assert local != words[:-1]
    return load_config(importlib.import_module(f"jobs.{command}").CONFIG, local, prog=f"mdm {command}", description="")


def amount(container: dict[str, Any], name: str) -> int:
    return int(container["resources"]["limits"].get(name, 0))


def on_workers(job: dict[str, Any], name: str, replicas: str) -> int:
    """CPUs or GPUs of all workers, at `replicas`, `minReplicas` or `maxReplicas` of each group."""
    return sum(group[replicas] * amount(group["template"]["spec"]["containers"][0], name) for group in groups(job)[1:])


def test_there_is_a_job_for_each_command_and_one_for_each_night() -> None:
    kinds = {name: (manifest(name)["kind"], command_of(job_of(name))[0]) for name in MANIFESTS}
    assert sorted(kinds.values()) == [
        ("RayCronJob", "refresh"),
        ("RayJob", "embed"),
        ("RayJob", "refresh"),
        ("RayJob", "train"),
    ]
    components = [manifest(name)["metadata"]["labels"]["app.kubernetes.io/component"] for name in MANIFESTS]
    assert len(set(components)) == len(MANIFESTS)
    # Each may be started alone, as the README says, and no other with it.
    readme = (KUBERAY / "README.md").read_text(encoding="utf-8")
    assert set(components) >= set(re.findall(r"component=([\w-]+)", readme)) - {"config"}
    assert {path.name for path in KUBERAY.glob("*.yaml")} == {*MANIFESTS, "kustomization.yaml"}


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="KubeRay's schemas (../shared/schemas) are absent")
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_the_operator_takes(name: str) -> None:
    document = manifest(name)
    schema = json.loads((SCHEMAS / f"{document['kind'].lower()}_v1.json").read_text(encoding="utf-8"))
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []
    assert document["apiVersion"] == "ray.io/v1"
    # KubeRay makes names of these, which Kubernetes allows 63 letters.
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,35}", document["metadata"]["name"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_entrypoint_is_a_command_line_of_this_version(name: str) -> None:
    places = [word for word in command_of(job_of(name)) if "://" in word]
    resolved = config_of(job_of(name)).model_dump_json()
    assert places
    assert [place for place in places if place not in resolved] == []
    # Nothing is left for a shell to put in.
    assert "$" not in " ".join(command_of(job_of(name)))


def test_the_jobs_hand_on_to_each_other() -> None:
    refresh, embed, train = (config_of(job_of(f"{name}.yaml")) for name in ("refresh", "embed", "train"))
    assert refresh.table.uri == embed.table == train.data.table
    assert refresh.table.uri.startswith("s3://")
    assert isinstance(embed, EmbedConfig)
    assert isinstance(train, TrainConfig)
    assert (embed.encoder, embed.max_tokens) == (train.text.encoder, train.text.max_tokens)
    assert train.checkpoint.uri.startswith("s3://")


def test_the_nightly_refresh_is_the_refresh_with_an_end_before_the_next() -> None:
    nightly, once = manifest("refresh-nightly.yaml")["spec"], job_of("refresh.yaml")
    limits = {"activeDeadlineSeconds", "preRunningDeadlineSeconds"}
    assert {key: value for key, value in nightly["jobTemplate"].items() if key not in limits} == once
    assert re.fullmatch(r"\d{1,2} \d{1,2} \* \* \*", nightly["schedule"])
    assert nightly["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600


def test_the_workers_suffice_for_what_the_configuration_asks() -> None:
    job = job_of("train.yaml")
    scaling = config_of(job).scaling
    workers = scaling.workers if isinstance(scaling.workers, tuple) else (scaling.workers, scaling.workers)
    for resource, each in (("nvidia.com/gpu", scaling.gpus_per_worker), ("cpu", scaling.cpus_per_worker)):
        # The run starts once `replicas` are there, and may grow to `maxReplicas`.
        assert workers[0] * each <= on_workers(job, resource, "replicas")
        assert workers[1] * each <= on_workers(job, resource, "maxReplicas")
    # Each worker fits a pod, with none of its CPUs on another.
    for _, container in list(pods(job))[1:]:
        fit = amount(container, "nvidia.com/gpu") // scaling.gpus_per_worker
        assert fit * scaling.cpus_per_worker <= amount(container, "cpu")


def test_embedding_has_a_cpu_for_each_gpu() -> None:
    job = job_of("embed.yaml")
    config = config_of(job)
    assert (config.workers, config.gpus_per_worker) == ("auto", 1)
    assert 0 < on_workers(job, "nvidia.com/gpu", "replicas") <= on_workers(job, "cpu", "replicas")


@pytest.mark.parametrize("name", MANIFESTS)
def test_jobs_end_and_are_tried_again(name: str) -> None:
    job = job_of(name)
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["backoffLimit"] > 0
    for group in groups(job)[1:]:
        # No autoscaler: what is asked for is there from the start.
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
    for pod, container in pods(job):
        assert pod["terminationGracePeriodSeconds"] > 0
        assert container["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for pod, container in pods(job) if name == "train.yaml" else []:
        (drain,) = [one["value"] for one in container["env"] if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert 60 < int(drain) < pod["terminationGracePeriodSeconds"]
    head, *workers = pods(job)
    assert "tolerations" not in head[0]
    for pod, container in workers:
        wanted = {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
        found = {toleration["key"] for toleration in pod.get("tolerations", [])}
        assert found == (wanted if amount(container, "nvidia.com/gpu") else set())


@pytest.mark.parametrize("name", MANIFESTS)
def test_secrets_come_by_reference_and_ray_asks_for_its_token(name: str) -> None:
    job = job_of(name)
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    readme = (KUBERAY / "README.md").read_text(encoding="utf-8")
    for pod, container in pods(job):
        given = {variable["name"]: variable for variable in container["env"]}
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        for variable in given.values():
            if SECRET.search(variable["name"]):
                reference = variable["valueFrom"]["secretKeyRef"]
                assert f"secret generic {reference['name']} " in readme
                assert reference["key"] == variable["name"]
                assert "value" not in variable
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"} < given.keys()
        assert container["envFrom"] == [{"configMapRef": {"name": "mdm-settings"}}]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000  # the Dockerfile's
        assert not pod["automountServiceAccountToken"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert not [name for name in settings() if SECRET.search(name)]
    # Keys of AWS, and bearer tokens, by their looks.
    text = "".join(path.read_text(encoding="utf-8") for path in KUBERAY.iterdir())
    assert not re.search(r"AKIA[0-9A-Z]{16}|eyJ[\w-]{20,}|[\w/+]{40}", text)


def test_ray_is_the_version_of_the_image() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    assert pinned is not None
    assert {job_of(name)["rayClusterSpec"]["rayVersion"] for name in MANIFESTS} == {pinned[1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Without Ray's dashboard KubeRay can neither submit a job nor see that a pod is well.
    assert any(extra.startswith("ray[default]") for extra in project["optional-dependencies"]["cluster"])
    assert {image["newTag"] for image in KUSTOMIZATION["images"]} == {
        f"{project['version']}-{target}" for target in ("cpu", "gpu")
    }


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_job_has_one_image_and_gpus_only_with_that_for_gpus(name: str) -> None:
    job = job_of(name)
    (image,) = {container["image"] for _, container in pods(job)}
    assert image == ("mdm-gpu" if on_workers(job, "nvidia.com/gpu", "replicas") else "mdm-cpu")
    assert image in {known["name"] for known in KUSTOMIZATION["images"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_volumes_are_of_config_maps_that_are_made(name: str) -> None:
    made = {CONFIGS["name"], *(generator["name"] for generator in KUSTOMIZATION["configMapGenerator"])}
    for pod, container in pods(job_of(name)):
        assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
        assert {volume["configMap"]["name"] for volume in pod["volumes"]} <= made
        assert {source["configMapRef"]["name"] for source in container["envFrom"]} <= made


def test_every_configuration_is_in_the_config_map() -> None:
    files = sorted(f"configs/{path.name}" for path in (ROOT / "jobs" / "configs").iterdir())
    assert sorted(CONFIGS["files"]) == files
    assert CONFIGS["options"]["disableNameSuffixHash"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_all_of_it_together() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(KUBERAY)], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(built.stdout))
    by_kind = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    configs = by_kind["ConfigMap", "mdm-configs"]["data"]
    for path in (ROOT / "jobs" / "configs").iterdir():
        assert configs[path.name] == path.read_text(encoding="utf-8")
    assert by_kind["ConfigMap", "mdm-settings"]["data"] == settings()
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in KUSTOMIZATION["images"]}
    for name in MANIFESTS:
        document = manifest(name)
        expected = json.loads(
            re.sub(r'"image": "(mdm-\w+)"', lambda match: f'"image": "{images[match[1]]}"', json.dumps(document))
        )
        assert by_kind[document["kind"], document["metadata"]["name"]] == expected
    assert len(documents) == len(MANIFESTS) + 2
