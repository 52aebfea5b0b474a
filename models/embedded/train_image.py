"""Trains `tandem-image` on pictures it draws: `python -m models.embedded.train_image`.

First the autoencoder, then text encoders and transformer on its latents. One thread at low priority, so that it can run
beside other work. Lengths are budgets of training time, as for the text models; checkpoints go to
`models/embedded/.train/`, and `--resume` goes on from the last ones, leaving out what is done.
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.embedded.evaluate_image import IMAGE
from models.embedded.image_autoencoder import (
    PEAK_RATE,
    autoencoder_images,
    autoencoder_loss,
    build_autoencoder,
    measure_scale,
)
from models.embedded.image_pipeline import build_pipeline, build_tokenizer, store
from models.embedded.image_trainer import DenoiserOptions, DenoiserTrainer
from models.embedded.paths import FOLDER
from models.embedded.training_budget import TrainingBudget

WORK = FOLDER / ".train"
SHIFT = 3.0
DEFAULTS = {
    "num_inference_steps": 12,
    "guidance_scale": 2.0,
    "width": 64,
    "height": 64,
    "sizes": [[64, 64], [48, 48], [96, 64], [64, 96], [96, 96]],
    "max_sequence_length": 1,
}
"""What suits the model, for a server to read; sizes are width and height in pixels."""


def train_autoencoder(autoencoder: Any, minutes: float, seed: int, checkpoint: Path, device: str) -> None:
    """The first stage; ends with the scale of the latents measured and a checkpoint."""
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    budget = TrainingBudget(minutes)
    for step in budget.steps("autoencoder"):
        images = autoencoder_images(random.Random(f"{seed}:{step}"), budget.share)
        with torch.autocast(device, torch.bfloat16):
            loss, shown = autoencoder_loss(autoencoder, images.to(device), budget.share)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * budget.rate
        optimiser.step()
        budget.show(step=step, **{name: f"{value:.4f}" for name, value in shown.items()})
    measure_scale(autoencoder, random.Random(seed))
    scale = {name: autoencoder.config[name] for name in ("shift_factor", "scaling_factor")}
    torch.save({"weights": autoencoder.state_dict(), "scale": scale}, checkpoint)


def load_autoencoder(autoencoder: Any, checkpoint: Path, device: str) -> None:
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    autoencoder.load_state_dict(state["weights"])
    autoencoder.register_to_config(**state["scale"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=60.0, help="budget of training time of the second stage")
    parser.add_argument("--autoencoder-minutes", type=float, default=15.0, help="and of the first")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument("--nice", type=int, default=10, help="lowers the priority of the process by this much")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(arguments.nice)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    WORK.mkdir(exist_ok=True)
    autoencoder = build_autoencoder().to(arguments.device)
    first, second = WORK / "tandem-image-autoencoder.pt", WORK / "tandem-image.pt"
    if arguments.resume and first.exists():
        load_autoencoder(autoencoder, first, arguments.device)
    else:
        train_autoencoder(autoencoder, arguments.autoencoder_minutes, arguments.seed, first, arguments.device)
    autoencoder.eval().requires_grad_(False)
    tokenizer = build_tokenizer()
    options = DenoiserOptions(minutes=arguments.minutes, device=arguments.device, seed=arguments.seed, shift=SHIFT)
    trainer = DenoiserTrainer(options, autoencoder, tokenizer, second)
    if arguments.resume and second.exists():
        trainer.load()
    trainer.run()
    store(build_pipeline(autoencoder, trainer.average, tokenizer, SHIFT), IMAGE)
    (IMAGE / "tandem.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    shutil.copy(FOLDER / "tandem-text" / "LICENSE", IMAGE / "LICENSE")


if __name__ == "__main__":
    main()
