"""One training run of one method, in a process of its own: `python methods.py RUN_FOLDER` reads `run.json` there.

All methods train LoRA of the same rank on the same layers, on the same pairs, for as many optimizer steps of as many
pairs. Ours by `QAdapterTrainer`; SFT and DPO by TRL's own trainers (https://huggingface.co/docs/trl). What comes out is
always a Q-Adapter folder: a plain LoRA adapter is one whose head is `logits` and whose `alpha_0` is 0.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import fastqadapter as fqa
from fastqadapter.config import write_sidecar
from fastqadapter.data import read_rows, tokenize_rows
from fastqadapter.models.base import fingerprint
from fastqadapter.rows import longest_branch

Method = Literal["q-adapter", "published", "dpo", "sft"]
Row = Mapping[str, Any]

# Of shared mode, which may not adapt k and v: the same layers for all.
TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAIRS_PER_STEP = 8
MICRO_BATCH = 8 if torch.cuda.is_available() else 2  # of TRL's padded batches; ours are packed and take all 8
RUN, TRAINED, ADAPTER = "run.json", "trained.json", "adapter"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides what is trained."""

    method: Method
    model: str
    train_pairs: str
    seed: int = 0
    epochs: float = 2.0
    learning_rate: float = 1e-3
    rank: int = 8
    pairs: int = 480
    longest: int = 256  # tokens of prompt + response
    beta: float | None = None  # of DPO, or of the regulariser on r^2
    kv_mode: str = "shared"
    q_head: str = "difference"
    divisor: str = "8"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is not one of {', '.join(get_args(Method))}")


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train and save the adapter; returns seconds of training and peak memory of the process."""
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto")
    rows = short_rows(read_rows(run.train_pairs), tokenizer, run)
    trainer = TRAINERS[run.method](run, model, tokenizer, rows, folder)
    started = time.perf_counter()
    trainer.train()
    found = {"seconds": time.perf_counter() - started, "peak_mib": peak_mib()}
    trainer.save_model(str(folder / ADAPTER))
    if run.method in ("dpo", "sft"):
        plain = fqa.QAdapterConfig(kv_mode="separate", q_head="logits", alpha_0=0.0)
        write_sidecar(
            folder / ADAPTER, plain, fingerprint(AutoModelForCausalLM.from_pretrained(run.model, dtype="auto"))
        )
    found |= {"steps": trainer.state.global_step, "pairs": len(rows)}
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {**found, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}


def peak_mib() -> float:
    """Of the process, or of the GPU's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def short_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, run: Run) -> list[Row]:
    """The first pairs of which both branches are short enough as they are."""
    found = []
    for row in rows:
        [ids] = tokenize_rows([row], tokenizer, max_length=None, progress=False)
        if longest_branch(ids) <= run.longest:
            found.append(row)
        if len(found) == run.pairs:
            break
    return found


def _common(run: Run, folder: Path, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": run.epochs,
        "learning_rate": run.learning_rate,
        "warmup_steps": 5,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": PAIRS_PER_STEP // batch_size,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": run.seed,
    }


def _lora(run: Run) -> LoraConfig:
    return LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules=list(TARGETS), task_type=TaskType.CAUSAL_LM)


def _q_adapter(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], folder: Path
) -> Any:
    if run.method == "published":
        config = fqa.QAdapterConfig(preset="reference", kv_mode="separate")
    else:
        beta = {} if run.beta is None else {"beta": run.beta}
        config = fqa.QAdapterConfig(kv_mode=run.kv_mode, q_head=run.q_head, divisor=run.divisor, **beta)
    return fqa.QAdapterTrainer(
        model=model,
        args=fqa.QAdapterTrainingArguments(**_common(run, folder, PAIRS_PER_STEP)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=_lora(run),
        qadapter_config=config,
    )


def _dpo(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    beta = {} if run.beta is None else {"beta": run.beta}
    return DPOTrainer(
        model=model,
        args=DPOConfig(**_common(run, folder, MICRO_BATCH), **_trl(), **beta),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=tokenizer,
        peft_config=_lora(run),
    )


def _sft(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**_common(run, folder, MICRO_BATCH), **_trl()),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=_lora(run),
    )


def _trl() -> dict[str, Any]:
    return {"bf16": False, "gradient_checkpointing": False, "max_length": 1024}


TRAINERS = {"q-adapter": _q_adapter, "published": _q_adapter, "dpo": _dpo, "sft": _sft}


def main() -> None:
    folder = Path(sys.argv[1])
    run = Run(**json.loads((folder / RUN).read_text(encoding="utf-8")))
    result = train(run, folder)
    part = folder / f"{TRAINED}.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / TRAINED)


if __name__ == "__main__":
    main()
