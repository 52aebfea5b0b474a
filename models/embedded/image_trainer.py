"""The second stage of `tandem-image`: text encoders and transformer learn the flow from noise to latents."""

import copy
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from models.embedded.captions import plain_prompt
from models.embedded.evaluate_image import generate, share_right
from models.embedded.image_pipeline import Denoiser, NullRows, build_pipeline
from models.embedded.image_rows import NULL_ROWS, TRAINED_SIZES, LatentPool, prompt_tokens, training_prompt
from models.embedded.pictures import combinations
from models.embedded.training_budget import TrainingBudget

# Legend: B pictures, C latent channels


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserOptions:
    """How the denoiser is trained."""

    minutes: float
    device: str = "cpu"
    seed: int = 0
    rows: int = 64
    """Pictures of 64 by 64 in one step; of larger ones fewer, of smaller ones more."""
    matrix_rate: float = 3e-3
    """Peak learning rate of Muon, scaled to the size of AdamW's updates."""
    other_rate: float = 2e-3
    shift: float = 3.0
    """Sigmas are uniform, then shifted towards noise, where colour, size and place are decided."""
    average: float = 0.995
    """The weights that are kept are a running average; after few steps over fewer of them."""
    checkpoint_every_s: float = 120.0
    watch_every_s: float = 480.0
    watch_steps: int = 12
    watch_guidance: float = 2.0


class DenoiserTrainer:
    """One run: float32 master weights, their average, and a copy in bfloat16 for forward and backward."""

    def __init__(self, options: DenoiserOptions, autoencoder: Any, tokenizer: CLIPTokenizer, checkpoint: Path) -> None:
        self.options = options
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.budget = TrainingBudget(options.minutes)
        torch.manual_seed(options.seed)
        self.master = Denoiser(len(tokenizer)).to(options.device)
        self.average = copy.deepcopy(self.master).eval()
        self.compute = copy.deepcopy(self.master).to(torch.bfloat16)
        self.null_rows = NullRows()
        self.compute.transformer.set_attn_processor(self.null_rows)
        matrices, others = _grouped(self.master)
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=options.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=options.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [options.matrix_rate, options.other_rate]
        self.pools = {size: LatentPool(autoencoder, *size) for size in TRAINED_SIZES}
        self.step = 0
        self.pictures = 0
        self.loss = math.nan

    def run(self) -> None:
        """Train until the budget is spent, with checkpoints and a look at held-out combinations now and then."""
        saved_s = watched_s = self.budget.spent_s
        for _ in self.budget.steps("denoiser"):
            self._step(random.Random(f"{self.options.seed}:{self.step}"))
            self.budget.show(step=self.step, loss=f"{self.loss:.4f}", pictures=self.pictures)
            if self.budget.spent_s - saved_s > self.options.checkpoint_every_s:
                saved_s = self.budget.spent_s
                self.save()
            if self.budget.spent_s - watched_s > self.options.watch_every_s:
                watched_s = self.budget.spent_s
                self._report()
        self.save()
        self._report()

    def save(self) -> None:
        """Checkpoint, replaced in one move, so that a kill never leaves half of one."""
        state: dict[str, Any] = {
            "master": self.master.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "spent_s": self.budget.spent_s,
            "step": self.step,
            "pictures": self.pictures,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.options.device, weights_only=True)
        self.master.load_state_dict(state["master"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.budget.spent_s, self.step, self.pictures = state["spent_s"], state["step"], state["pictures"]
        self._each(self.compute, lambda target, source: target.copy_(source))

    def _step(self, rng: random.Random) -> None:
        height, width = rng.choices(list(TRAINED_SIZES), list(TRAINED_SIZES.values()))[0]
        num_rows = round(self.options.rows * 64 * 64 / (height * width))
        latents, rows = self.pools[height, width].batch(num_rows, rng)
        tokens = prompt_tokens([training_prompt(row, rng) for row in rows], self.tokenizer)
        self.null_rows.count(rng.choices(list(NULL_ROWS), list(NULL_ROWS.values()))[0])
        loss = self._loss(latents.to(self.options.device), tokens.to(self.options.device))
        loss.backward()
        for target, source in zip(self.master.parameters(), self.compute.parameters(), strict=True):
            target.grad = None if source.grad is None else source.grad.float()
            source.grad = None
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.budget.rate
            optimiser.step()
        self.step += 1
        self.pictures += num_rows
        weight = max(1 - self.options.average, 1 / (1 + self.step / 4))
        self._each(self.average, lambda target, source: target.lerp_(source, weight))
        self._each(self.compute, lambda target, source: target.copy_(source))
        self.loss = loss.item() if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss.item()

    def _loss(self, latents_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
        """Squared error of the velocity, with sigmas spread evenly over the batch."""
        num_rows, device = latents_BCHW.shape[0], latents_BCHW.device
        uniform_B = (torch.randperm(num_rows, device=device) + torch.rand(num_rows, device=device)) / num_rows
        sigma_B = self.options.shift * uniform_B / (1 + (self.options.shift - 1) * uniform_B)
        noise = torch.randn_like(latents_BCHW)
        noisy = torch.lerp(latents_BCHW, noise, sigma_B[:, None, None, None])
        velocity = self.compute(noisy.to(torch.bfloat16), sigma_B, tokens_BT)
        return (velocity.float() - (noise - latents_BCHW)).square().mean()

    @torch.no_grad()
    def _each(self, model: nn.Module, change: Callable[[Tensor, Tensor], object]) -> None:
        for target, source in zip(model.parameters(), self.master.parameters(), strict=True):
            change(target, source)

    def _report(self) -> None:
        """Accuracy of the averaged weights through the stock pipeline."""
        pipeline = build_pipeline(self.autoencoder, self.average, self.tokenizer, self.options.shift)
        shares = []
        for split in ("held_out", "train"):
            asked = combinations(split)
            asked = asked[:: max(1, len(asked) // 21)]
            images = generate(
                pipeline,
                [plain_prompt(combination) for combination in asked],
                num_inference_steps=self.options.watch_steps,
                guidance_scale=self.options.watch_guidance,
            )
            shares.append(f"{split} {share_right(images, asked):.2f}")
        self.budget.say(
            f"step={self.step} pictures={self.pictures} spent_s={self.budget.spent_s:.0f} loss={self.loss:.4f}  "
            + "  ".join(shares)
        )
        sys.stdout.flush()


def _grouped(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the blocks, which Muon updates, and all else: embeddings, norms, biases, first and last layer."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = "transformer_blocks." in name or "encoder.layers." in name
        (matrices if parameter.ndim == 2 and in_block else others).append(parameter)
    return matrices, others
