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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from models.embedded.cases import ARITHMETIC, CASE_TASKS, Case, held_out_cases, is_correct
from models.embedded.chats import Message
from models.embedded.paths import EMBEDDED

# Legend: T positions, V vocabulary

MAX_NEW_TOKENS = 256


class Answerer:
    """A model folder that answers greedily, one conversation at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def prompt(self, messages: list[Message]) -> Tensor:
        """The ids of the chat template up to where the answer begins, (1, T)."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def continue_greedily(self, prompt: Tensor) -> Tensor:
        """The answer's ids, with the token that ended it, (T)."""
        with torch.no_grad():
            output = self.model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return output[0, prompt.shape[1] :]

    def answer(self, messages: list[Message]) -> str:
        answer_T = self.continue_greedily(self.prompt(messages))
        return str(self.tokenizer.decode(answer_T, skip_special_tokens=True))

    def choices(self, prompt: Tensor, answer_T: Tensor) -> Tensor:
        """The token this model would choose at every position of an answer somebody else gave, (T)."""
        with torch.no_grad():
            logits_TV = self.model(torch.cat([prompt, answer_T[None]], dim=1)).logits[0]
        return logits_TV[prompt.shape[1] - 1 : -1].argmax(-1)


def accuracy(model: Answerer, cases: list[Case]) -> float:
    """Share of cases answered right."""
    return sum(is_correct(model.answer(case.messages), case) for case in cases) / len(cases)


def agreement(draft: Answerer, model: Answerer, cases: list[Case]) -> float:
    """Share of the model's greedy tokens which the draft would have proposed."""
    agreed = total = 0
    for case in cases:
        prompt = model.prompt(case.messages)
        answer_T = model.continue_greedily(prompt)
        agreed += int((draft.choices(prompt, answer_T) == answer_T).sum())
        total += len(answer_T)
    return agreed / total


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
    shared = [case for task in CASE_TASKS for case in held_out_cases(task, arguments.cases // 4, arguments.seed)]
    draft, large = models["tandem-text-draft"], models["tandem-text"]
    figures["agreement"] = agreement(draft, large, shared)
    print(f"agreement of the draft: {figures['agreement']:.3f} of greedy tokens, {len(shared)} prompts")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
