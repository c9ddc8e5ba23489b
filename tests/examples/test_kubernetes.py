"""The manifests: flags that exist, names and ports that meet, containers without rights."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from servegym.cli import parse
from servegym.envs.costs import load_profile
from servegym.runtime.gateway.settings import Settings
from servegym.runtime.vllm.config import read_config

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "kubernetes"
OBJECTS = [
    document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def find(kind, name):
    (found,) = (o for o in OBJECTS if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def pods():
    return {
        (o["kind"], o["metadata"]["name"]): o["spec"]["template"] for o in OBJECTS if "template" in o["spec"]
    }


def containers():
    """Ours: all but the one of llm-d that the patch extends."""
    for template in pods().values():
        for container in template["spec"]["containers"]:
            if "image" in container:
                yield template["spec"], container


def ports(container):
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def engine():
    return find("StatefulSet", "vllm")["spec"]["template"]["spec"]["containers"][0]


def picker():
    return find("Deployment", "servegym-picker")["spec"]["template"]["spec"]["containers"][0]


def engine_flags():
    return dict(argument[2:].split("=", 1) for argument in engine()["args"])


def test_every_object_says_what_and_where_it_is():
    assert len(OBJECTS) == 9
    assert all(o["apiVersion"] and o["kind"] and o["metadata"]["name"] for o in OBJECTS)
    assert {o["metadata"]["namespace"] for o in OBJECTS} == {"inference", "llm-d"}


def test_picker_takes_its_flags():
    settings = parse(picker()["args"])
    assert isinstance(settings, Settings)
    settings.check()
    assert not settings.envoy
    assert (settings.picker_port, settings.metrics_port) == (9002, 9092)
    load_profile(settings.profile[0])
    flags = engine_flags()
    assert str(settings.max_seqs) == flags["max-num-seqs"]
    assert str(settings.token_budget) == flags["max-num-batched-tokens"]


def test_picker_knows_each_engine_by_its_stable_name():
    service, stateful = find("Service", "vllm"), find("StatefulSet", "vllm")
    assert service["spec"]["clusterIP"] == "None"
    assert stateful["spec"]["serviceName"] == "vllm"
    port = ports(engine())["http"]
    expected = [
        f"http://vllm-{i}.vllm.inference.svc.cluster.local:{port}"
        for i in range(stateful["spec"]["replicas"])
    ]
    assert list(parse(picker()["args"]).engines) == expected
    assert engine_flags()["port"] == str(port)


def test_scheduler_class_and_its_configuration_exist():
    flags = engine_flags()
    module, name = flags["scheduler-cls"].rsplit(".", 1)
    source = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
    assert f"class {name}(" in source.read_text(encoding="utf-8")
    config = read_config(json.loads(flags["additional-config"]))
    load_profile(config.profile)


def test_predictor_takes_its_flags_and_llm_d_asks_it():
    epp, sidecar = find("Deployment", "llm-d-epp")["spec"]["template"]["spec"]["containers"]
    command = parse(sidecar["args"])
    assert command.engine().max_seqs == 256
    assert command.host == "127.0.0.1"
    assert epp["env"] == [{"name": "PREDICTION_SERVER_URL", "value": f"http://127.0.0.1:{command.port}"}]
    for probe in ("readinessProbe", "livenessProbe"):
        assert f":{command.port}/readyz" in sidecar[probe]["exec"]["command"][-1]


def test_pool_and_route_meet():
    """Fields of the v1 API, gateway-api-inference-extension 1.0."""
    pool, route = find("InferencePool", "llama-3-1-8b"), find("HTTPRoute", "llama-3-1-8b")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert pool["spec"]["targetPorts"] == [{"number": ports(engine())["http"]}]
    reference = pool["spec"]["endpointPickerRef"]
    service = find("Service", reference["name"])
    assert reference["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    assert reference["failureMode"] in ("FailOpen", "FailClose")
    (rule,) = route["spec"]["rules"]
    backend = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "llama-3-1-8b"}
    assert rule["backendRefs"] == [backend]


def labels_of_pods():
    return [template["metadata"]["labels"] for template in pods().values() if "metadata" in template]


def selects(selector):
    return any(selector.items() <= labels.items() for labels in labels_of_pods())


def test_selectors_select_pods_and_service_ports_exist():
    for service in (o for o in OBJECTS if o["kind"] == "Service"):
        selector = service["spec"]["selector"]
        assert selects(selector)
        target = next(
            t for t in pods().values() if selector.items() <= t.get("metadata", {}).get("labels", {}).items()
        )
        known = ports(target["spec"]["containers"][0])
        for port in service["spec"]["ports"]:
            assert known[port["targetPort"]] == port["port"]
    for kind, name in (("StatefulSet", "vllm"), ("Deployment", "servegym-picker")):
        workload = find(kind, name)["spec"]
        assert workload["selector"]["matchLabels"] == workload["template"]["metadata"]["labels"]
    assert selects(find("InferencePool", "llama-3-1-8b")["spec"]["selector"]["matchLabels"])


def test_network_policies_open_the_ports_that_are_served_and_no_others():
    served = {"vllm": set(ports(engine()).values()), "servegym-picker": set(ports(picker()).values())}
    for name, numbers in served.items():
        policy = find("NetworkPolicy", name)["spec"]
        assert selects(policy["podSelector"]["matchLabels"])
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == numbers
        assert all(rule["from"] for rule in policy["ingress"])


def mebibytes(quantity):
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_containers_have_probes_resources_and_no_rights():
    seen = 0
    for pod, container in containers():
        seen += 1
        mine = container["securityContext"]
        whole = {**pod.get("securityContext", {}), **mine}
        assert whole["runAsNonRoot"] and whole["runAsUser"] > 0
        assert whole["seccompProfile"]["type"] == "RuntimeDefault"
        assert not mine["allowPrivilegeEscalation"] and mine["readOnlyRootFilesystem"]
        assert mine["capabilities"] == {"drop": ["ALL"]}
        assert container["readinessProbe"] and container["livenessProbe"]
        assert container["resources"]["requests"]["cpu"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert mebibytes(limits["memory"]) >= mebibytes(requests["memory"])
        assert not container["image"].endswith(":latest")
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert seen == 3


def test_the_picker_s_image_has_what_the_gateway_needs():
    """pip installs without dependencies there, so that torch stays out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"]["gateway"]}
    words = set((FOLDER / "Dockerfile").read_text(encoding="utf-8").split())
    assert wanted - words == {"msgpack", "pyzmq"}  # of KV events, which these manifests do not use
