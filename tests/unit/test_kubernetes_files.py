"""The manifests in examples/: what they refer to is there, and flags, ports and metrics exist. No cluster is asked."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rpc_devices import NO_GPU
from serving import http_server

from superllama._commands.program_flags import flags_of
from superllama._programs import find_program, server_environment

yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifests")

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("kubernetes.yaml", "inference-gateway.yaml")

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
LABELS = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "args", "ports", "resources", "securityContext", "volumeMounts"],
    "additionalProperties": False,
    "properties": {
        "name": NAME,
        "image": {"type": "string", "minLength": 1},
        "command": {"type": "array", "items": {"type": "string"}},
        "args": {"type": "array", "items": {"type": "string"}},
        "env": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        "ports": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "containerPort"],
                "additionalProperties": False,
                "properties": {"name": NAME, "containerPort": PORT},
            },
        },
        "resources": {
            "type": "object",
            "required": ["requests", "limits"],
            "properties": {
                "requests": {"type": "object", "additionalProperties": QUANTITY},
                "limits": {"type": "object", "required": ["memory"], "additionalProperties": QUANTITY},
            },
        },
        "startupProbe": {"$ref": "#/$defs/probe"},
        "readinessProbe": {"$ref": "#/$defs/probe"},
        "securityContext": {"type": "object"},
        "volumeMounts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "mountPath"],
                "additionalProperties": False,
                "properties": {
                    "name": NAME,
                    "mountPath": {"type": "string", "pattern": "^/"},
                    "readOnly": {"type": "boolean"},
                },
            },
        },
    },
}
PROBE = {
    "type": "object",
    "required": ["httpGet"],
    "additionalProperties": False,
    "properties": {
        "httpGet": {
            "type": "object",
            "required": ["path", "port"],
            "properties": {"path": {"type": "string", "pattern": "^/"}},
        },
        "periodSeconds": {"type": "integer", "minimum": 1},
        "failureThreshold": {"type": "integer", "minimum": 1},
    },
}
WORKLOAD = {
    "type": "object",
    "required": ["selector", "template", "replicas"],
    "additionalProperties": False,
    "properties": {
        "serviceName": NAME,
        "replicas": {"type": "integer", "minimum": 1},
        "podManagementPolicy": {"enum": ["OrderedReady", "Parallel"]},
        "strategy": {"type": "object", "properties": {"type": {"enum": ["Recreate", "RollingUpdate"]}}},
        "selector": {"type": "object", "required": ["matchLabels"], "properties": {"matchLabels": LABELS}},
        "template": {
            "type": "object",
            "required": ["metadata", "spec"],
            "properties": {
                "metadata": {"type": "object", "required": ["labels"], "properties": {"labels": LABELS}},
                "spec": {
                    "type": "object",
                    "required": ["containers", "volumes", "securityContext"],
                    "properties": {
                        "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                        "volumes": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name"],
                                "minProperties": 2,
                                "maxProperties": 2,
                                "properties": {
                                    "name": NAME,
                                    "secret": {
                                        "type": "object",
                                        "required": ["secretName"],
                                        "properties": {"defaultMode": {"type": "integer", "maximum": 0o777}},
                                    },
                                    "persistentVolumeClaim": {"type": "object", "required": ["claimName"]},
                                    "emptyDir": {"type": "object"},
                                },
                                "additionalProperties": False,
                            },
                        },
                    },
                },
            },
        },
    },
}
SERVICE = {
    "type": "object",
    "required": ["selector", "ports"],
    "properties": {
        "selector": LABELS,
        "ports": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["name", "port", "targetPort"], "properties": {"port": PORT}},
        },
    },
}
POOL = {
    "type": "object",
    "required": ["selector", "targetPorts", "endpointPickerRef"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object", "required": ["matchLabels"], "properties": {"matchLabels": LABELS}},
        "targetPorts": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["number"], "properties": {"number": PORT}},
        },
        "endpointPickerRef": {
            "type": "object",
            "required": ["name", "port"],
            "properties": {"name": NAME, "port": {"type": "object", "required": ["number"]}},
        },
    },
}
# apiVersion of each kind, and its spec
KINDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "Service": ("v1", SERVICE),
    "ConfigMap": ("v1", None),
    "StatefulSet": ("apps/v1", WORKLOAD),
    "Deployment": ("apps/v1", WORKLOAD),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        {"type": "object", "required": ["podSelector", "policyTypes", "ingress"]},
    ),
    "InferencePool": ("inference.networking.k8s.io/v1", POOL),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", {"type": "object", "required": ["parentRefs", "rules"]}),
}


def documents(*files: str) -> list[dict[str, Any]]:
    return [d for file in files or FILES for d in yaml.safe_load_all((EXAMPLES / file).read_text())]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [d for d in documents() if d["kind"] in kinds]


def workloads() -> list[dict[str, Any]]:
    return of_kind("StatefulSet", "Deployment")


def containers() -> list[dict[str, Any]]:
    return [c for w in workloads() for c in w["spec"]["template"]["spec"]["containers"]]


def pods_of(labels: dict[str, str]) -> list[dict[str, Any]]:
    """Templates that a selector finds."""
    templates = [w["spec"]["template"] for w in workloads()]
    return [t for t in templates if labels.items() <= t["metadata"]["labels"].items()]


def picker_config() -> dict[str, Any]:
    (config,) = of_kind("ConfigMap")
    found: dict[str, Any] = yaml.safe_load(config["data"]["config.yaml"])
    return found


def test_documents_have_the_structure_of_their_kind() -> None:
    found = documents()
    assert {d["kind"] for d in found} == set(KINDS)
    for d in found:
        version, spec = KINDS[d["kind"]]
        assert d["apiVersion"] == version
        jsonschema.validate(d["metadata"], {"type": "object", "required": ["name"], "properties": {"name": NAME}})
        if spec is not None:
            jsonschema.validate(d["spec"], spec | {"$defs": {"probe": PROBE}})
    assert len({(d["kind"], d["metadata"]["name"]) for d in found}) == len(found)


def test_the_validator_refuses_what_is_wrong() -> None:
    good = workloads()[0]["spec"]
    for path in (("replicas",), ("template", "spec", "volumes"), ("selector", "matchLabels")):
        wrong = json.loads(json.dumps(good))
        table = wrong
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, WORKLOAD | {"$defs": {"probe": PROBE}})


def test_what_is_referred_to_is_there() -> None:
    for w in workloads():
        template = w["spec"]["template"]
        assert w["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        spec = template["spec"]
        volumes = {v["name"] for v in spec["volumes"]}
        for c in spec["containers"]:
            assert {m["name"] for m in c["volumeMounts"]} == volumes
            for probe in ("startupProbe", "readinessProbe"):
                if probe in c:
                    assert c[probe]["httpGet"]["port"] in {p["name"] for p in c["ports"]}
            variables = {e["name"] for e in c.get("env", [])}
            assert set(re.findall(r"\$\((\w+)\)", " ".join(c["args"]))) == variables
            mounts = [m["mountPath"] for m in c["volumeMounts"]]
            for word in c["args"]:
                assert not word.startswith("/") or any(word == m or word.startswith(f"{m}/") for m in mounts), word
    services = {s["metadata"]["name"]: s["spec"] for s in of_kind("Service")}
    for service in services.values():
        (template,) = pods_of(service["selector"])
        ports = {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
        assert {p["targetPort"] for p in service["ports"]} <= ports
    for w in of_kind("StatefulSet"):
        assert services[w["spec"]["serviceName"]]["clusterIP"] == "None"
    (policy,) = of_kind("NetworkPolicy")
    assert len(pods_of(policy["spec"]["podSelector"]["matchLabels"])) == 1
    for source in policy["spec"]["ingress"][0]["from"]:
        assert len(pods_of(source["podSelector"]["matchLabels"])) == 1


def test_the_server_names_each_rpc_server_of_the_group() -> None:
    (group,) = of_kind("StatefulSet")
    (server,) = of_kind("Deployment")
    name, service = group["metadata"]["name"], group["spec"]["serviceName"]
    (rpc,) = group["spec"]["template"]["spec"]["containers"]
    port = rpc["ports"][0]["containerPort"]
    args = server["spec"]["template"]["spec"]["containers"][0]["args"]
    expected = [f"{name}-{i}.{service}:{port}" for i in range(group["spec"]["replicas"])]
    assert args[args.index("--rpc") + 1].split(",") == expected
    assert args.index("--rpc-secret") < args.index("--rpc")
    assert rpc["args"][rpc["args"].index("-p") + 1] == str(port)
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] == port


def test_flags_exist_and_memory_is_limited() -> None:
    server = {name for flag in flags_of("llama-server") for name in flag.names}
    done = subprocess.run(
        [find_program("ggml-rpc-server"), "--help"], capture_output=True, text=True, env=server_environment() | NO_GPU
    )
    rpc = set(re.findall(r"(?<!\S)(--?[A-Za-z][\w-]*)", done.stdout + done.stderr))
    assert "--model-dir" in rpc and "--rpc" in server
    for c in containers():
        assert {word for word in c["args"] if word.startswith("-")} <= (rpc if "command" in c else server)
        assert c["resources"]["limits"]["memory"] == c["resources"]["requests"]["memory"]


def test_the_gateway_finds_the_server_and_its_picker() -> None:
    (pool,) = of_kind("InferencePool")
    (template,) = pods_of(pool["spec"]["selector"]["matchLabels"])
    ports = {p["containerPort"] for c in template["spec"]["containers"] for p in c["ports"]}
    assert {p["number"] for p in pool["spec"]["targetPorts"]} == ports
    (route,) = of_kind("HTTPRoute")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["group"], backend["kind"]) == (pool["apiVersion"].partition("/")[0], "InferencePool")
    assert backend["name"] == pool["metadata"]["name"]

    config = picker_config()
    assert config["kind"] == "EndpointPickerConfig"
    plugins = [p.get("name", p["type"]) for p in config["plugins"]]
    used = [p["pluginRef"] for profile in config["schedulingProfiles"] for p in profile["plugins"]]
    for source in config["dataLayer"]["sources"]:
        used += [source["pluginRef"], *(e["pluginRef"] for e in source["extractors"])]
    assert sorted(used) == sorted(plugins)


def test_metrics_of_the_picker_exist_and_are_gauges(tiny_model: Path, tmp_path: Path) -> None:
    (extractor,) = (p["parameters"] for p in picker_config()["plugins"] if p["type"] == "core-metrics-extractor")
    (engine,) = extractor["engineConfigs"]
    assert engine.pop("name") == extractor["defaultEngine"]
    with (
        http_server(tiny_model, tmp_path / "log", "--metrics", "-c", 64) as server,
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer,
    ):
        text = answer.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    assert set(engine) == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"}
    assert [kinds.get(name) for name in engine.values()] == ["gauge", "gauge", "gauge"]
    # the flags of older pickers name the same ones
    text = (EXAMPLES / FILES[1]).read_text()
    flags = {f"{which}RequestsSpec": name for which, name in re.findall(r"--total-(\w+)-requests-metric=(\S+)", text)}
    (flags["kvUsageSpec"],) = re.findall(r"--kv-cache-usage-percentage-metric=(\S+)", text)
    assert flags == engine


def test_files_say_that_they_were_never_applied() -> None:
    for file in FILES:
        head = (EXAMPLES / file).read_text().partition("apiVersion")[0]
        assert "Never applied to a cluster" in head
