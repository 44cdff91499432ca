#!/usr/bin/env python3
"""Checks the manifests: of one model over several pods (a StatefulSet), and of one server with a GPU (a Deployment).

  check.py FOLDER                   against the schemas of Kubernetes and the rules of such a server or group
  check.py FOLDER --mutations       every rule must catch a manifest that breaks it
  check.py FOLDER --pod ORDINAL     prints what is given to that pod, as JSON: arguments and environment

Needs kubernetes-validate (requirements.txt) and the PyYAML that it brings.
"""

import copy
import glob
import json
import os
import sys

import jsonpatch
import kubernetes_validate
import yaml

# The oldest has the label apps.kubernetes.io/pod-index.
VERSIONS = ["1.28", "1.34", "1.37"]
GROUP_PORTS = range(7400, 7409)


def load(folder):
    """All documents by kind and name, but for those that are not applied; those of another folder with its patches."""
    documents = {}
    with open(os.path.join(folder, "kustomization.yaml"), encoding="utf-8") as file:
        kustomization = yaml.safe_load(file)
    for base in kustomization["resources"]:
        if base.startswith("../"):
            documents.update(load(os.path.join(folder, base)))
    for path in sorted(glob.glob(os.path.join(folder, "*.yaml"))):
        if os.path.basename(path) == "kustomization.yaml":
            continue
        with open(path, encoding="utf-8") as file:
            for document in yaml.safe_load_all(file):
                documents[document["kind"], document["metadata"]["name"]] = document
    for patch in kustomization.get("patches", []):
        target = patch["target"]["kind"], patch["target"]["name"]
        documents[target] = jsonpatch.apply_patch(documents[target], yaml.safe_load(patch["patch"]))
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


def workload(documents):
    """What makes the pods."""
    (found,) = (document for (kind, _), document in documents.items() if kind in ("StatefulSet", "Deployment"))
    return found


def is_group(documents):
    return workload(documents)["kind"] == "StatefulSet"


def has_gpus(documents):
    return "nvidia.com/gpu" in container(documents)["resources"]["limits"]


def container(documents):
    return workload(documents)["spec"]["template"]["spec"]["containers"][0]


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

    pod_rules(documents, rule)
    (group_rules if is_group(documents) else gpu_rules)(documents, rule)
    return problems


def pod_rules(documents, rule):
    """What every pod of ours keeps to."""
    spec = workload(documents)["spec"]
    pod, main = spec["template"]["spec"], container(documents)
    rule(pod.get("terminationGracePeriodSeconds") == 150, "the grace period is 150 s")
    rule(pod.get("enableServiceLinks") is False, "service links look like flags")
    rule(pod.get("automountServiceAccountToken") is False, "the worker needs no token")

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
    rule(main["readinessProbe"]["periodSeconds"] <= 2, "readiness must follow the server quickly")
    resources = main["resources"]
    rule(resources["limits"] == resources["requests"] and resources["limits"]["cpu"].isdigit(), "whole CPUs, guaranteed")


def gpu_pod_rules(documents, rule):
    """What a pod with GPUs keeps to."""
    variables, pod = environment(documents), workload(documents)["spec"]["template"]["spec"]
    tolerations = [entry.get("key") for entry in pod.get("tolerations", [])]
    rule("nvidia.com/gpu" in tolerations, "nodes with GPUs must be open to it")
    rule(variables.get("TANDEM_DEVICE") == "cuda", "without a GPU it must not compute on the CPU")
    rule("TANDEM_CACHE_DIR" not in variables, "the image's compiled kernels must be found")
    rule(container(documents)["image"].endswith(":cuda"), "the image must be that of Dockerfile.cuda")


def gpu_rules(documents, rule):
    """One server with one GPU."""
    deployment, main, variables = workload(documents), container(documents), environment(documents)
    spec, name = deployment["spec"], deployment["metadata"]["name"]
    rolling = spec.get("strategy", {}).get("rollingUpdate", {})
    rule(rolling.get("maxSurge") == 0 and rolling.get("maxUnavailable"), "an update must not need another GPU")
    rule(main["resources"]["limits"].get("nvidia.com/gpu") == "1", "one GPU")
    gpu_pod_rules(documents, rule)
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    rule(ports == {"http": 8000, "metrics": 9090}, "ports are 8000 and 9090")
    policy, service = documents["NetworkPolicy", name]["spec"], documents["Service", name]["spec"]
    open_ports = {port["port"] for entry in policy["ingress"] for port in entry["ports"]}
    rule(open_ports == set(ports.values()), "the NetworkPolicy must let these ports through, and no others")
    rule(policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == [], "it calls nobody")
    labels = spec["template"]["metadata"]["labels"]
    budget = documents["PodDisruptionBudget", name]["spec"]
    selectors = [spec["selector"]["matchLabels"], service["selector"], policy["podSelector"]["matchLabels"],
                 budget["selector"]["matchLabels"]]
    rule(all(selector and selector.items() <= labels.items() for selector in selectors), "selectors must match the pods")


def group_rules(documents, rule):
    """The pods of one model."""
    stateful_set = documents["StatefulSet", "tandem"]
    spec, pod = stateful_set["spec"], stateful_set["spec"]["template"]["spec"]
    main = container(documents)
    headless, client = documents["Service", "tandem-group"], documents["Service", "tandem"]
    policy = documents["NetworkPolicy", "tandem"]["spec"]
    variables = environment(documents)

    rule(spec.get("podManagementPolicy") == "Parallel", "pods must start in parallel")
    rule(spec.get("updateStrategy") == {"type": "OnDelete"}, "a group is updated as a whole: OnDelete")
    rule(spec["serviceName"] == headless["metadata"]["name"], "serviceName must be the headless Service")
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

    replicas, gpus = int(variables["TANDEM_REPLICAS"]), int(variables["TANDEM_GPUS_PER_POD"])
    rule(replicas == spec["replicas"], "TANDEM_REPLICAS must be the number of replicas")
    rule(replicas * gpus == int(variables["TANDEM_TENSOR_PARALLEL_SIZE"]), "the sizes must multiply up")
    rule(variables["TANDEM_SERVICE_NAME"] == headless["metadata"]["name"], "TANDEM_SERVICE_NAME must be the headless Service")
    mounts = {mount["mountPath"]: mount for mount in main["volumeMounts"]}
    rule(os.path.dirname(variables["TANDEM_GROUP_KEY_FILE"]) in mounts, "the group key must be mounted")
    writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
    if has_gpus(documents):
        gpu_pod_rules(documents, rule)
        rule(main["resources"]["limits"]["nvidia.com/gpu"] == str(gpus), "a GPU for each rank of a pod")
    else:
        rule(variables["TANDEM_CACHE_DIR"] in writable, "the cache must be writable")
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    rule(ports == {"http": 8000, "metrics": 9090, "group": 7400, "rank": 7401}, "ports are 8000, 9090, 7400 and 7401")
    open_ports, group_ports = set(), set()
    for entry in policy["ingress"]:
        # None named are all.
        for port in entry.get("ports", [{"port": 1, "endPort": 65535}]):
            numbers = range(port["port"], port.get("endPort", port["port"]) + 1)
            open_ports.update(numbers)
            if any(number in GROUP_PORTS for number in numbers):
                group_ports.update(numbers)
                peers = [peer.get("podSelector", {}).get("matchLabels") for peer in entry.get("from", [])]
                rule(bool(peers) and all(peers), "the group's ports are for its own pods only")
    rule(open_ports >= set(ports.values()), "the NetworkPolicy must let every port through")
    rule(group_ports >= set(range(7400, 7401 + gpus)), "the NetworkPolicy must let every rank through")
    egress = {p["port"] for entry in policy["egress"] for p in entry.get("ports", [{"port": 7400}, {"port": 8000}])}
    rule({7400, 8000, 53} <= egress, "pods must reach each other, the leader's API and DNS")
    if has_gpus(documents):
        free = [entry for way in ("ingress", "egress") for entry in policy[way] if "ports" not in entry]
        rule(len(free) == 2, "NCCL takes ports as it finds them")


# Of what makes the pods, whatever it is.
POD_MUTATIONS = [
    ("spec template spec terminationGracePeriodSeconds", 30),
    ("spec template spec enableServiceLinks", True),
    ("spec template spec automountServiceAccountToken", True),
    ("spec template spec securityContext runAsNonRoot", False),
    ("spec template spec securityContext seccompProfile", {"type": "Unconfined"}),
    ("spec template spec containers 0 securityContext readOnlyRootFilesystem", False),
    ("spec template spec containers 0 securityContext allowPrivilegeEscalation", True),
    ("spec template spec containers 0 securityContext capabilities", {"add": ["SYS_ADMIN"]}),
    ("spec template spec containers 0 startupProbe httpGet path", "/readyz"),
    ("spec template spec containers 0 startupProbe failureThreshold", 3),
    ("spec template spec containers 0 livenessProbe httpGet path", "/readyz"),
    ("spec template spec containers 0 readinessProbe periodSeconds", 30),
    ("spec template spec containers 0 resources limits cpu", "500m"),
    ("spec template metadata labels", {"app.kubernetes.io/name": "other"}),
]
GROUP_MUTATIONS = [
    ("StatefulSet tandem spec podManagementPolicy", "OrderedReady"),
    ("StatefulSet tandem spec updateStrategy", {"type": "RollingUpdate"}),
    ("StatefulSet tandem spec serviceName", "tandem"),
    ("StatefulSet tandem spec replicas", 3),
    ("StatefulSet tandem spec template spec containers 0 ports 2 containerPort", 7500),
    ("StatefulSet tandem spec template spec volumes 4 emptyDir", {}),
    ("Service tandem-group spec clusterIP", "10.0.0.1"),
    ("Service tandem-group spec publishNotReadyAddresses", False),
    ("Service tandem spec selector statefulset.kubernetes.io/pod-name", "tandem-1"),
    ("NetworkPolicy tandem spec ingress 2 from", []),
    ("NetworkPolicy tandem spec ingress 2 ports 0 endPort", 7400),
    ("NetworkPolicy tandem spec egress", []),
    ("PodDisruptionBudget tandem spec selector matchLabels", {"a": "b"}),
]
GPU_GROUP_MUTATIONS = [
    ("StatefulSet tandem spec template spec tolerations", []),
    ("StatefulSet tandem spec template spec containers 0 image", "tandem:latest"),
    ("StatefulSet tandem spec template spec containers 0 env 8 value", "auto"),
    ("StatefulSet tandem spec template spec containers 0 resources", {
        "limits": {"cpu": "4", "nvidia.com/gpu": "2"}, "requests": {"cpu": "4", "nvidia.com/gpu": "2"}}),
    ("NetworkPolicy tandem spec ingress 2", {"from": [{"podSelector": {"matchLabels": {"a": "b"}}}],
                                             "ports": [{"port": 7400, "endPort": 7408}]}),
]
GPU_MUTATIONS = [
    ("Deployment tandem-gpu spec strategy rollingUpdate maxSurge", 1),
    ("Deployment tandem-gpu spec template spec tolerations", []),
    ("Deployment tandem-gpu spec template spec containers 0 image", "tandem:latest"),
    ("Deployment tandem-gpu spec template spec containers 0 resources limits nvidia.com/gpu", "2"),
    ("Deployment tandem-gpu spec template spec containers 0 env 0 value", "auto"),
    ("Deployment tandem-gpu spec template spec containers 0 env 1 name", "TANDEM_CACHE_DIR"),
    ("Deployment tandem-gpu spec template spec containers 0 ports 0 containerPort", 80),
    ("Service tandem-gpu spec selector", {"a": "b"}),
    ("NetworkPolicy tandem-gpu spec ingress 0 ports 0 port", 7400),
    ("NetworkPolicy tandem-gpu spec egress", [{}]),
    ("PodDisruptionBudget tandem-gpu spec selector matchLabels", {"a": "b"}),
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
    missed, group = [], is_group(documents)
    owner = "StatefulSet tandem" if group else "Deployment tandem-gpu"
    mutations = [(f"{owner} {path}", value) for path, value in POD_MUTATIONS] + (GROUP_MUTATIONS if group else GPU_MUTATIONS)
    if group and has_gpus(documents):
        mutations = [(path, value) for path, value in mutations if "ports 0 endPort" not in path] + GPU_GROUP_MUTATIONS
    for path, value in mutations:
        mutant = copy.deepcopy(documents)
        set_at(mutant, path, value)
        if not rule_problems(mutant):
            missed.append(f"{path} = {value}")
    sizes = ["TANDEM_REPLICAS", "TANDEM_GPUS_PER_POD", "TANDEM_TENSOR_PARALLEL_SIZE", "TANDEM_SERVICE_NAME"]
    for name in sizes if group else []:
        mutant = copy.deepcopy(documents)
        entry = next(entry for entry in container(mutant)["env"] if entry["name"] == name)
        entry["value"] = "7"
        if not rule_problems(mutant):
            missed.append(f"{name} = 7")
    broken = copy.deepcopy(documents)
    workload(broken)["spec"]["replica"] = 2
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
