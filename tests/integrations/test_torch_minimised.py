"""What a host minimises is what is measured: the rate is ||update||^2 / lr^2 of one step of plain SGD that it takes."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lnp
import lnp_torch
from integrations.torch_architectures import BART, DECODER, ENCODER, T5, TASK
from integrations.torch_runs import one_thread, warned_of
from lnp_torch import self_check
from lnp_torch.lightning import LNPCallback
from lnp_torch.transformers import attach, detach

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
_one_thread = pytest.fixture(one_thread, autouse=True, scope="module")
told = pytest.fixture(warned_of)
transformers.logging.set_verbosity_error()
RATE, SAMPLES, TOKENS = 0.125, 4, 6
JOINT = {"estimator": "joint", "max_probes": 2, "population": False}


def squared_update(before, after):
    """||update||^2 / lr^2."""
    pairs = [(after[name].double() - value.double()) / RATE for name, value in before.items()]
    return sum(float(difference.square().sum()) for difference in pairs)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# --- Hugging Face --------------------------------------------------------------------------------------------------


def whole_numbers(below, *shape):
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(4))


def texts(**columns):
    """Rows of tokens, of different lengths."""
    ids, rows = whole_numbers(20, SAMPLES, TOKENS), []
    for index in range(SAMPLES):
        labels = ids[index].clone()
        labels[TOKENS - index :] = -100
        more = {name: column[index] for name, column in columns.items()}
        rows.append({"input_ids": ids[index], "attention_mask": torch.ones(TOKENS, dtype=torch.long),
                     "labels": labels, **more})  # fmt: skip
    return rows


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def adapted(kind):
    peft = pytest.importorskip("peft")
    config = {
        "LoRA": lambda: peft.LoraConfig(**TASK, r=2, target_modules=["q_proj"]),
        "DoRA": lambda: peft.LoraConfig(**TASK, r=2, target_modules=["q_proj"], use_dora=True),
        "prompt": lambda: peft.PromptTuningConfig(**TASK, num_virtual_tokens=2),
    }[kind]()
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model


def bert(kind, **more):
    return kind(transformers.BertConfig(**ENCODER, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **more))


def shifted(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, of the last positions."""
    logits = outputs.logits[:, -labels.shape[1] : -1]
    total = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.2)
    return total / num_items_in_batch


class Weighted(transformers.Trainer):
    """Overrides the loss: a mean weighted by class, in another precision."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        self.seen = getattr(self, "seen", 0) + 1  # which a measurement must not count
        loss = F.cross_entropy(outputs.logits.double(), labels, weight=torch.tensor([1.0, 3.0]).double())
        return (loss, outputs) if return_outputs else loss


class Distilled(transformers.Trainer):
    """Overrides the loss: with a teacher, in two calls of models."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.teacher = getattr(self, "teacher", None) or llama()
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"]).logits.softmax(-1)
        outputs = model(**inputs)
        loss = outputs.loss + F.kl_div(outputs.logits.log_softmax(-1), wanted, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


POSITIONS = {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([2, 3, 4, 5])}
SMOOTHED = {"label_smoothing_factor": 0.1}
NUMBERS = {"labels": torch.linspace(0, 1, SAMPLES)}
LABELS = {"labels": torch.tensor([0, 1, 1, 0])}
T5_CONFIG = {**T5, "decoder_start_token_id": 0, "dropout_rate": 0}
HUGGING_FACE = {  # model, rows, arguments, more, class of the trainer
    "Llama": (llama, texts(), {}, {}, None),
    "smoothed": (llama, texts(), SMOOTHED, {}, None),
    "compute_loss_func": (llama, texts(), {}, {"compute_loss_func": shifted}, None),
    "LoRA": (lambda: adapted("LoRA"), texts(), {}, {}, None),
    "LoRA, smoothed": (lambda: adapted("LoRA"), texts(), SMOOTHED, {}, None),
    "DoRA, compute_loss_func": (lambda: adapted("DoRA"), texts(), {}, {"compute_loss_func": shifted}, None),
    "prompt tuning": (lambda: adapted("prompt"), texts(), {}, {}, None),
    "BART, smoothed": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, dropout=0)), texts(),
        SMOOTHED, {}, None,
    ),
    "T5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_CONFIG)), texts(), {}, {}, None),
    "questions": (
        lambda: bert(transformers.BertForQuestionAnswering),
        [{name: value for name, value in row.items() if name != "labels"} for row in texts(**POSITIONS)], {}, {}, None,
    ),
    "regression": (
        lambda: bert(transformers.BertForSequenceClassification, num_labels=1), texts(**NUMBERS), {}, {}, None
    ),
    "own compute_loss": (
        lambda: bert(transformers.BertForSequenceClassification), texts(**LABELS), {}, {}, Weighted
    ),
    "own compute_loss, with a teacher": (llama, texts(), {}, {}, Distilled),
}  # fmt: skip


def trainer_of(name, folder, size=SAMPLES, **arguments):
    model, rows, own, more, kind = HUGGING_FACE[name]
    torch.manual_seed(0)
    network = model()
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, max_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", max_grad_norm=0.0, logging_strategy="no", **own, **arguments,
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    make = transformers.Trainer if kind is None else kind
    return make(network, args, train_dataset=rows, optimizers=(optimizer, constant), **more)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name, tmp_path, told):
    trainer = trainer_of(name, tmp_path)
    before = values(trainer.model)
    tracker = attach(trainer, schedule=1, log=False, **JOINT)
    trainer.train()
    assert told() == []
    (rate,) = tracker.history["rate"]
    assert rate == pytest.approx(squared_update(before, values(trainer.model)), rel=2e-4)
    assert getattr(trainer, "seen", 1) == 1


@pytest.mark.parametrize("name", ["Llama", "smoothed", "compute_loss_func", "LoRA, smoothed"])
def test_all_batches_of_an_update(name, tmp_path, told):
    """Whose texts have different numbers of labels, by which the trainer weighs them."""
    trainer = trainer_of(name, tmp_path, size=1, gradient_accumulation_steps=SAMPLES)
    before = values(trainer.model)
    tracker = attach(trainer, schedule=1, log=False, accumulated=True, **JOINT)
    trainer.train()
    assert told() == []
    (rate,) = tracker.history["rate"]
    assert rate == pytest.approx(squared_update(before, values(trainer.model)), rel=2e-4)
    detach(trainer)
    assert not {"training_step", "get_batch_samples"} & set(vars(trainer))


def test_a_trainer_s_own_way_to_batches_is_put_back(tmp_path, told):
    trainer = trainer_of("Llama", tmp_path, size=1, gradient_accumulation_steps=SAMPLES)
    original, asked = trainer.get_batch_samples, []
    trainer.get_batch_samples = own = lambda *args: asked.append(1) or original(*args)
    tracker = attach(trainer, schedule=1, log=False, accumulated=True, **JOINT)
    trainer.train()
    assert (told(), asked, len(tracker.history)) == ([], [1], 1)
    detach(trainer)
    assert trainer.get_batch_samples is own
    assert "training_step" not in vars(trainer)


def test_a_trainer_that_minimises_something_else_is_told_of(tmp_path, told):
    trainer = trainer_of("Llama", tmp_path)
    training_step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: training_step(*args, **kwargs) + 1  # by another one that wraps
    attach(trainer, schedule=1, log=False, **JOINT)
    trainer.train()
    assert "was measured: the measurement is not of what is minimised" in told()[0]


@pytest.fixture
def compared(monkeypatch):
    """How often samples were compared with the batch in full."""
    found, compare = [], self_check._plan_here
    monkeypatch.setattr(self_check, "_plan_here", lambda *args: found.append(1) or compare(*args))
    return found


def test_samples_are_compared_once_in_a_run(tmp_path, compared):
    trainer = trainer_of("Llama", tmp_path, num_train_epochs=3)
    trainer.args.max_steps = 3
    tracker = attach(trainer, schedule=1, log=False)
    trainer.train()
    assert (len(tracker.history), len(compared)) == (3, 1)
    torch.manual_seed(0)
    callback = LNPCallback(schedule=1)
    lightning = pl.Trainer(max_steps=4, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                           logger=False, default_root_dir=tmp_path, callbacks=[callback])  # fmt: skip
    lightning.fit(Plain(), DataLoader(list(zip(INPUTS, CLASSES, strict=True)), batch_size=4))
    assert (len(callback.tracker.history), len(compared)) == (4, 2)


# --- Lightning -----------------------------------------------------------------------------------------------------

INPUTS = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
CLASSES, NUMBERS_OUT = torch.arange(8) % 3, torch.randn(8, 3, generator=torch.Generator().manual_seed(3))


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.calls = []

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        self.calls.append(batch_idx)  # which a measurement must not count
        loss = self.loss(batch)
        self.log("loss", loss["loss"] if isinstance(loss, dict) else loss)
        if self.logger is not None:
            self.logger.experiment.add_scalar("again", 1.0)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


def module(loss, **methods):
    return type("Own", (Plain,), {"loss": loss, **methods})


def named(self, batch):
    return {"loss": F.mse_loss(self.net(batch["x"]), batch["z"])}


def two_heads(self, batch):
    h = self.net[1](self.net[0](batch["x"]))
    return F.cross_entropy(self.net[2](h), batch["y"]) + 0.3 * F.mse_loss(h, torch.zeros_like(h))


LIGHTNING = {
    "cross-entropy": Plain,
    "mean squared error for labels": module(lambda self, b: F.mse_loss(self(b[0]), F.one_hot(b[1], 3).float())),
    "a criterion that is a module": module(lambda self, b: self.criterion(self.net(b[0]), b[1])),
    "a named batch": module(named),
    "without an index": module(named, training_step=lambda self, batch: self.loss(batch)),
    "several modules": module(two_heads),
    "a sum divided by something": module(
        lambda self, b: F.cross_entropy(self(b[0]), b[1], reduction="sum") / (len(b[1]) + 2)
    ),
    "half": module(lambda self, b: 0.5 * F.cross_entropy(self(b[0]), b[1])),
    "weights by class": module(lambda self, b: F.cross_entropy(self(b[0]), b[1], weight=torch.tensor([1.0, 2.0, 0.5]))),
    "noise": module(lambda self, b: F.cross_entropy(self(b[0] + 0.3 * torch.randn_like(b[0])), b[1])),
    "two passes": module(lambda self, b: (self(b[0]).softmax(-1) - self(-b[0]).softmax(-1)).square().mean()),
    "by the step that it is": module(
        lambda self, b: F.cross_entropy(self(b[0]), b[1]) * (2.0 + self.global_step + self.trainer.max_epochs)
    ),
    "contrastive": module(lambda self, b: F.cross_entropy(self(b[0]) @ self(b[0]).T, torch.arange(len(b[0])))),
}


def fitted(kind, folder, batches=1, **options):
    torch.manual_seed(0)
    network = kind()
    rows = [{"x": x, "y": y, "z": z} for x, y, z in zip(INPUTS, CLASSES, NUMBERS_OUT, strict=True)]
    as_named = kind.loss in (named, two_heads)
    data = rows if as_named else [(row["x"], row["y"]) for row in rows]
    callback = LNPCallback(**{"schedule": 1, **JOINT, **options})
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=folder, callbacks=[callback], enable_checkpointing=False, accumulate_grad_batches=batches,
    )  # fmt: skip
    before = values(network)
    trainer.fit(network, DataLoader(data, batch_size=8 // batches))
    return network, callback.tracker.history, squared_update(before, values(network))


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning(name, tmp_path, told):
    network, history, squared = fitted(LIGHTNING[name], tmp_path)
    assert told() == []
    assert history["rate"].tolist() == pytest.approx([squared], rel=1e-4)
    assert network.calls == ([] if name == "without an index" else [0])


def decayed(self, batch):
    return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float()) + 0.1 * self.net[0].weight.square().sum()


def test_terms_that_do_not_come_from_outputs_are_said(tmp_path):
    """A mean squared error for labels, with a penalty: it is no cross-entropy."""
    _, history, _ = fitted(module(decayed), tmp_path)
    assert "do not come from the outputs" in history.rows()[0]["notes"]
    torch.manual_seed(0)
    first = Plain()
    F.mse_loss(first(INPUTS), F.one_hot(CLASSES, 3).float()).backward()
    rate = sum(float(p.grad.square().sum()) for p in first.parameters())
    assert history["rate"].tolist() == pytest.approx([rate], rel=1e-4)


@pytest.mark.parametrize("given", [{"loss": "mse"}, {"prepare": lambda m, b: (m.net, (b[0], b[1]))}])
def test_a_module_that_minimises_something_else_is_told_of(given, tmp_path, told):
    kind = module(lambda self, b: F.mse_loss(self(b[0]), F.one_hot(b[1], 3).float()))
    if "loss" in given:
        kind = module(lambda self, b: F.l1_loss(self(b[0]), b[1]))
        data = [(x, z) for x, z in zip(INPUTS, NUMBERS_OUT, strict=True)]
    else:
        data = [(x, y) for x, y in zip(INPUTS, CLASSES, strict=True)]
    callback = LNPCallback(schedule=1, **JOINT, **given)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", enable_progress_bar=False, logger=False, callbacks=[callback],
                         enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(kind(), DataLoader(data, batch_size=8))
    (text,) = told()
    assert "the measurement is not of what is minimised" in text
    assert "Pass loss=, forward= or prepare=" in text


class TwoOptimizers(Plain):
    """Optimizes by hand, by two optimizers in each batch: Lightning counts two steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), RATE), torch.optim.SGD(self.net[2].parameters(), RATE)


def by_hand(folder, **options):
    callback = LNPCallback(**JOINT, **options)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False, callbacks=[callback],
                         enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(TwoOptimizers(), DataLoader(list(zip(INPUTS, CLASSES, strict=True)), batch_size=4))
    return callback.tracker.history


@pytest.mark.parametrize(("schedule", "steps"), [(1, [0, 2, 4, 6]), ([1, 5], [2, 6]), ([0, 3], [0, 4])])
def test_steps_that_lightning_passes_over_are_measured_at_the_next_batch(schedule, steps, tmp_path, told):
    assert by_hand(tmp_path, schedule=schedule, loss="cross_entropy")["step"].tolist() == steps
    assert told() == []


def test_what_a_module_minimises_by_hand_cannot_be_seen(tmp_path, told):
    assert len(by_hand(tmp_path, schedule=1)) == 0
    (text,) = told()
    assert "optimizes by hand" in text
    assert "Expected loss=, forward= or prepare=" in text


@pytest.mark.parametrize("batches", [2, 4])
def test_accumulated_gradients_are_measured_on_the_first_batch(batches, tmp_path, told):
    _, history, _ = fitted(Plain, tmp_path, batches)
    torch.manual_seed(0)
    network, few = Plain(), 8 // batches
    loss = F.cross_entropy(network(INPUTS[:few]), CLASSES[:few])
    assert history["loss"].tolist() == pytest.approx([loss.item()], rel=1e-5)
    assert told() == []


# --- Steps that are shared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1 / 3, 0.5, 8.0])
def test_a_loss_that_was_multiplied(factor):
    """As in loops that accumulate by hand: the row says so, or is told by scale=."""
    torch.manual_seed(0)
    network, criterion, found = Plain().net, nn.CrossEntropyLoss(), []
    for scale in (1.0, factor):
        with lnp_torch.shared(network) as step:
            loss = criterion(network(INPUTS), CLASSES) * factor
        found.append(step.backward(loss, CLASSES, criterion, scale=scale))
    assert any("pass scale=" in note for note in found[0].notes)
    assert not any("pass scale=" in note for note in found[1].notes)
    assert found[0].rate == pytest.approx(factor**2 * found[1].rate, rel=1e-4)
    assert found[1].loss == pytest.approx(float(criterion(network(INPUTS), CLASSES)), rel=1e-5)
    assert found[1].population is not None


class Counting(nn.Module):
    """A loss with a state."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, labels):
        self.calls += 1
        return F.cross_entropy(outputs, labels) * self.calls


def differentiating(outputs, labels):
    loss = F.cross_entropy(outputs, labels)
    return loss + torch.autograd.grad(loss, outputs, create_graph=True)[0].square().sum()


def writing(outputs, labels):
    return F.cross_entropy(outputs.mul_(2.0), labels)


def drawing(outputs, labels):
    return F.cross_entropy(outputs + torch.randn_like(outputs), labels)


@pytest.mark.parametrize("criterion", [Counting(), differentiating, writing, drawing])
def test_a_criterion_that_was_what_it_is_said_to_be(criterion):
    network = Plain().net
    with lnp_torch.shared(network) as step:
        loss = criterion(network(INPUTS), CLASSES)
    found = step.backward(loss, CLASSES, criterion)
    assert not any("the loss that is trained on" in note for note in found.notes)
    assert found.loss_terms == len(INPUTS)


@pytest.mark.parametrize("end", ["another step", "close", "with"])
def test_a_backward_pass_out_of_habit(end, told):
    network, tracker = Plain().net, lnp.Tracker(schedule=1)

    def habit(step):
        with tracker.shared(step, network):
            loss = F.cross_entropy(network(INPUTS), CLASSES)
        loss.backward()

    if end == "with":
        with tracker:
            habit(0)
    else:
        habit(0)
        assert told() == []
        habit(1) if end == "another step" else tracker.close()
    assert "its shared.backward() was never called" in told()[0]
