"""The Kubernetes manifests: each build is complete, valid and agrees with the code.

They are checked against Kubernetes' schemas; no cluster is needed.
"""

import base64
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import kubernetes_validate
import pytest
import ray
import yaml
from PIL import Image
from ray.serve.schema import ServeDeploySchema

import serve.offline.__main__
import serve.retrain.__main__
import train.cli
import tune.cli
from cluster import connect, private, serve_environment
from cluster.ingress import haproxy_config
from serve import config as serve_config
from serve.access import AllowedHosts
from serve.deployment import DRAIN_S
from tests import server
from tests.server import REPOSITORY

Object = dict[str, Any]

K8S = REPOSITORY / "k8s"
CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1")
KUBERNETES_VERSION = "1.32.0"
OF_NO_NAMESPACE = ("Namespace", "ResourceFlavor", "ClusterQueue")
# The operator appends suffixes to these names.
NAME_LIMITS = {"RayService": 47, "RayJob": 47, "CronJob": 52}
CLUSTERS = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
# Suffixes of a service's name, from the short name to the fully qualified one.
SERVICE_NAMES = ("", ".halyard", ".halyard.svc", ".halyard.svc.cluster.local")
# Depends on the machine: each container sets it from its CPU limit.
THREADS = "RAY_SERVE_HAPROXY_NBTHREAD"
BUILDS = sorted(str(path.parent.relative_to(K8S)) for path in K8S.glob("**/kustomization.yaml"))
# The objects in the base's files, read without building them with kustomize.
FILES = "files of base"
PARSERS = {
    "train/main.py": train.cli.parse,
    "tune/main.py": tune.cli.parse,
    "serve.offline": serve.offline.__main__.parse,
}

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which builds the manifests, is not installed"
)
built = [pytest.param(name, marks=needs_kubectl) for name in BUILDS]
each_build = pytest.mark.parametrize("name", built)
each_build_and_the_files = pytest.mark.parametrize("name", [FILES, *built])


class Pod(NamedTuple):
    """A pod template and its location."""

    where: str
    owner: Object
    template: Object

    @property
    def containers(self) -> list[Object]:
        spec = self.template["spec"]
        return [*spec["containers"], *spec.get("initContainers", [])]


@functools.cache
def build(name: str) -> list[Object]:
    """Return the objects of a base or overlay, of a component on the plain base, or of FILES."""
    if name == FILES:
        return [item for path in sorted((K8S / "base").glob("*.yaml")) for item in read(path)]
    with tempfile.TemporaryDirectory() as folder:
        target = K8S / name
        if name.startswith("components/"):
            # Kustomize accepts relative paths only.
            base, component = (os.path.relpath(path, folder) for path in (K8S / "base", target))
            text = yaml.safe_dump({"resources": [base], "components": [component]})
            Path(folder, "kustomization.yaml").write_text(text)
            target = Path(folder)
        command = ["kubectl", "kustomize", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def read(path: Path) -> list[Object]:
    """Return the objects of a file, without patches (lists) and kustomize's own file."""
    items = yaml.safe_load_all(path.read_text())
    return [item for item in items if isinstance(item, dict) and item["kind"] != "Kustomization"]


def pods(name: str) -> Iterator[Pod]:
    for item in build(name):
        where, spec = f"{item['kind']}/{item['metadata']['name']}", item.get("spec", {})
        if field := CLUSTERS.get(item["kind"]):
            cluster = spec[field]
            yield Pod(f"{where} head", item, cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield Pod(f"{where} {group['groupName']}", item, group["template"])
            if "submitterPodTemplate" in spec:
                yield Pod(f"{where} submitter", item, spec["submitterPodTemplate"])
        elif item["kind"] == "CronJob":
            yield Pod(where, item, spec["jobTemplate"]["spec"]["template"])
        elif "template" in spec:
            yield Pod(where, item, spec["template"])


def of_kind(name: str, kind: str) -> list[Object]:
    return [item for item in build(name) if item["kind"] == kind]


def validate(item: Object) -> None:
    _validate(json.dumps(item))


# Most builds have most objects in common.
@functools.cache
def _validate(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), KUBERNETES_VERSION, strict=True)


@each_build
def test_core_objects_match_the_kubernetes_schema(name):
    for item in build(name):
        if item["apiVersion"] in CORE:
            validate(item)


@each_build
def test_pod_templates_match_the_kubernetes_schema(name):
    found = list(pods(name))
    assert found
    for pod in found:
        metadata = {"name": "pod", **pod.template.get("metadata", {})}
        validate({"apiVersion": "v1", "kind": "Pod", **pod.template, "metadata": metadata})


@each_build
def test_names_are_unique_and_short_enough(name):
    keys = [(item["kind"], item["metadata"]["name"]) for item in build(name)]
    assert len(keys) == len(set(keys))
    for kind, own in keys:
        assert len(own) <= NAME_LIMITS.get(kind, 63)


@each_build
def test_pods_have_no_rights_that_they_do_not_need(name):
    for pod in pods(name):
        spec = pod.template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"], pod.where
        assert security["runAsUser"] >= 1000, pod.where
        assert security["fsGroup"] >= 1000, pod.where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), pod.where
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{pod.where} {container['name']}"


@each_build
def test_only_the_autoscaler_has_a_token_of_the_api(name):
    for account in of_kind(name, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for pod in pods(name):
        spec, field = pod.template["spec"], CLUSTERS.get(pod.owner["kind"])
        cluster = pod.owner["spec"][field] if field else {}
        scales = cluster.get("enableInTreeAutoscaling", False) and pod.where.endswith(" head")
        assert spec["automountServiceAccountToken"] == scales, pod.where
        expected = "halyard-autoscaler" if scales else "halyard"
        assert spec["serviceAccountName"] == expected, pod.where


@each_build
def test_containers_have_limits_and_request_all_their_memory(name):
    for pod in pods(name):
        for container in pod.containers:
            limits = container["resources"]["limits"]
            assert {"cpu", "memory"} <= limits.keys(), pod.where
            # A container that uses more memory than it requested may be killed by the node.
            assert container["resources"]["requests"]["memory"] == limits["memory"], pod.where
            tag = container["image"].rpartition(":")[2]
            assert re.match(r"\d+\.\d+", tag), f"{pod.where}: {container['image']} is not pinned"


@needs_kubectl
def test_the_local_node_has_room_for_the_server_and_a_job():
    """The README states the node's cores and memory; 5 % is reserved for the node itself."""
    readme = (K8S / "README.md").read_text()
    said = re.search(r"`local` \| one node of (\d+) cores and (\d+) GiB", readme)
    assert said is not None
    wanted: dict[str, list[float]] = {}
    for pod in pods("overlays/local"):
        many = 1
        for group in cluster_of(pod.owner).get("workerGroupSpecs", []):
            if group["template"] is pod.template:
                many = group["maxReplicas"]
        cores, gib = wanted.setdefault(pod.where.split()[0], [0.0, 0.0])
        for container in pod.template["spec"]["containers"]:
            requests = container["resources"]["requests"]
            cores += many * parse_quantity(requests["cpu"])
            gib += many * parse_quantity(requests["memory"]) / 2**30
        wanted[pod.where.split()[0]] = [cores, gib]
    (server,) = (need for where, need in wanted.items() if where.startswith("RayService"))
    jobs = [need for where, need in wanted.items() if where.startswith("RayJob")]
    assert len(jobs) == 3
    for at, room in enumerate(map(int, said.groups())):
        needed = server[at] + max(job[at] for job in jobs)
        assert needed <= 0.95 * room


def cluster_of(item: Object) -> Object:
    return item["spec"].get(CLUSTERS.get(item["kind"], ""), {})


def parse_quantity(text: str) -> float:
    """Return the number of cores or bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMG]i)?", str(text)).groups()
    return float(number) * {"m": 1e-3, None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


@each_build
def test_objects_that_pods_need_are_built_or_documented(name):
    readme = (K8S / "README.md").read_text()
    names = {(item["kind"], item["metadata"]["name"]) for item in build(name)}
    made = {item["spec"].get("secretName") for item in of_kind(name, "Certificate")}
    for pod in pods(name):
        for kind, needed in references(pod.template["spec"]):
            if kind == "Secret":
                assert needed in made or f"`{needed}`" in readme, f"{pod.where}: {needed}"
            else:
                assert (kind, needed) in names, f"{pod.where}: {kind} {needed}"
    for pod in pods(name):
        volumes = {volume["name"] for volume in pod.template["spec"].get("volumes", [])}
        claims = pod.owner["spec"].get("volumeClaimTemplates", [])
        volumes |= {claim["metadata"]["name"] for claim in claims}
        for container in pod.containers:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, pod.where


def references(spec: Object) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of each object that a pod needs to start."""
    yield "ServiceAccount", spec["serviceAccountName"]
    for volume in spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                yield "ConfigMap", source["configMapRef"]["name"]
            if "secretRef" in source:
                yield "Secret", source["secretRef"]["name"]
        for variable in container.get("env", []):
            if key := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", key["name"]


@each_build
def test_manifests_contain_no_secrets(name):
    for item in build(name):
        assert item["kind"] != "Secret"
        for variable in variables(item):
            if re.search("PASSWORD|SECRET|TOKEN|CREDENTIAL|AUTH$|ACCESS_KEY", variable["name"]):
                assert "value" not in variable, variable["name"]
        for text in texts(item):
            assert "PRIVATE KEY" not in text
            assert not re.search(r"://[^/@\s]+:[^/@\s]+@", text), "an address with a password"


def variables(value: Any) -> Iterator[Object]:
    """Yield every entry of every `env` list."""
    if isinstance(value, dict):
        yield from value.get("env") or []
        for inner in value.values():
            yield from variables(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from variables(inner)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


@each_build_and_the_files
def test_the_environment_matches_the_code(name):
    (settings,) = (
        item
        for item in of_kind(name, "ConfigMap")
        if item["metadata"]["name"] == "halyard-environment"
    )
    code = connect.ENVIRONMENT | serve_environment.ENVIRONMENT | {"RAY_AUTH_MODE": "token"}
    code[haproxy_config.CONNECTIONS] = "0"
    assert settings["data"] == {key: value for key, value in code.items() if key != THREADS}


@each_build
def test_allowed_hosts_include_every_name_of_the_server(name):
    (service,) = of_kind(name, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    hosts = AllowedHosts(serve_config.validate_options(application["args"]).security.allowed_hosts)
    names = [f"{service['metadata']['name']}-serve-svc{end}" for end in SERVICE_NAMES]
    if name.startswith("overlays/"):  # overlays set their own host names
        names += [
            each for route in of_kind(name, "HTTPRoute") for each in route["spec"]["hostnames"]
        ]
    for each in names:
        assert hosts.has(each), each
    assert not hosts.has("evil.example")


def test_the_dockerfile_sets_the_paths_of_haproxy():
    recipe = (K8S / "Dockerfile").read_text()
    folder = str(private.private_root() / "haproxy").replace(f"-{os.getuid()}", "-1000")
    for key, value in serve_environment.local_paths().items():
        there = value.replace(str(private.private_root() / "haproxy"), folder)
        there = there.replace(sys.executable, "/usr/local/bin/python3")
        there = there.replace(str(REPOSITORY), "/srv/halyard")
        assert f"{key}={there}" in recipe


@each_build
def test_rays_pods_have_the_environment(name):
    for pod in pods(name):
        if pod.owner["kind"] not in CLUSTERS or pod.where.endswith("submitter"):
            continue
        (container,) = pod.template["spec"]["containers"]
        assert {"configMapRef": {"name": "halyard-environment"}} in container["envFrom"]
        given = {variable["name"] for variable in container.get("env", [])}
        assert (THREADS in given) == (pod.owner["kind"] == "RayService")


@each_build
def test_rays_pods_have_time_to_drain(name):
    (service,) = of_kind(name, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    options = serve_config.validate_options(application["args"])
    drain_s = DRAIN_S + options.limits.timeout_s + options.limits.body_timeout_s
    for pod in pods(name):
        if pod.owner["kind"] not in CLUSTERS or pod.where.endswith("submitter"):
            continue
        grace_s = pod.template["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > drain_s, pod.where
        if pod.where.endswith(" head"):
            continue
        (container,) = pod.template["spec"]["containers"]
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        bound_s, waited_s = (
            int(re.search(pattern, script)[1])
            for pattern in (r"timeout (\d+)", r"waited_s < (\d+)")
        )
        assert grace_s > bound_s + waited_s, pod.where
        if pod.owner["kind"] == "RayService":
            assert waited_s > drain_s, pod.where


@each_build_and_the_files
def test_the_servers_options_are_valid(name):
    (service,) = of_kind(name, "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0"
    ports = {"serve": schema.http_options.port, "grpc": schema.grpc_options.port}
    for application in schema.applications:
        serve_config.validate_options(application.args)
        module, _, attribute = application.import_path.partition(":")
        assert (module, attribute) == ("serve.deployment", "app")
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert named["serve"] == ports["serve"]
        assert named["metrics"] == 8080
        # The operator adds probes that fit its version.
        assert not {"readinessProbe", "livenessProbe"} & container.keys()
    assert named["grpc"] == ports["grpc"]
    wanted = options_of(schema).replica_range[1] * options_of(schema).threads
    cores = int(container["resources"]["limits"]["cpu"])
    assert wanted <= cores * cluster["workerGroupSpecs"][0]["maxReplicas"]


def options_of(schema: ServeDeploySchema) -> serve_config.ServeConfig:
    return serve_config.validate_options(schema.applications[0].args)


@each_build
def test_clusters_use_our_ray_version_and_token_mode(name):
    for kind, field in CLUSTERS.items():
        for item in of_kind(name, kind):
            cluster = item["spec"][field]
            assert cluster["rayVersion"] == ray.__version__
            assert cluster["authOptions"] == {"mode": "token"}
            assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            for group in cluster["workerGroupSpecs"]:
                assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@each_build
def test_jobs_have_deadlines_and_are_deleted_in_one_way(name):
    jobs = of_kind(name, "RayJob")
    assert len(jobs) == 3
    for job in jobs:
        spec = job["spec"]
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["backoffLimit"] > 0
        by_rules = "deletionStrategy" in spec
        assert by_rules != spec.get("shutdownAfterJobFinishes", False)
        # The operator suspends only jobs with shutdownAfterJobFinishes.
        assert not (by_rules and spec.get("suspend", False))
        if by_rules:
            rules = spec["deletionStrategy"]["deletionRules"]
            # "Failed" is also the status of a job that exceeded its deadline.
            for end in ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}):
                ttl_s = {
                    rule["policy"]: rule["condition"]["ttlSeconds"]
                    for rule in rules
                    if end.items() <= rule["condition"].items()
                }
                assert ttl_s["DeleteCluster"] < ttl_s["DeleteSelf"]


@each_build_and_the_files
def test_commands_of_jobs_are_valid(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    scripts = {parsed(job)[0] for job in of_kind(name, "RayJob")}
    assert scripts == PARSERS.keys()


@each_build
def test_training_has_cores_for_the_workers_of_its_command(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for job in of_kind(name, "RayJob"):
        script, options = parsed(job)
        if script != "train/main.py":
            continue
        workers = options.config.workers
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        # The command itself occupies some of these cores.
        cores = int(limits["cpu"]) * group["replicas"] - job["spec"]["entrypointNumCpus"]
        assert workers.all_cpus <= cores
        assert workers.gpu == ("nvidia.com/gpu" in limits)


@needs_kubectl
def test_the_retrain_check_ends_before_its_deadline():
    (item,) = of_kind("components/retrain", "CronJob")
    (pod,) = (pod for pod in pods("components/retrain") if pod.owner["kind"] == "CronJob")
    (container,) = pod.containers
    assert container["command"][:3] == ["python", "-m", "serve.retrain"]
    options = serve.retrain.__main__.parse(container["command"][3:])
    job = item["spec"]["jobTemplate"]["spec"]
    assert options.lease_hours * 3600 < job["activeDeadlineSeconds"]
    # The volume that training jobs write to.
    assert options.storage == str(Path("runs").absolute())
    # No retries: the cooldown decides when to try again.
    assert job["backoffLimit"] == 0


def parsed(job: Object) -> tuple[str, Any]:
    """Return the script of a job's command and the options that the script's parser returns."""
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "python"
    script = arguments.pop(1 if arguments[0] == "-m" else 0)
    return script, PARSERS[script](arguments[1:] if arguments[:1] == ["-m"] else arguments)


@each_build
def test_everything_but_the_gateway_is_in_the_namespace(name):
    made = {item["metadata"]["name"] for item in of_kind(name, "Namespace")}
    for item in build(name):
        if item["kind"] not in OF_NO_NAMESPACE:
            where = "halyard-gateway" if item["kind"] == "Gateway" else "halyard"
            assert item["metadata"].get("namespace") == where, item["kind"]
            assert where in made


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_kubectl)
        for name in ("components/gateway", "overlays/production")
    ],
)
def test_routes_refer_to_the_gateway_and_are_allowed(name):
    (gateway,) = of_kind(name, "Gateway")
    (namespace,) = (
        item
        for item in of_kind(name, "Namespace")
        if item["metadata"]["name"] == gateway["metadata"]["namespace"]
    )
    # The network policy admits namespaces with this label.
    assert namespace["metadata"]["labels"]["halyard-clients"] == "true"
    listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
    for route in (*of_kind(name, "HTTPRoute"), *of_kind(name, "GRPCRoute")):
        (parent,) = route["spec"]["parentRefs"]
        own = gateway["metadata"]
        assert (parent["name"], parent["namespace"]) == (own["name"], own["namespace"])
        listener = listeners.pop(parent["sectionName"])
        assert route["spec"]["hostnames"] == [listener["hostname"]]
        assert listener["allowedRoutes"]["namespaces"] == {
            "from": "Selector",
            "selector": {
                "matchLabels": {"kubernetes.io/metadata.name": route["metadata"]["namespace"]}
            },
        }
    assert not listeners


@needs_kubectl
def test_prometheus_needs_no_key_where_clients_do():
    (service,) = of_kind("overlays/production", "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    options = options_of(schema)
    assert options.security.api_keys_file
    assert options.security.metrics_without_key
    # The gateway must not route to /metrics either.
    (route,) = of_kind("overlays/production", "HTTPRoute")
    for rule in route["spec"]["rules"]:
        paths = [match["path"] for match in rule["matches"]]
        reached = {path["value"] for path in paths if path["type"] == "PathPrefix"}
        reached |= {path["value"] for path in paths if path["type"] == "Exact"} - {"/"}
        assert paths
        assert not {"/", "/metrics"} & reached


@needs_kubectl
def test_autoscalers_do_not_evict_pods_of_jobs():
    for pod in pods("overlays/production"):
        if pod.owner["kind"] == "RayJob" and not pod.where.endswith("submitter"):
            assert pod.template["metadata"]["annotations"] == {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }, pod.where


def test_the_images_have_this_version():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    files = "".join(path.read_text() for path in (K8S / "base").glob("*.yaml"))
    images = set(re.findall(r"image: (\S+)", files))
    assert images == {f"halyard-{part}:{project['version']}" for part in ("serve", "train")}
    recipe = (K8S / "Dockerfile").read_text()
    constraints = (REPOSITORY / "constraints.txt").read_text().split()
    (torch,) = re.findall(r"torch==\S+", recipe)
    assert torch in constraints
    ignored = (K8S / "Dockerfile.dockerignore").read_text().split()
    for folder in ("cluster", "train", "tune", "serve"):
        assert f"COPY {folder} {folder}\n" in recipe
        assert f"!{folder}" in ignored


def test_the_readme_lists_each_component():
    readme = (K8S / "README.md").read_text()
    for path in (K8S / "components").iterdir():
        if (path / "kustomization.yaml").exists():
            assert f"`{path.name}`" in readme


@pytest.mark.ray
@pytest.mark.slow
def test_the_servers_config_serves_a_trained_model(trained, storage_path, tmp_path):
    (service,) = of_kind(FILES, "RayService")
    (settings,) = of_kind(FILES, "ConfigMap")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config["applications"][0]["args"]["storage"] == "runs"
    config["applications"][0]["args"]["storage"] = str(storage_path)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = settings["data"] | {"RAY_AUTH_TOKEN": "of this test"}
    with server.running(log=tmp_path / "log", app=str(file), environment=environment) as url:
        # The operator's readiness probe requests this path.
        health = httpx.get(f"{url}/-/healthz")
        assert (health.status_code, "success" in health.text) == (200, True)
        blank = base64.b64encode(png()).decode()
        answer = httpx.post(
            f"{url}/v1/models/digits:predict", content=json.dumps({"instances": [{"b64": blank}]})
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["label"] in "0123456789"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()
