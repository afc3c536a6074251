"""What a worker is given on a cluster, and what is refused before there is one; no Ray runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from search.data import cache
from search.data.splits import fetch
from search.engine import cluster
from search.engine.cluster import WorkerResources, at_work
from search.study.study import Study
from spaces.exceptions import InputError


def test_a_client_is_refused_with_what_to_do(study: Study) -> None:
    away = study.model_copy(update={"address": "ray://127.0.0.1:10001"})
    with pytest.raises(InputError, match="submit the search"), cluster.joined(away):
        pass


def test_the_users_own_connection_to_ray_is_left_alone(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("it is not ours"))
    with pytest.raises(InputError, match=r"connected already: call ray.shutdown\(\) first"), cluster.joined(study):
        pass
    with pytest.raises(InputError, match="connected already"):
        cluster.capacity(study)


def _node(cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}


NODES = [_node(1), _node(1), _node(0)]


@pytest.mark.parametrize(
    ("held", "cpu", "gpu", "law"),
    [
        (NODES, 2, 0, "cpus_per_trial must be at most what the cluster has on one node, 1, but is 2"),
        (NODES, 1, 0.5, "gpus_per_trial must be at most what the cluster has on one node, 0, but is 0.5"),
        (
            [_node(8), _node(1, 2)],
            4,
            1,
            "a training must fit on one node, but asks for 4 CPUs and 1 GPUs of nodes with",
        ),
        ([_node(8, 4)], 4, 1.5, "gpus_per_trial must be a fraction of one GPU or whole ones, but is 1.5"),
    ],
)
def test_what_no_single_node_holds_is_refused(held: list[dict[str, Any]], cpu: float, gpu: float, law: str) -> None:
    with pytest.raises(InputError, match=law):
        cluster._fitting(held, cpu, gpu)


def test_only_nodes_that_hold_a_trial_are_asked_for_the_storage() -> None:
    assert cluster._fitting([_node(0), _node(4, 1), _node(4)], 1, 0.25) == [_node(4, 1)]


@pytest.mark.parametrize(("gpu", "caps"), [(0.25, [0.225]), (0.5, [0.45]), (0, []), (1, []), (2, [])])
def test_a_worker_that_shares_a_gpu_is_capped_before_it_works(
    study: Study, monkeypatch: pytest.MonkeyPatch, gpu: float, caps: list[float]
) -> None:
    said: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: said.append(round(share, 3)))
    at_work(study, WorkerResources(1, gpu), lambda study, more: said.append(more), "works")
    assert said == [*caps, "works"]


def test_data_are_adopted_once_and_whole(tmp_path: Path) -> None:
    fetch("digits", tmp_path / "here")
    packed = cache.pack("digits", tmp_path / "here")
    opened = []

    def bring() -> dict[str, Any]:
        opened.append("once")
        return packed

    for _ in range(2):
        cache.adopt("digits", tmp_path / "there", bring)
    assert opened == ["once"] and cache.fault(tmp_path / "there" / "decoded" / "digits", thorough=True) is None
    (tmp_path / "there" / "decoded" / "digits" / "x_train.npy").write_bytes(b"cut short")
    cache.adopt("digits", tmp_path / "there", bring)
    assert opened == ["once"] * 2 and cache.fault(tmp_path / "there" / "decoded" / "digits", thorough=True) is None
