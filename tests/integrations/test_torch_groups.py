"""Four processes that measure a batch together get what one process gets of all of it, and none waits for ever.

Those of sharded models are `thorough` (`nox -s processes`): they take two minutes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations import torch_groups, torch_split
from integrations.torch_groups import EXACT, SAMPLES, SIZE

TESTS = Path(__file__).parent.parent
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LIMIT = 300
"""Seconds until the processes count as waiting for each other."""
ERRORS = ("rate_stderr", "chi_pos_stderr", "noise_scale_low", "noise_scale_high")
"""Of the population, which come from other samples in parts of a batch."""


def run(folder, *cases):
    """What each process came to, by case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", torch_groups.__name__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), port, *cases],
            cwd=TESTS,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ends = [0, 9, 0, 9] if "killed" in cases else [0] * SIZE
    assert [process.returncode for process in processes] == ends, "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return run(tmp_path_factory.mktemp("copies"), "data_parallel", "last_line")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = "data_parallel", "fully_sharded", "tensor_parallel", "undisturbed", "failing", "killed"
    return run(tmp_path_factory.mktemp("groups"), *cases)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run(tmp_path_factory.mktemp("more"), "other_shardings", "ways_of_their_own")


def whole(model, batch, loss=None, **options):
    return lnp.decompose(model, batch, loss, **EXACT | options).to_dict()


def same(found, expected, rel):
    for name, value in expected.items():
        if isinstance(value, float) and not name.endswith(ERRORS):
            assert found[name] == pytest.approx(value, rel=rel, abs=1e-9 if rel > 1e-9 else 1e-15), name


def test_every_process_gets_the_result_of_the_whole_batch(copies):
    of_the_whole_batch([cases["data_parallel"] for cases in copies])


@pytest.mark.thorough
def test_every_process_gets_the_result_of_the_whole_batch_with_its_shard_of_a_model(ranks):
    of_the_whole_batch([cases["fully_sharded"] for cases in ranks])


def of_the_whole_batch(cases):
    for name, rel in (("float64", 1e-12), ("float32", 1e-6)):
        dtype = DTYPES[name]
        found = [one[name] for one in cases]
        assert all(one == found[0] for one in found)
        same(found[0], whole(torch_groups.network(dtype), torch_groups.numbers(dtype)), rel)
        assert found[0]["samples"] == SAMPLES
        assert not found[0]["notes"]


def test_a_program_may_end_with_a_measurement(copies):
    expected = whole(torch_groups.network(), torch_groups.numbers())
    for cases in copies:
        same(cases["last_line"], expected, 1e-12)


def test_two_processes_of_four(copies):
    expected = whole(torch_groups.network(), torch_groups.numbers())
    for cases in copies:
        same(cases["data_parallel"]["pair"], expected, 1e-12)


def test_one_process_measures_its_own_batch(copies):
    for rank, cases in enumerate(copies):
        expected = whole(torch_groups.network(), torch_groups.own(torch_groups.numbers(), rank))
        assert cases["data_parallel"]["alone"]["rate"] == pytest.approx(expected["rate"], rel=1e-12)
        assert cases["data_parallel"]["alone"]["samples"] == SAMPLES // SIZE


def test_what_is_measured_is_the_mean_of_the_processes_losses(copies):
    """With 3, 4, 5 and 6 samples, as data-parallel training weighs them."""
    rows = [cases["data_parallel"]["unequal"]["rows"] for cases in copies]
    model, (x, y) = torch_groups.network(), torch_groups.numbers()
    loss = sum(F.cross_entropy(model(x[a:b]), y[a:b]) for a, b in rows) / SIZE
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    found = copies[0]["data_parallel"]["unequal"]
    assert [b - a for a, b in rows] == [3, 4, 5, 6]
    assert found["samples"] == 18
    loss = loss.detach()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-12)
    assert found["rate"] == pytest.approx(float(sum(g.square().sum() for g in gradient)), rel=1e-12)
    assert found["parts"] == pytest.approx(float(loss), rel=1e-12)


def test_error_bars_of_random_probes_hold(copies):
    exact = whole(torch_groups.network(), torch_groups.numbers())["chi_net"]
    found = np.array(copies[0]["data_parallel"]["probes"])
    deviations = (found[:, 0] - exact) / found[:, 1]
    assert 0.3 < np.mean(deviations**2) < 3  # of 8
    assert np.all(found[:, 2] > 5)


@pytest.mark.thorough
def test_errors_of_the_population_are_those_of_the_whole_batch(ranks):
    """All six samples of a process are left out one by one, with products of the whole gradient."""
    expected = whole(torch_groups.network(), torch_groups.numbers())
    some = ranks[0]["data_parallel"]["float64"]["population/rate_stderr"]
    assert some == pytest.approx(
        expected["population/rate_stderr"], rel=0.35
    )  # there 12 samples of 24, drawn at random
    assert ranks[0]["fully_sharded"]["float64"]["population/rate_stderr"] > 0.9 * some  # an upper bound


@pytest.mark.thorough
def test_a_sharded_language_model(ranks):
    expected = whole(torch_groups.language(), torch_groups.text(), nn.CrossEntropyLoss())
    found = [cases["fully_sharded"]["language"] for cases in ranks]
    assert all(one == found[0] for one in found)
    same(found[0], expected, 1e-10)


@pytest.mark.thorough
def test_processes_that_split_operations_get_the_result_of_one(ranks):
    """With the population's errors, and the same signs: all of them have the whole batch."""
    expected = {name: whole(torch_groups.network(dtype), torch_groups.numbers(dtype)) for name, dtype in DTYPES.items()}
    expected["pair"] = expected["float64"]
    language = nn.CrossEntropyLoss()
    expected["block"] = whole(torch_split.block(), torch_split.sentences(), language)
    expected["probes"] = lnp.decompose(torch_split.block(), torch_split.sentences(), language, seed=3).to_dict()
    for name, values in expected.items():
        found = [cases["tensor_parallel"][name] for cases in ranks]
        assert all(one == found[0] for one in found)
        for key, value in values.items():
            if isinstance(value, float):
                rel = 1e-6 if name == "float32" else 1e-12
                rel *= 10 if key.startswith("population") else 1  # differences of what is nearly the same
                assert found[0][key] == pytest.approx(value, rel=rel, abs=1e-7 * rel, nan_ok=True), (name, key)
        assert not found[0]["notes"]


@pytest.mark.thorough
def test_splitting_goes_on_bit_by_bit(ranks):
    assert all(cases["tensor_parallel"]["undisturbed"] for cases in ranks)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "counts",
            "ValueError: This network is tensor parallel, and lnp runs it whole, where it raised a",
        ),
        ("means", "ValueError: This network is tensor parallel, and lnp runs it whole, where its outputs"),
        (
            "gains",
            "ValueError: This network is tensor parallel, and lnp runs it whole, where its gradient",
        ),
        ("batches", "ValueError: Processes 0 and 1 of the group have different batches: 6 samples with a loss of"),
        ("shifted", "ValueError: This network is tensor parallel, and lnp runs it whole, where its"),
        (
            "two meshes",
            "ValueError: The model's parameters are sharded over processes (DTensor, over several meshes",
        ),
    ],
)
def test_what_goes_by_its_part_of_the_weights_is_refused_in_every_process(ranks, case, text):
    for cases in ranks:
        assert cases["tensor_parallel"][case].startswith(text)


@pytest.mark.thorough
def test_a_process_that_splits_operations_and_is_alone_or_fails_is_told_of(ranks):
    told = [cases["tensor_parallel"]["one fails"] for cases in ranks]
    assert ranks[0]["tensor_parallel"]["alone"].startswith("Gone: Process 0 of 4 has called lnp and waited 2 s")
    assert told[2] == "FloatingPointError: overflow in process 2"
    assert all(told[rank].startswith("FailedElsewhere: lnp failed in process 2 of 4") for rank in (0, 1, 3))
    expected = whole(torch_groups.network(), torch_groups.numbers())
    for cases in ranks:
        same(cases["tensor_parallel"]["afterwards"], expected, 1e-12)


@pytest.mark.thorough
def test_parameters_are_whole_one_module_at_a_time(ranks):
    model = torch_groups.language()
    largest = max(sum(8 * p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    every = sum(8 * p.numel() for p in model.parameters())
    for cases in ranks:
        assert cases["fully_sharded"]["peak"] <= largest < every / 3
        assert cases["fully_sharded"]["gathered"] > every


@pytest.mark.parametrize("kind", ["hybrid", "grouped", "partly"])
@pytest.mark.thorough
def test_other_shardings(more, kind):
    expected = whole(torch_groups.network(), torch_groups.numbers())
    for cases in more:
        same(cases["other_shardings"][kind], expected, 1e-12)


@pytest.mark.thorough
def test_parameters_that_not_all_processes_use(more):
    models, (x, y) = [torch_groups.branching(0), torch_groups.branching(1)], torch_groups.numbers()
    parts = [torch_groups.own((x, y), rank) for rank in range(SIZE)]
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(models[rank % 2](a), b), list(models[rank % 2].parameters()), materialize_grads=True
        )
        for rank, (a, b) in enumerate(parts)
    ]
    expected = sum(float((sum(of_one) / SIZE).square().sum()) for of_one in zip(*gradients, strict=True))
    for cases in more:
        assert cases["other_shardings"]["branching"]["rate"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.thorough
def test_mixed_precision_is_that_of_the_policy(more):
    """Parameters and inputs in bfloat16, outputs in float32: the loss is that of the sharded model itself."""
    losses = [cases["ways_of_their_own"]["loss"] for cases in more]
    found = more[0]["ways_of_their_own"]["bfloat16"]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    model, (x, y) = torch_groups.network(torch.bfloat16), torch_groups.numbers(torch.bfloat16)
    expected = whole(
        (lambda p, x: torch.func.functional_call(model, p, x).float(), dict(model.named_parameters())), (x, y)
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name in ("rate", "chi_loss", "chi_net", "chi_pos"):
        assert found[name] == pytest.approx(expected[name], rel=1e-2), name


@pytest.mark.thorough
def test_processes_may_go_ways_of_their_own(more):
    expected = whole(torch_groups.language(), torch_groups.text(), nn.CrossEntropyLoss())
    for cases in more:
        found = cases["ways_of_their_own"]["ways"]
        assert found["rate"] == pytest.approx(expected["rate"], rel=1e-10)
        assert abs(found["chi_net"] - expected["chi_net"]) < 5 * found["chi_net_stderr"]
        assert "parts of the batch took different estimators: per_sample, exact" in found["notes"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_training_goes_on_bit_by_bit(ranks, kind):
    assert all(cases["undisturbed"][kind] for cases in ranks)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["alone", "alone, sharded"])
def test_a_process_that_calls_alone_is_told_so_in_time(ranks, kind):
    assert ranks[0]["failing"][kind].startswith("Gone: Process 0 of 4 has called lnp and waited 2 s for process 1")
    assert "group=None" in ranks[0]["failing"][kind]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_a_process_that_fails_makes_the_others_raise_and_the_next_measurement_is_right(ranks, kind):
    told = [cases["failing"][f"{kind}, one fails"] for cases in ranks]
    assert told[2] == "FloatingPointError: overflow in process 2"
    others = "FailedElsewhere: lnp failed in process 2 of 4, and so there is no result in any: " + told[2]
    assert [told[rank] for rank in (0, 1, 3)] == [others] * 3
    expected = whole(torch_groups.network(), torch_groups.numbers())
    for cases in ranks:
        same(cases["failing"][f"{kind}, afterwards"], expected, 1e-12)


@pytest.mark.thorough
def test_killed_processes_make_the_others_raise_in_time(ranks):
    assert ranks[0]["killed"]["told"].startswith("Gone: Process 1 of 2 has given no sign of life for 2 s")
    assert ranks[2]["killed"]["told"].startswith("Gone: ")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("talks", "RuntimeError: The network or its loss talks to other processes"),
        ("shards alone", "ValueError: The model's parameters are sharded over processes by fully_shard or"),
        ("spectrum", "ValueError: The model's parameters are sharded over processes by fully_shard or"),
        ("narrow", "ValueError: The model's parameters are sharded over processes (fully_shard of float16)"),
        ("parameters", "ValueError: Processes 0 and 1 of the group measure different parameters: ['0.bias'"),
        ("preconditioner", "ValueError: preconditioner= was given for a model that 4 processes measure together"),
        ("nested together", "ValueError: group= was given to lnp.decompose_nested, which cuts the batch of this"),
        ("kind", "TypeError: group is 3. Expected a torch.distributed.ProcessGroup"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_every_process(ranks, case, text):
    for cases in ranks:
        assert cases["failing"][case].startswith(text)


@pytest.mark.thorough
def test_other_functions_measure_one_process(ranks):
    assert ranks[0]["failing"]["nested"] is None


@pytest.mark.thorough
def test_groups_that_do_not_fit(ranks):
    told = [cases["failing"]["other group"] for cases in ranks]
    assert told[0] == told[1]
    assert told[0].startswith(
        "ValueError: group= has the processes [0, 1], and the model is sharded over [0, 1, 2, 3]."
    )
    assert all(one.startswith("ValueError: This process is no part of the group") for one in told[2:])
    assert ranks[0]["failing"]["talks alone"].startswith("RuntimeError: The network or its loss talks")


def test_groups_of_one_process():
    """Where nothing is distributed, "auto" is this process, and what needs several is refused."""
    import lnp_torch

    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        lnp.decompose(torch_groups.network(), torch_groups.numbers(), group=lnp_torch.Group())
    with pytest.raises(ValueError, match="timeout is 0"):
        lnp_torch.Group(timeout=0)
