"""Train a Q-Adapter on a few preference pairs, then turn its dials.

    python examples/train_and_generate.py

On two CPU cores this takes less than a minute. The model is that of `fastqadapter demo`, SmolLM2-135M-Instruct: once it
is in the cache, nothing is fetched. The preference is for concise answers.
"""

from tempfile import TemporaryDirectory

from transformers import AutoTokenizer

import fastqadapter as fqa
from fastqadapter.demo.preference import preference_pairs
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.progress import show_metric_lines

# 1. Data: rows with `prompt`, `chosen` and `rejected`, here as lists of messages.
train_rows, heldout_rows = preference_pairs()
train_rows, heldout_rows = train_rows[:80], heldout_rows[:16]

# 2. A frozen base model with a new adapter on it, in the default mode: `shared`, one K/V cache for both.
folder = str(demo_model_folder())
tokenizer = AutoTokenizer.from_pretrained(folder)
model = fqa.get_qadapter_model(folder)

# 3. Training: a transformers Trainer. An untrained adapter is the base model, so held-out accuracy starts at chance.
with TemporaryDirectory() as output_dir:
    args = fqa.QAdapterTrainingArguments(
        output_dir,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
    )
    trainer = fqa.QAdapterTrainer(
        model, args=args, train_dataset=train_rows, eval_dataset=heldout_rows, processing_class=tokenizer
    )
    show_metric_lines(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
for name in ("rewards/accuracies", "rewards/margins"):
    print(f"held-out {name}: {before[f'eval_{name}']:.2f} before, {after[f'eval_{name}']:.2f} after training")

# 4. Generation from softmax((w q + alpha_0 log pi) / alpha_tilde). No dial needs training; here weight 0 is the base.
model.eval()
chat = [{"role": "user", "content": "What is a rainbow?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
for dials in (
    {"adapters": {"default": 0.0}},
    {"adapters": {"default": 1.0}},
    {"adapters": {"default": 2.0}},
    {"adapters": {"default": 1.0}, "alpha_0": 0.5},
):
    output = model.generate(**inputs, **dials, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{dials}\n  {' '.join(answer.split())}")
