"""What the preference loss reports of each pair."""

# The rows of the (8, B) matrix of metrics that every kernel writes.
METRICS = (
    "pref_loss", "chi2_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "q_values/mean", "values/mean",
)  # fmt: skip
