"""Two processes that a host trains together measure its whole batch, and the run stays what it was, bit by bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lnp

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
SCRIPT = Path(__file__).with_name("torch_host_ranks.py")
LIMIT, STEPS = 240, 2
pytestmark = pytest.mark.thorough  # it takes half a minute, most of it for imports


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process came to, by host."""
    folder = tmp_path_factory.mktemp("hosts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started |= {"TORCHELASTIC_RUN_ID": "lnp", "GROUP_RANK": "0"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | started | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def first_rate(order):
    """The rate of the first batch of both processes, 16 samples, measured by one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator, dtype=torch.float64), torch.randint(3, (32,), generator=generator)
    return lnp.decompose(model, (x[order[:16]], y[order[:16]]), estimator="exact").rate


HOSTS = ("accelerate", "lightning", "transformers")


@pytest.mark.parametrize("host", [*HOSTS, *(f"{host}, FSDP2" for host in HOSTS)])
def test_hosts_measure_the_batch_of_all_processes(ranks, host):
    order = torch.arange(32)
    if not host.startswith("accelerate"):  # their samplers shuffle, with the seed 0
        order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    first, second = (cases[host] for cases in ranks)
    assert [row["samples"] for row in first["rows"]] == [16] * STEPS
    assert second["rows"] == []
    assert first["equal"]
    assert second["equal"]
    assert first["rows"][0]["rate"] == pytest.approx(first_rate(order), rel=1e-12)


def test_nothing_is_told(ranks):
    assert [cases["told"] for cases in ranks] == [[], []]
