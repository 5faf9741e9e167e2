"""A Hugging Face Trainer: a small vision transformer learns handwritten digits, with label smoothing and accumulation.

pip install '.[transformers,plot]' scikit-learn
python docs/examples/huggingface_trainer.py [folder] [steps]
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import lnp
import lnp.plot
from lnp_torch.transformers import attach


def main(folder: Path, steps: int) -> lnp.Tracker:
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float().reshape(-1, 1, 8, 8)
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3,
        gradient_accumulation_steps=2, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(ViTForImageClassification(config), arguments, train_dataset=data)

    def by_block(name):
        return ".".join(name.split(".")[:4]) if "layer" in name else name.split(".")[0]

    schedule = lnp.schedule.log_windows(4, last=steps - 1)
    tracker = attach(trainer, folder / "huggingface.jsonl", schedule, log=False, by_layer=by_block, rtol=0.1)
    trainer.train()
    lnp.plot.dashboard(tracker, "Hugging Face Trainer").savefig(folder / "huggingface.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 300)
