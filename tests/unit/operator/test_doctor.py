"""What the doctor says of a cluster, from what kubectl prints."""

from __future__ import annotations

import json

from antiphon.cli.doctor import check_cluster, check_machine, line


def cluster(image: str = "quay.io/kuberay/operator:v1.7.0", missing: str = "", gpus: str = "8", ready: int | None = 2) -> list[str]:
    def run(arguments: list[str]) -> str | None:
        match arguments[:2]:
            case ["version", _]:
                return json.dumps({"serverVersion": {"gitVersion": "v1.36.0"}})
            case ["get", "crd"]:
                return None if arguments[2].startswith(missing or "-") else arguments[2]
            case ["get", "deployments"] if "app.kubernetes.io/name=antiphon-operator" in arguments:
                ours = {"metadata": {"name": "antiphon", "namespace": "system"}, "spec": {"replicas": 2}}
                return json.dumps(
                    {"items": [] if ready is None else [{**ours, "status": {"readyReplicas": ready} if ready else {}}]}
                )
            case ["get", "deployments"]:
                return json.dumps({"items": [{"spec": {"template": {"spec": {"containers": [{"image": image}]}}}}]})
            case ["auth", "can-i"]:
                return "yes\n"
            case _:
                return json.dumps({"items": [{"status": {"allocatable": {"nvidia.com/gpu": gpus}}}]})

    return [line(finding) for finding in check_cluster(run)]


def test_a_good_cluster_is_all_ok() -> None:
    assert all(text.startswith("ok") for text in cluster())
    assert "ok   accelerators: 8 nvidia.com/gpu" in cluster()


def test_an_old_kuberay_is_told_with_the_way_out() -> None:
    assert "FAIL KubeRay: 1.6.2  -> upgrade KubeRay to 1.7 or newer" in cluster("kuberay/operator:v1.6.2@sha256:abc")


def test_an_operator_that_does_not_run_is_told() -> None:
    (told,) = [text for text in cluster(ready=0) if "operator:" in text]
    assert told.startswith("FAIL operator: 0 of 2 replicas are ready in system  -> kubectl logs -n system deployment/antiphon")
    assert any(text.startswith("FAIL operator: not installed  -> helm install antiphon") for text in cluster(ready=None))
    assert "ok   operator: 1 of 2 replicas are ready in system" in cluster(ready=1)


def test_missing_kinds_are_told() -> None:
    assert any(text.startswith("FAIL servingpools: missing") for text in cluster(missing="servingpools"))


def test_without_a_cluster_nothing_fails() -> None:
    (finding,) = check_cluster(lambda arguments: None)
    assert finding.ok is None


def test_this_machine_has_what_the_tests_need() -> None:
    assert all(finding.ok for finding in check_machine() if finding.name in ("torch", "ray"))
