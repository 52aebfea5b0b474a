"""Trains `tandem-text` and `tandem-text-draft` on conversations it generates: `python -m models.embedded.train_text`.

One thread at low priority, so that it can run beside other work. The length is a budget of processor time, not of
steps: the learning rate follows the share of the budget that is spent, so a run always ends with a finished schedule,
and being stopped or slowed by something else costs nothing of it.
Checkpoints go to `models/embedded/.train/`; `--resume` goes on from the last one. Matrices are updated by Muon (Jordan
et al., 2024), embeddings and norms by AdamW.
"""

import argparse
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.embedded.bpe import PAD, train_tokenizer, write_tokenizer
from models.embedded.cases import CASE_TASKS, held_out_cases
from models.embedded.chats import training_chat
from models.embedded.decoder import SHAPES, UNFUSED_UP_TO, Decoder, read_decoder, write_checkpoint
from models.embedded.paths import FOLDER
from models.embedded.rows import Batch, RowMaker, batches, training_batches

WORK = FOLDER / ".train"
TOKENIZER_CHATS = 20_000
WATCHED = [task for task in CASE_TASKS if task not in ("story", "distant_recall")]
"""Of a story many are right, and a long prompt takes as long as a hundred short ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """How one model is trained."""

    model: str
    minutes: float
    device: str = "cpu"
    seed: int = 0
    matrix_rate: float = 4e-3
    """Peak learning rate of Muon, scaled to the size of AdamW's updates."""
    other_rate: float = 4e-3
    rate: float = 1.0
    """Scales both peaks; a restart from trained weights wants less than a first run."""
    weight_decay: float = 0.02
    tokens_per_batch: int = 2048
    """Padded positions in one forward pass."""
    batches_per_step: int = 2
    """Rows of one batch are alike in length, so a step sums the gradients of several."""
    warmup: float = 0.02
    """Share of the budget in which the rate rises."""
    checkpoint_every_s: float = 60.0
    watch_every_s: float = 240.0


class Trainer:
    """One run: float32 master weights, a copy in the compute dtype for forward and backward, and the two optimisers."""

    def __init__(self, options: TrainingOptions, rows: RowMaker) -> None:
        self.options = options
        self.rows = rows
        torch.manual_seed(options.seed)
        self.master = Decoder(SHAPES[options.model]).to(options.device)
        self.compute = Decoder(SHAPES[options.model]).to(options.device, torch.bfloat16)
        named = list(self.master.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=options.matrix_rate,
                weight_decay=options.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=options.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [options.rate * options.matrix_rate, options.rate * options.other_rate]
        # Fuses norms, rotations and softmax. One graph for all usual shapes; a single or a long row would need another.
        self._compiled = torch.compile(self._loss, dynamic=True)
        self.spent_s = 0.0
        self.step = 0
        self.tokens = 0
        self.loss = math.nan
        self._load_compute()

    @property
    def share(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent_s / (60 * self.options.minutes))

    def run(self) -> None:
        """Train until the budget is spent, with checkpoints and a look at held-out cases now and then."""
        rng = random.Random(f"{self.options.seed}:{self.step}")
        stream = training_batches(self.rows, rng, self.options.tokens_per_batch, self.options.device)
        saved_s = watched_s = self.spent_s
        bar = tqdm(total=round(60 * self.options.minutes), initial=round(self.spent_s), unit="s", mininterval=5)
        while self.share < 1.0:
            started = time.process_time()
            parts = [next(stream) for _ in range(self.options.batches_per_step)]
            self._step(parts)
            self.tokens += sum(part.tokens_BT.numel() for part in parts)
            self.spent_s += time.process_time() - started
            bar.update(min(round(self.spent_s), bar.total) - bar.n)
            bar.set_postfix(
                step=self.step, loss=f"{self.loss:.4f}", tps=f"{self.tokens / self.spent_s:.0f}", refresh=False
            )
            if self.spent_s - saved_s > self.options.checkpoint_every_s:
                saved_s = self.spent_s
                self.save()
            if self.spent_s - watched_s > self.options.watch_every_s:
                watched_s = self.spent_s
                self._report(bar)
        self._report(bar)
        bar.close()
        self.save()

    def save(self) -> None:
        """Checkpoint, replaced in one move, so that a kill never leaves half of one."""
        WORK.mkdir(exist_ok=True)
        state: dict[str, Any] = {
            "master": self.master.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "spent_s": self.spent_s,
            "step": self.step,
            "tokens": self.tokens,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.options.device, weights_only=True)
        self.master.load_state_dict(state["master"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.spent_s, self.step, self.tokens = state["spent_s"], state["step"], state["tokens"]
        self._load_compute()

    def start_from(self, folder: Path) -> None:
        """Begin with finished weights, a fresh schedule and fresh optimisers."""
        self.master.load_state_dict(read_decoder(folder).state_dict())
        self._load_compute()

    @property
    def checkpoint(self) -> Path:
        return WORK / f"{self.options.model}.pt"

    def exact_share(self, task: str, n: int = 40) -> float:
        """Share of held-out answers whose every token is the likeliest: those greedy decoding gets word for word."""
        rows = [self.rows.row(case.chat, only_last=True) for case in held_out_cases(task, n, seed=1)]
        wrong = 0
        with torch.no_grad():
            for row in rows:
                (batch,) = batches([row], self.rows.special[PAD], self.options.tokens_per_batch, self.options.device)
                logits_SV = self.compute(batch.tokens_BT, batch.positions_S)
                wrong += int((logits_SV.argmax(-1) != batch.targets_S).any())
        return 1 - wrong / n

    def _step(self, parts: list[Batch]) -> None:
        total = sum(float(part.weights_S.sum()) for part in parts)
        loss_sum = 0.0
        for part in parts:
            usual = part.tokens_BT.shape[0] > 1 and part.tokens_BT.shape[1] <= UNFUSED_UP_TO
            loss_of = self._compiled if usual else self._loss
            loss = loss_of(part.tokens_BT, part.positions_S, part.targets_S, part.weights_S) / total
            loss.backward()
            loss_sum += loss.item()
            for target, source in zip(self.master.parameters(), self.compute.parameters(), strict=True):
                assert source.grad is not None
                target.grad = source.grad.float() if target.grad is None else target.grad.add_(source.grad)
                source.grad = None
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * self._rate()
            optimiser.step()
        self.master.zero_grad(set_to_none=True)
        self._load_compute()
        self.step += 1
        self.loss = loss_sum if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss_sum

    def _loss(self, tokens_BT: Tensor, positions_S: Tensor, targets_S: Tensor, weights_S: Tensor) -> Tensor:
        logits_SV = self.compute(tokens_BT, positions_S).float()
        return (F.cross_entropy(logits_SV, targets_S, reduction="none") * weights_S).sum()

    def _rate(self) -> float:
        """Warm-up, then a cosine from 1 to 1 %, over the share of the budget."""
        if self.share < self.options.warmup:
            return max(0.02, self.share / self.options.warmup)
        progress = (self.share - self.options.warmup) / (1 - self.options.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    def _load_compute(self) -> None:
        with torch.no_grad():
            for target, source in zip(self.compute.parameters(), self.master.parameters(), strict=True):
                target.copy_(source)

    def _report(self, bar: "tqdm[Any]") -> None:
        shares = "  ".join(f"{task} {self.exact_share(task):.2f}" for task in WATCHED)
        bar.write(f"step={self.step} tokens={self.tokens} spent_s={self.spent_s:.0f} loss={self.loss:.4f}  {shares}")
        sys.stdout.flush()


def prepare_tokenizer() -> None:
    """Learn the tokenizer once; both models get the same files."""
    source = FOLDER / "tandem-text"
    if not (source / "tokenizer.json").exists():
        rng = random.Random(0)
        texts = [message["content"] for _ in range(TOKENIZER_CHATS) for message in training_chat(rng).messages]
        roles = ["system user assistant"] * (TOKENIZER_CHATS // 10)
        write_tokenizer(train_tokenizer(texts + roles), source)
    (FOLDER / "tandem-text-draft").mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (FOLDER / "tandem-text-draft" / file).write_bytes((source / file).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tandem-text")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=60.0, help="budget of processor time")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="begin with the weights of a model folder")
    parser.add_argument("--rate", type=float, default=1.0, help="scales the peak learning rates")
    parser.add_argument("--nice", type=int, default=10, help="lowers the priority of the process by this much")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(arguments.nice)
    torch.set_num_threads(1)

    prepare_tokenizer()
    rows = RowMaker.from_folder(FOLDER / arguments.model)
    options = TrainingOptions(
        model=arguments.model,
        minutes=arguments.minutes,
        device=arguments.device,
        seed=arguments.seed,
        rate=arguments.rate,
    )
    trainer = Trainer(options, rows)
    if arguments.start_from:
        trainer.start_from(arguments.start_from)
    if arguments.resume:
        trainer.load()
    trainer.run()
    write_checkpoint(FOLDER / options.model, SHAPES[options.model], trainer.master.state_dict(), rows.special)


if __name__ == "__main__":
    main()
