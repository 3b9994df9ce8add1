"""Every metric by its name, for people: docs/reference/metrics.md is made from it, and a test holds
the names equal to those that evaluations and trainings record."""

from __future__ import annotations

METRICS = {
    "ndcg@K": "1 where the right item is first, falling with the logarithm of its place, 0 below place K. Of several "
    "targets: their sum, divided by that of the best possible order.",
    "hr@K": "Share of questions with a target among the first K.",
    "recall@K": "Share of a question's targets that are among the first K (divided by K where there are more).",
    "mrr@K": "One over the place of the first hit; 0 below place K.",
    "first_item_hr@K": "Only for next sessions: whether the very first item of the session is among the first K.",
    "coverage@K": "Share of the vocabulary that is in any user's first K.",
    "popularity@K": "Of what is listed: the mean share of training events that belong to less popular items. 0.5: items "
    "are listed as often as they are chosen. 1: only the most popular one is listed.",
    "test_loss": "Mean cross-entropy of the targets over the whole catalogue, in nats. Only of models whose scores "
    "are logits.",
}
PREFIXES = {
    "first_": "Of targets that open a session.",
    "inside_": "Of targets inside a session.",
    "born_that_night_": "Of `--split nightly`: items first seen in the night itself.",
    "born_in_7_days_": "Items first seen in the seven days before it.",
    "older_": "Items first seen earlier.",
    "sampled_random_": "The target among drawn items, all alike. For comparison with papers only; nothing is decided by it.",
    "sampled_popular_": "The same, drawn by their number of training events.",
    "recipe_": "Of a refit (as tags): the scores of its recipe.",
}
RUN = {
    "num_params": "Parameters of the model.",
    "num_params_added": "Of these, what the encodings add to the backbone.",
    "params_added_pct": "The same in percent of the backbone's.",
    "epochs": "Epochs that were trained.",
    "best_epoch": "The epoch whose weights were kept.",
    "seconds": "Seconds of the whole command.",
    "train_s": "Seconds of training.",
    "eval_s": "Seconds of the evaluation.",
    "events_per_second": "Events trained on, a second.",
    "peak_rss_mb": "Peak memory of the process, in MB.",
    "unseen_share": "Share of targets that the model cannot know; they count as missed.",
    "validation_ndcg@10_best": "NDCG@10 of the best epoch on the validation period.",
}
CURVES = {
    "loss": "Training loss.",
    "validation_ndcg@10": "NDCG@10 on the validation period.",
    "epoch_s": "Seconds of the epoch.",
    "again_loss": 'With `train_until = "test"`: the loss of the second training.',
    "again_epoch_s": "Its seconds an epoch.",
}
