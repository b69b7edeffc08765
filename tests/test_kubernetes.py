"""Kubernetes files against Kubernetes' own schemas, KServe's and kustomize's against hand-written ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from test_triton import COMPATIBLE, write_plan

from engines.service.ensemble import DECODERS, PREPROCESS_MODEL
from engines.service.kubernetes import DRAIN_SECONDS, HEADER, PAUSE_SECONDS, Serving, kubernetes_files
from engines.service.options import RepositoryOptions
from engines.service.repository import Repository, TritonError, make_repository
from engines.service.served_model import Source, read_model

KUBERNETES = "1.31"
"""Oldest version whose schemas the files must pass; the newest that the validator knows is tried, too."""


def closed(**properties: Any) -> dict[str, Any]:
    """An object with these fields and no other; those that begin with `!` are required."""
    required = [name.removeprefix("!") for name in properties if name.startswith("!")]
    fields = {name.removeprefix("!"): schema for name, schema in properties.items()}
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def each(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, WHOLE, TRUTH, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
METADATA = closed(**{"!name": TEXT, "labels": TEXTS, "annotations": TEXTS})

SERVING_RUNTIME = closed(
    **{"!apiVersion": {"const": "serving.kserve.io/v1alpha1"}, "!kind": {"const": "ServingRuntime"}},
    **{"!metadata": METADATA},
    **{
        "!spec": closed(
            annotations=TEXTS,
            supportedModelFormats=each(closed(**{"!name": TEXT}, version=TEXT, autoSelect=TRUTH, priority=WHOLE)),
            protocolVersions=each({"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}),
            **{"!containers": each(ANY)},
            volumes=each(ANY),
        )
    },
)
"""The fields of KServe's ServingRuntime that are used, as its documentation of serving.kserve.io/v1alpha1 has them.

Containers, volumes and affinity are Kubernetes' own: they are checked inside a Pod (`as_pod`).
"""

INFERENCE_SERVICE = closed(
    **{"!apiVersion": {"const": "serving.kserve.io/v1beta1"}, "!kind": {"const": "InferenceService"}},
    **{"!metadata": METADATA},
    **{
        "!spec": closed(
            **{
                "!predictor": closed(
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    tolerations=each(ANY),
                    affinity=ANY,
                    automountServiceAccountToken=TRUTH,
                    serviceAccountName=TEXT,
                    terminationGracePeriodSeconds=WHOLE,
                    **{
                        "!model": closed(
                            **{"!modelFormat": closed(**{"!name": TEXT}, version=TEXT)},
                            runtime=TEXT,
                            protocolVersion={"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                            storageUri=TEXT,
                        )
                    },
                )
            }
        )
    },
)

KUSTOMIZATION = closed(
    **{"!apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"}, "!kind": {"const": "Kustomization"}},
    **{"!resources": each(TEXT)},
)

OWN_SCHEMAS = {
    "ServingRuntime": SERVING_RUNTIME,
    "InferenceService": INFERENCE_SERVICE,
    "Kustomization": KUSTOMIZATION,
}


POD_FIELDS = (
    *("affinity", "tolerations", "volumes"),
    *("automountServiceAccountToken", "serviceAccountName", "terminationGracePeriodSeconds"),
)


def as_pod(document: dict[str, Any]) -> dict[str, Any]:
    """What is Kubernetes' own in one of KServe's documents, as a Pod."""
    spec = document["spec"].get("predictor", document["spec"])
    container = {"name": "kserve-container", "image": "triton"}
    own = {key: spec[key] for key in spec if key in POD_FIELDS}
    pod = {"containers": spec.get("containers", [container]), **own}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": pod}


def check(document: dict[str, Any], version: str = KUBERNETES) -> None:
    """Checks one document strictly; a kind that has no schema fails."""
    if document["kind"] in OWN_SCHEMAS:
        jsonschema.Draft202012Validator(OWN_SCHEMAS[document["kind"]]).validate(document)
        if document["kind"] != "Kustomization":
            check(as_pod(document), version)
        return
    kubernetes_validate.validate(document, version, strict=True)


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where it is: 50 sets of files take a third of the time."""


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """Or each check reads megabytes of them."""
    with pytest.MonkeyPatch.context() as patch:
        utils = kubernetes_validate.utils
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def make(plan: Path, folder: Path, **changes: Any) -> Repository:
    options = {"kubernetes": folder / "cluster", **changes}
    return make_repository(RepositoryOptions(plan, folder / "repository", **options))


def documents(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: list(yaml.load_all(path.read_text(), LOADER)) for path in sorted(folder.glob("*.yaml"))}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "in" / "encoder.plan")


def test_every_document_is_valid(plan: Path, tmp_path: Path) -> None:
    """Against the oldest and the newest schemas; which files there are, and what `kubectl apply -k` takes."""
    other = write_plan(tmp_path / "in" / "other.plan", compute_capabilities=["12.0"])
    always = {"Deployment", "Service", "ConfigMap", "NetworkPolicy", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"more": (other,), "ensemble": True, "image": "registry/encoder:1"}, {"PersistentVolumeClaim", "Pod"}),
        ({"storage": "s3://models.example.com:9000/sam3/encoder"}, {"ServiceAccount"}),
        ({"storage": "pvc://shared/models/sam3"}, {"Pod"}),
    ]
    for number, (changes, extra) in enumerate(cases):
        folder = tmp_path / f"cluster{number}"
        found = make(plan, tmp_path, name=f"m{number}", **{"kubernetes": folder, **changes})
        files = documents(folder)
        for version in (KUBERNETES, kubernetes_validate.latest_version()):
            for document in (document for content in files.values() for document in content):
                check(document, version)
        kinds = {document["kind"] for content in files.values() for document in content}
        assert kinds == always | extra | set(OWN_SCHEMAS)
        applied = ["deployment.yaml", "service.yaml", "network.yaml", "autoscaler.yaml", "storage.yaml"]
        assert files["kustomization.yaml"][0]["resources"] == [name for name in applied if name in files]
        assert {path for path in found.files if path.parent == folder} == set(folder.iterdir())


FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("Deployment", lambda found: found["spec"].update(replica=3)),
    ("Deployment", lambda found: found["spec"]["template"]["spec"]["containers"][0].update(limits={})),
    ("Deployment", lambda found: found["spec"]["template"]["spec"]["containers"][0]["startupProbe"].update(path="/")),
    ("Deployment", lambda found: found["spec"].pop("selector")),
    ("NetworkPolicy", lambda found: found["spec"]["ingress"][0].update(port=8080)),
    ("ConfigMap", lambda found: found["data"].update(port=8080)),
    ("Pod", lambda found: found["spec"]["containers"][0]["securityContext"].update(readOnly=True)),
    ("Service", lambda found: found["spec"]["ports"][0].update(port="http")),
    ("HorizontalPodAutoscaler", lambda found: found["spec"].update(maxReplicas="many")),
    ("HorizontalPodAutoscaler", lambda found: found["spec"]["metrics"][0]["pods"].update(name="x")),
    ("PersistentVolumeClaim", lambda found: found["spec"].update(accessModes="ReadWriteMany")),
    ("PodDisruptionBudget", lambda found: found["spec"].update(minimum=1)),
    ("ServingRuntime", lambda found: found["spec"].update(models=[])),
    ("ServingRuntime", lambda found: found["spec"]["containers"][0].update(gpus=1)),
    ("ServingRuntime", lambda found: found["spec"].pop("containers")),
    ("InferenceService", lambda found: found["spec"]["predictor"]["model"].pop("modelFormat")),
    ("InferenceService", lambda found: found["spec"]["predictor"]["model"].update(storageURI="x")),
    ("InferenceService", lambda found: found["spec"]["predictor"]["affinity"].update(nodes=[])),
    ("Kustomization", lambda found: found.update(resource=[])),
    ("Deployment", lambda found: found.update(kind="Deploiment")),
    ("InferenceService", lambda found: found.update(kind="InferenceServices")),
]


def test_a_planted_fault_is_seen(plan: Path, tmp_path: Path) -> None:
    """The control: a wrong field, a missing one, or an unknown kind is not passed over."""
    make(plan, tmp_path)
    whole = {document["kind"]: document for content in documents(tmp_path / "cluster").values() for document in content}
    failures = (
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
        jsonschema.ValidationError,
    )
    for kind, plant in FAULTS:
        check(whole[kind])
        faulty = copy.deepcopy(whole[kind])
        plant(faulty)
        with pytest.raises(failures):
            check(faulty)


def container_of(document: dict[str, Any], name: str = "triton") -> dict[str, Any]:
    containers = document["spec"]["template"]["spec"]["containers"]
    return next(container for container in containers if container["name"] == name)


def deployments(files: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [document for document in files["deployment.yaml"] if document["kind"] == "Deployment"]


def expressions(document: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    affinity = document["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return {item["key"]: (item["operator"], item["values"]) for item in term["matchExpressions"]}


MAJOR, MINOR = "nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"


def test_mixed_gpu_generations_and_a_plan_for_all(plan: Path, tmp_path: Path) -> None:
    other = write_plan(tmp_path / "in" / "other.plan", compute_capabilities=["12.0"])
    make(plan, tmp_path, more=(other,))
    files = documents(tmp_path / "cluster")
    ada, blackwell = deployments(files)
    assert expressions(ada) == {MAJOR: ("In", ["8"]), MINOR: ("In", ["9"])}
    assert expressions(blackwell) == {MAJOR: ("In", ["12"]), MINOR: ("In", ["0"])}
    assert len(predictors(files)) == 2
    options = {"version_compatible": False, "hardware_compatible": "ampere+"}
    make(write_plan(tmp_path / "encoder.plan", options=options), tmp_path, name="ampere")
    (deployment,) = deployments(documents(tmp_path / "cluster"))
    assert expressions(deployment) == {MAJOR: ("Gt", ["7"])} and deployment["metadata"]["name"] == "ampere"


def test_the_autoscaler_asks_for_waiting_requests(plan: Path, tmp_path: Path) -> None:
    make(plan, tmp_path, name="Our.Model_1")
    text = (tmp_path / "cluster" / "autoscaler.yaml").read_text()
    scaler = next(yaml.safe_load_all(text))
    waiting, processor = scaler["spec"]["metrics"]
    assert waiting["pods"]["metric"]["name"] == "nv_inference_pending_request_count"
    assert waiting["pods"]["metric"]["selector"]["matchLabels"] == {"model": "Our.Model_1"}  # Triton's name
    assert waiting["pods"]["target"]["averageValue"] == "8"  # one full batch
    assert processor["resource"]["name"] == "cpu" and "prometheus-adapter" in text
    assert scaler["metadata"]["name"] == "our-model-1-cc-8-9"  # Kubernetes' name


def predictors(files: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [found["spec"]["predictor"] for found in files["kserve.yaml"] if found["kind"] == "InferenceService"]


@pytest.mark.parametrize(
    ("storage", "uri", "endpoint", "https"),
    [
        ("s3://bucket/models", "s3://bucket/models", None, None),
        ("s3://minio.svc:9000/models/sam3", "s3://models/sam3", "minio.svc:9000", "0"),
        ("s3://http://10.0.0.7:9000/models", "s3://models", "10.0.0.7:9000", "0"),
        ("s3://https://minio.example.com:443/models/a/b", "s3://models/a/b", "minio.example.com:443", "1"),
    ],
)
def test_s3(storage: str, uri: str, endpoint: str | None, https: str | None, plan: Path, tmp_path: Path) -> None:
    """Triton and KServe write the address of a server of one's own differently, and both need the keys."""
    make(plan, tmp_path, storage=storage)
    files = documents(tmp_path / "cluster")
    container = container_of(deployments(files)[0])
    assert f"--model-repository={storage}" in container["args"] and "storage.yaml" not in files
    secrets = [entry["valueFrom"].get("secretKeyRef") for entry in container["env"]]
    assert [secret["name"] for secret in secrets if secret] == ["sam3-encoder-s3"] * 3
    (predictor,) = predictors(files)
    assert predictor["model"]["storageUri"] == uri
    account = next(found for found in files["kserve.yaml"] if found["kind"] == "ServiceAccount")
    assert predictor["serviceAccountName"] == account["metadata"]["name"]
    assert account["secrets"] == [{"name": "sam3-encoder-s3"}]
    text = (tmp_path / "cluster" / "kserve.yaml").read_text()
    found = dict(part.split("=", 1) for part in text.split() if part.startswith("serving.kserve.io/s3-"))
    assert found.get("serving.kserve.io/s3-endpoint") == endpoint
    assert found.get("serving.kserve.io/s3-usehttps") == https


def test_storage(plan: Path, tmp_path: Path) -> None:
    """An existing claim is not written, or `kubectl delete -k` would delete it; what no longer applies is removed."""
    make(plan, tmp_path)  # the control: without --storage the claim is the model's own
    assert documents(tmp_path / "cluster")["storage.yaml"][0]["metadata"]["name"] == "sam3-encoder-models"
    (tmp_path / "cluster" / "overlay.yaml").write_text("kind: Kustomization\n")  # somebody else's
    make(plan, tmp_path, storage="pvc://shared/models/sam3")
    files = documents(tmp_path / "cluster")
    assert "storage.yaml" not in files and "overlay.yaml" in files
    (deployment,) = deployments(files)
    (mount,) = (mount for mount in container_of(deployment)["volumeMounts"] if mount["name"] == "models")
    assert mount == {"name": "models", "mountPath": "/models", "subPath": "models/sam3", "readOnly": True}
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "shared"
    (to_fill,) = files["upload.yaml"][0]["spec"]["containers"][0]["volumeMounts"]
    assert to_fill == {"name": "models", "mountPath": "/models", "subPath": "models/sam3"}
    assert predictors(files)[0]["model"]["storageUri"] == "pvc://shared/models/sam3"
    assert files["network.yaml"][0]["spec"]["egress"] == []
    make(plan, tmp_path, storage="s3://s3.example.com:9000/bucket/models")
    files = documents(tmp_path / "cluster")
    ports = [port["port"] for rule in files["network.yaml"][0]["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 9000] and "upload.yaml" not in files


def test_the_ensembles_image_has_pillow(plan: Path, tmp_path: Path) -> None:
    name = "registry.example.com:5000/team/encoder:7"
    with pytest.raises(TritonError, match=r"--ensemble, .* need a container image with .*Pillow"):
        make(plan, tmp_path, ensemble=True)
    make(plan, tmp_path, ensemble=True, image=name)
    files = documents(tmp_path / "cluster")
    dockerfile = (tmp_path / "cluster" / "Dockerfile").read_text()
    assert f"docker build -t {name} kubernetes && docker push {name}" in dockerfile
    assert "FROM nvcr.io/nvidia/tritonserver:25.09-py3\n" in dockerfile and "pip install" in dockerfile
    images = {
        container_of(deployments(files)[0])["image"],
        runtime_of(files)["spec"]["containers"][0]["image"],
    }
    assert images == {name}


def runtime_of(files: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return next(one for one in files["kserve.yaml"] if one["kind"] == "ServingRuntime")


def test_a_version_compatible_plan_tells_triton(tmp_path: Path) -> None:
    """Also in the container whose TensorRT built it: without consent no lean runtime is started."""
    flag = "--backend-config=tensorrt,version-compatible=true"
    for version in ("10.9.0.34", "10.13.3.9"):
        plan = write_plan(tmp_path / "encoder.plan", options=COMPATIBLE, tensorrt_version=version)
        make(plan, tmp_path, name=f"of-{version.replace('.', '-')}")
        files = documents(tmp_path / "cluster")
        assert flag in container_of(deployments(files)[0])["args"]
        assert flag in runtime_of(files)["spec"]["containers"][0]["args"]
    make(write_plan(tmp_path / "other.plan"), tmp_path, name="other")
    assert flag not in container_of(deployments(documents(tmp_path / "cluster"))[0])["args"]


def serving_of(source: Source, other: Source, chance: random.Random) -> Serving:
    """One combination of the options."""
    several = chance.random() < 0.3
    ensemble = chance.random() < 0.5
    digest = "sha256:" + 64 * "b"
    images = ["registry.example.com/encoder:1", f"encoder@{digest}", f"nvcr.io/nvidia/tritonserver:25.09-py3@{digest}"]
    storage = chance.choice(
        [None, "pvc://shared", "pvc://shared/models", "s3://bucket/models", "s3://host:9000/bucket/m"]
    )
    return Serving(
        model=chance.choice(["sam3-encoder", "Our.Model_1", "m" * 63]),
        source=chance.choice([source, other]),
        capabilities=("8.9", "12.0") if several else chance.choice([(), ("8.9",)]),
        container="25.09",
        storage=storage or "pvc://own",
        own_claim=storage is None,
        gpus=chance.choice([1, 2, 16]),
        compatible=chance.random() < 0.5,
        ensemble=ensemble,
        image_name=chance.choice(images if ensemble else [None, *images]),
        proxy_image=chance.choice(["nginx:1", f"registry.example.com/nginx@{digest}"]),
        replicas=chance.choice([1, 2, 3, 20]),
        rollout=chance.choice(["surge", "replace"]),
    )


COMBINATIONS = 50


def parsed(files: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    return {name: list(yaml.load_all(text, LOADER)) for name, text in files.items() if name.endswith(".yaml")}


def test_combinations_of_the_options(plan: Path, tmp_path: Path) -> None:
    """Each of 50 is valid, strictly, and has what a platform team asks for."""
    source, other = read_model(plan), read_model(write_plan(tmp_path / "fixed.plan", batch="2"))
    chance = random.Random(29)
    valid: set[str] = set()
    seen = 0
    while seen < COMBINATIONS:
        serving = serving_of(source, other, chance)
        if serving.image_name is not None and "nvidia" in serving.image_name and serving.ensemble:
            continue
        seen += 1
        files = parsed(kubernetes_files(serving))
        for document in (document for content in files.values() for document in content):
            text = json.dumps(document, sort_keys=True)
            if text not in valid:
                check(document)
                valid.add(text)
        check_platform(serving, files)
    assert len(valid) > COMBINATIONS  # they differ


BYTES_PER_PIXEL, DECODER_AT_REST = 10, 220 * 2**20
"""What a decoder takes, measured: preprocess/model.py with torch, on a progressive JPEG."""


def test_a_pod_has_room_for_its_decoders(plan: Path) -> None:
    """For an image as large as their limits allow in each of them; the control is a pod without them."""
    source = read_model(plan)
    without, with_them = (
        dataclasses.replace(serving_of(source, source, random.Random(1)), ensemble=ensemble)
        for ensemble in (False, True)
    )
    (pixels,) = re.findall(r"^MAX_PIXELS = ([0-9_]+)$", PREPROCESS_MODEL.read_text(), re.MULTILINE)
    most = DECODERS * (BYTES_PER_PIXEL * int(pixels) + DECODER_AT_REST)
    room = (with_them.memory_gib - without.memory_gib) * 2**30
    assert most < room < 2 * most
    deployment = deployments(parsed(kubernetes_files(with_them)))[0]
    assert container_of(deployment)["resources"]["limits"]["memory"] == f"{with_them.memory_gib}Gi"


def test_a_pod_has_room_for_the_old_and_the_new_version(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From S3 Triton copies a version of 2.5 GiB to /tmp; from a volume it copies none."""
    source = read_model(plan)
    monkeypatch.setattr(Source, "bytes", 5 * 2**29)
    for storage, room in (("s3://bucket/models", "7Gi"), ("pvc://shared", "1Gi")):
        serving = dataclasses.replace(
            serving_of(source, source, random.Random(1)), storage=storage, own_claim=False, capabilities=()
        )
        (deployment,) = deployments(parsed(kubernetes_files(serving)))
        volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
        assert volumes["tmp"]["emptyDir"]["sizeLimit"] == room


def check_platform(serving: Serving, files: dict[str, list[dict[str, Any]]]) -> None:
    """What a platform team asks for, on one set of files."""
    kserve, runtime = predictors(files)[0], runtime_of(files)
    (service,) = files["service.yaml"]
    selectors = [one["spec"]["selector"]["matchLabels"] for one in deployments(files)]
    assert len({json.dumps(one) for one in selectors}) == len(selectors) == max(1, len(serving.capabilities))
    for deployment, selector in zip(deployments(files), selectors, strict=True):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= selector.items() <= labels.items()
        pod, triton, proxy = (
            deployment["spec"]["template"]["spec"],
            container_of(deployment),
            container_of(deployment, "proxy"),
        )
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            check_locked(container, pod["volumes"])
        step = deployment["spec"]["strategy"]["rollingUpdate"]
        assert step == {"surge": {"maxUnavailable": 0, "maxSurge": 1}}.get(
            serving.rollout, {"maxUnavailable": 1, "maxSurge": 0}
        )
        assert triton["resources"]["limits"].keys() == {"nvidia.com/gpu", "memory", "ephemeral-storage"}
        assert triton["resources"]["limits"]["nvidia.com/gpu"] == str(serving.gpus)
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in pod["volumes"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in triton["volumeMounts"]
        assert triton["image"] == (serving.image_name or "nvcr.io/nvidia/tritonserver:25.09-py3")
        assert proxy["image"] == serving.proxy_image
        # the proxy quits, closing what is kept alive, before Triton is told to end, and the pod waits for both
        assert "-s quit" in proxy["lifecycle"]["preStop"]["exec"]["command"][2]
        paused, sleeps = PAUSE_SECONDS, int(triton["lifecycle"]["preStop"]["exec"]["command"][1])
        assert paused < sleeps and sleeps + DRAIN_SECONDS < pod["terminationGracePeriodSeconds"]
        assert {"--http-address=127.0.0.1", "--grpc-address=127.0.0.1"} <= set(triton["args"])
        check_probes(serving, triton, 8080, 8000)
        check_closed(triton)
    (container,) = runtime["spec"]["containers"]
    check_locked(container, runtime["spec"]["volumes"])
    check_probes(serving, container, 8080, 8080)
    check_closed(container)
    assert container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert kserve["terminationGracePeriodSeconds"] > DRAIN_SECONDS
    assert ("serviceAccountName" in kserve) is serving.storage.startswith("s3://")
    assert ("storage.yaml" in files) is serving.own_claim
    kinds = [document["kind"] for content in files.values() for document in content]
    scalers = [one for one in files["autoscaler.yaml"] if one["kind"] == "HorizontalPodAutoscaler"]
    scaled = [one["spec"]["scaleTargetRef"]["name"] for one in scalers]
    assert scaled == [one["metadata"]["name"] for one in deployments(files)]
    budgets = [one for one in files["autoscaler.yaml"] if one["kind"] == "PodDisruptionBudget"]
    least = sum(one["spec"]["minReplicas"] for one in scalers)
    assert least == serving.replicas * len(scalers) and kserve["minReplicas"] == serving.replicas
    assert all(one["spec"]["maxReplicas"] >= one["spec"]["minReplicas"] for one in scalers)
    assert len(budgets) == (1 if least > 1 else 0) and all(one["spec"]["maxUnavailable"] < least for one in budgets)
    assert kinds.count("NetworkPolicy") == 1
    (policy,) = files["network.yaml"]
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == {8080, 8081, 8002}


def check_locked(container: dict[str, Any], volumes: list[dict[str, Any]]) -> None:
    """It writes to volumes alone, and of the disk no more than it may."""
    security, resources = container["securityContext"], container["resources"]
    assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert all("ephemeral-storage" in resources[kind] for kind in ("requests", "limits"))
    by_name = {volume["name"]: volume for volume in volumes}
    scratch = {mount["mountPath"]: by_name[mount["name"]] for mount in container["volumeMounts"]}
    assert "emptyDir" in scratch["/tmp"] and "sizeLimit" in scratch["/tmp"]["emptyDir"]


def check_probes(serving: Serving, container: dict[str, Any], port: int, own: int) -> None:
    model = f"{serving.model}-images" if serving.ensemble else serving.model
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": f"/v2/models/{model}/ready", "port": port}
    words = container["livenessProbe"]["exec"]["command"]
    assert words[:3] == ["python3", "/etc/neck/canary.py", str(own)]
    assert words[3:] == ([f"{serving.model}-preprocess", "2"] if serving.ensemble else [])


def check_closed(container: dict[str, Any]) -> None:
    apis = "shared-memory,model-repository,trace,logging:closed-by=$(POD_UID)"
    wanted = {f"--http-restricted-api={apis}", f"--grpc-restricted-protocol={apis}", "--strict-readiness=false"}
    assert wanted <= set(container["args"])
    assert any(entry["name"] == "POD_UID" for entry in container["env"])


def test_what_is_refused(plan: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"storage": "/mnt/models"}, "--storage '/mnt/models' is invalid"),
        ({"storage": "pvc://Bad_Name"}, "expected pvc://CLAIM"),
        ({"storage": "s3://https://minio.example.com/models"}, "HOST:PORT"),  # Triton takes it for a bucket
        ({"storage": "s3://minio:9000"}, "HOST:PORT"),
        ({"gpus": 0}, "--gpus 0 is invalid"),
        ({"replicas": 0}, "--replicas 0 is invalid"),
        ({"rollout": "big-bang"}, "--rollout 'big-bang' is invalid"),
        (
            {"image": "registry/encoder@sha256:12"},
            "'registry/encoder@sha256:12' is not a valid name of a container image; expected",
        ),
        (
            {"image": "registry/encoder:1; rm"},
            "'registry/encoder:1; rm' is not a valid name of a container image; expected",
        ),
        ({"proxy_image": ""}, "'' is not a valid name of a container image; expected"),
        (
            {"image": "nvcr.io/nvidia/tritonserver:24.01-py3"},
            "24.01-py3.* use --image nvcr.io/nvidia/tritonserver:25.09-py3",
        ),
        ({"kubernetes": tmp_path / "repository" / "cluster"}, "inside the model repository"),
        ({"kubernetes": plan}, "encoder.plan: neck-export must write the Kubernetes files to a folder"),
    ]
    for changes, message in refused:
        with pytest.raises(TritonError, match=message):
            make(plan, tmp_path, **changes)
    unknown = write_plan(tmp_path / "unknown.plan", tensorrt_version="11.4.0.106")
    with pytest.raises(TritonError, match=r"does not know a container with TensorRT 11\.4\.0\.106.*with --container"):
        make(unknown, tmp_path)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "service.yaml").write_text("kind: Service\n")
    with pytest.raises(TritonError, match=r"service\.yaml: .*not written by neck-export"):
        make(plan, tmp_path)
    assert not (tmp_path / "repository").exists()
    (tmp_path / "cluster" / "service.yaml").unlink()
    make(unknown, tmp_path, container="27.01")
    written = [path.read_text() for path in (tmp_path / "cluster").iterdir()]
    assert written and all(text.startswith(HEADER) for text in written)
    make(unknown, tmp_path, container="27.01")  # its own files are written again
    assert not list((tmp_path / "cluster").glob(".*"))
