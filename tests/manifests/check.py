#!/usr/bin/env python3
"""Checks the manifests of one model over several pods.

  check.py FOLDER                   against the schemas of Kubernetes and the rules of a tensor-parallel group
  check.py FOLDER --mutations       every rule must catch a manifest that breaks it
  check.py FOLDER --pod ORDINAL     prints what the StatefulSet gives to that pod, as JSON: arguments and environment

Needs kubernetes-validate (requirements.txt) and the PyYAML that it brings.
"""

import copy
import glob
import json
import os
import sys

import kubernetes_validate
import yaml

# The oldest has the label apps.kubernetes.io/pod-index.
VERSIONS = ["1.28", "1.34", "1.37"]
GROUP_PORTS = range(7400, 7409)


def load(folder):
    """All documents by kind and name, but for those that are not applied."""
    documents = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.yaml"))):
        if os.path.basename(path) == "kustomization.yaml":
            continue
        with open(path, encoding="utf-8") as file:
            for document in yaml.safe_load_all(file):
                documents[document["kind"], document["metadata"]["name"]] = document
    return documents


def schema_problems(documents):
    problems = []
    for (kind, name), document in documents.items():
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                problems.append(f"{kind} {name} for Kubernetes {version}: {error.message}")
    return problems


def container(documents):
    return documents["StatefulSet", "tandem"]["spec"]["template"]["spec"]["containers"][0]


def environment(documents, pod_name="tandem-0", namespace="default"):
    """The container's variables, the downward API resolved for one pod."""
    fields = {
        "metadata.name": pod_name,
        "metadata.namespace": namespace,
        "metadata.labels['apps.kubernetes.io/pod-index']": pod_name.rsplit("-", 1)[1],
    }
    variables = {}
    for entry in container(documents)["env"]:
        if "value" in entry:
            variables[entry["name"]] = entry["value"]
        else:
            variables[entry["name"]] = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    return variables


def rule_problems(documents):
    problems = []

    def rule(holds, problem):
        if not holds:
            problems.append(problem)

    stateful_set = documents["StatefulSet", "tandem"]
    spec, pod = stateful_set["spec"], stateful_set["spec"]["template"]["spec"]
    main = container(documents)
    headless, client = documents["Service", "tandem-group"], documents["Service", "tandem"]
    policy = documents["NetworkPolicy", "tandem"]["spec"]
    variables = environment(documents)

    rule(spec.get("podManagementPolicy") == "Parallel", "pods must start in parallel")
    rule(spec.get("updateStrategy") == {"type": "OnDelete"}, "a group is updated as a whole: OnDelete")
    rule(spec["serviceName"] == headless["metadata"]["name"], "serviceName must be the headless Service")
    rule(pod.get("terminationGracePeriodSeconds") == 150, "the grace period is 150 s")
    rule(pod.get("enableServiceLinks") is False, "service links look like flags")
    rule(pod.get("automountServiceAccountToken") is False, "the worker needs no token")
    rule(any(v.get("emptyDir", {}).get("medium") == "Memory" for v in pod["volumes"]), "/dev/shm must be memory")

    rule(headless["spec"].get("clusterIP") == "None", "the group's Service must be headless")
    rule(headless["spec"].get("publishNotReadyAddresses") is True, "pods must find each other before they are ready")
    rule(
        client["spec"]["selector"].get("statefulset.kubernetes.io/pod-name") == stateful_set["metadata"]["name"] + "-0",
        "clients must reach the leader, ordinal 0",
    )
    labels = spec["template"]["metadata"]["labels"]
    selectors = [
        spec["selector"]["matchLabels"],
        headless["spec"]["selector"],
        {k: v for k, v in client["spec"]["selector"].items() if not k.startswith("statefulset.")},
        policy["podSelector"]["matchLabels"],
        documents["PodDisruptionBudget", "tandem"]["spec"]["selector"]["matchLabels"],
    ]
    rule(all(selector and selector.items() <= labels.items() for selector in selectors), "selectors must match the pods")

    security = pod.get("securityContext", {})
    rule(security.get("runAsNonRoot") is True and security.get("runAsUser") == 65532, "the pod must not run as root")
    rule(security.get("seccompProfile") == {"type": "RuntimeDefault"}, "seccomp must be the runtime's default")
    security = main.get("securityContext", {})
    rule(security.get("readOnlyRootFilesystem") is True, "the root file system must be read-only")
    rule(security.get("allowPrivilegeEscalation") is False, "privileges must not grow")
    rule(security.get("capabilities") == {"drop": ["ALL"]}, "no capabilities")

    for probe, path in [("startupProbe", "/startupz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]:
        rule(main.get(probe, {}).get("httpGet") == {"path": path, "port": "http"}, f"{probe} must ask {path}")
    startup = main["startupProbe"]
    rule(startup["periodSeconds"] * startup["failureThreshold"] >= 600, "loading may take ten minutes")
    rule(main["readinessProbe"]["periodSeconds"] <= 2, "readiness must follow the group quickly")

    replicas, gpus = int(variables["TANDEM_REPLICAS"]), int(variables["TANDEM_GPUS_PER_POD"])
    rule(replicas == spec["replicas"], "TANDEM_REPLICAS must be the number of replicas")
    rule(replicas * gpus == int(variables["TANDEM_TENSOR_PARALLEL_SIZE"]), "the sizes must multiply up")
    rule(variables["TANDEM_SERVICE_NAME"] == headless["metadata"]["name"], "TANDEM_SERVICE_NAME must be the headless Service")
    mounts = {mount["mountPath"]: mount for mount in main["volumeMounts"]}
    rule(os.path.dirname(variables["TANDEM_GROUP_KEY_FILE"]) in mounts, "the group key must be mounted")
    writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
    rule(variables["TANDEM_CACHE_DIR"] in writable, "the cache must be writable")
    resources = main["resources"]
    rule(resources["limits"] == resources["requests"] and resources["limits"]["cpu"].isdigit(), "whole CPUs, guaranteed")

    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    rule(ports == {"http": 8000, "metrics": 9090, "group": 7400, "rank": 7401}, "ports are 8000, 9090, 7400 and 7401")
    open_ports, group_ports = set(), set()
    for entry in policy["ingress"]:
        for port in entry["ports"]:
            numbers = range(port["port"], port.get("endPort", port["port"]) + 1)
            open_ports.update(numbers)
            if any(number in GROUP_PORTS for number in numbers):
                group_ports.update(numbers)
                peers = [peer.get("podSelector", {}).get("matchLabels") for peer in entry.get("from", [])]
                rule(bool(peers) and all(peers), "the group's ports are for its own pods only")
    rule(open_ports >= set(ports.values()), "the NetworkPolicy must let every port through")
    rule(group_ports >= set(range(7400, 7401 + gpus)), "the NetworkPolicy must let every rank through")
    egress = {p["port"] for entry in policy["egress"] for p in entry["ports"]}
    rule({7400, 8000, 53} <= egress, "pods must reach each other, the leader's API and DNS")
    return problems


MUTATIONS = [
    ("StatefulSet tandem spec podManagementPolicy", "OrderedReady"),
    ("StatefulSet tandem spec updateStrategy", {"type": "RollingUpdate"}),
    ("StatefulSet tandem spec serviceName", "tandem"),
    ("StatefulSet tandem spec replicas", 3),
    ("StatefulSet tandem spec template spec terminationGracePeriodSeconds", 30),
    ("StatefulSet tandem spec template spec enableServiceLinks", True),
    ("StatefulSet tandem spec template spec automountServiceAccountToken", True),
    ("StatefulSet tandem spec template spec securityContext runAsNonRoot", False),
    ("StatefulSet tandem spec template spec securityContext seccompProfile", {"type": "Unconfined"}),
    ("StatefulSet tandem spec template spec containers 0 securityContext readOnlyRootFilesystem", False),
    ("StatefulSet tandem spec template spec containers 0 securityContext allowPrivilegeEscalation", True),
    ("StatefulSet tandem spec template spec containers 0 securityContext capabilities", {"add": ["SYS_ADMIN"]}),
    ("StatefulSet tandem spec template spec containers 0 startupProbe httpGet path", "/readyz"),
    ("StatefulSet tandem spec template spec containers 0 startupProbe failureThreshold", 3),
    ("StatefulSet tandem spec template spec containers 0 livenessProbe httpGet path", "/readyz"),
    ("StatefulSet tandem spec template spec containers 0 readinessProbe periodSeconds", 30),
    ("StatefulSet tandem spec template spec containers 0 resources limits cpu", "500m"),
    ("StatefulSet tandem spec template spec containers 0 ports 2 containerPort", 7500),
    ("StatefulSet tandem spec template spec volumes 4 emptyDir", {}),
    ("StatefulSet tandem spec template metadata labels", {"app.kubernetes.io/name": "other"}),
    ("Service tandem-group spec clusterIP", "10.0.0.1"),
    ("Service tandem-group spec publishNotReadyAddresses", False),
    ("Service tandem spec selector statefulset.kubernetes.io/pod-name", "tandem-1"),
    ("NetworkPolicy tandem spec ingress 2 from", []),
    ("NetworkPolicy tandem spec ingress 2 ports 0 endPort", 7400),
    ("NetworkPolicy tandem spec egress", []),
    ("PodDisruptionBudget tandem spec selector matchLabels", {"a": "b"}),
]


def set_at(documents, path, value):
    kind, name, *keys = path.split(" ")
    node = documents[kind, name]
    for key in keys[:-1]:
        node = node[int(key) if key.isdigit() else key]
    key = int(keys[-1]) if keys[-1].isdigit() else keys[-1]
    assert node[key] != value, f"{path} is {value} already"
    node[key] = value


def uncaught(documents):
    """Mutations that no rule catches, and variables whose change none does."""
    missed = []
    for path, value in MUTATIONS:
        mutant = copy.deepcopy(documents)
        set_at(mutant, path, value)
        if not rule_problems(mutant):
            missed.append(f"{path} = {value}")
    for name in ["TANDEM_REPLICAS", "TANDEM_GPUS_PER_POD", "TANDEM_TENSOR_PARALLEL_SIZE", "TANDEM_SERVICE_NAME"]:
        mutant = copy.deepcopy(documents)
        entry = next(entry for entry in container(mutant)["env"] if entry["name"] == name)
        entry["value"] = "7"
        if not rule_problems(mutant):
            missed.append(f"{name} = 7")
    broken = copy.deepcopy(documents)
    broken["StatefulSet", "tandem"]["spec"]["replica"] = 2
    if not schema_problems(broken):
        missed.append("a misspelt field")
    return missed


def main():
    folder, *options = sys.argv[1:]
    documents = load(folder)
    if options[:1] == ["--pod"]:
        variables = environment(documents, f"tandem-{options[1]}")
        print(json.dumps({"args": container(documents)["args"], "env": variables}))
        return
    problems = uncaught(documents) if options == ["--mutations"] else schema_problems(documents) + rule_problems(documents)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(documents)} documents are well")


if __name__ == "__main__":
    main()
