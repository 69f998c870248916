"""Q-Adapters in EleutherAI's lm-evaluation-harness: its model `qadapter` is the customised policy.

`lm-eval --model qadapter --model_args adapter=FOLDER,alpha_0=0.8 --tasks ...` where lm-eval finds models by the entry
point group `lm_eval.models`, `python -m fastqadapter.lm_eval` with the same options where it does not yet. In Python:
`fastqadapter.lm_eval.model.QAdapterLM`. Written against lm-eval 0.4.13; docs/evaluation.md has the commands.
"""
