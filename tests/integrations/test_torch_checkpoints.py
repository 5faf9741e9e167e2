"""Saved checkpoints of PyTorch's hosts give what a tracker in the run gave; what is hostile is named, and not run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import lnp
from lnp import cli

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the hosts' own, about each other
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]

TOKENS = np.random.default_rng(0).integers(0, 32, (6, 8))
X = np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32)
Y = np.random.default_rng(2).integers(0, 2, 12)


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def trained(model, step, batch, each):
    """The model after some steps of gradient descent; `each` is called before every step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for now in range(step + 1):
        each(now, model)
        optimizer.zero_grad()
        batch(model).backward()
        optimizer.step()


def same(rows, expected):
    """Whether the rows are a tracker's, to the rounding of one process after another."""
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if name not in ("time", "seconds", "notes") and not isinstance(value, str):
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


def language_run(folder, save, model=None):
    """A tracker's rows, and a folder of checkpoints of the same run."""
    model = (gpt2() if model is None else model).eval()
    tokens = torch.tensor(TOKENS)
    tracker = lnp.Tracker(schedule=2, batch={"input_ids": tokens, "labels": tokens})

    def each(step, model):
        tracker.observe(step, model)
        if step % 2 == 0:
            save(model, folder / f"checkpoint-{step}")

    trained(model, 4, lambda m: m(input_ids=tokens, labels=tokens).loss, each)
    return tracker.history.rows()


def test_a_folder_of_the_trainer(tmp_path):
    def save(model, path):
        model.save_pretrained(path)
        step = int(path.name[11:])
        state = {"global_step": step, "num_input_tokens_seen": 48 * step, "log_history": []}
        (path / "trainer_state.json").write_text(json.dumps(state))

    rows = language_run(tmp_path / "run", save)
    checkpoints = lnp.open_checkpoints(tmp_path / "run")
    assert checkpoints.steps == (0, 2, 4)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    history = lnp.measure_checkpoints(checkpoints, batches=batch, path=tmp_path / "a.jsonl").history
    same(history.rows(), rows)
    assert list(history["parameters"]) == [sum(p.numel() for p in gpt2().parameters())] * 3
    assert list(history["tokens_per_step"]) == [48] * 3
    assert not checkpoints(0).training
    half = lnp.open_checkpoints(tmp_path / "run", dtype="bfloat16")(0)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_revisions_in_the_hub_s_cache(tmp_path):
    folder = tmp_path / "models--me--gpt"
    (folder / "refs").mkdir(parents=True)
    for step in (1, 10, 2):
        (folder / "blobs" / str(step)).mkdir(parents=True)
        gpt2(step).save_pretrained(folder / "blobs" / str(step))
        (folder / "snapshots").mkdir(exist_ok=True)
        (folder / "snapshots" / f"abc{step}").symlink_to(folder / "blobs" / str(step))
        (folder / "refs" / f"step{step}").write_text(f"abc{step}")
    (folder / "refs" / "main").write_text("abc10")
    checkpoints = lnp.open_checkpoints(folder)
    assert checkpoints.steps == (1, 2, 10)
    assert torch.equal(checkpoints(2).lm_head.weight, gpt2(2).lm_head.weight)


def test_adapters(tmp_path):
    import peft
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    rows = language_run(tmp_path / "run", lambda model, path: model.save_pretrained(path), model)
    checkpoints = lnp.open_checkpoints(tmp_path / "run")
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    history = lnp.measure_checkpoints(checkpoints, batches=batch, on_error="raise").history
    same(history.rows(), rows)
    assert history["parameters"][0] == 2 * 8 + 24 * 2
    elsewhere = lnp.open_checkpoints(tmp_path / "run", model=gpt2)
    assert torch.equal(elsewhere(2).base_model.lm_head.weight, checkpoints(2).base_model.lm_head.weight)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"belongs to the base model .*base', which is not on this disk.*model="):
        checkpoints(2)
    evil = tmp_path / "run" / "checkpoint-4" / "adapter_config.json"
    evil.write_text(json.dumps(json.loads(evil.read_text()) | {"megatron_config": {}, "megatron_core": "antigravity"}))
    with pytest.raises(ValueError, match="names a module to import"):
        checkpoints(4)


def plain_run(save):
    """A tracker's rows of a plain loop that saves its weights."""
    x, y = torch.tensor(X), torch.tensor(Y)
    tracker = lnp.Tracker(schedule=2, batch=(x, y))

    def each(step, model):
        tracker.observe(step, model)
        if step % 2 == 0:
            save(step, model)

    trained(network(), 4, lambda m: torch.nn.functional.cross_entropy(m(x), y), each)
    return tracker.history.rows()


@pytest.mark.parametrize("form", ["plain", "nested", "wrapped", "safetensors"])
def test_state_dictionaries(tmp_path, form):
    from safetensors.torch import save_file

    def save(step, model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if form == "safetensors":
            save_file(state, tmp_path / f"model_{step:06d}.safetensors")
        elif form == "nested":
            torch.save({"model": state, "optimizer": {"state": {}, "lr": 0.1}, "step": step}, tmp_path / f"{step}.pt")
        elif form == "wrapped":
            torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / f"step={step}.pth")
        else:
            torch.save(state, tmp_path / f"step-{step}.pt")

    rows = plain_run(save)
    checkpoints = lnp.open_checkpoints(tmp_path, model=network)
    assert not checkpoints(2).training
    same(lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history.rows(), rows)


def test_lightning_s_checkpoints(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=6)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "run", "{epoch}", save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader)
    for model in (Module, network):
        checkpoints = lnp.open_checkpoints(tmp_path / "run", model=model)
        assert checkpoints.steps == (2, 4)
        d = lnp.decompose(module.net.eval(), (torch.tensor(X), torch.tensor(Y)), seed=4)
        rows = lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history.rows()
        assert rows[1]["rate"] == pytest.approx(d.rate, rel=1e-6)
        assert rows[1]["chi_net"] == pytest.approx(d.chi_net, rel=1e-6)


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    state = network().state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "1.pt")
    torch.save({"0.weight": state["0.weight"]}, tmp_path / "2.pt")
    torch.save(state | {"more": torch.ones(1)}, tmp_path / "3.pt")
    torch.save(state | {"0.weight": torch.ones(5, 3)}, tmp_path / "4.pt")
    torch.save([1, 2], tmp_path / "5.pt")
    torch.save({"ema": state, "model": {"w": torch.ones(1)}}, tmp_path / "6.pt")
    checkpoints = lnp.open_checkpoints(tmp_path, model=network)
    for step, match in enumerate(
        ("several sets of weights that fit the model, under 'model', 'ema'", "lacks .*0.bias", "has .'more'.",
         "size mismatch", "holds a list"), 1
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            checkpoints(step)
    assert checkpoints(6)[0].weight.shape == (4, 3)
    assert lnp.open_checkpoints(tmp_path, model=network, entry="ema")(1)[0].weight.shape == (4, 3)
    with pytest.raises(ValueError, match=r"received no model.*--model"):
        lnp.open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        lnp.open_checkpoints(tmp_path, model=network, dtype="int8")


def test_a_hugging_face_checkpoint_without_a_weight_is_refused_and_not_filled_up_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    for step in (1, 2):
        gpt2().save_pretrained(tmp_path / f"checkpoint-{step}")
        file = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        state = load_file(file)
        if step == 1:
            del state["transformer.h.0.mlp.c_fc.weight"]
        else:
            state["transformer.h.7.mlp.c_fc.weight"] = torch.ones(2)
        save_file(state, file, {"format": "pt"})
    checkpoints = lnp.open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['transformer.h.0.mlp.c_fc.weight'\]"):
        checkpoints(1)
    with pytest.raises(ValueError, match=r"has \['transformer.h.7.mlp.c_fc.weight'\] beyond"):
        checkpoints(2)


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


HOSTILE = ["pickle", "torch", "truncated", "shapes", "header", "own code", "fetched code", "config", "link", "pipe"]


def damaged(kind, folder, mark):
    """Make a sound checkpoint one that is damaged, or that wants to run code which makes the file `mark`."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    changes = {
        "shapes": {"n_embd": 16},
        "own code": {"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}},
        "fetched code": {"attn_implementation": "evil/kernel"},
    }
    if kind in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[kind]))
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass")
    elif kind == "config":
        config.write_text("[" * 100_000)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + b"{" * 100)
    else:
        weights.unlink()
    if kind in ("pickle", "torch"):
        with open(folder / "pytorch_model.bin", "wb") as file:
            pickle.dump(Evil(mark), file) if kind == "pickle" else torch.save({"w": Evil(mark)}, file)
    elif kind == "link":
        weights.symlink_to(weights)
    elif kind == "pipe":
        os.mkfifo(weights)


@pytest.mark.filterwarnings("ignore:lnp. the checkpoint of step .* was skipped")
def test_a_hostile_folder_gives_named_errors_and_runs_nothing(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "run"
    for step in range(len(HOSTILE) + 1):
        gpt2().save_pretrained(folder / f"checkpoint-{step}")
    for step, kind in enumerate(HOSTILE, 1):
        damaged(kind, folder / f"checkpoint-{step}", mark)
    checkpoints = lnp.open_checkpoints(folder)
    measured = lnp.measure_checkpoints(checkpoints, batches={"input_ids": TOKENS, "labels": TOKENS})
    assert list(measured.history["step"]) == [0]
    assert list(measured.skipped) == list(range(1, len(HOSTILE) + 1))
    for step, kind in enumerate(HOSTILE, 1):
        assert str(folder / f"checkpoint-{step}") in measured.skipped[step], kind
        assert "Expected" in measured.skipped[step] or kind == "link", kind
        assert kind not in ("pickle", "torch") or "pickles (.bin) can run code" in measured.skipped[step]
    assert not mark.exists()


def test_pickles_of_state_dictionaries_run_nothing(tmp_path):
    mark = tmp_path / "ran"
    torch.save(network().state_dict(), tmp_path / "1.pt")
    torch.save(network().state_dict() | {"evil": Evil(mark)}, tmp_path / "2.pt")
    with open(tmp_path / "3.pt", "wb") as file:
        pickle.dump(Evil(mark), file)
    torch.save({"state_dict": network().state_dict(), "global_step": Evil(mark)}, tmp_path / "4.ckpt")
    with pytest.warns(UserWarning, match="was skipped"):
        measured = lnp.measure_checkpoints(
            lnp.open_checkpoints(tmp_path, model=network, pattern="*.pt"), batches=(X, Y)
        )
    assert list(measured.skipped) == [2, 3]
    with pytest.warns(UserWarning, match="step 4 was skipped"):
        lnp.measure_checkpoints(lnp.open_checkpoints(tmp_path, model=network, pattern="*.ckpt"), batches=(X, Y))
    assert not mark.exists()
    torch.load(tmp_path / "2.pt", weights_only=False)
    assert mark.exists()  # the pickle is one that would have run


def test_folders_that_hold_no_checkpoints_or_several(tmp_path):
    with pytest.raises(NotADirectoryError, match="is no folder"):
        lnp.open_checkpoints(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        lnp.open_checkpoints(tmp_path)
    for name in ("model-3.pt", "optimizer-3.pt"):
        torch.save(network().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"model-3.pt and optimizer-3.pt .* both of step 3.*--pattern"):
        lnp.open_checkpoints(tmp_path, model=network)
    assert lnp.open_checkpoints(tmp_path, model=network, pattern="model-*").steps == (3,)
    (tmp_path / "3.keras").touch()
    with pytest.raises(FileNotFoundError, match="of several kinds"):
        lnp.open_checkpoints(tmp_path, model=network, pattern="[!o]*")


def byte_tokenizer(folder):
    """A tokenizer of 32 characters, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz.,;:!?")}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (0, 5):
        gpt2(step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh. "), 1000))
    (tmp_path / "text.txt").write_text(text)
    command = ["measure", "run", "--text", "text.txt", "--length", "8", "--batch-size", "3"]
    assert cli.main(command) == 1
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run.jsonl").exists()
    byte_tokenizer(tmp_path / "run" / "checkpoint-5")
    assert cli.main([*command, "--count", "2", "--tag", "tokens_per_step=10", "--by-layer"]) == 0
    assert capsys.readouterr().out == "run.jsonl: 2 checkpoints measured\n"
    history = lnp.History.read(tmp_path / "run.jsonl")
    assert "layer/transformer.wte/rate" in history
    assert history["net/rate_per_token"][1] == pytest.approx(-np.diff(history["loss"])[0] / 50, rel=1e-3)
    assert cli.main(["compare", "run.jsonl"]) == 0
    (tmp_path / "run" / "checkpoint-5" / "config.json").write_text("{}")
    np.save(tmp_path / "tokens.npy", TOKENS)
    again = ["measure", "run", "--tokens", "tokens.npy", "--batch-size", "6", "--out", "other.jsonl"]
    assert cli.main(again) == 1  # of which kind the last one is, is not known
    gpt2().save_pretrained(tmp_path / "run" / "checkpoint-6")
    capsys.readouterr()
    assert cli.main(again) == 3
    told = capsys.readouterr()
    assert told.out == "other.jsonl: 2 checkpoints measured, 1 skipped\n"
    assert told.err.startswith("lnp: the checkpoint of step 5 was skipped: ")
    d = lnp.decompose(gpt2(0).eval(), {"input_ids": torch.tensor(TOKENS), "labels": torch.tensor(TOKENS)})
    assert lnp.History.read(tmp_path / "other.jsonl")["rate"][0] == pytest.approx(d.rate, rel=1e-6)


def test_the_command_line_with_a_model_of_one_s_own(tmp_path, capsys):
    torch.save(network().state_dict(), tmp_path / "1.pt")
    np.savez(tmp_path / "data.npz", inputs=X, targets=Y)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))\n"
    )
    command = ["measure", str(tmp_path), "--arrays", str(tmp_path / "data.npz"), "--batch-size", "12"]
    out = ["--out", str(tmp_path / "run.jsonl")]
    assert cli.main([*command, *out]) == 1
    assert "--model mine.py:build" in capsys.readouterr().err
    assert cli.main([*command, *out, "--model", f"{tmp_path / 'mine.py'}:build", "--dtype", "float64"]) == 0
    d = lnp.decompose(network().double(), (torch.tensor(X).double(), torch.tensor(Y)), seed=1)
    assert lnp.History.read(tmp_path / "run.jsonl")["chi_net"][0] == pytest.approx(d.chi_net, rel=1e-12)


def test_text_needs_a_causal_language_model(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path / "checkpoint-1")
    np.save(tmp_path / "tokens.npy", TOKENS)
    with pytest.raises(ValueError, match=r"is a BertForMaskedLM, .*--batches"):
        lnp.open_checkpoints(tmp_path).reader.check_language_model(tmp_path / "checkpoint-1")
