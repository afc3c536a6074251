"""What each column of candidates.csv, of the leaderboard and of the report means: shown by --help and on hovering.

This module must not import torch, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS: Mapping[str, str] = {
    "candidate": "a training and one setting of the knobs that need no training; what stands before the dash names the "
    "training",
    "fit": "the key of the training's result in the store",
    "defense": "the defense that was trained",
    "task": "the data set, and the classifier that is protected",
    "threat": "what the attacker knows: oblivious (not the defense), black-box (only answers), white-box (everything)",
    "norm": "the norm in which an attack may change an image",
    "eps": "how far an attack may change it, pixels in [0, 1]",
    "attacked_accuracy": "share of the images that stay accepted and right under every attack of the search's threat "
    "model",
    "attacked_error": "share of the images of which some attacked version is accepted and wrong; a search minimises it",
    "attacked_rejection": "the remaining images: rejected, which never counts as accuracy",
    "oblivious_accuracy": "accuracy under attack where the attacker does not know the defense",
    "black_box_accuracy": "accuracy under attack where the attacker sees only the model's answers",
    "white_box_accuracy": "accuracy under attack where the attacker knows all of the defense",
    "worst_draw_accuracy": "attacked accuracy in the worst draw of a defense's noise (--noise known)",
    "known_noise_accuracy": "white-box accuracy where the attacker also knows the noise of one draw (--noise known)",
    "clean_accuracy": "accuracy without an attack",
    "clean_rejection": "share of the images without an attack that are rejected",
    "latency_ms_p50": "purification latency: the median time for a batch of 128 minus the bare classifier's, "
    "milliseconds",
    "latency_ms_p95": "the same, which 95 % of the batches keep to",
    "latency_images": "which images took longer, clean or attacked: the latency is theirs",
    "device": "where the latency was measured",
    "alarms": "the quick audit checks that failed: the accuracy is not to be believed",
    "state": "how the training ended",
    "queries": "how often the black-box attacker asked",
}
"""The knobs, and `KNOWLEDGE/ATTACK` (accuracy after this attack), are further columns of candidates.csv."""
HEADINGS: Mapping[str, str] = {
    "attacked_accuracy": "attacked %",
    "attacked_error": "error %",
    "attacked_rejection": "rejected %",
    "clean_rejection": "clean rejected %",
    "oblivious_accuracy": "oblivious %",
    "white_box_accuracy": "white-box %",
    "worst_draw_accuracy": "worst draw %",
    "known_noise_accuracy": "known noise %",
    "clean_accuracy": "clean %",
    "latency_ms_p50": "p50 ms",
    "latency_images": "ms on",
    "device": "timed on",
}
"""What the leaderboard calls some of them."""
FURTHER: Mapping[str, str] = {
    "interval": "where the accuracy of all such images lies with 95 % certainty (Wilson); it does not cover the choice "
    "of the best",
    "remeasured": "the latency, measured again when no training ran any more",
    "quick_score": "accuracy under a small attack on few images after each epoch, for early stopping; no result",
    "final_score": "one minus the attacked error, by all attacks of the search",
    "epochs": "epochs that were trained",
    "seconds": "from the start of the training to the last score of its candidates",
}
"""Further columns of the report."""
EXPLAINED: Mapping[str, str] = {
    **{f"{name} ({HEADINGS[name]})" if name in HEADINGS else name: meaning for name, meaning in COLUMNS.items()},
    "95 %": FURTHER["interval"],
}
"""What --help shows, each with its heading in the leaderboard in brackets."""
