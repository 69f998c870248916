"""The model card, README.md, that is saved beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from fastqadapter.config import QAdapterConfig

TEMPLATE = """---
{data}
---

# A Q-Adapter for {base}

A LoRA adapter that is the *residual Q-function* of a preference
([Q-Adapter](https://arxiv.org/abs/2407.03856)). By itself it is no language model: sampling combines it with the base,
whose weights stay as they are, as `softmax((q + alpha_0 log pi) / alpha_tilde)`.

## Use

```bash
pip install fastqadapter
```

In this folder (from elsewhere, give its path or hub id in place of `{adapter!r}`):

```python
import fastqadapter as fqa
from transformers import AutoTokenizer

base = {base!r}
model = fqa.QAdapterModel.from_pretrained(base, {adapter!r})
tokenizer = AutoTokenizer.from_pretrained(base)
inputs = tokenizer("The best way to learn is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`generate` takes the dials `alpha_0`, `alpha_tilde` and `adapters={{"default": weight}}` for each call; weight 0
with equal alphas is the base model. Loaded by PEFT alone the files give another function, without dials.

## Trained with

{settings}
"""
BEGIN, END = "<!-- settings -->", "<!-- end of settings -->"  # between these it is written anew with each save


def write_card(folder: Path, adapter: str, base: str, config: QAdapterConfig, lora: LoraConfig) -> None:
    """Write `README.md`; of one that is there, metadata and settings alone are brought up to date.

    Args:
        folder: where it goes.
        adapter: the adapter's folder, seen from there.
        base: folder or hub id of the base model.
        config: of the Q-Adapter.
        lora: of its weights.
    """
    path = folder / "README.md"
    data = ModelCardData(
        base_model=base,
        library_name="fastqadapter",
        pipeline_tag="text-generation",
        tags=["q-adapter", "lora", "peft", "preference-learning"],
    )
    settings = _table({**config.to_dict(), **_lora_settings(lora)})
    if path.exists():
        card = ModelCard.load(path)
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if begin and end:
            card.text = before + settings + after
        for name, value in data.to_dict().items():
            setattr(card.data, name, value)
    else:
        card = ModelCard(TEMPLATE.format(data=data, base=base, adapter=adapter, settings=settings))
    card.save(path)


def _lora_settings(lora: LoraConfig) -> dict[str, Any]:
    targets = lora.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    return {"LoRA rank": lora.r, "LoRA alpha": lora.lora_alpha, "LoRA targets": names}


def _table(settings: dict[str, Any]) -> str:
    cells = {name: str(value).replace("|", r"\|") for name, value in settings.items()}  # a regular expression has some
    rows = [BEGIN, "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells.items()), "", END]
    return "\n".join(rows)
