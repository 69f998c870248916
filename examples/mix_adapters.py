"""Two preferences, an adapter for each, trained in a loop of our own; then both at once.

    python examples/mix_adapters.py

No Trainer here: `model(batch)` is the loss of packed pairs, and the rest is plain torch. Residual Q-functions add, so
adapters that were trained apart mix while text is generated. On two CPU cores this takes less than a minute; the model
is that of `fastqadapter demo`, SmolLM2-135M-Instruct, and once it is in the cache nothing is fetched.
"""

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import fastqadapter as fqa
from fastqadapter.demo.preference import preference_pairs
from fastqadapter.demo.smollm import demo_model_folder

# Preference "concise": the demo's pairs, short answers over wordy ones.
# Preference "friendly": the same short answers, with a greeting before them over without.
concise_rows = preference_pairs()[0][:64]
friendly_rows = []
for row in concise_rows:
    [answer] = row["chosen"]
    friendly = {"role": "assistant", "content": f"Dear friend, {answer['content']}"}
    friendly_rows.append({"prompt": row["prompt"], "chosen": [friendly], "rejected": [answer]})

# One frozen base, two adapters on it. In `shared` mode both read the base's K/V.
torch.manual_seed(0)
folder = str(demo_model_folder())
tokenizer = AutoTokenizer.from_pretrained(folder)
lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)
model = fqa.get_qadapter_model(folder, fqa.QAdapterConfig(), lora, adapter_name="concise")
model.add_adapter("friendly", lora)


def train(adapter: str, rows: list[dict]) -> None:
    """One epoch. Only the active adapter gets gradients: the base and the others stay as they are."""
    model.set_adapter(adapter)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    collate = fqa.PreferenceCollator(tokenizer, max_length=256)
    for batch in DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate):
        output = model(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = {name: values.mean().item() for name, values in output.metrics.items()}  # (pairs,) each
        accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
        print(f"{adapter}: loss {output.loss.item():.3f}, accuracy {accuracy:.2f}, margin {margin:.2f}")


train("concise", concise_rows)
train("friendly", friendly_rows)

# Any weights, per call; several adapters together still take one pass and one product with the LM head. (The model is
# small and has seen few pairs: on other questions, and with larger weights, mixtures come out rougher than this one.)
model.eval()
chat = [{"role": "user", "content": "What is gravity?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
for adapters in ({}, {"concise": 1.0}, {"friendly": 1.0}, {"concise": 1.0, "friendly": 1.0}):
    output = model.generate(
        **inputs, adapters=adapters, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{adapters or 'base'}\n  {' '.join(answer.split())}")
