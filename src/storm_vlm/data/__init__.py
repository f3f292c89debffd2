"""Rows, clips, prompts and batches: everything between a JSONL file and the model's inputs."""
