"""Measures the embedded text models on held-out cases: `python -m models.embedded.evaluate_text`.

Greedy decoding through transformers, on the files as they ship. The agreement of the draft is the share of positions of
the large model's greedy answers at which the draft, given the same text so far, would have chosen the same token: what
speculative decoding would accept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from models.embedded.cases import ARITHMETIC, CASE_TASKS, Case, held_out_cases, is_correct
from models.embedded.paths import EMBEDDED

# Legend: B cases, T positions, V vocabulary

MAX_NEW_TOKENS = 256
CASES_PER_BATCH = 50


class Answerer:
    """A model folder that answers greedily, many conversations at once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def prompts(self, cases: list[Case]) -> BatchEncoding:
        """The chat template up to where each answer begins, padded on the left, (B, T)."""
        texts = [
            self.tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, tokenize=False)
            for case in cases
        ]
        return self.tokenizer(texts, return_tensors="pt", padding=True)

    def continue_greedily(self, prompts: BatchEncoding) -> Tensor:
        """The answers' ids with the token that ended each, padded on the right, (B, T)."""
        with torch.no_grad():
            output_BT = self.model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return output_BT[:, prompts["input_ids"].shape[1] :]

    def answers(self, cases: list[Case]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(cases), CASES_PER_BATCH):
            answers_BT = self.continue_greedily(self.prompts(cases[start : start + CASES_PER_BATCH]))
            texts += self.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
        return texts

    def choices(self, prompts: BatchEncoding, answers_BT: Tensor) -> Tensor:
        """The token this model would choose at every position of answers somebody else gave, (B, T)."""
        tokens_BT = torch.cat([prompts["input_ids"], answers_BT], dim=1)
        mask_BT = torch.cat([prompts["attention_mask"], torch.ones_like(answers_BT)], dim=1)
        with torch.no_grad():
            logits_BTV = self.model(tokens_BT, attention_mask=mask_BT).logits
        return logits_BTV[:, prompts["input_ids"].shape[1] - 1 : -1].argmax(-1)


def accuracy(model: Answerer, cases: list[Case]) -> float:
    """Share of cases answered right."""
    return sum(is_correct(answer, case) for answer, case in zip(model.answers(cases), cases, strict=True)) / len(cases)


def agreement(draft: Answerer, model: Answerer, cases: list[Case]) -> float:
    """Share of the model's greedy tokens which the draft would have proposed."""
    prompts = model.prompts(cases)
    answers_BT = model.continue_greedily(prompts)
    is_answer_BT = answers_BT != model.tokenizer.pad_token_id
    agreed_BT = (draft.choices(prompts, answers_BT) == answers_BT) & is_answer_BT
    return int(agreed_BT.sum()) / int(is_answer_BT.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="cases per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    models = {name: Answerer(folder) for name, folder in EMBEDDED.items()}
    figures: dict[str, Any] = {"cases": arguments.cases, "accuracy": {}}
    for name, model in models.items():
        size = sum(file.stat().st_size for file in EMBEDDED[name].iterdir())
        print(f"{name}: num_parameters={model.num_parameters} size_bytes={size}")
        shares = {}
        for task in tqdm(CASE_TASKS, desc=name):
            shares[task] = accuracy(model, held_out_cases(task, arguments.cases, arguments.seed))
            tqdm.write(f"{name}: {task} {shares[task]:.3f}")
        figures["accuracy"][name] = shares
        print(f"{name}: arithmetic {sum(shares[task] for task in ARITHMETIC) / len(ARITHMETIC):.3f}")
    short = [task for task in CASE_TASKS if task != "distant_recall"]  # all in one batch, so as long as the longest
    shared = [case for task in short for case in held_out_cases(task, arguments.cases // 4, arguments.seed)]
    figures["agreement"] = agreement(models["tandem-text-draft"], models["tandem-text"], shared)
    print(f"agreement of the draft: {figures['agreement']:.3f} of greedy tokens, {len(shared)} prompts")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
