"""The search: studies, tasks, the store, trials, Optuna, Ray, W&B, reports and exports."""
